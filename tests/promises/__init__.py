"""What Holdfast promises, whole: kills, configurations, several processes, the pipeline, identity, the house."""
