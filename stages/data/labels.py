"""The labels: which classes there are, in which order, whether every row is right; the validation cut."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.config.schema import DataParams
from stages.data.columns import listing
from stages.data.kept import Keeper, Made
from stages.data.numbers import refuse_unusable
from stages.data.origin import Origin
from stages.data.sources import Source
from stages.data.tables import batches, map_tables
from stages.ground.errors import UserError, quote
from stages.tasks.base import Kind

MAX_CLASSES = 1000
INTEGER = re.compile(r"[+-]?[0-9]+")
# Between the parts of a word; a sign before or after it (`-1`, `A-`) is something else.
JOINED = re.compile(r"(?<=\w)[-_](?=\w)|_")
QUOTES = "'\"\u2018\u2019\u201c\u201d \t"
# What pandas, numpy and Python print where there is no value.
MISSING = ("nan", "NaN", "NAN", "<NA>", "NaT", "None", "null", "NULL", "#N/A", "#NA")
# Lists as they are printed: what `to_csv` makes of a column of lists.
LIST_AS_TEXT = re.compile(r"\[\s*(['\"].*['\"]|[0-9][0-9,. ]*)?\s*\]")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?")


def check_source(source: Source, data: DataParams) -> list[str]:
    """Check every row of every split; the class names in id order, none where labels are numbers.

    Raises:
        UserError: an empty cell, no finite number, an unknown label, a class without rows in train, with its row.
    """
    names = data.label_names or source.class_names
    known_from = "data.label_names" if data.label_names else "the dataset's own classes"
    counts = _check_rows(source, "train", names, known_from)
    if not data.kind.has_classes:
        names = []
    elif names is None:
        names = _sorted_names(counts)
        known_from = "the classes in train"
        _refuse_too_few(names, source, data)
    for name in names:
        if not counts[name]:
            raise UserError(
                f"{source.where['train']}: no row of class {quote(name)}, which {known_from} "
                f"({listing(names)}) name; give train such rows, or list only the classes it has in data.label_names"
            )
    for split in source.splits:
        if split != "train":
            _check_rows(source, split, names, known_from)
    return names


def _refuse_too_few(names: list[str], source: Source, data: DataParams) -> None:
    where = f"{source.where['train']}: column {quote(data.label_column)}"
    if not names:
        raise UserError(f"{where} holds no label in any row; is it really the column with the labels?")
    if len(names) < data.kind.fewest_classes:
        raise UserError(f"{where} holds the one class {quote(names[0])}; {data.task} needs two or more")


def is_unlabelled(dataset: datasets.Dataset, label_column: str) -> bool:
    """Whether no row of `dataset` has a label."""
    return dataset.data.column(label_column).null_count == dataset.num_rows


def count_labels(labels: pa.ChunkedArray) -> Counter[str]:
    """How often each label occurs in a column of text, or of lists of text."""
    flat = pc.list_flatten(labels) if pa.types.is_list(labels.type) else labels
    return Counter({pair["values"]: pair["counts"] for pair in pc.value_counts(pc.drop_null(flat)).to_pylist()})


def _sorted_names(counts: Counter[str]) -> list[str]:
    # Of more digits Python makes no number, and nobody a class.
    if all(INTEGER.fullmatch(name) and len(name) < 100 for name in counts):
        return sorted(counts, key=lambda name: (int(name), name))
    return sorted(counts)


def spelled_alike(names: Sequence[str]) -> list[list[str]]:
    """Groups of names that are one number (`1`, `1.0`), or one word but for blanks, case, form, quotes or what joins
    its parts (`neg`, `Neg `, `'neg'`; `not_so`, `not-so`)."""
    groups: dict[object, list[str]] = {}
    for name in names:
        seen = (sign for sign in unicodedata.normalize("NFKC", name) if unicodedata.category(sign) != "Cf")
        word = " ".join(JOINED.sub(" ", "".join(seen).strip(QUOTES)).split()).casefold() or name
        groups.setdefault(Decimal(word) if NUMBER.fullmatch(word) else word, []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def looks_missing(names: Sequence[str]) -> list[str]:
    """Those of the names that are, more often than not, a value that is not there."""
    return [name for name in names if name.strip() in MISSING]


def _check_rows(source: Source, split: str, names: list[str] | None, known_from: str) -> Counter[str]:
    dataset, where, columns = source.splits[split], source.where[split], source.columns
    checked = columns.names
    if (source.hub or split in source.unlabelled) and is_unlabelled(dataset, columns.label):
        if split != "test":
            raise UserError(f"{where}: no row has a label (all are -1 or null); only the test split may lack them")
        checked.remove(columns.label)
    counts: Counter[str] = Counter()
    position = 0
    for table in batches(dataset, checked):
        for column in checked:
            advice = ", or remove the column, to predict without labels" if split == "test" else ""
            _check_cells(table[column], where, column, position, advice if column == columns.label else "")
        if columns.label in checked and columns.kind.has_classes:
            labels = table[columns.label]
            if names is not None:
                _refuse_unknown(labels, names, known_from, where, columns.label, position)
            counts += count_labels(labels)
            if names is None and len(counts) > MAX_CLASSES:
                raise UserError(_too_many(str(where), columns.label))
        position += len(table)
    return counts


def _check_cells(values: pa.ChunkedArray, where: Origin, column: str, position: int, advice: str) -> None:
    if pa.types.is_floating(values.type):
        refuse_unusable(values, where, column, position)
    elif pa.types.is_list(values.type):
        _refuse_odd_list(values, where, column, position)
    else:
        _refuse_empty(values, where, column, position, advice)


def _first(mask: pa.ChunkedArray) -> int:
    return pc.index(mask, True).as_py()


def _refuse_empty(values: pa.ChunkedArray, where: Origin, column: str, position: int, advice: str) -> None:
    row = _first(pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), True))
    if row >= 0:
        found = values[row].as_py()
        what = "null" if found is None else "empty" if found == "" else "only whitespace"
        raise UserError(
            f"{where.row(position + row)}, column {quote(column)} is {what}; every row needs a text and a label: "
            f"fill it in or remove the row{advice}"
        )


def _refuse_odd_list(values: pa.ChunkedArray, where: Origin, column: str, position: int) -> None:
    for row, labels in enumerate(values.to_pylist(), position):
        if labels is None:
            problem, advice = "is null", "write an empty cell or list where a row has no label"
        elif not all(label and label.strip() for label in labels):
            problem, advice = f"holds {quote(labels)}, with an empty label", "remove it"
        elif len(set(labels)) < len(labels):
            problem, advice = f"holds {quote(labels)}, with a label twice", "write it once"
        elif LIST_AS_TEXT.fullmatch(",".join(labels)):
            problem = f"holds {quote(','.join(labels))}, a list that was written as text"
            advice = "write the labels alone, joined by data.label_separator, or real lists in JSON or Parquet"
        else:
            continue
        raise UserError(f"{where.row(row)}, column {quote(column)} {problem}; {advice}")


def _refuse_unknown(
    labels: pa.ChunkedArray, names: list[str], known_from: str, where: Origin, column: str, position: int
) -> None:
    lists = pa.types.is_list(labels.type)
    flat = pc.list_flatten(labels) if lists else labels
    at = _first(pc.invert(pc.is_in(flat, value_set=pa.array(names, pa.string()))))
    if at >= 0:
        row = pc.list_parent_indices(labels)[at].as_py() if lists else at
        raise UserError(
            f"{where.row(position + row)}, column {quote(column)} holds {quote(flat[at].as_py())}, "
            f"which is none of {known_from} "
            f"({listing(names)}); correct the row or name the class in data.label_names"
        )


def _too_many(where: str, column: str) -> str:
    return (
        f"{where}: column {quote(column)} holds more than {MAX_CLASSES} different labels; is data.label_column "
        "really the column with the class? If so, list the classes in data.label_names"
    )


def target_feature(kind: Kind, classes: int) -> datasets.Value | datasets.List:
    """The type of `labels`: a value a row, or where `kind.several` a list of length `classes`."""
    value = datasets.Value(kind.label_dtype)
    return datasets.List(value, length=classes) if kind.several else value


def cut_validation(source: Source, data: DataParams, names: list[str], keeper: Keeper) -> Source:
    """`source` with `data.validation_size` of train as its validation split; rows keep their order.

    Where a row has one class, each class is cut, else the shuffled rows.

    Raises:
        UserError: if there are too few rows to give every class its share of both.
    """
    from sklearn.model_selection import train_test_split

    train, where = source.splits["train"], source.where["train"]
    advice = "add a validation file (or more rows), or change data.validation_size"
    problem = f"{where}: no validation split, and {data.validation_size} of train cannot be cut off for one"
    cut = math.ceil(train.num_rows * data.validation_size)
    if cut == train.num_rows:
        raise UserError(f"{problem}: none of the {train.num_rows} rows would be left in train; {advice}")
    ids = None
    if data.kind.has_classes and not data.kind.several:
        ids = _class_ids(train, data.label_column, names)
        counts = np.bincount(ids, minlength=len(names))
        rarest = int(counts.argmin())
        if counts[rarest] < 2:
            raise UserError(f"{problem}: class {quote(names[rarest])} has one row, and each part needs one; {advice}")
        if min(cut, train.num_rows - cut) < len(names):
            raise UserError(
                f"{problem}: {train.num_rows} rows would become {train.num_rows - cut} and {cut}, "
                f"too few for {len(names)} classes; {advice}"
            )
    parts = train_test_split(
        np.arange(train.num_rows), test_size=data.validation_size, stratify=ids, random_state=data.seed
    )
    chosen = np.zeros(train.num_rows, bool)
    chosen[parts[1]] = True
    splits = {
        split: keeper.kept(f"cut-{split}-{source.version}", partial(_part, train, taken))[0]
        for split, taken in (("train", ~chosen), ("validation", chosen))
    }
    left: Counter[str] = Counter()
    for table in batches(splits["train"], [data.label_column]) if names else ():
        left += count_labels(table[data.label_column])
    for name in names:
        if not left[name]:
            raise UserError(f"{problem}: class {quote(name)} would be left without rows in train; {advice}")
    origins = {"train": Origin(where.files, np.flatnonzero(~chosen)),
               "validation": Origin(where.files, np.flatnonzero(chosen))}  # fmt: skip
    return replace(source, splits={**source.splits, **splits}, where={**source.where, **origins})


def _part(dataset: datasets.Dataset, chosen: npt.NDArray[np.bool_], cache: Path) -> Made:
    # Copied: rows picked one by one from a larger table are slow to read, again and again.
    def pick(table: pa.Table, position: int) -> pa.Table:
        return table.filter(pa.array(chosen[position : position + len(table)]))

    return map_tables(dataset, pick, dataset.features, cache / "cut.arrow", "cutting"), {}


def _class_ids(dataset: datasets.Dataset, column: str, names: list[str]) -> npt.NDArray[np.int32]:
    value_set = pa.array(names, pa.string())
    ids = [pc.index_in(table[column], value_set=value_set).to_numpy() for table in batches(dataset, [column])]
    return np.concatenate(ids)
