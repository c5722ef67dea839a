"""Local data files: what is in one, and what is wrong with it, down to the line.

CSV and TSV are read by `datasets` (pandas underneath), which repairs silently what it cannot read: a short row is
filled up, NUL cuts a cell. So every file is checked first, by the standard library's strict reader.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TextIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from stages.data.columns import Columns, listing, require_columns, split_labels
from stages.ground.errors import UserError, quote

DELIMITERS = {".csv": ",", ".tsv": "\t"}
OTHER_DELIMITERS = {";": "a semicolon", "\t": "a tab", ",": "a comma", "|": "a bar"}
JSON_LINES = (".jsonl", ".json", ".ndjson")
PARQUET = ".parquet"
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", PARQUET, ".ndjson")
UNPACKED_BY: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# What a damaged archive raises, beside OSError.
UNPACKING_ERRORS = (EOFError, zlib.error, lzma.LZMAError)
# One cell. The csv module's own limit of 128 KiB is shorter than long documents are; without any limit, a quote
# that is never closed reads the rest of the file into memory.
MAX_CELL_CHARACTERS = 2**24
Cell = str | Sequence[str | None] | None
"""Text, as typed, or the labels of a multi_label cell."""


def suffix_of(path: Path) -> str:
    """The format of a data file, one of SUFFIXES, also where it is packed (`rows.csv.gz`); `` of no data file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in UNPACKED_BY
    suffix = suffixes[-2] if packed and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    # Parquet packs its own pages.
    return suffix if suffix in SUFFIXES and not (packed and suffix == PARQUET) else ""


def open_bytes(path: Path) -> BinaryIO:
    """`path` for reading, unpacked if its name says that it is packed."""
    opened = UNPACKED_BY.get(path.suffix.lower())
    return cast(BinaryIO, opened(path, "rb")) if opened else path.open("rb")


def unpack(path: Path, to: Path) -> Path:
    """Write what is in the packed file `path` to `to`, and give that."""
    with open_bytes(path) as packed, to.open("wb") as file:
        shutil.copyfileobj(packed, file)
    return to


def _open_text(path: Path) -> TextIO:
    return TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="")


def _raise_not_utf8(path: Path) -> NoReturn:
    # A text reader decodes ahead in blocks, so its error knows no line: look again, line by line.
    with open_bytes(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}: line {number}: byte {error.start + 1} of the line (0x{line[error.start]:02x}) "
                    "is not UTF-8; save the file as UTF-8"
                ) from None
    raise UserError(f"{path}: not UTF-8; save the file as UTF-8")


def header(path: Path) -> list[str]:
    """A file's column names: of its first row, its first JSON object, or its schema.

    Raises:
        UserError: if it is empty, or what comes first cannot be read.
    """
    suffix = suffix_of(path)
    if suffix in JSON_LINES:
        return list(next(_json_objects(path))[1])
    if suffix == PARQUET:
        return _parquet_footer(path)[0]
    return next(_delimited_rows(path))[1]


def check_delimited(path: Path, columns: Sequence[str]) -> int:
    """Read a CSV or TSV file through once, strictly; its number of data rows (blank lines are none).

    Raises:
        UserError: the first thing that is wrong, with its physical line.
    """
    rows = _delimited_rows(path)
    _, names = next(rows)
    require_columns(str(path), names, columns)
    count = 0
    for line, row in rows:
        _check_width(f"{path}: line {line}", len(row), len(names), DELIMITERS[suffix_of(path)])
        if len(row) == 1 and row[0].isspace():
            # pandas takes it for a blank line, and reads a row less.
            raise UserError(f"{path}: line {line} is only whitespace; remove it")
        count += 1
    if not count:
        raise UserError(f"{path}: no rows below the header")
    return count


def _delimited_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    # The rows that are not blank, each with the line it starts on; the header is the first.
    limit = csv.field_size_limit(MAX_CELL_CHARACTERS)
    start, empty = 1, True
    try:
        _refuse_other_delimiter(path)
        with _open_text(path) as lines:
            reader = csv.reader(lines, delimiter=DELIMITERS[suffix_of(path)], strict=True)
            for row in reader:
                if any("\0" in cell for cell in row):
                    raise UserError(f"{path}: line {reader.line_num} holds a NUL character; remove it")
                if row:
                    empty = False
                    yield start, row
                start = reader.line_num + 1
    except csv.Error as error:
        where = f"line {reader.line_num}"
        if reader.line_num != start:
            where += f" (of a row that starts on line {start})"
        raise UserError(
            f"{path}: {where}: {error}; a cell that starts with a quote must end with one, "
            "and a quote inside it is written twice"
        ) from None
    except UnicodeDecodeError:
        _raise_not_utf8(path)
    finally:
        csv.field_size_limit(limit)
    if empty:
        raise UserError(f"{path}: the file is empty; it needs a header line and data rows")


def _refuse_other_delimiter(path: Path) -> None:
    ours = DELIMITERS[suffix_of(path)]
    with _open_text(path) as lines:
        line = lines.readline(MAX_CELL_CHARACTERS).rstrip("\r\n").replace("\0", "")
    if re.match('"?sep=', line, re.IGNORECASE):
        raise UserError(
            f"{path}: line 1 is {quote(line)}, which is for spreadsheets; remove it, so that line 1 names the columns"
            + ("" if line.strip('"').lower() == f"sep={ours}" else f", and separate them by {OTHER_DELIMITERS[ours]}")
        )
    if len(next(csv.reader([line], delimiter=ours), "")) == 1:
        for delimiter, name in OTHER_DELIMITERS.items():
            if delimiter != ours and len(next(csv.reader([line], delimiter=delimiter))) > 1:
                raise UserError(
                    f"{path}: line 1 is {quote(line)}: its columns are separated by {name}, but in a {suffix_of(path)} "
                    f"file it is {OTHER_DELIMITERS[ours]}; save it again with that"
                )


def _check_width(where: str, found: int, expected: int, delimiter: str) -> None:
    if found != expected:
        name = "tab" if delimiter == "\t" else "comma"
        advice = f"put a cell that holds a {name} in quotes" if found > expected else "fill in the missing ones"
        raise UserError(
            f"{where}: {found} {'field' if found == 1 else 'fields'}, but the header names {expected}; {advice}"
        )


def json_rows(path: str, columns: Columns, names: Sequence[str]) -> Iterator[dict[str, Cell]]:
    """Each line's columns `names` as text, as typed: `1.0` stays `1.0`, `true` stays `true` (1 in numeric inputs), null
    is None. A multi_label label is a list.

    Not `datasets`' own JSON reader: that takes text such as 2020-01-31 for a date and rewrites it.

    Raises:
        UserError: the first thing that is wrong, with its line.
    """
    first = True
    for number, row in _json_objects(Path(path)):
        if first:
            require_columns(path, list(row), names)
            first = False
        if columns.label in row and columns.label not in names:
            raise UserError(
                f"{path}: line {number} has a {quote(columns.label)}, but the first line has none; "
                "give all rows a label, or none"
            )
        yield {name: _json_cell(f"{path}: line {number}", row, name, columns) for name in names}


def _json_objects(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    # The object of each line that is not blank, with its number.
    empty = True
    with open_bytes(path) as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                empty = False
                yield number, _json_object(f"{path}: line {number}", line, path)
    if empty:
        raise UserError(f"{path}: the file is empty; it needs one JSON object a line")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a key occurs twice")
    return row


def _json_object(where: str, line: bytes, path: Path) -> dict[str, object]:
    expected = "write one object a line, such as {...}"
    try:
        row = json.loads(
            line.decode("utf-8"), parse_int=str, parse_float=str, parse_constant=float, object_pairs_hook=_unique
        )
    except UnicodeDecodeError:
        _raise_not_utf8(path)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, column {error.colno}: not valid JSON: {error.msg}; {expected}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a usable JSON row: {error}; {expected}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {_json_kind(row)}, not an object; {expected}")
    return row


def _json_kind(value: object) -> str:
    return "list" if isinstance(value, list) else "object" if isinstance(value, dict) else "value"


def _json_cell(where: str, row: dict[str, object], name: str, columns: Columns) -> Cell:
    if name not in row:
        raise UserError(f"{where}: no {quote(name)}; it holds {listing(list(row))}")
    value, where = row[name], f"{where}, {quote(name)}"
    if columns.numeric and name != columns.label and isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and (not columns.kind.has_classes if name == columns.label else columns.numeric):
        return str(value)  # NaN or Infinity, which columns of numbers refuse
    if not columns.kind.several or name != columns.label:
        return _json_text(where, value, "text, a number, true or false")
    if isinstance(value, list):
        return [_json_text(where, label, "a list of text, or text") for label in value]
    text = _json_text(where, value, "a list of text, or text")
    return None if text is None else split_labels(text, columns.separator)


def _json_text(where: str, value: object, allowed: str) -> str | None:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        raise UserError(f"{where} holds {value}, which is neither text nor a label; fill it in or remove the row")
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: found a JSON {_json_kind(value)}; allowed are {allowed}")
    try:
        (value or "").encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: half of a surrogate pair (such as \\ud83d alone), which is no text") from None
    return value


def check_parquet(path: Path, columns: Sequence[str]) -> None:
    """Read a Parquet file's footer. Raises `UserError` if it is broken, has no rows, or lacks a column."""
    names, count = _parquet_footer(path)
    require_columns(str(path), names, columns)
    if not count:
        raise UserError(f"{path}: no rows")


def _parquet_footer(path: Path) -> tuple[list[str], int]:
    try:
        with pq.ParquetFile(path) as file:
            return file.schema_arrow.names, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({quote(str(error), 160)}); write it again") from None
