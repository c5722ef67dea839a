"""Being asked to stop: by a signal, or because the process that started this one died."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from stages.ground.errors import say
from stages.ground.places import repository
from stages.ground.words import Exit, leave_word

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
SECOND_CTRL_C_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1
# The process that a stage is started by: set by the child of `python -m stages repro` that becomes DVC, and for its
# workers by the launcher.
PARENT_PID = "HOLDFAST_PARENT_PID"
RWLOCK = Path(".dvc/tmp/rwlock")


Handler = Callable[[int, FrameType | None], None] | signal.Handlers


def on_stop_signals(handler: Handler) -> None:
    """Let `handler` have the stop signals; but not SIGHUP under `nohup`."""
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


class SecondCtrlC:
    """Tells a second SIGINT, at least two seconds after the first, from its repeats."""

    def __init__(self) -> None:
        self._first: float | None = None

    def is_it(self, number: int) -> bool:
        if number != signal.SIGINT:
            return False
        now = time.monotonic()
        if self._first is None:
            self._first = now
        return now - self._first >= SECOND_CTRL_C_SECONDS


class StopRequest:
    """Remembers the first stop signal; the loop looks at `signal` at its step boundaries.

    `on_request` is called once, with the first. Repeats change nothing, as a signal to the group and the parent's
    death often arrive as two. Only a second SIGINT at least two seconds after the first ends the process at once; the
    last checkpoint counts then.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.on_request: Callable[[], None] = lambda: None
        self._ctrl_c = SecondCtrlC()

    def install(self) -> None:
        on_stop_signals(self._handle)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """In here a signal ends the process at once: for waits that Python cannot leave, while there is nothing to
        save. Ends it as well if there was one before."""
        self.leave_if_asked()
        on_stop_signals(signal.SIG_DFL)
        yield
        self.install()

    def leave_if_asked(self) -> None:
        """End the process, with nothing to save, if a signal asked for it."""
        if self.signal is not None:
            line = f"stopped by {self.signal.name}; run the same command again to go on"
            say(line)
            leave_word(Exit.AGAIN, line)
            os._exit(Exit.AGAIN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        at_once = self._ctrl_c.is_it(number)
        if self.signal is None:
            self.signal = signal.Signals(number)
            self.on_request()
        elif at_once:
            os.write(2, b"\nended at once; run the same command again: it continues from the last checkpoint\n")
            os._exit(Exit.AGAIN)


def ignore_stop_signals(worker: int = 0) -> None:
    """For loader processes, whose end the trainer decides and no signal to the group, and for a trainer at its end."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def work_for(parent: int) -> None:
    """For a process that shares the work of process `parent`, which forked it: what ends that one ends it as well, and
    of the signals to the group it hears SIGTERM alone, with which a pool ends those that are left of it."""
    ignore_stop_signals()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _ask_for_signal()
    if os.getppid() != parent:
        os._exit(1)


def die_with_parent() -> None:
    """Ask for SIGTERM when the parent dies: DVC, killed alone, tells its children nothing."""
    _ask_for_signal()
    starter = os.environ.get(PARENT_PID) or _dvc_pid()
    if starter not in (None, str(os.getppid())):
        # A shell may stand between, as in `cmd: python -m … | tee log`: it outlives DVC, so DVC itself is watched.
        _watch(_is_running_above(int(starter)))


def _dvc_pid() -> str | None:
    """The pid of the DVC that runs this stage; None where it is not known, or there is none.

    DVC's own lock file names it as the writer of the stage's outs. One that was killed before this process came so far
    is not its parent any more, and sends no signal: then it is the pid of a process that is not above this one.
    """
    if "DVC_STAGE" not in os.environ:
        return None
    try:
        held = json.loads(((repository() or Path()) / RWLOCK).read_text(encoding="utf-8"))["write"]
        writers = {int(info["pid"]) for info in held.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not writers or os.getppid() in writers:
        return None  # the usual case: its death sends a signal
    import psutil

    above = {process.pid for process in psutil.Process().parents()}
    return str(next(iter(writers & above or writers)))


def _ask_for_signal() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        return
    parent = os.getppid()
    _watch(lambda: os.getppid() == parent)


def _is_running_above(pid: int) -> Callable[[], bool]:
    """Whether process `pid`, if it is one of those that this one comes from, is running still."""
    import psutil

    starter = next((process for process in psutil.Process().parents() if process.pid == pid), None)
    if starter is None:
        say(f"process {pid}, which started this stage, has ended: this stage ends too")
        return lambda: False

    def is_running() -> bool:
        try:
            return starter.is_running() and starter.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return is_running


def _watch(is_running: Callable[[], bool]) -> None:
    """Send this process SIGTERM as soon as what it looks at is not running any more."""

    def end() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def watch() -> None:
        while is_running():
            time.sleep(1)
        end()

    if not is_running():
        end()  # before there is anything to save
    else:
        threading.Thread(target=watch, name="parent-watch", daemon=True).start()
