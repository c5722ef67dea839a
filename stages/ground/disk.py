"""Bytes on disk: durable files, folders that appear whole or not at all, hashes. No policy lives here."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

# Linux's request for a clone of a file's blocks, from <linux/fs.h>.
FICLONE = 0x40049409
TEMPORARY = ".tmp"
REPLACED = f".replaced{TEMPORARY}"
REMOVED = f".removed{TEMPORARY}"


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()


def absolute(path: str | Path) -> Path:
    """`path` from the root, without `.` and `..`. Links are not followed, as what is named is the link."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def fsync(path: Path) -> None:
    """Force a file's data, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def dumps(value: Any) -> str:
    """`value` as the JSON text that every out and record uses: sorted keys, indented, newline at the end."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Replace a text file so that a reader, or a crash, sees the old text or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = temporary(path)
    made.write_text(text, encoding="utf-8")
    fsync(made)
    os.replace(made, path)
    fsync(path.parent)


def temporary(path: Path) -> Path:
    """Where what becomes `path` is made; `remove_temporaries` clears it."""
    return path.with_name(f".{path.name}{TEMPORARY}")


def write_folder(path: Path, fill: Callable[[Path], T]) -> T:
    """Make the folder `path` from what `fill` writes into a temporary one, and give what that returns. If anything
    fails, the temporary folder is removed and the error goes on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = temporary(path)
    remove(made)
    try:
        made.mkdir()
        result = fill(made)
        put_in_place(made, path)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return result


def link(path: Path, target: Path) -> None:
    """Let `target` be the file `path`, to which nobody writes again; a copy where the disk has no such links, or they
    are two disks. Raises OSError."""
    try:
        os.link(path, target)
    except OSError:
        copy(path, target)


def copy(path: str | Path, target: str | Path) -> None:
    """Let `target` hold what the file `path` does; in blocks that both share until one is written to, where the disk
    knows that. Raises OSError."""
    try:
        with Path(path).open("rb") as source, Path(target).open("wb") as made:
            fcntl.ioctl(made, FICLONE, source.fileno())
    except OSError:
        shutil.copyfile(path, target)


def put_in_place(made: Path, path: Path) -> None:
    """Let the folder `made` become `path`, durably: fsync of all that is in it, rename, fsync of the parent.

    An older `path` is replaced, and removed last; `remove_temporaries` puts it back if a crash came in between.
    """
    for inner in sorted(made.rglob("*"), reverse=True):
        fsync(inner)
    fsync(made)
    replaced = path.with_name(f".{path.name}{REPLACED}")
    remove(replaced)
    if path.exists():
        os.rename(path, replaced)
    os.rename(made, path)
    fsync(path.parent)
    remove(replaced)


def remove(path: Path) -> None:
    """Remove a file or folder if it is there.

    A folder is renamed first, so that a crash half-way leaves a temporary name and never half a folder.
    """
    if path.is_dir() and not path.is_symlink():
        if path.suffix != TEMPORARY:
            doomed = path.with_name(f".{path.name}{REMOVED}")
            shutil.rmtree(doomed, ignore_errors=True)
            os.rename(path, doomed)
            path = doomed
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Clear what a killed process left half-made in `folder`, and put back what it was about to replace."""
    for path in folder.glob(f".*{REPLACED}"):
        original = path.with_name(path.name.removeprefix(".").removesuffix(REPLACED))
        if not original.exists():
            os.rename(path, original)
    for path in folder.glob(f".*{TEMPORARY}"):
        remove(path)
