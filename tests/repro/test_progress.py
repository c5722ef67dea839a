"""Starts that get nowhere are counted over processes: a scheduler's starts are each a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.ground.words import Exit
from stages.keeping.folder import runs_root
from stages.repro import command, progress
from stages.repro.progress import RECORD, count_start, forget_starts
from stages.repro.supervisor import Ended
from tests.support.project import Project


def test_starts_are_counted_until_something_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_RUNS", str(tmp_path))
    is_done = {"a"}
    monkeypatch.setattr(progress, "done", lambda: is_done)
    assert [count_start() for _ in range(3)] == [1, 2, 3]
    is_done.add("b")
    assert [count_start() for _ in range(2)] == [1, 2]
    for damaged in ("", "[]", "{}", '{"done": 1, "starts": []}'):
        (tmp_path / RECORD).write_text(damaged)
        assert count_start() == 1
    for _ in range(2):
        forget_starts()
    assert count_start() == 1


@pytest.fixture
def start(project: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None, float], int | None]:
    """Starts repro, which is killed, or told to stop after so many seconds; its exit code, None if it was killed."""
    project.write_params()
    project.write("data/in/train.csv", "text,label\na,b\n")
    clock = [0.0]

    def run(told: str | None, seconds: float) -> int | None:
        class Supervisor:
            def __init__(self, stop_after: float | None) -> None:
                self.told = told

            def run(self, arguments: list[str]) -> Ended:
                clock[0] += seconds
                if told is None:
                    raise KeyboardInterrupt
                return Ended(Exit.AGAIN, f"stopped by {told}")

        monkeypatch.setattr(command, "Supervisor", Supervisor)
        monkeypatch.setattr(command.time, "monotonic", lambda: clock[0])
        try:
            command.repro([], fresh=False, stop_after=None, until_done=True)
        except KeyboardInterrupt:
            return None
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    return run


@pytest.mark.parametrize(("told", "code"), [(None, None), ("SIGTERM", 75)])
def test_the_fourth_start_gives_up(
    start: Callable[[str | None, float], int | None],
    told: str | None,
    code: int | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert [start(told, 3600) for _ in range(5)] == [code, code, code, 1, code]
    assert "given up: 3 starts in a row got nowhere" in capsys.readouterr().err


def test_who_is_told_to_stop_at_once_could_get_nowhere(start: Callable[[str | None, float], int | None]) -> None:
    assert [start("SIGTERM", 5) for _ in range(6)] == [75] * 6
    assert json.loads((runs_root() / RECORD).read_text())["starts"] == 0
