"""Which files, and splits of the Hub, are which split: by the words in their names, as `datasets` takes them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from stages.config.pipeline import require_rows
from stages.data.columns import listing
from stages.data.files import SUFFIXES, UNPACKED_BY, suffix_of
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
# What `save_to_disk` leaves, of several splits or of one: its JSON files are no rows.
SAVED = ("dataset_dict.json", "state.json", "train/state.json")
# What lies in a folder of data and is none.
NO_DATA = re.compile(r"\..*|.*\.(md|dvc)|licen[sc]e.*", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """The files of each split, in the order of their numbers, and the names of what in the folder is taken for none."""

    splits: dict[str, tuple[Path, ...]]
    left_aside: tuple[str, ...] = ()


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
