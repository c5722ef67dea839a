"""Ends a process in which nothing happens any more: whoever waits for it starts it again, or somebody else."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

from stages.ground.errors import say
from stages.ground.words import Exit, end_soon, leave_word

TICK_SECONDS = 1.0
# What is slow by nature (an atom of a slow metric, a save to a slow disk) may take this much longer than it ever did.
SLOWEST_FACTOR = 3.0
_signs = 0


def sign_of_life() -> None:
    """A step, a batch, an atom or a save is done."""
    global _signs
    _signs += 1


@contextlib.contextmanager
def watch(seconds: float, log: Callable[..., None]) -> Iterator[None]:
    """In here the process ends with 75 if there is no sign of life for `seconds`, and for three times as long as one
    ever took before. `log` is given the stacks of all threads then. Time in which the whole process was stopped
    (SIGSTOP, a laptop's lid) does not count."""
    over, tick = threading.Event(), min(TICK_SECONDS, seconds / 10)

    def look() -> None:
        before, quiet, slowest, last = _signs, 0.0, 0.0, time.monotonic()
        while not over.wait(tick):
            now = time.monotonic()
            quiet, last = quiet + min(now - last, 2 * tick), now
            if _signs != before:
                before, quiet, slowest = _signs, 0.0, max(slowest, quiet)
            elif quiet > max(seconds, SLOWEST_FACTOR * slowest):
                _end(quiet, log)

    thread = threading.Thread(target=look, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _end(quiet: float, log: Callable[..., None]) -> None:
    # What hangs may be the disk, or whoever reads what is said here.
    end_soon(Exit.AGAIN)
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = {
        names.get(ident, str(ident)): "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
    }
    line = (
        f"no step, atom or save for {quiet:.0f} s (train.hang_seconds): ended; the stacks of all threads are in the "
        "run's log.jsonl; run the same command again to go on, with more hang_seconds if something does take so long"
    )
    leave_word(Exit.AGAIN, line)
    log("hang", seconds=round(quiet), stacks=stacks)
    say(line)
    os._exit(Exit.AGAIN)
