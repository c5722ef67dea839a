"""One process at a time, by a file lock that goes with its process, however that ends: a stale one never blocks."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path
from typing import IO

from stages.ground.errors import TransientError, UserError, say

# How long a start waits for a process that was told to stop and is still saving.
STOPPING_SECONDS = 120
# A listing that looks whether the lock is free has it for an instant.
INSTANT_SECONDS = 0.5


class BusyError(TransientError):
    """Another process holds the lock."""


class Lock:
    """The lock at `path`; its text names the process that holds it, for people. `what` it is of goes into messages."""

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self._what = what
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            BusyError: another process holds it; its pid is named. One that is stopping is waited for.
            UserError: this disk knows no locks.
        """
        begin, announced = time.monotonic(), False
        while not self._try():
            assert self._file is not None
            self._file.seek(0)
            pid, _, stopping = self._file.read().strip().partition(" ")
            self.release()
            waited = time.monotonic() - begin
            if waited > (STOPPING_SECONDS if stopping else INSTANT_SECONDS):
                raise BusyError(
                    f"{self._what} is being worked on by process {pid or 'unknown'}; "
                    "wait for it, or stop it and run the same command again"
                )
            if stopping and not announced:
                say(f"waiting for process {pid}, which is saving {self._what}")
                announced = True
            time.sleep(0.1)
        self._write(str(os.getpid()))

    def _try(self) -> bool:
        """Whether it is ours now; `_file` is open then, and where another process has it."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            self._file = os.fdopen(descriptor, "r+", encoding="utf-8")
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return False
            except OSError as error:
                raise UserError(
                    f"{self.path}: this disk knows no locks ({error.strerror}); use another one, for the runs by "
                    "HOLDFAST_RUNS"
                ) from None
            # Whoever had it may have removed the folder: a lock on a file that is gone keeps nobody out.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), self.path.stat()):
                    return True
            self.release()

    def release(self) -> None:
        """Give the lock back."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def holder(self) -> str | None:
        """The pid of the process that has the lock, or None. Not for a process that has it itself."""
        if not self.path.is_file():  # of a pipe the reader would wait for ever
            return None
        try:
            with self.path.open("r", encoding="utf-8") as file:
                try:
                    fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError:
                    return (file.read().split() or ["unknown"])[0]
        except OSError:
            return None
        return None

    def announce_stop(self) -> None:
        """Tell a second start, through the lock's text, that this process is about to end."""
        self._write(f"{os.getpid()} stopping")

    def _write(self, text: str) -> None:
        """One write of one length, so that a reader sees the old text or the new; of no weight if the disk is full."""
        assert self._file is not None
        with contextlib.suppress(OSError):
            os.pwrite(self._file.fileno(), text.ljust(40).encode() + b"\n", 0)
