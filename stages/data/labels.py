"""The classes: which there are, in which order, whether every row has one; and the stratified cut."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.config.errors import UserError, quote
from stages.config.params import DataParams
from stages.data.files import listing
from stages.data.sources import BATCH_ROWS, Source

MAX_CLASSES = 1000
INTEGER = re.compile(r"[+-]?[0-9]+")


def batches(dataset: datasets.Dataset, columns: Sequence[str]) -> Iterator[pa.Table]:
    """`columns` of `dataset`, a few thousand rows at a time."""
    yield from dataset.select_columns(list(columns)).with_format("arrow").iter(BATCH_ROWS)


def check_source(source: Source, data: DataParams) -> list[str]:
    """Check every row of every split; the class names in id order.

    Raises:
        UserError: an empty cell, an unknown label, a class without rows in train, with its row.
    """
    names = data.label_names or source.class_names
    known_from = "data.label_names" if data.label_names else "the dataset's own classes"
    counts = _check_rows(source, "train", data, names, known_from)
    if names is None:
        names = _sorted_names(counts)
        known_from = "the classes in train"
        if len(names) < 2:
            raise UserError(
                f"{source.where['train']}: column {quote(data.label_column)} holds the one class {quote(names[0])}; "
                "classification needs two or more"
            )
    for name in names:
        if not counts[name]:
            raise UserError(
                f"{source.where['train']}: no row of class {quote(name)}, which {known_from} "
                f"({listing(names)}) name; give train such rows, or list only the classes it has in data.label_names"
            )
    for split in source.splits:
        if split != "train":
            _check_rows(source, split, data, names, known_from)
    return names


def is_unlabelled(dataset: datasets.Dataset, label_column: str) -> bool:
    """Whether no row of `dataset` has a label."""
    return dataset.data.column(label_column).null_count == dataset.num_rows


def _sorted_names(counts: Counter[str]) -> list[str]:
    if all(INTEGER.fullmatch(name) for name in counts):
        return sorted(counts, key=lambda name: (int(name), name))
    return sorted(counts)


def _check_rows(source: Source, split: str, data: DataParams, names: list[str] | None, known_from: str) -> Counter[str]:
    dataset, where = source.splits[split], source.where[split]
    columns = [*data.text_columns, data.label_column]
    if source.hub and is_unlabelled(dataset, data.label_column):
        if split != "test":
            raise UserError(f"{where}: no row has a label (all are -1 or null); only the test split may lack them")
        columns.remove(data.label_column)
    counts: Counter[str] = Counter()
    start = 1
    for table in batches(dataset, columns):
        for column in columns:
            _refuse_empty(table[column], where, column, start)
        if data.label_column in columns:
            labels = table[data.label_column]
            if names is not None:
                _refuse_unknown(labels, names, known_from, where, data.label_column, start)
            for pair in pc.value_counts(labels).to_pylist():
                counts[pair["values"]] += pair["counts"]
            if names is None and len(counts) > MAX_CLASSES:
                raise UserError(_too_many(where, data.label_column))
        start += len(table)
    return counts


def _first(mask: pa.ChunkedArray) -> int:
    return pc.index(mask, True).as_py()


def _refuse_empty(values: pa.ChunkedArray, where: str, column: str, start: int) -> None:
    row = _first(pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), True))
    if row >= 0:
        found = values[row].as_py()
        what = "null" if found is None else "empty" if found == "" else "only whitespace"
        raise UserError(
            f"{where}: row {start + row}, column {quote(column)} is {what}; every row needs a text and a label: "
            "fill it in or remove the row"
        )


def _refuse_unknown(
    labels: pa.ChunkedArray, names: list[str], known_from: str, where: str, column: str, start: int
) -> None:
    row = _first(pc.invert(pc.is_in(labels, value_set=pa.array(names, pa.string()))))
    if row >= 0:
        raise UserError(
            f"{where}: row {start + row}, column {quote(column)} holds {quote(labels[row].as_py())}, "
            f"which is none of {known_from} "
            f"({listing(names)}); correct the row or name the class in data.label_names"
        )


def _too_many(where: str, column: str) -> str:
    return (
        f"{where}: column {quote(column)} holds more than {MAX_CLASSES} different labels; is data.label_column "
        "really the column with the class? If so, list the classes in data.label_names"
    )


def class_ids(dataset: datasets.Dataset, column: str, names: list[str]) -> npt.NDArray[np.int32]:
    """The position in `names` of every row's label, int32 of shape (rows,)."""
    value_set = pa.array(names, pa.string())
    ids = [pc.index_in(table[column], value_set=value_set).to_numpy() for table in batches(dataset, [column])]
    return np.concatenate(ids)


def cut_validation(source: Source, data: DataParams, names: list[str], cache: Path) -> Source:
    """`source` with `data.validation_size` of train as its validation split, stratified; rows keep their order.

    Raises:
        UserError: if there are too few rows to give every class its share of both.
    """
    from sklearn.model_selection import train_test_split

    train, where = source.splits["train"], source.where["train"]
    ids = class_ids(train, data.label_column, names)
    advice = "add a validation file (or more rows), or change data.validation_size"
    problem = f"{where}: no validation split, and {data.validation_size} of train cannot be cut off for one"
    counts = np.bincount(ids, minlength=len(names))
    rarest = int(counts.argmin())
    if counts[rarest] < 2:
        raise UserError(f"{problem}: class {quote(names[rarest])} has one row, and each part needs one; {advice}")
    cut = math.ceil(train.num_rows * data.validation_size)
    if min(cut, train.num_rows - cut) < len(names):
        raise UserError(
            f"{problem}: {train.num_rows} rows would become {train.num_rows - cut} and {cut}, "
            f"too few for {len(names)} classes; {advice}"
        )
    parts = train_test_split(
        np.arange(train.num_rows), test_size=data.validation_size, stratify=ids, random_state=data.seed
    )
    if np.bincount(ids[parts[0]], minlength=len(names)).min() == 0:
        raise UserError(f"{problem}: a class would be left without rows in train; {advice}")
    splits = {}
    for split, rows in zip(("train", "validation"), parts, strict=True):
        splits[split] = train.select(
            np.sort(rows), indices_cache_file_name=str(cache / f"cut-{split}.arrow"), new_fingerprint=split
        )
    return Source({**source.splits, **splits}, {**source.where, "validation": where}, source.class_names, source.hub)
