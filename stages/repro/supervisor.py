"""DVC, and all that comes of it, from its start until nothing of it is left: signals, time, and how it ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from stages.ground.places import repository
from stages.ground.signals import PARENT_PID, SecondCtrlC, on_stop_signals
from stages.ground.words import FOLDER, Exit, Word, read_words
from stages.repro.healing import DVC_TMP

_PR_SET_CHILD_SUBREAPER = 36
TURN_SECONDS = 0.05
# What is left once DVC and the stages have ended (a logger's process, say) is asked to end, and then made to.
ASK_SECONDS, KILL_SECONDS = 3.0, 6.0


@dataclass(frozen=True)
class Ended:
    """How a start ended: `line` is for people."""

    code: Exit
    line: str


class Supervisor:
    """Starts `dvc repro` as often as it is asked to; what tells this process to stop tells the stage at work.

    Args:
        stop_after: seconds from now after which the stage is told to stop as if by SIGTERM; None: never.
    """

    def __init__(self, stop_after: float | None = None) -> None:
        self.told: str | None = None  # by what this process was told to stop
        self._deadline = None if stop_after is None else time.monotonic() + stop_after
        self._at_once = False
        self._ctrl_c = SecondCtrlC()
        self._signals: list[int] = []
        on_stop_signals(self._note)
        if sys.platform == "linux":  # what loses its parent becomes a child of this process, and is waited for
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._at_once = self._ctrl_c.is_it(number) or self._at_once
        self.told = self.told or signal.Signals(number).name
        self._signals.append(number)

    def _look_at_the_clock(self) -> None:
        if self.told is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self.told = "--stop-after"
            self._signals.append(signal.SIGTERM)

    def wait(self, seconds: float) -> None:
        """Let so much time pass, but for a word to stop."""
        end = time.monotonic() + seconds
        while self.told is None and time.monotonic() < end:
            self._look_at_the_clock()
            time.sleep(TURN_SECONDS)

    def run(self, arguments: Sequence[str]) -> Ended:
        """Run `dvc repro` with these `arguments` until nothing of it is left, in no process."""
        if self.told is not None:
            return Ended(Exit.AGAIN, f"stopped by {self.told}")
        root = repository()  # where nobody cleans up while it runs
        if root is not None:
            (root / DVC_TMP).mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="repro-", dir=root and root / DVC_TMP) as place:
            words = Path(place).absolute()
            dvc = _start_dvc(arguments, words)
            return judge(self._attend(dvc, words), read_words(words), dvc, self.told)

    def _attend(self, dvc: int, words: Path) -> int:
        """Until no process is left; DVC's exit code, negative for a signal."""
        code, last, asked = None, 0.0, 0.0
        handed: dict[int, int] = {}
        while True:
            self._look_at_the_clock()
            codes, is_any_left = _reap()
            code = codes.get(dvc, code)
            working = set() if self.told is None and code is None else _at_work(words)
            if code is None or working:
                last = time.monotonic()
            elif not is_any_left:
                return code
            if self._at_once:
                _end_all(psutil.Process.kill)
            elif self.told is not None and (working or code is None):
                self._hand_on(working or _without_word(dvc), handed)
                if not working and time.monotonic() - asked > 1:
                    os.kill(dvc, signal.SIGINT)  # between two stages; while one runs, DVC does not hear it
                    asked = time.monotonic()
            if time.monotonic() - last > ASK_SECONDS:
                _end_all(psutil.Process.kill if time.monotonic() - last > KILL_SECONDS else psutil.Process.terminate)
            time.sleep(TURN_SECONDS)

    def _hand_on(self, working: set[int], handed: dict[int, int]) -> None:
        """Give each of these processes the signals that it has not had; one that began since then the last of them."""
        received = self._signals[:]
        for pid in working:
            for number in received[handed.get(pid, len(received) - 1) :]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            handed[pid] = len(received)


def _start_dvc(arguments: Sequence[str], words: Path) -> int:
    environment = os.environ | {
        # dvc.yaml says `python`.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONHASHSEED": "0",
        PARENT_PID: str(os.getpid()),
        FOLDER: str(words),
    }
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "stages.repro.dvc", "repro", *arguments],
        environment,
    )


def _reap() -> tuple[dict[int, int], bool]:
    """The exit codes, by pid, of those children that have ended, and whether there are others: orphans are among
    them."""
    codes = {}
    try:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])
    except ChildProcessError:
        return codes, False
    return codes, True


def _at_work(words: Path) -> set[int]:
    """The processes of stages that have begun and not ended."""
    begun = {word.pid for word in read_words(words) if word.code is None}
    if sys.platform == "linux":  # elsewhere orphans are not below this one
        return begun & {process.pid for process in psutil.Process().children(recursive=True) if _lives(process)}
    return {pid for pid in begun if psutil.pid_exists(pid)}


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def _without_word(dvc: int) -> set[int]:
    """The processes of a stage that leaves none, which is a program of the user's; those at the ends of the tree."""
    found = set()
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(dvc).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "DVC_STAGE" in process.environ() and not process.children():
                    found.add(process.pid)
    return found


def _end_all(end: Callable[[psutil.Process], None]) -> None:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            end(process)


def judge(code: int, words: Sequence[Word], dvc: int, told: str | None) -> Ended:
    """How a start ended.

    Args:
        code: DVC's exit code, negative for a signal. But for 0 it says nothing.
        words: what the stages' processes left, and process `dvc`.
        told: by what `repro` was told to stop; None if it was not.
    """
    if code == 0:
        return Ended(Exit.DONE, "")
    of_stages = [word for word in words if word.code != 0 and word.pid != dvc]
    failed = of_stages or [word for word in words if word.pid == dvc]  # DVC knows less of what a stage failed with
    ended = [word for word in failed if word.code is not None]
    for word in ended:
        if word.code == Exit.MEND:
            return Ended(Exit.MEND, word.line)
    for word in ended:
        if word.code != Exit.AGAIN:
            return Ended(Exit.FAULT, word.line or f"{word.stage} ended with {word.code}")
    line = next((word.line for word in ended if word.pid != dvc and word.line), None)
    if line is not None:
        return Ended(Exit.AGAIN, line)
    if told is not None:
        return Ended(Exit.AGAIN, f"stopped by {told}")
    for word in failed:
        return Ended(Exit.AGAIN, word.line or f"{word.stage} ended without a word: it was killed, or memory ran out")
    if code < 0:
        return Ended(Exit.AGAIN, f"DVC was ended by {signal.Signals(-code).name}")
    return Ended(Exit.FAULT, f"DVC ended with {code}")
