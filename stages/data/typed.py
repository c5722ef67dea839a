"""Columns as they come, of whatever type a file or the Hub gives them, into the types in `Columns.features`."""

from __future__ import annotations

from collections.abc import Callable, Sized
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from stages.data.columns import Columns, split_labels
from stages.data.numbers import is_number_type, to_float64
from stages.data.tables import map_tables
from stages.ground.errors import UserError, quote

# What a Parquet or label column may hold: these have one obvious text.
SCALARS = ("string", "large_string", "string_view", "int", "uint", "float", "bool", "decimal", "null")
LISTS = (datasets.List, datasets.LargeList)
Reader = Callable[[pa.ChunkedArray, int], pa.ChunkedArray]
"""A column's cells as they come, and the number of the first row, to what `Columns.features` says."""


def nulls(values: Sized, columns: Columns) -> pa.ChunkedArray:
    """As many labels that are missing as there are `values`."""
    return pa.chunked_array([pa.nulls(len(values), columns.features[columns.label].pa_type)])


def kind_of(feature: object) -> str:
    """What a message calls the type of a column."""
    return feature.dtype if isinstance(feature, datasets.Value) else quote(feature, 60)


def class_names_of(dataset: datasets.Dataset, column: str) -> list[str] | None:
    """The classes that the column itself declares, in their order; None where it declares none."""
    feature = dataset.features[column]
    feature = feature.feature if isinstance(feature, LISTS) else feature
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def as_typed(dataset: datasets.Dataset, columns: Columns, where: str, cache: Path, *, hub: bool) -> datasets.Dataset:
    """`dataset` with the wanted columns alone, of the types in `columns.features`; class ids become names."""
    found = [name for name in columns.names if name in dataset.column_names]
    dataset = dataset.select_columns(found)
    features = dataset.features  # a deep copy, each time
    # A number may stand for a label that is kept secret: see `_label_reader`.
    if features == columns.features and columns.kind.has_classes and not hub:  # whose files are not ours to keep
        return dataset
    reader_of = _number_reader if columns.numeric else _text_reader
    readers = {column: reader_of(features[column], column, where) for column in columns.inputs}
    if columns.label in found:
        readers[columns.label] = _label_reader(dataset, columns, where, hub=hub)

    def typed_table(table: pa.Table, position: int) -> pa.Table:
        typed = {column: read(table[column], position + 1) for column, read in readers.items()}
        return pa.table({columns.label: nulls(table, columns)} | typed).select(columns.names)

    return map_tables(dataset, typed_table, columns.features, cache, f"reading {where}")


def _text_reader(feature: object, column: str, where: str, also: str = "") -> Reader:
    if not isinstance(feature, datasets.Value) or not feature.dtype.startswith(SCALARS):
        raise UserError(
            f"{where}: column {quote(column)} is {kind_of(feature)}; allowed are text, numbers and true or false{also}"
        )

    def text_of(values: pa.ChunkedArray, start: int) -> pa.ChunkedArray:
        position = _first_not_finite(values)
        if position is not None:
            raise _no_text(values[position], f"{where}: row {start + position}", column)
        return pc.cast(values, pa.string())

    return text_of


def _first_not_finite(values: pa.ChunkedArray) -> int | None:
    # NaN is what pandas writes where nothing is, and as text would be a class.
    if not pa.types.is_floating(values.type):
        return None
    position = pc.index(pc.is_finite(values), False).as_py()
    return position if position >= 0 else None


def _no_text(value: pa.Scalar, row: str, column: str) -> UserError:
    return UserError(
        f"{row}, column {quote(column)} holds {value.as_py()}, which is neither text nor a label; "
        "fill it in or remove the row"
    )


def _number_reader(feature: object, column: str, where: str) -> Reader:
    if not isinstance(feature, datasets.Value) or not is_number_type(feature.pa_type):
        raise UserError(
            f"{where}: column {quote(column)} is {kind_of(feature)}; allowed are numbers, and text that is one"
        )
    return lambda values, start: to_float64(values, where, column, start)


def _label_reader(dataset: datasets.Dataset, columns: Columns, where: str, *, hub: bool) -> Reader:
    column = columns.label
    feature = dataset.features[column]
    if columns.kind.several:
        return _labels_reader(feature, columns, where)
    if columns.kind.has_classes and isinstance(feature, datasets.ClassLabel):
        names = pa.array(feature.names, pa.string())

        def name_of(ids: pa.ChunkedArray, _: int) -> pa.ChunkedArray:
            known = pc.and_(pc.greater_equal(ids, 0), pc.less(ids, len(names)))
            return pc.take(names, pc.if_else(known, ids, None))

        return name_of
    if not columns.kind.has_classes and getattr(feature, "dtype", None) == "bool":
        raise UserError(f"{where}: column {quote(column)} holds true and false; a {columns.kind.name} predicts numbers")
    reader = (_text_reader if columns.kind.has_classes else _number_reader)(feature, column, where)
    # The Hub's convention for a test split whose labels are kept secret. A lone -1 may be a class of its own.
    secret = ("int",) if columns.kind.has_classes else ("int", "float")
    if hub and feature.dtype.startswith(secret) and pc.all(pc.equal(dataset.data.column(column), -1)).as_py():
        return lambda values, _: nulls(values, columns)
    return reader


def _labels_reader(feature: object, columns: Columns, where: str) -> Reader:
    column, lists = columns.label, pa.list_(pa.string())
    if isinstance(feature, LISTS) and isinstance(feature.feature, datasets.ClassLabel):
        name_of = dict(enumerate(feature.feature.names))

        def names(values: pa.ChunkedArray, _: int) -> pa.ChunkedArray:
            rows = [row and [name_of.get(label) for label in row] for row in values.to_pylist()]
            return pa.chunked_array([pa.array(rows, lists)])

        return names
    if isinstance(feature, LISTS):
        _text_reader(feature.feature, column, where)

        def labels(values: pa.ChunkedArray, start: int) -> pa.ChunkedArray:
            flat = pc.list_flatten(values)
            position = _first_not_finite(flat)
            if position is not None:
                row = start + pc.list_parent_indices(values)[position].as_py()
                raise _no_text(flat[position], f"{where}: row {row}", column)
            return pc.cast(values, lists)

        return labels
    text_of = _text_reader(feature, column, where, ", and lists of them")

    def split(values: pa.ChunkedArray, start: int) -> pa.ChunkedArray:
        cells = text_of(values, start).to_pylist()
        rows = [None if cell is None else split_labels(cell, columns.separator) for cell in cells]
        return pa.chunked_array([pa.array(rows, lists)])

    return split
