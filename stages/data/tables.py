"""Datasets a batch at a time, as Arrow tables: read through, and mapped to new ones on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import pyarrow as pa

# What is in memory at a time: so many rows, or fewer if they are wide.
BATCH_ROWS = 10_000
BATCH_CELLS = 1_000_000


def batch_rows(columns: int) -> int:
    """How many rows of so many columns to read at a time."""
    return min(BATCH_ROWS, BATCH_CELLS // columns + 1)


def batches(dataset: datasets.Dataset, columns: Sequence[str]) -> Iterator[pa.Table]:
    """`columns` of `dataset`, as many rows at a time as `batch_rows` says."""
    yield from dataset.select_columns(list(columns)).with_format("arrow").iter(batch_rows(len(columns)))


def map_tables(
    dataset: datasets.Dataset,
    function: Callable[[pa.Table, int], pa.Table],
    features: datasets.Features,
    cache: Path,
    what: str,
) -> datasets.Dataset:
    """What `function` makes of each batch, given the position of its first row; kept in the file `cache`."""

    def positioned(table: pa.Table, positions: list[int]) -> pa.Table:
        return function(table, positions[0])

    # Without a fingerprint of our own, datasets would pickle `function` to hash it; there is no cache to look up.
    return (
        dataset.with_format("arrow")
        .map(
            positioned,
            batched=True,
            batch_size=batch_rows(len(dataset.column_names)),
            with_indices=True,
            features=features,
            cache_file_name=str(cache),
            load_from_cache_file=False,
            new_fingerprint="0" * 16,
            desc=what,
        )
        .with_format(None)
    )
