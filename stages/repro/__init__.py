"""`python -m stages repro`: mends what a killed DVC left, is DVC's parent, and tells a scheduler how it ended."""
