"""Folders that tell whether they are whole: a manifest, written last, with every file's size and sha256.

Everything a run keeps carries the number of its format, which is defined here. What is read back is held against a
schema first: whoever may write into `runs/` can make an entry useless, and nothing worse.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from stages.ground import disk
from stages.ground.errors import UserError
from stages.ground.words import Exit

MANIFEST = "manifest.json"
FORMAT = 3
# Who wrote, and so reads, each format. What carries no number is of the first.
VERSIONS = {1: "0.1", 2: "0.2", 3: "0.3"}
# Far more than any model has files.
MANIFEST_BYTES = 2**24


class SaveError(UserError):
    """Something could not be saved; what was saved before is untouched. One line, with the bytes needed. `passes`: the
    disk is full, say, and will not be for ever."""

    def __init__(self, line: str, *, passes: bool = False) -> None:
        super().__init__(line)
        if passes:
            self.code = Exit.AGAIN


class DamagedError(Exception):
    """Something is not what was sealed. One line: which file, and what is wrong."""


@dataclass(frozen=True)
class FileRecord:
    """What a sealed file is: its size in bytes, and the sha256 of its content in hex."""

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """The content of manifest.json: what the folder is (`about`), and its files by their path in it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    format: int
    about: dict[str, str]
    files: Annotated[dict[str, FileRecord], Field(min_length=1)]


def seal(folder: Path, about: dict[str, str]) -> Manifest:
    """Write the manifest of a folder, which holds no other yet."""
    files = {
        name: FileRecord(size=path.stat().st_size, sha256=disk.sha256_file(path))
        for name, path in sorted(_files(folder).items())
    }
    manifest = Manifest(format=FORMAT, about=about, files=files)
    (folder / MANIFEST).write_text(disk.dumps(manifest.model_dump()), encoding="utf-8")
    return manifest


def verify(folder: Path, about: dict[str, str]) -> Manifest:
    """Check a folder against its manifest, and the manifest against `about`.

    Raises:
        DamagedError: naming the first file that is missing, surplus, of the wrong size, or of the wrong content.
    """
    try:
        manifest, files = _read(folder), _files(folder)
        _compare("format", manifest.format, FORMAT, folder)
        for key in about.keys() | manifest.about.keys():
            _compare(key, manifest.about.get(key), about.get(key), folder)
        for name in sorted(manifest.files.keys() - files.keys()):
            raise DamagedError(f"{folder}: {name[:200]!r} is missing")
        for name in sorted(files.keys() - manifest.files.keys()):
            raise DamagedError(f"{folder}: {name!r} is not in its manifest")
        for name, path in files.items():
            size, record = path.stat().st_size, manifest.files[name]
            if size != record.size:
                raise DamagedError(f"{path}: {size} bytes, expected {record.size}")
            if disk.sha256_file(path) != record.sha256:
                raise DamagedError(f"{path}: content does not match its sha256")
    except OSError as error:
        raise DamagedError(f"{folder}: cannot be read ({error.strerror})") from None
    return manifest


def _compare(what: str, found: object, expected: object, folder: Path) -> None:
    if found != expected:
        raise DamagedError(f"{folder / MANIFEST}: {what} is {found!r}, expected {expected!r}")


def _read(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MANIFEST_BYTES:
            raise DamagedError(f"{path}: unreadable, larger than {MANIFEST_BYTES} bytes")
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DamagedError(f"{folder}: {MANIFEST} is missing, so it was never finished") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:200]
        raise DamagedError(f"{path}: unreadable ({where}{': ' if where else ''}{first['msg'][:200]})") from None


def _files(folder: Path) -> dict[str, Path]:
    """The files below `folder` but its manifest, by their path in it. Raises DamagedError at what is no plain file."""
    found: dict[str, Path] = {}
    for place, folders, names in os.walk(folder, onerror=_raise):
        for name in (*folders, *names):
            path = Path(place, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise DamagedError(f"{path}: neither a file nor a folder")
            if stat.S_ISREG(mode) and path != folder / MANIFEST:
                found[path.relative_to(folder).as_posix()] = path
    return found


def _raise(error: OSError) -> None:
    raise error


def manifest_hash(folder: Path) -> str:
    """The first 8 hex digits of the sha256 of a sealed folder's manifest: a name for its content."""
    return disk.sha256_file(folder / MANIFEST)[:8]
