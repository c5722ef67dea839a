"""A model's predictions on a split, and their scores: for train, evaluate and select_best alike."""
