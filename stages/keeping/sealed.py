"""Folders that tell whether they are whole: a manifest, written last, with every file's size and sha256.

Everything a run keeps carries the number of its format, which is defined here.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.ground import disk
from stages.ground.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 2
# Who wrote, and so reads, each format. What carries no number is of the first.
VERSIONS = {1: "0.1", 2: "0.2"}


class SaveError(UserError):
    """Something could not be saved; what was saved before is untouched. One line, with the bytes needed."""


class DamagedError(Exception):
    """A folder is not what was sealed. One line: which file, and what is wrong."""


@contextmanager
def disk_errors(folder: Path, what: str, needed: int) -> Iterator[None]:
    """Turn an error of the disk while writing `what` below `folder` into a SaveError that names the `needed` bytes."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        raise SaveError(
            f"{what} could not be written to {folder}: {'the disk is full' if full else error}; it needs {needed} "
            f"bytes, {shutil.disk_usage(place).free} are free; the last good checkpoint is kept: make room, or move "
            "the runs with HOLDFAST_RUNS, and run the same command again"
        ) from error


def seal(folder: Path, **about: Any) -> None:
    """Write the manifest of a folder: size and sha256 of every file in it, and what `about` says of them."""
    entries = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": disk.sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    text = disk.dumps({"format": FORMAT, **about, "files": entries})
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def verify(folder: Path, **about: Any) -> None:
    """Check a folder against its manifest, and the manifest against `about`.

    Raises:
        DamagedError: naming the first file that is missing, of the wrong size, or of the wrong content.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        raise DamagedError(f"{folder}: {MANIFEST} is missing, so it was never finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{folder / MANIFEST}: unreadable ({type(error).__name__})") from None
    for key, value in {"format": FORMAT, **about}.items():
        if manifest.get(key) != value:
            raise DamagedError(f"{folder / MANIFEST}: {key} is {manifest.get(key)!r}, expected {value!r}")
    for name, (size, sha256) in entries.items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{path}: missing")
        if path.stat().st_size != size:
            raise DamagedError(f"{path}: {path.stat().st_size} bytes, expected {size}")
        if disk.sha256_file(path) != sha256:
            raise DamagedError(f"{path}: content does not match its sha256")


def manifest_hash(folder: Path) -> str:
    """The first 8 hex digits of the sha256 of a sealed folder's manifest: a name for its content."""
    return disk.sha256_file(folder / MANIFEST)[:8]
