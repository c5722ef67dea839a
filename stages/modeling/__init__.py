"""A model built, called, measured and placed: heads, losses, precision, devices, processes."""
