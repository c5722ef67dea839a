"""Local data files: which file is which split, and what is wrong with one, down to the line.

CSV and TSV are read by `datasets` (pandas underneath), which repairs silently what it cannot read: a short row is
filled up, NUL cuts a cell. So every file is checked first, by the standard library's strict reader.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from stages.config.errors import UserError, quote

# The file stems, and the Hub's split names, that stand for each split.
SPLIT_OF = {"train": "train", "validation": "validation", "dev": "validation", "val": "validation", "test": "test"}
DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".json")
PARQUET = ".parquet"
SUFFIXES = (*DELIMITERS, *JSON_LINES, PARQUET)
# One cell. The csv module's own limit of 128 KiB is shorter than long documents are; without any limit, a quote
# that is never closed reads the rest of the file into memory.
MAX_CELL_CHARACTERS = 2**24


def listing(names: Sequence[str], limit: int = 20) -> str:
    """`names` as one line, cut to `limit` of them."""
    if not names:
        return "nothing"
    rest = len(names) - limit
    return ", ".join(map(quote, names[:limit])) + (f" and {rest} more" if rest > 0 else "")


def require_columns(where: str, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise `UserError` if `wanted` names a column that `found` lacks, or `found` holds a name twice."""
    for name in found:
        if name.strip() and found.count(name) > 1:
            raise UserError(f"{where}: the column name {quote(name)} occurs {found.count(name)} times; rename them")
    by_lower = {name.lower().strip(): name for name in found}
    for name in wanted:
        if name not in found:
            close = difflib.get_close_matches(name.lower(), by_lower, 1)
            hint = f"; did you mean {quote(by_lower[close[0]])}?" if close else ""
            raise UserError(
                f"{where}: no column {quote(name)}; the columns are {listing(found)}{hint} "
                "(named in data.text_columns and data.label_column)"
            )


def find_files(path: Path) -> dict[str, Path]:
    """The file of each split. A single file is the train split; a folder holds them by stem.

    Raises:
        UserError: no such path, no train file, two files for one split, or an unknown format.
    """
    formats = ", ".join(SUFFIXES)
    if not path.exists():
        raise UserError(f"data.path is {quote(str(path))}: no such file or folder; give one of {formats} or a folder")
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"data.path is {quote(str(path))}: the name must end with one of {formats}")
        return {"train": path}
    files: dict[str, Path] = {}
    entries = sorted(path.iterdir())
    for entry in entries:
        split = SPLIT_OF.get(entry.stem)
        if split is None or entry.suffix.lower() not in SUFFIXES or not entry.is_file():
            continue
        if split in files:
            raise UserError(f"{path}: {files[split].name} and {entry.name} are both {split} files; keep one of them")
        files[split] = entry
    if "train" not in files:
        found = listing([entry.name for entry in entries])
        raise UserError(f"{path}: no train file (train with one of {formats}); the folder holds {found}")
    return files


def _raise_not_utf8(path: Path) -> NoReturn:
    # A text reader decodes ahead in blocks, so its error knows no line: look again, line by line.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}: line {number}: byte {error.start + 1} of the line (0x{line[error.start]:02x}) "
                    "is not UTF-8; save the file as UTF-8"
                ) from None
    raise UserError(f"{path}: not UTF-8; save the file as UTF-8")


def check_delimited(path: Path, columns: Sequence[str]) -> int:
    """Read a CSV or TSV file through once, strictly; its number of data rows (blank lines are none).

    Raises:
        UserError: the first thing that is wrong, with its physical line.
    """
    delimiter = DELIMITERS[path.suffix.lower()]
    limit = csv.field_size_limit(MAX_CELL_CHARACTERS)
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            return _count_rows(path, lines, delimiter, columns)
    except UnicodeDecodeError:
        _raise_not_utf8(path)
    finally:
        csv.field_size_limit(limit)


def _count_rows(path: Path, lines: io.TextIOWrapper, delimiter: str, columns: Sequence[str]) -> int:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    count, start = 0, 1
    try:
        for row in reader:
            if any("\0" in cell for cell in row):
                raise UserError(f"{path}: line {reader.line_num} holds a NUL character; remove it")
            if row and header is None:
                header = row
                require_columns(str(path), header, columns)
            elif row and header is not None:
                _check_width(f"{path}: line {start}", len(row), len(header), delimiter)
                count += 1
            start = reader.line_num + 1
    except csv.Error as error:
        where = f"line {reader.line_num}"
        if reader.line_num != start:
            where += f" (of a row that starts on line {start})"
        raise UserError(
            f"{path}: {where}: {error}; a cell that starts with a quote must end with one, "
            "and a quote inside it is written twice"
        ) from None
    if header is None:
        raise UserError(f"{path}: the file is empty; it needs a header line and data rows")
    if not count:
        raise UserError(f"{path}: no rows below the header")
    return count


def _check_width(where: str, found: int, expected: int, delimiter: str) -> None:
    if found != expected:
        name = "tab" if delimiter == "\t" else "comma"
        advice = f"put a cell that holds a {name} in quotes" if found > expected else "fill in the missing ones"
        raise UserError(
            f"{where}: {found} {'field' if found == 1 else 'fields'}, but the header names {expected}; {advice}"
        )


def json_rows(path: str, columns: Sequence[str]) -> Iterator[dict[str, str | None]]:
    """Each line's `columns` as text, as typed: `1.0` stays `1.0`, `true` stays `true`, null is None.

    Not `datasets`' own JSON reader: that takes text such as 2020-01-31 for a date and rewrites it.

    Raises:
        UserError: the first thing that is wrong, with its line.
    """
    first = True
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            row = _json_object(where, line, Path(path))
            if first:
                require_columns(path, list(row), columns)
                first = False
            yield {name: _json_text(where, row, name) for name in columns}
    if first:
        raise UserError(f"{path}: the file is empty; it needs one JSON object a line")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a key occurs twice")
    return row


def _typed_bool(value: object) -> object:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else value


def _json_object(where: str, line: bytes, path: Path) -> dict[str, object]:
    expected = "write one object a line, such as {...}"
    try:
        row = json.loads(
            line.decode("utf-8"), parse_int=str, parse_float=str, parse_constant=str, object_pairs_hook=_unique
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


def _json_text(where: str, row: dict[str, object], name: str) -> str | None:
    if name not in row:
        raise UserError(f"{where}: no {quote(name)}; it holds {listing(list(row))}")
    value = _typed_bool(row[name])
    if value is not None and not isinstance(value, str):
        kind = _json_kind(value)
        raise UserError(f"{where}, {quote(name)}: found a JSON {kind}; allowed are text, a number, true or false")
    try:
        (value or "").encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{where}, {quote(name)}: half of a surrogate pair (such as \\ud83d alone), which is no text"
        ) from None
    return value


def check_parquet(path: Path, columns: Sequence[str]) -> None:
    """Read a Parquet file's footer. Raises `UserError` if it is broken, has no rows, or lacks a column."""
    try:
        with pq.ParquetFile(path) as file:
            names, count = file.schema_arrow.names, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({quote(str(error), 160)}); write it again") from None
    require_columns(str(path), names, columns)
    if not count:
        raise UserError(f"{path}: no rows")
