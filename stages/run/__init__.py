"""What survives a kill of train: state, checkpoints, candidates, histories, saving and going on."""
