"""`runs/`: one folder a run, named by its identity. What is in it is listed at `RunFolder`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from stages.config.pipeline import load_stage
from stages.ground import disk
from stages.ground.errors import UserError, quote
from stages.ground.places import step_name
from stages.keeping.identity import Identity, identify
from stages.keeping.lock import Lock
from stages.keeping.sealed import FORMAT, VERSIONS
from stages.keeping.store import DiskStore, Key, Shelf

RUNS_VARIABLE = "HOLDFAST_RUNS"
LIMIT_VARIABLE = "HOLDFAST_RUNS_LIMIT"


def runs_root() -> Path:
    """The folder of all runs: $HOLDFAST_RUNS, else `runs`; if relative, in the project that a person sees.

    In `dvc exp run --temp` and its queue the current folder is in a copy that DVC removes afterwards, below .dvc/tmp of
    the repository, which DVC_ROOT names then.
    """
    here = Path.cwd()
    repository = Path(os.environ.get("DVC_ROOT") or here).resolve()
    if here.is_relative_to(repository / ".dvc/tmp"):
        copy = next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)
        here = repository / here.relative_to(copy)
    named = os.environ.get(RUNS_VARIABLE) or "runs"
    try:
        return here / Path(named).expanduser()
    except RuntimeError:
        raise UserError(f"{RUNS_VARIABLE} is {quote(named)}, but there is no such user; write the whole path") from None


def runs_limit() -> int | None:
    """$HOLDFAST_RUNS_LIMIT in bytes; None, no limit, if it is unset or empty. Raises UserError if it is no number."""
    value = os.environ.get(LIMIT_VARIABLE) or None
    if value is not None and not (value.isascii() and value.isdecimal()):
        raise UserError(f"{LIMIT_VARIABLE} is {quote(value)}; it should be a number of bytes, such as 20000000000")
    return None if value is None else int(value)


class RunFolder:
    """State of one run, outside DVC's sight.

    identity.json     what decides its result, and the format of all that is in the folder
    environment.json  what surrounds it (see stages.keeping.environment)
    checkpoints/      step-…/: see stages.run.checkpoint
    candidates/       step-…/: a model each
    result/           final/: what publishing needs, there once the run is done; see stages.run.result
    log.jsonl         starts, stops, saves, with the clock; for people
    lock              held by the one process that trains

    The entries of the three folders are those of a `Store`.
    """

    def __init__(self, path: Path, stage: str = "train") -> None:
        self.path = path
        self.store = DiskStore(path.parent)
        self.checkpoints = Shelf(self.store, stage, path.name, "checkpoints")
        self.candidates = Shelf(self.store, stage, path.name, "candidates")
        self.result = Key(stage, path.name, "result", "final")
        self.lock = Lock(path / "lock", f"run {path.name}")

    @classmethod
    def of(cls, identity: Identity) -> RunFolder:
        return cls(runs_root() / identity.id, identity.stage)

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def finished(self) -> bool:
        return bool(self.store.names(self.result.stage, self.id, self.result.kind))

    def _read(self, name: str) -> dict[str, Any]:
        """A record of this run; empty if it is not there, not readable, or of another format."""
        values = self._read_any(name)
        return values if values.get("format") == FORMAT else {}

    def _read_any(self, name: str) -> dict[str, Any]:
        if not (self.path / name).is_file():  # of a pipe the reader would wait for ever
            return {}
        try:
            values = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return values if isinstance(values, dict) else {}

    def _write(self, name: str, **values: Any) -> None:
        disk.write_text(self.path / name, disk.dumps({"format": FORMAT, **values}))

    @property
    def format(self) -> Any:
        """The number of the format that this run is kept in; 1 where none is written down, None if it is unreadable."""
        values = self._read_any("identity.json")
        return values.get("format", 1) if values else None

    def identity_values(self) -> dict[str, Any] | None:
        """What decides its result; None if that is not there, not readable, or of another format."""
        values = self._read("identity.json").get("values")
        return values if isinstance(values, dict) else None

    def environment(self) -> dict[str, Any]:
        """What surrounded it last (see stages.keeping.environment); empty if that is not known."""
        values = self._read("environment.json").get("values")
        return values if isinstance(values, dict) and type(values.get("threads")) is int else {}

    def keep_environment(self, environment: dict[str, Any]) -> None:
        """Write the environment down for the stages after train."""
        if self.environment() != environment:
            self._write("environment.json", values=environment)

    def create(self, identity: Identity) -> bool:
        """Make the folder; whether it was not there.

        Raises:
            UserError: if it cannot be written.
            FileNotFoundError: somebody removed it in between.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = not self.path.exists()
            self.path.mkdir(exist_ok=True)
            if self.identity_values() != identity.values:
                self._write("identity.json", stage=identity.stage, values=identity.values)
            return new
        except OSError as error:
            if isinstance(error, FileNotFoundError | FileExistsError) and self._comes_and_goes():
                raise FileNotFoundError(self.path) from error
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); make room or permission, or set {RUNS_VARIABLE}"
            ) from None

    def _comes_and_goes(self) -> bool:
        """Whether the folder is somebody else's to remove at this moment, and nothing stands in its place."""
        return self.path.parent.is_dir() and (self.path.is_dir() or not os.path.lexists(self.path))

    def enter(self, identity: Identity) -> bool:
        """Make the folder and take its lock; whether it was not there.

        Raises:
            UserError: if it cannot be written, or another process has it.
        """
        new = False
        while True:
            # Somebody may remove it in between, or begin to and be waited for: what is locked is made whole again.
            with contextlib.suppress(FileNotFoundError):
                new = self.create(identity) or new
                self.lock.acquire()
                self.create(identity)
                return new

    def recover(self) -> None:
        """Clear what a process that was killed left half-made. By whoever has the lock."""
        for kind in (self.checkpoints.kind, self.candidates.kind, self.result.kind):
            self.store.recover(self.result.stage, self.id, kind)

    def reference(self, step: int) -> str:
        """`<run>/step-00000230@1a2b3c4d`: what `train.init_from_run` names a checkpoint by."""
        return f"{self.id}/{step_name(step)}@{self.store.fingerprint(self.checkpoints.key(step))}"

    def newest_reference(self) -> str | None:
        """`reference` of the newest checkpoint; None if there is none that can be read."""
        for step in self.checkpoints.steps():
            with contextlib.suppress(OSError):
                return self.reference(step)
        return None

    @property
    def bytes(self) -> int:
        """What it takes of the disk, as far as it can be read."""
        total = 0
        for place, _, names in os.walk(self.path):
            for name in names:
                with contextlib.suppress(OSError):
                    total += Path(place, name).lstat().st_size
        return total

    def log(self, event: str, **values: Any) -> None:
        """Append a line to log.jsonl. A line that a kill cut short stays, and is followed by a whole one."""
        line = json.dumps({"time": _now(), "pid": os.getpid(), "event": event, **values})
        with contextlib.suppress(OSError), (self.path / "log.jsonl").open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode() + b"\n")

    @property
    def used(self) -> float:
        """Seconds since the epoch of the last start: what "newest" means among runs."""
        try:
            return self.lock.path.stat().st_mtime
        except OSError:
            return 0.0

    def remove(self, unfinished: bool = True) -> None:
        """Remove it all. Raises UserError or OSError if another process has it, it belongs to somebody else, or it is
        not finished and `unfinished` is false."""
        self.lock.acquire()
        try:
            if not unfinished and not self.finished:  # whatever it was before: a start may have begun it anew
                raise UserError("it is not finished any more; name it to remove it all the same")
            disk.remove(self.path)
        finally:
            self.lock.release()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def list_runs() -> list[RunFolder]:
    """All runs that can be read, newest first, those of other formats too. Nothing is written."""
    found = []
    with contextlib.suppress(OSError):
        for path in runs_root().iterdir():
            with contextlib.suppress(OSError):
                if not path.name.startswith(".") and os.access(path, os.R_OK | os.X_OK):
                    (path / "identity.json").stat()
                    found.append(RunFolder(path))
    return sorted(found, key=lambda run: (-run.used, run.id))


def _sources() -> set[str]:
    """The runs that others start from and have not saved anything of their own yet."""
    waiting = [run for run in list_runs() if not run.finished and not run.checkpoints.steps()]
    named = [(run.identity_values() or {}).get("train.init_from_run") or "" for run in waiting]
    return {str(reference).partition("/")[0] for reference in named}


def removable() -> list[RunFolder]:
    """The finished runs, those used longest ago first. Of another format none is ever removed unasked."""
    return [run for run in list_runs() if run.finished and run.format == FORMAT][::-1]


def left_by_a_prune() -> list[RunFolder]:
    """What a prune that was killed left half-removed, by the name that it lies under."""
    with contextlib.suppress(OSError):
        return [RunFolder(path) for path in sorted(runs_root().glob(f".*{disk.REMOVED}"))]
    return []


def prune(runs: list[RunFolder], say: Callable[[str], None], unfinished: bool = True) -> None:
    """Remove `runs`, each with a line that says so, or why not; and what a prune that was killed left half-removed.
    One that is not finished goes only if `unfinished`."""
    for rest in left_by_a_prune():
        size = rest.bytes
        with contextlib.suppress(OSError):  # another prune's, which is at it
            disk.remove(rest.path)
            say(f"removed {rest.id}, left by a prune that was killed ({size / 1e6:.0f} MB)")
    # A run that starts from another goes before it.
    sources = _sources()
    for run in sorted(runs, key=lambda run: run.id in sources):
        size = run.bytes
        if run.id in _sources():
            say(f"kept run {run.id}: another run starts from it and has saved nothing of its own yet")
            continue
        try:
            run.remove(unfinished)
            say(f"removed run {run.id} ({size / 1e6:.0f} MB)")
        except FileNotFoundError:
            say(f"run {run.id} was removed by somebody else")
        except UserError as error:
            say(f"kept run {run.id}: {error}")
        except OSError as error:
            say(f"kept run {run.id}: {error.strerror}")


def keep_within_limit(current: RunFolder, say: Callable[[str], None]) -> None:
    """Remove the finished runs that were used longest ago, while all runs together take more than the limit; never
    `current`, and never one that is not finished."""
    limit = runs_limit()
    if limit is None:
        return
    for run in removable():
        total = sum(run.bytes for run in list_runs())
        if total <= limit:
            return
        if run.id not in (current.id, *_sources()):
            say(f"all runs take {total} bytes, and {LIMIT_VARIABLE} is {limit}:")
            prune([run], say, unfinished=False)


def version_of(number: Any) -> str:
    """`Holdfast 0.1`: the version that reads a format."""
    version = VERSIONS.get(number) if type(number) is int else None
    return f"Holdfast {version}" if version else "another Holdfast"


def threads_of_run(current: int) -> int | None:
    """The intra-op threads of the run that trained what the stages after train read; None if it is not known here, or
    no run had another number than `current`."""
    if {run.environment().get("threads", current) for run in list_runs()} <= {current}:
        return None  # without reading all of train's deps
    try:
        return RunFolder.of(identify(load_stage("train"))).environment().get("threads")
    except UserError:
        return None


def find_source(reference: str) -> tuple[RunFolder, int]:
    """The run and step that `train.init_from_run` names.

    Raises:
        UserError: there is no such run or checkpoint, its content is another, it is of another format, or the
            checkpoint is not named; with the line to write.
    """
    named = f"train.init_from_run is {reference}"
    name, _, checkpoint = reference.partition("/")
    runs = {run.id: run for run in list_runs()}
    run = runs.get(name)
    if run is None:
        ours = ", ".join(filter(None, (run.newest_reference() for run in runs.values() if run.format == FORMAT)))
        raise UserError(f"{named}, but there is no such run; there are: {ours or 'none'}")
    if run.format != FORMAT:
        raise UserError(
            f"{named}, which is kept in format {run.format!r}, and this version reads format {FORMAT}; "
            f"use {version_of(run.format)} to go on with it"
        )
    newest = run.newest_reference()
    if newest is None:
        raise UserError(f"{named}, but that run has no checkpoint")
    if not checkpoint:
        raise UserError(f"{named}, which names no checkpoint; write train.init_from_run: {newest}")
    there = {run.reference(step): step for step in run.checkpoints.steps()}
    if reference not in there:
        raise UserError(f"{named}, but that run has no such checkpoint; it has {', '.join(there)}")
    return run, there[reference]


def runs_named(ids: list[str]) -> Iterator[RunFolder]:
    """The runs of these ids. Raises UserError if there is none of an id."""
    known = {run.id: run for run in list_runs()}
    for name in ids:
        if name not in known:
            raise UserError(f"{runs_root()}: there is no run {quote(name)}; there are {', '.join(known) or 'none'}")
    for name in ids:
        yield known[name]
