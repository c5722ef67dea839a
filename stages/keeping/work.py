"""A stage other than train at work: what is done of it is kept in a run's folder until DVC knows that it is done."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.config.pipeline import Stage
from stages.ground import disk
from stages.ground.errors import UserError, say
from stages.ground.places import repository
from stages.keeping.environment import difference
from stages.keeping.folder import RunFolder, list_runs, runs_root
from stages.keeping.identity import identify
from stages.keeping.lock import BusyError, Lock


def lock_outs(stage: str) -> Lock:
    """Take the lock on the outs of `stage` in this workspace, so that a stage whose DVC was killed and its successor
    never write the same place.

    Raises:
        BusyError: another process has it.
        UserError: it cannot be written.
    """
    root, here = repository(), Path.cwd()
    # Where DVC keeps its own; a repository may hold several projects.
    folder = root / ".dvc/tmp" / here.relative_to(root) if root else runs_root()
    lock = Lock(folder / f"{stage}.lock", f"stage {stage} of this workspace")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise UserError(f"{lock.path}: cannot be written ({error.strerror}); make room or give permission") from None
    return lock


@contextlib.contextmanager
def work_of(stage: Stage, environment: dict[str, Any]) -> Iterator[RunFolder]:
    """Where a stage other than train, which alone may write its outs in here, keeps what is done of it in this
    environment. What is left undone stays for the next start.

    Another workspace that is at the same work has the folder; then it is one of this process's own, which goes with it.

    Raises:
        BusyError: another process writes the outs.
        UserError: the folder cannot be written.
        SaveError: that the stage is done cannot be kept.
    """
    outs = lock_outs(stage.name)
    sweep()
    identity = identify(stage)
    run = RunFolder.of(identity)
    try:
        run.enter(identity)
    except BusyError:
        run = RunFolder(runs_root() / f".{identity.id}-{os.getpid()}{disk.TEMPORARY}", stage.name)
        run.enter(identity)
    try:
        run.recover()
        run.store.remove(run.result)
        _settle_environment(run, environment)
        run.log("start", environment=environment)
        yield run
        run.finish()
    except UserError as error:
        run.log("failed", reason=str(error))
        raise
    finally:
        if run.id != identity.id:
            disk.remove(run.path)
        run.lock.release()
        outs.release()


def _settle_environment(run: RunFolder, environment: dict[str, Any]) -> None:
    before, done = run.environment(), run.atom_keys()
    if done and before != environment:
        changes = ", ".join(difference(before, environment))
        say(f"{run.stage}: the environment changed ({changes}); what was done in the one before is done again")
        for key in done:
            run.store.remove(key)
    run.keep_environment(environment)


def sweep() -> None:
    """Remove what stages other than train kept, where DVC has written down since that they are done, and what is left
    of folders of a process's own."""
    written = Path("dvc.lock").stat().st_mtime if Path("dvc.lock").is_file() else 0.0
    for run in list_runs():
        place = run.finished_in()
        if place is not None and (not place.is_dir() or (place == Path.cwd() and run.used < written)):
            with contextlib.suppress(UserError, OSError):  # another workspace is at the same work
                run.remove()
    for path in runs_root().glob(f".*-*{disk.TEMPORARY}"):
        with contextlib.suppress(UserError, OSError):  # its process is at it
            RunFolder(path).remove()
