"""One process at a time: who has the lock is named, one that is stopping is waited for, a stale one never blocks."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from stages.ground.errors import UserError
from stages.keeping import lock as module
from stages.keeping.lock import INSTANT_SECONDS, STOPPING_SECONDS, Lock


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[Lock]:
    made = Lock(tmp_path / "lock", "run 1234")
    yield made
    made.release()


class Other:
    """Another process, which has the lock until `until`; the clock goes on as far as one waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.until, self.real = 100.0, 0.0, module.fcntl.lockf
        monkeypatch.setattr(module.fcntl, "lockf", self.lockf)
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(module.time, "sleep", self.sleep)

    def lockf(self, file: IO[str], flags: int) -> None:
        if self.now < self.until:
            raise BlockingIOError
        self.real(file, flags)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def hold(self, seconds: float, path: Path, text: str) -> None:
        path.write_text(text)
        self.until = self.now + seconds


def test_disk_that_knows_no_locks_is_no_other_process(lock: Lock, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "lockf", no_locks)
    with pytest.raises(UserError, match=r"this disk knows no locks \(No locks available\); use another one"):
        lock.acquire()


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Other:
    return Other(monkeypatch)


def test_lock_names_its_process_and_says_when_that_is_stopping(lock: Lock) -> None:
    lock.acquire()
    assert lock.path.read_text().split() == [str(os.getpid())]
    lock.announce_stop()
    assert lock.path.read_text().split() == [str(os.getpid()), "stopping"]
    assert lock.path.stat().st_size == 41  # one length, so that a reader sees the old text or the new


def test_stale_text_never_blocks_and_is_replaced(lock: Lock) -> None:
    lock.path.write_text("999999 stopping of a process that was killed\n" * 3)
    lock.acquire()
    assert lock.path.read_text().split()[0] == str(os.getpid())
    assert "stopping" not in lock.path.read_text().splitlines()[0]


@pytest.mark.parametrize(("text", "named"), [("4711\n", "4711"), ("", "unknown")])
def test_lock_of_another_process_is_refused_with_its_number(lock: Lock, other: Other, text: str, named: str) -> None:
    other.hold(1e9, lock.path, text)
    begin = other.now
    with pytest.raises(UserError, match=f"run 1234 is being worked on by process {named}; wait for it"):
        lock.acquire()
    assert INSTANT_SECONDS < other.now - begin < INSTANT_SECONDS + 1
    assert lock.path.read_text() == text
    assert lock.holder() == named


def test_listing_that_has_the_lock_for_an_instant_is_waited_out(
    lock: Lock, other: Other, capsys: pytest.CaptureFixture[str]
) -> None:
    other.hold(INSTANT_SECONDS / 2, lock.path, "4711\n")
    lock.acquire()
    assert lock.path.read_text().split() == [str(os.getpid())]
    assert capsys.readouterr().err == ""


def test_process_that_is_stopping_is_waited_for_and_it_is_said_once(
    lock: Lock, other: Other, capsys: pytest.CaptureFixture[str]
) -> None:
    other.hold(STOPPING_SECONDS - 1, lock.path, "4711 stopping\n")
    lock.acquire()
    assert capsys.readouterr().err == "waiting for process 4711, which is saving run 1234\n"


def test_process_that_never_stops_is_not_waited_for_without_end(lock: Lock, other: Other) -> None:
    other.hold(1e9, lock.path, "4711 stopping\n")
    with pytest.raises(UserError, match="process 4711"):
        lock.acquire()
    assert other.now < 100 + STOPPING_SECONDS + 1


def test_free_lock_and_none_have_no_holder(lock: Lock, tmp_path: Path) -> None:
    assert lock.holder() is None
    assert not lock.path.exists()
    lock.path.write_text("4711\n")
    assert lock.holder() is None


def test_full_disk_takes_no_lock_away(lock: Lock, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "pwrite", full)
    lock.acquire()
    lock.announce_stop()


def test_released_lock_can_be_taken_again(lock: Lock) -> None:
    lock.acquire()
    lock.release()
    lock.release()  # once more costs nothing
    lock.acquire()
    assert lock.path.read_text().split() == [str(os.getpid())]
