"""What a stage keeps on its way, as entries that are there whole or not at all: `Store`, and the one on a disk.

A store knows bytes and no policy: what an entry holds is its writer's business, and which to keep its owner's. The
protocol says nothing of how an entry lies there, nor of renames, so that an object store can be one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stages.ground import disk
from stages.ground.errors import NO_ROOM, PASSING, full
from stages.ground.places import step_name, steps_in
from stages.keeping.sealed import FileRecord, SaveError, manifest_hash, seal, verify

DAMAGED = "damaged-"


@dataclass(frozen=True)
class Key:
    """Names an entry: whose it is (a stage, and its identity's id), its kind, and its name among those."""

    stage: str
    identity: str
    kind: str
    name: str


@dataclass(frozen=True)
class Part:
    """A part of an entry: a file that nobody may write to, and its size and content as they were sealed."""

    path: Path
    record: FileRecord


class Store(Protocol):
    """Where entries are. An entry consists of parts, files with a name; the mark that it is whole is written last."""

    def begin(self, key: Key, size: int) -> None:
        """Make room for an entry of about `size` bytes; what was begun under its key before is forgotten."""

    def put(self, key: Key, fill: Callable[[Path], object]) -> None:
        """Add parts to an entry that was begun: `fill` writes them into a folder of the store's. From any process."""

    def commit(self, key: Key) -> dict[str, FileRecord]:
        """The entry is whole, and there from now on, in the place of an older one of its key; its parts' records."""

    def invalidate(self, key: Key) -> None:
        """The entry is there no more, its mark first of all; its bytes stay for a person to look at."""

    def remove(self, key: Key) -> None:
        """The entry is gone, its mark first of all, and with it its bytes."""

    def read(self, key: Key) -> dict[str, Part]:
        """The parts of an entry by name, verified. Raises DamagedError."""

    def path(self, key: Key, part: str) -> Path:
        """Where a part is, if it is there: unverified."""

    def names(self, stage: str, identity: str, kind: str) -> list[str]:
        """The names of the entries that were committed; they are not verified."""

    def fingerprint(self, key: Key) -> str:
        """8 hex digits that name the content of an entry. Raises OSError if it is not there."""

    def recover(self, stage: str, identity: str, kind: str) -> None:
        """Clear what a process that was killed left half-made. By the only writer, before it begins."""


class DiskStore:
    """Entries are folders `root/<identity>/<kind>/<name>/`, and their mark is `manifest.json`.

    `begin`, `put` and `commit` raise SaveError where the disk refuses it: no space, no permission, or any other
    OSError. Entries that were committed stay.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._sizes: dict[Key, int] = {}

    def begin(self, key: Key, size: int) -> None:
        self._sizes[key] = size
        with self._disk_errors(key):
            staging = self._staging(key)
            disk.remove(staging)
            staging.mkdir(parents=True)

    def put(self, key: Key, fill: Callable[[Path], object]) -> None:
        with self._disk_errors(key):
            fill(self._staging(key))

    def commit(self, key: Key) -> dict[str, FileRecord]:
        with self._disk_errors(key):
            staging = self._staging(key)
            manifest = seal(staging, self._about(key))
            disk.put_in_place(staging, self._path(key))
            del self._sizes[key]
            return manifest.files

    def invalidate(self, key: Key) -> None:
        path, number = self._path(key), 0
        while (aside := path.with_name(f"{DAMAGED}{path.name}{f'-{number}' * bool(number)}")).exists():
            number += 1
        path.rename(aside)
        disk.fsync(path.parent)

    def remove(self, key: Key) -> None:
        disk.remove(self._path(key))

    def read(self, key: Key) -> dict[str, Part]:
        path = self._path(key)
        return {name: Part(path / name, record) for name, record in verify(path, self._about(key)).files.items()}

    def path(self, key: Key, part: str) -> Path:
        return self._path(key) / part

    def names(self, stage: str, identity: str, kind: str) -> list[str]:
        try:
            found = [path.name for path in (self._root / identity / kind).iterdir() if path.is_dir()]
        except OSError:
            return []
        # One that has lost its mark is damaged, and whoever reads it says so.
        return [name for name in found if not name.startswith((".", DAMAGED))]

    def fingerprint(self, key: Key) -> str:
        return manifest_hash(self._path(key))

    def recover(self, stage: str, identity: str, kind: str) -> None:
        disk.remove_temporaries(self._root / identity / kind)

    def _path(self, key: Key) -> Path:
        return self._root / key.identity / key.kind / key.name

    def _staging(self, key: Key) -> Path:
        return disk.temporary(self._path(key))

    @staticmethod
    def _about(key: Key) -> dict[str, str]:
        return {"stage": key.stage, "identity": key.identity, "kind": key.kind, "name": key.name}

    @contextmanager
    def _disk_errors(self, key: Key) -> Iterator[None]:
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, SafetensorError) as error:
            shutil.rmtree(self._staging(key), ignore_errors=True)
            folder = self._path(key).parent
            place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
            no_room = getattr(error, "errno", None) in NO_ROOM or "No space left" in str(error)
            raise SaveError(
                f"{key.kind} {key.name} could not be written to {folder}: {full(place) if no_room else error}; it "
                f"needs {self._sizes[key]} bytes, {shutil.disk_usage(place).free} are free; what was kept before "
                "stays: make room, or move the runs with HOLDFAST_RUNS, and run the same command again",
                passes=no_room or getattr(error, "errno", None) in PASSING,
            ) from error


@dataclass(frozen=True)
class Shelf:
    """The entries of one kind of a run that are named after steps."""

    store: Store
    stage: str
    identity: str
    kind: str

    def key(self, step: int) -> Key:
        return Key(self.stage, self.identity, self.kind, step_name(step))

    def steps(self) -> list[int]:
        """The steps of the entries that were committed, newest first; they are not verified."""
        return steps_in(self.store.names(self.stage, self.identity, self.kind))

    def invalidate(self, step: int) -> None:
        """See `Store.invalidate`; where there is no entry of this step, nothing is done."""
        if step in self.steps():
            self.store.invalidate(self.key(step))

    def remove_but(self, kept: set[int]) -> None:
        """Remove the entries of all other steps."""
        for step in set(self.steps()) - kept:
            self.store.remove(self.key(step))
