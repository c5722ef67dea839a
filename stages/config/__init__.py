"""params.yaml and dvc.yaml: which parameters exist, what they decide, what contradicts what, what they name."""
