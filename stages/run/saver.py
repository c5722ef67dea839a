"""When to save, and saving beside the loop: the loop pays for one copy, a thread pays for the disk."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from stages.ground.watchdog import sign_of_life
from stages.keeping.sealed import SaveError
from stages.modeling.codec import Tree
from stages.run.checkpoint import Checkpoints, Snapshot

# The first save after a start comes with the first step. From then on a save may cost this share of the time since the
# last one, and a kill this share of the time since the start: a machine that is taken away every 45 s still gets far.
COST_SHARE = 0.1
LOSS_SHARE = 0.1
FIRST_SECONDS = 1.0


class TimeSchedule:
    """`save_strategy: time`. Due soon after the start, then ever less often, down to every `save_seconds`.

    Args:
        save_seconds: the longest distance between two saves, in seconds.
        clock: monotonic seconds; another one in tests.
    """

    def __init__(self, save_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = save_seconds
        self._clock = clock
        self._start, self._last = clock(), -math.inf

    def is_due(self, cost_seconds: float) -> bool:
        """Whether to save now, where the last save cost the loop and the processor `cost_seconds`."""
        tolerable = LOSS_SHARE * (self._last - self._start)
        distance = min(self._limit, max(FIRST_SECONDS, cost_seconds / COST_SHARE, tolerable))
        return self._clock() - self._last >= distance

    def begun(self) -> None:
        """A save begins."""
        self._last = self._clock()


class Saver:
    """Writes checkpoints in a thread, one in flight. A failure of the thread is raised as SaveError by the next
    `check`, `save` or `wait`."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._thread: threading.Thread | None = None
        self._error: SaveError | None = None
        # What the last save took from training: the loop's stall, and processor time beside it. Waiting for a disk, or
        # for others on a busy machine, takes nothing.
        self._stall = self._processor = 0.0

    @property
    def last_cost(self) -> float:
        """Seconds that the last save took from training."""
        return self._stall + self._processor

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise what the last save failed with, if it did."""
        if self._error is not None and not self.busy:
            error, self._error = self._error, None
            raise error

    def save(self, step: int, state: Callable[[], dict[str, Tree]]) -> None:
        """Copy the state now and commit it beside the loop, after the one in flight is done."""
        begin = time.monotonic()
        self.wait()
        try:
            snapshot = Snapshot.of(step, state())
        except TypeError as error:
            raise SaveError(f"checkpoint of step {step}: {error}") from None
        self._stall = time.monotonic() - begin
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self._checkpoints.write(snapshot)
        except SaveError as error:
            self._error = error
        except Exception as error:  # the loop must hear of whatever ended its saves
            self._error = SaveError(f"checkpoint of step {snapshot.step} failed: {type(error).__name__}: {error}")
        self._processor = time.thread_time()
        sign_of_life()

    def wait(self) -> None:
        """Return when nothing is in flight; raise what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()
