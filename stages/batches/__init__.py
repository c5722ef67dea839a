"""What tokenize left, and in which order it is run: rows, the plan, padding, seeds."""
