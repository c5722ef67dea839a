"""Saving beside the loop: one copy in flight, and a failure that is heard of."""

from __future__ import annotations

import errno
import itertools
import threading
from pathlib import Path
from typing import Any

import pytest

from stages.keeping.sealed import SaveError
from stages.run import checkpoint
from stages.run.checkpoint import Checkpoints, Snapshot
from stages.run.saver import Saver, TimeSchedule
from tests.support.runs import make_run, write_checkpoints


def test_failed_save_is_raised_once_at_the_next_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = write_checkpoints(make_run(tmp_path), 9)

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(checkpoint.Snapshot, "write", fail)
    saver = Saver(checkpoints)
    saver.save(12, lambda: {"model": {}})
    with pytest.raises(SaveError, match="step-00000012"):
        saver.wait()
    saver.check()
    assert checkpoints.shelf.steps() == [9]


def test_state_that_no_checkpoint_can_hold_is_refused_with_its_step(tmp_path: Path) -> None:
    saver = Saver(Checkpoints(make_run(tmp_path).checkpoints))
    with pytest.raises(SaveError, match=r"checkpoint of step 3: callbacks\.a: a state holds"):
        saver.save(3, lambda: {"callbacks": {"a": {1, 2}}})


def test_one_copy_is_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    real = Snapshot.write

    def wait(snapshot: Snapshot, folder: Path) -> None:
        assert gate.wait(10)
        real(snapshot, folder)

    monkeypatch.setattr(Snapshot, "write", wait)
    saver = Saver(Checkpoints(make_run(tmp_path).checkpoints))
    copies: list[int] = []

    def copy(step: int) -> dict[str, Any]:
        copies.append(step)
        return {"progress": step}

    saver.save(12, lambda: copy(12))
    assert saver.busy
    second = threading.Thread(target=saver.save, args=(13, lambda: copy(13)))
    second.start()
    second.join(0.3)
    assert copies == [12]
    gate.set()
    second.join(10)
    saver.wait()
    assert copies == [12, 13]
    assert not saver.busy


def test_saves_begin_at_once_and_back_off_to_the_interval() -> None:
    now = 0.0
    schedule = TimeSchedule(60, clock=lambda: now)
    times = []
    while now < 1200:
        if schedule.is_due(cost_seconds=0.05):
            times.append(now)
            schedule.begun()
        now += 0.5
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert times[0] == 0
    assert gaps == sorted(gaps)
    assert gaps[0] == 1
    assert gaps[-1] == 60


def test_asking_whether_a_save_is_due_books_none() -> None:
    schedule = TimeSchedule(60, clock=lambda: 5.0)
    assert [schedule.is_due(0.0) for _ in range(3)] == [True] * 3


def test_expensive_saves_are_spread_out_from_the_first_one_on() -> None:
    now = 0.0
    schedule = TimeSchedule(600, clock=lambda: now)
    assert schedule.is_due(cost_seconds=0.0)
    schedule.begun()
    now = 119.0
    assert not schedule.is_due(cost_seconds=12.0)
    now = 120.0
    assert schedule.is_due(cost_seconds=12.0)
