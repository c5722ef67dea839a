"""What metrics/data.json says: counts, lengths, and rows that occur in more than one split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt

from stages.batches.tokenized import lengths
from stages.data.columns import Columns
from stages.data.labels import count_labels
from stages.data.numbers import Moments
from stages.data.tables import batches

PERCENTILES = (50, 90, 99)


def length_summary(tokens: npt.NDArray[np.int32]) -> dict[str, int]:
    """p50, p90, p99 and max of the token counts; each is the length of some row."""
    found = np.percentile(tokens, PERCENTILES, method="inverted_cdf")
    return {**{f"p{p}": int(n) for p, n in zip(PERCENTILES, found, strict=True)}, "max": int(tokens.max())}


def split_summary(
    inputs: datasets.Dataset, raw: datasets.Dataset, columns: Columns, names: list[str], truncated: int | None
) -> dict[str, Any]:
    """One split's entry; `labels` is empty for an unlabelled split, `truncated` None for features."""
    labels: dict[str, Any] = {}
    if "labels" in inputs.column_names:
        labels = _label_counts(raw, columns, names) if columns.kind.has_classes else _label_moments(raw, columns)
    summary = {"rows": inputs.num_rows, "labels": labels}
    return (
        summary if truncated is None else summary | {"length": length_summary(lengths(inputs)), "truncated": truncated}
    )


def _label_counts(raw: datasets.Dataset, columns: Columns, names: list[str]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for table in batches(raw, [columns.label]):
        counts += count_labels(table[columns.label])
    return {name: counts[name] for name in names}


def _label_moments(raw: datasets.Dataset, columns: Columns) -> dict[str, float]:
    moments = Moments.of(raw.data.column(columns.label))
    found = {"mean": moments.mean, "std": moments.std, "min": moments.low, "max": moments.high}
    return {name: round(value, 6) for name, value in found.items()}


def _keys(raw: datasets.Dataset) -> npt.NDArray[np.uint64]:
    # Eight bytes a row, where a set of Python strings would take a hundred.
    parts = [bytes.fromhex("".join(table["key"].to_pylist())) for table in batches(raw, ["key"])]
    return np.concatenate([np.frombuffer(part, dtype=">u8").astype(np.uint64) for part in parts])


def duplicates(raw: Mapping[str, datasets.Dataset]) -> dict[str, int]:
    """For each pair of splits, how many rows of the second have the same raw inputs as a row of the first."""
    keys = {split: np.sort(_keys(dataset)) for split, dataset in raw.items()}
    return {f"{a}_{b}": _occur_in(keys[a], keys[b]) for a, b in combinations(keys, 2)}


def _occur_in(seen: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64]) -> int:
    at = np.minimum(np.searchsorted(seen, keys), len(seen) - 1)
    return int(np.count_nonzero(seen[at] == keys))
