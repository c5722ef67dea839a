"""Rows to batches, and the order-preserving loader around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import datasets
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

Batch = dict[str, torch.Tensor]
"""The model's inputs, int64 (rows, longest row) or `features`, float32 (rows, columns); and `labels` where there are
any: int64 (rows,), in multi_label float32 (rows, classes), in regression float32 (rows,).
"""


class _Rows(Iterable[list[int]]):
    """A batch sampler that can be iterated again, as DataLoader's workers need."""

    def __init__(self, rows: Iterable[list[int]]) -> None:
        self._rows = rows

    def __iter__(self) -> Any:
        return iter(self._rows)


class _FeatureBatches(Dataset[Batch]):
    """A split of features whose item is a batch: Arrow columns become tensors whole, not cell by cell."""

    def __init__(self, split: datasets.Dataset) -> None:
        self._split = split.with_format("arrow")

    def __getitems__(self, rows: list[int]) -> Batch:
        table = self._split[rows]
        return {name: _tensor(table[name].combine_chunks()) for name in table.column_names}


def _tensor(cells: pa.Array) -> torch.Tensor:
    # Copied: Arrow's memory is read-only.
    if pa.types.is_fixed_size_list(cells.type):
        return torch.tensor(cells.flatten().to_numpy().reshape(len(cells), -1))
    return torch.tensor(cells.to_numpy())


def _as_is(batch: Any) -> Any:
    return batch


def make_loader(
    split: datasets.Dataset,
    rows: Iterable[list[int]],
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
    num_workers: int,
    worker_init_fn: Callable[[int], None] | None = None,
) -> DataLoader[Batch]:
    """Batches of `split`, in the order of `rows` (one list of positions a batch), each padded to its longest row
    by `tokenizer`; None where the inputs are features.

    The loader draws from a generator of its own, so iterating it moves no other random state.
    """
    return DataLoader(
        _FeatureBatches(split) if tokenizer is None else split,
        batch_sampler=_Rows(rows),
        collate_fn=_as_is if tokenizer is None else DataCollatorWithPadding(tokenizer),
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=worker_init_fn,
        generator=torch.Generator(),
    )
