"""`runs/`: one folder a run, named by its identity. What is in it is listed at `RunFolder`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from stages.config.errors import UserError
from stages.run.identity import Identity
from stages.storage import files

RUNS_VARIABLE = "HOLDFAST_RUNS"
FINISHED_KEPT = 3
# How long a start waits for a trainer that was told to stop and is still saving.
STOPPING_SECONDS = 120


def runs_root() -> Path:
    """The folder of all runs: $HOLDFAST_RUNS, else `runs` in the repository.

    DVC sets DVC_ROOT; in `dvc exp run --temp` and its queue it is the parent repository, which outlives them.
    """
    if RUNS_VARIABLE in os.environ:
        return Path(os.environ[RUNS_VARIABLE]).expanduser().resolve()
    return Path(os.environ.get("DVC_ROOT", ".")).resolve() / "runs"


class RunFolder:
    """State of one run, outside DVC's sight.

    identity.json   what decides its result
    checkpoints/    see stages.run.checkpoint
    candidates/     step-…/: a model each, with its manifest
    history/        train.tsv, eval.tsv: become plots/ when the run is done
    finished.json   there once the run is done
    log.jsonl       starts, stops, saves, with the clock; for people
    lock            held by the one process that trains
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.candidates = path / "candidates"
        self.history = path / "history"
        self._lock: IO[str] | None = None

    @classmethod
    def of(cls, identity: Identity) -> RunFolder:
        return cls(runs_root() / identity.id)

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def finished(self) -> bool:
        return (self.path / "finished.json").exists()

    def identity_values(self) -> dict[str, Any] | None:
        """identity.json, or None if it is not there or not readable."""
        try:
            values = json.loads((self.path / "identity.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return values if isinstance(values, dict) else None

    def create(self, identity: Identity) -> bool:
        """Make the folder; whether it was not there.

        Raises:
            UserError: if it cannot be written.
        """
        try:
            new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            if self.identity_values() != identity.values:
                files.write_text(self.path / "identity.json", files.dumps(identity.values))
            return new
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); make room or permission, or set {RUNS_VARIABLE}"
            ) from None

    def acquire(self) -> None:
        """Take the run's lock; it goes with the process, however that ends, so a stale one never blocks.

        Raises:
            UserError: another process holds it; its pid is named. One that is stopping is waited for.
        """
        self._lock = os.fdopen(os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8")
        deadline, announced = time.monotonic() + STOPPING_SECONDS, False
        while True:
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                self._lock.seek(0)
                pid, _, stopping = self._lock.read().strip().partition(" ")
                if not stopping or time.monotonic() > deadline:
                    raise UserError(
                        f"run {self.id} is being trained by process {pid or 'unknown'}; "
                        "wait for it, or stop it and run the same command again"
                    ) from None
                if not announced:
                    print(f"waiting for process {pid}, which is saving run {self.id}", file=sys.stderr, flush=True)
                    announced = True
                time.sleep(0.2)
        self._write_lock(str(os.getpid()))

    def release(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def held_by(self) -> str | None:
        """The pid of the process that trains this run, or None. Not for a process that holds the lock itself."""
        path = self.path / "lock"
        if not path.exists():
            return None
        with path.open("r+", encoding="utf-8") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return (file.read().split() or ["unknown"])[0]
        return None

    def announce_stop(self) -> None:
        """Tell a second start, through the lock's text, that this process is about to end."""
        self._write_lock(f"{os.getpid()} stopping")

    def _write_lock(self, text: str) -> None:
        """One write of one length, so that a reader sees the old text or the new; of no weight if the disk is full."""
        assert self._lock is not None
        with contextlib.suppress(OSError):
            os.pwrite(self._lock.fileno(), text.ljust(40).encode() + b"\n", 0)

    def unfinish(self) -> None:
        """It trains again: its last state was damaged."""
        (self.path / "finished.json").unlink(missing_ok=True)

    def finish(self) -> None:
        files.write_text(self.path / "finished.json", files.dumps({"finished": _now()}))

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
        path = self.path / "lock"
        return path.stat().st_mtime if path.exists() else 0.0


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def list_runs() -> list[RunFolder]:
    """All runs, newest first."""
    root = runs_root()
    paths: Iterator[Path] = root.iterdir() if root.is_dir() else iter(())
    runs = [RunFolder(p) for p in paths if not p.name.startswith(".") and (p / "identity.json").exists()]
    return sorted(runs, key=lambda run: (-run.used, run.id))


def remove_old_finished(current: RunFolder) -> None:
    """Keep the newest finished runs, so that going back to one publishes at once; a killed run is never removed."""
    finished = [run for run in list_runs() if run.finished and run.id != current.id]
    for run in finished[FINISHED_KEPT - 1 :]:
        # Another process may be publishing it, or it may belong to somebody else.
        with contextlib.suppress(UserError, OSError):
            run.acquire()
            files.remove(run.path)
            current.log("removed", run=run.id)
