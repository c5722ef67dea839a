"""Rows to padded batches, and the order-preserving loader around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

Batch = dict[str, torch.Tensor]
"""The model's inputs, int64 (rows, longest row), and `labels`, int64 (rows,)."""


class _Rows(Iterable[list[int]]):
    """A batch sampler that can be iterated again, as DataLoader's workers need."""

    def __init__(self, rows: Iterable[list[int]]) -> None:
        self._rows = rows

    def __iter__(self) -> Any:
        return iter(self._rows)


def make_loader(
    split: datasets.Dataset,
    rows: Iterable[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    num_workers: int,
    worker_init_fn: Callable[[int], None] | None = None,
) -> DataLoader[Batch]:
    """Batches of `split`, in the order of `rows` (one list of positions a batch), each padded to its longest row.

    The loader draws from a generator of its own, so iterating it moves no other random state.
    """
    return DataLoader(
        split,
        batch_sampler=_Rows(rows),
        collate_fn=DataCollatorWithPadding(tokenizer),
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=worker_init_fn,
        generator=torch.Generator(),
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch; asynchronously where its memory is pinned."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
