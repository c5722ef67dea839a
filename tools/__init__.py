"""Commands for whoever works on Holdfast: see Makefile."""
