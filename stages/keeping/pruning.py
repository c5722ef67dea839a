"""Removing runs: by name, all finished ones, or those beyond a limit; what is removed is said."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from stages.ground import disk
from stages.ground.errors import UserError, quote
from stages.keeping.folder import RunFolder, list_runs, runs_root, trained
from stages.keeping.sealed import FORMAT

LIMIT_VARIABLE = "HOLDFAST_RUNS_LIMIT"


def runs_limit() -> int | None:
    """$HOLDFAST_RUNS_LIMIT in bytes; None, no limit, if it is unset or empty. Raises UserError if it is no number."""
    value = os.environ.get(LIMIT_VARIABLE) or None
    if value is not None and not (value.isascii() and value.isdecimal()):
        raise UserError(f"{LIMIT_VARIABLE} is {quote(value)}; it should be a number of bytes, such as 20000000000")
    return None if value is None else int(value)


def _sources() -> set[str]:
    """The runs that others start from and have not saved anything of their own yet."""
    waiting = [run for run in trained() if not run.finished and not run.checkpoints.steps()]
    named = [(run.identity_values() or {}).get("train.init_from_run") or "" for run in waiting]
    return {str(reference).partition("/")[0] for reference in named}


def removable() -> list[RunFolder]:
    """The finished runs, those used longest ago first. Of another format none is ever removed unasked."""
    return [run for run in trained() if run.finished and run.format == FORMAT][::-1]


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


def runs_named(ids: list[str]) -> Iterator[RunFolder]:
    """The runs of these ids. Raises UserError if there is none of an id."""
    known = {run.id: run for run in list_runs()}
    for name in ids:
        if name not in known:
            raise UserError(f"{runs_root()}: there is no run {quote(name)}; there are {', '.join(known) or 'none'}")
    for name in ids:
        yield known[name]
