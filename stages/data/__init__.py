"""Raw files to model inputs, every row checked: for tokenize alone."""
