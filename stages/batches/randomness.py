"""Randomness as a function of where the run is, so that resuming needs no replay."""

from __future__ import annotations

import random

import numpy
import torch

from stages.batches.permutation import hash_numbers

# Stands for a step's number, which count from 1, where batches are evaluated.
EVALUATION = 0
# Stands for a micro-batch's number where callbacks draw, after the last one.
AFTER_BACKWARD = 2**31


def seed_all(seed: int, step: int, micro_batch: int) -> None:
    """Seed Python, NumPy and torch (every device) for one forward pass.

    The stream depends on (seed, optimizer step, micro-batch) alone: not on what ran before, nor on which process
    runs it.
    """
    value = hash_numbers(seed, step, micro_batch)
    random.seed(value)
    numpy.random.seed(value % 2**32)
    torch.manual_seed(value % 2**63)
