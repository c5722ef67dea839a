"""Local data files: which files are which split, and what is wrong with one, down to the line.

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
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TextIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from stages.config.pipeline import require_rows
from stages.data.columns import Columns, listing, require_columns, split_labels
from stages.ground.errors import UserError, quote

# The words in a file's name, or the Hub's split names, that stand for each split: those that `datasets` knows.
WORDS = {"train": ("train", "training"), "validation": ("validation", "valid", "dev", "val"),
         "test": ("test", "testing", "eval", "evaluation")}  # fmt: skip
SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}
# Those that need no line to say what they are taken for.
PLAIN = ("train", "validation", "dev", "val", "test")
_WORD = re.compile(rf"(?:^|[-._ 0-9])({'|'.join(SPLIT_OF)})(?=[-._ 0-9]|$)")
_DIGITS = re.compile("[0-9]+")
_SHARD = re.compile(r"-([0-9]+)-of-([0-9]+)$")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
OTHER_DELIMITERS = {";": "a semicolon", "\t": "a tab", ",": "a comma", "|": "a bar"}
JSON_LINES = (".jsonl", ".json", ".ndjson")
PARQUET = ".parquet"
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", PARQUET, ".ndjson")
UNPACKED_BY: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# What a damaged archive raises, beside OSError.
UNPACKING_ERRORS = (EOFError, zlib.error, lzma.LZMAError)
# What `save_to_disk` leaves, of several splits or of one: its JSON files are no rows.
SAVED = ("dataset_dict.json", "state.json", "train/state.json")
# What lies in a folder of data and is none.
NO_DATA = re.compile(r"\..*|.*\.(md|dvc)|licen[sc]e.*", re.IGNORECASE)
# One cell. The csv module's own limit of 128 KiB is shorter than long documents are; without any limit, a quote
# that is never closed reads the rest of the file into memory.
MAX_CELL_CHARACTERS = 2**24
Cell = str | Sequence[str | None] | None
"""Text, as typed, or the labels of a multi_label cell."""


@dataclass(frozen=True)
class Found:
    """The files of each split, in the order of their numbers, and the names of what in the folder is taken for none."""

    splits: dict[str, tuple[Path, ...]]
    left_aside: tuple[str, ...] = ()


def suffix_of(path: Path) -> str:
    """The format of a data file, one of SUFFIXES, also where it is packed (`rows.csv.gz`); `` of no data file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in UNPACKED_BY
    suffix = suffixes[-2] if packed and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    # Parquet packs its own pages.
    return suffix if suffix in SUFFIXES and not (packed and suffix == PARQUET) else ""


def _stem(path: Path) -> str:
    name = path.name.lower()
    for packed in UNPACKED_BY:
        name = name.removesuffix(packed)
    return name.removesuffix(suffix_of(path))


def find_files(path: Path) -> Found:
    """The files of each split, which a folder names as `datasets` does: by a word in a file's or a sub-folder's name.
    A single file is the train split.

    Raises:
        UserError: no such path, no train file, two candidates for one split, a shard that is missing, an unknown
            format, or what is neither file nor folder.
    """
    formats = ", ".join(SUFFIXES)
    is_path = f"data.path is {quote(str(path))}"
    if not path.exists():
        raise UserError(f"{is_path}: no such file or folder; give one of {formats} or a folder")
    require_rows(path)
    if not path.is_dir():
        if not suffix_of(path):
            raise UserError(f"{is_path}: the name must end with one of {formats}, packed or not (.gz, .bz2, .xz)")
        return Found({"train": (path,)})
    _refuse_saved(path)
    candidates: dict[str, dict[tuple[str, str], list[Path]]] = defaultdict(lambda: defaultdict(list))
    left: list[str] = []
    entries = sorted(entry for entry in path.iterdir() if not NO_DATA.fullmatch(entry.name))
    for entry in entries:
        inside = entry.is_dir() and entry.name.lower() in SPLIT_OF
        split = SPLIT_OF[entry.name.lower()] if inside else None if entry.is_dir() else _split_of(entry)
        files = [file for file in sorted(entry.iterdir()) if not NO_DATA.fullmatch(file.name)] if inside else [entry]
        for file in files:
            if split is None or not suffix_of(file):
                left.append(f"{file.relative_to(path)}{'/' if file.is_dir() else ''}")
                continue
            # Names that differ in their numbers alone are shards of one table.
            like = f"{entry.name}/" if inside else _DIGITS.sub("0", _stem(file))
            candidates[split][like, suffix_of(file)].append(file)
    splits = {}
    for split, groups in candidates.items():
        files = sorted(next(iter(groups.values())), key=_number)
        rivals = [group[0] for group in groups.values()]
        if len(rivals) == 1:
            rivals = next((list(pair) for pair in pairwise(files) if _number(pair[0]) == _number(pair[1])), rivals)
        if len(rivals) > 1:
            first, second = (str(file.relative_to(path)) for file in rivals[:2])
            raise UserError(
                f"{path}: {first} and {second} are both {split} files ({', '.join(WORDS[split])} stand for it); "
                "keep one of them there"
            )
        _require_all_shards(files)
        splits[split] = tuple(files)
    if "train" not in splits and (path / "data").is_dir():
        # As a repository of the Hub has it
        inner = find_files(path / "data")
        beside = (f"{entry.name}{'/' if entry.is_dir() else ''}" for entry in entries if entry.name != "data")
        return Found(inner.splits, (*beside, *(f"data/{name}" for name in inner.left_aside)))
    if "train" not in splits:
        found = listing([entry.name for entry in entries])
        raise UserError(f"{path}: no train file (train with one of {formats}); the folder holds {found}")
    return Found(splits, tuple(left))


def _refuse_saved(path: Path) -> None:
    for name in SAVED:
        if (found := next(path.glob(name), None)) is not None:
            raise UserError(
                f"{path}: {found.relative_to(path)} says that `datasets` saved it with save_to_disk, which is its own "
                "format; write each split with to_parquet instead, as train.parquet, validation.parquet, test.parquet"
            )


def _split_of(path: Path) -> str | None:
    # A name that holds the words of two splits says neither.
    found = {SPLIT_OF[word] for word in _WORD.findall(_stem(path))}
    return found.pop() if len(found) == 1 else None


def _number(path: Path) -> tuple[str, list[int]]:
    # 10 comes after 9, whatever the width.
    stem = _stem(path)
    return _DIGITS.sub("0", stem), [int(digits) for digits in _DIGITS.findall(stem)]


def _require_all_shards(files: Sequence[Path]) -> None:
    shards = [(path, int(match[1]), int(match[2])) for path in files if (match := _SHARD.search(_stem(path)))]
    for position, (path, number, total) in enumerate(shards):
        if total != len(shards) or number != position:
            raise UserError(
                f"{path}: one of {total} shards, numbered from 0, but there are {len(shards)} and number {position} "
                "is not where it should be; fetch all of them, and remove those of another version"
            )


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
