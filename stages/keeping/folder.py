"""`runs/`: one folder a run, named by its identity. What is in it is listed at `RunFolder`."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from stages.config.pipeline import load_stage
from stages.ground import disk
from stages.ground.errors import UserError, quote
from stages.ground.places import repository, step_name, steps_in
from stages.keeping.atoms import KIND as ATOMS
from stages.keeping.atoms import Atoms, fingerprint
from stages.keeping.identity import Identity, identify
from stages.keeping.lock import Lock
from stages.keeping.sealed import FORMAT, VERSIONS
from stages.keeping.store import DiskStore, Key, Shelf

RUNS_VARIABLE = "HOLDFAST_RUNS"
PLACE = "workspace.txt"


def runs_root() -> Path:
    """The folder of all runs: $HOLDFAST_RUNS, else `runs`; if relative, in the project that a person sees.

    In `dvc exp run --temp` and its queue the current folder is in a copy that DVC removes afterwards, below .dvc/tmp of
    the repository, which DVC_ROOT names then.
    """
    here = Path.cwd()
    root = Path(os.environ.get("DVC_ROOT") or here).resolve()
    if here.is_relative_to(root / ".dvc/tmp"):
        here = root / here.relative_to(repository() or here)
    named = os.environ.get(RUNS_VARIABLE) or "runs"
    try:
        return here / Path(named).expanduser()
    except RuntimeError:
        raise UserError(f"{RUNS_VARIABLE} is {quote(named)}, but there is no such user; write the whole path") from None


class RunFolder:
    """State of one run of a stage, outside DVC's sight.

    identity.json     the stage, what decides its result, and the format of all that is in the folder
    environment.json  what surrounds it (see stages.keeping.environment)
    atoms/            what is done of a piece of work; see stages.keeping.atoms
    checkpoints/      step-…/: see stages.run.checkpoint
    candidates/       step-…/: a model each
    result/           final/: there once the run is done; of train, what publishing needs; see stages.run.result
    log.jsonl         starts, stops, saves, with the clock; for people
    lock              held by the one process that works on it

    The entries of these folders are those of a `Store`. Checkpoints and candidates are train's, whose folder stays;
    that of another stage goes once DVC has written down that it is done.
    """

    def __init__(self, path: Path, stage: str = "train") -> None:
        self.path, self.stage = path, stage
        self.store = DiskStore(path.parent)
        self.checkpoints = Shelf(self.store, stage, path.name, "checkpoints")
        self.candidates = Shelf(self.store, stage, path.name, "candidates")
        self.result = Key(stage, path.name, "result", "final")
        self.lock = Lock(path / "lock", f"run {path.name}")

    @classmethod
    def of(cls, identity: Identity) -> RunFolder:
        return cls(runs_root() / identity.id, identity.stage)

    @classmethod
    def at(cls, path: Path) -> RunFolder:
        """The run in a folder that is there, of whichever stage."""
        stage = cls(path)._read_any("identity.json").get("stage")
        return cls(path, stage if isinstance(stage, str) else "train")

    def atoms(self, scope: str) -> Atoms:
        """Those of a piece of its work, in its environment as it is now."""
        return Atoms(self.store, self.stage, self.id, scope, fingerprint(self.environment()))

    def atom_keys(self) -> list[Key]:
        """Those of all its atoms."""
        return [Key(self.stage, self.id, ATOMS, name) for name in self.store.names(self.stage, self.id, ATOMS)]

    def steps_in_atoms(self) -> list[int]:
        """The steps that the scopes of its atoms name, as in `validation.step-00000230`."""
        return steps_in({part for key in self.atom_keys() for part in key.name.split(".")})

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
        return values if isinstance(values, dict) else {}

    def threads(self) -> int | None:
        """The intra-op threads of its environment; None if they are not known."""
        found = self.environment().get("threads")
        return found if type(found) is int else None

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
        for kind in (self.checkpoints.kind, self.candidates.kind, self.result.kind, ATOMS):
            self.store.recover(self.stage, self.id, kind)

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
    def state(self) -> str:
        """Who works on it, or how it ended, for people."""
        if self.finished:
            return "finished"
        holder = self.lock.holder()
        if holder:
            return f"running: process {holder}"
        last: dict[str, Any] = next(reversed(list(self._events())), {})
        if last.get("event") == "stopped":
            return f"stopped: {last.get('signal') or 'a signal to another process'}"
        if last.get("event") == "hang":
            return f"hung for {last.get('seconds')} s"
        return f"failed: {last.get('reason')}" if last.get("event") == "failed" else "killed"

    @property
    def done(self) -> str:
        """How far it is, for people: the step of its newest checkpoint, and how many atoms are kept."""
        steps, atoms = self.checkpoints.steps(), len(self.atom_keys())
        return ", ".join([f"step {step}" for step in steps[:1]] + [f"{atoms} atoms"] * bool(atoms))

    @property
    def processes(self) -> str:
        """In how many processes it was trained, start by start, for people; starts in a row with one number are one."""
        starts = (event.get("processes") for event in self._events() if event.get("event") == "start")
        return ", ".join(str(number) for number, _ in itertools.groupby(starts) if number is not None)

    def _events(self) -> Iterator[dict[str, Any]]:
        """What `log` wrote, the oldest first; lines that a kill cut short are left out."""
        lines: list[str] = []
        with contextlib.suppress(OSError, ValueError):
            lines = (self.path / "log.jsonl").read_text(encoding="utf-8").splitlines()
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                values = json.loads(line)
                if isinstance(values, dict):
                    yield values

    @property
    def used(self) -> float:
        """Seconds since the epoch of the last start: what "newest" means among runs."""
        try:
            return self.lock.path.stat().st_mtime
        except OSError:
            return 0.0

    def finish(self) -> None:
        """A stage other than train is done, in this workspace: from here on its work is kept only until DVC has written
        that down. Raises SaveError."""
        self.store.begin(self.result, 0)
        self.store.put(self.result, lambda folder: (folder / PLACE).write_text(str(Path.cwd()), encoding="utf-8"))
        self.store.commit(self.result)
        self.log("finished")

    def finished_in(self) -> Path | None:
        """The workspace in which `finish` was called; None if it was not, or the run is train's."""
        if self.stage == "train" or self.format != FORMAT or not self.finished:
            return None
        try:
            return Path(self.store.path(self.result, PLACE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

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
                    found.append(RunFolder.at(path))
    return sorted(found, key=lambda run: (-run.used, run.id))


def trained() -> list[RunFolder]:
    """Those of train, newest first."""
    return [run for run in list_runs() if run.stage == "train"]


def version_of(number: Any) -> str:
    """`Holdfast 0.1`: the version that reads a format."""
    version = VERSIONS.get(number) if type(number) is int else None
    return f"Holdfast {version}" if version else "another Holdfast"


def threads_of_run(current: int) -> int | None:
    """The intra-op threads of the run that trained what the stages after train read; None if it is not known here, or
    no run had another number than `current`."""
    if {run.threads() or current for run in trained()} <= {current}:
        return None  # without reading all of train's deps
    try:
        return RunFolder.of(identify(load_stage("train"))).threads()
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
    runs = {run.id: run for run in trained()}
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
