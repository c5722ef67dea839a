"""Holdfast: five DVC stages around a resumable PyTorch training loop."""
