"""What a killed DVC leaves behind is mended, and nothing that a live process holds: here without DVC's own runs."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from dvc.lock import make_lock

from stages.ground.errors import UserError
from stages.repro import healing
from stages.repro.healing import heal

RWLOCK, LOCK = Path(".dvc/tmp/rwlock"), Path("dvc.lock")
WHOLE = "schema: '2.0'\nstages:\n  train:\n    cmd: exec python\n"
HEAD, BRANCH = "a" * 40, "refs/heads/work"
NOBODY = 2**22 + 1  # above the largest pid there is


@pytest.fixture
def git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """An empty folder as the current one, and what git answers there, by the command's beginning: a branch is checked
    out. What it is told to change is listed under "changed"."""
    monkeypatch.chdir(tmp_path)
    RWLOCK.parent.mkdir(parents=True)
    answers: dict[str, str | None] = {"symbolic-ref --quiet": BRANCH, "ls-files --unmerged": "", "changed": ""}

    def answer(*arguments: str) -> str | None:
        command = " ".join(arguments)
        if command.startswith(("symbolic-ref -m", "update-ref")):
            answers["changed"] = f"{answers['changed']}{arguments[-2:]}"
        return next((found for start, found in answers.items() if command.startswith(start)), None)

    monkeypatch.setattr(healing, "_git", answer)
    return answers


def held(write: dict[str, int] | None = None, read: dict[str, list[int]] | None = None) -> dict[str, Any]:
    """A rwlock's content: the pids that hold each path."""
    return {
        "write": {path: {"pid": pid, "cmd": "dvc repro"} for path, pid in (write or {}).items()},
        "read": {path: [{"pid": pid, "cmd": "dvc repro"} for pid in pids] for path, pids in (read or {}).items()},
    }


def aside(name: str) -> list[str]:
    """What was kept of the damaged files of this name."""
    return [path.read_text() for path in sorted(RWLOCK.parent.glob(f"{name}.damaged-*"))]


pytestmark = pytest.mark.usefixtures("git")


@pytest.mark.parametrize("content", ["", "{", '{"write": {"a": 1}, "read": {}}', '{"write": [], "read": {}}', "[1]"])
def test_torn_rwlock_is_set_aside_and_kept(content: str) -> None:
    RWLOCK.write_text(content)
    (line,) = heal()
    assert line.startswith(".dvc/tmp/rwlock was torn by a kill: set aside as .dvc/tmp/rwlock.damaged-0")
    assert not RWLOCK.exists()
    RWLOCK.write_text("{")
    heal()
    assert aside("rwlock") == [content, "{"]


def test_nothing_to_mend_changes_nothing() -> None:
    assert heal() == []
    RWLOCK.write_text("{}")
    LOCK.write_text(WHOLE)
    assert heal() == []
    assert (RWLOCK.read_text(), LOCK.read_text()) == ("{}", WHOLE)


def test_entries_of_ended_processes_are_removed_and_those_of_live_ones_stay() -> None:
    me = os.getpid()
    RWLOCK.write_text(json.dumps(held({"a": NOBODY, "b": me}, {"c": [NOBODY, me], "d": [NOBODY]})))
    assert heal() == [".dvc/tmp/rwlock: removed the entries of processes that have ended"]
    assert json.loads(RWLOCK.read_text()) == held({"b": me}, {"c": [me]})
    assert heal() == []


def test_entry_whose_number_a_later_process_has_is_removed() -> None:
    RWLOCK.write_text(json.dumps(held({"a": os.getpid()})))
    os.utime(RWLOCK, (0, 0))
    assert heal() == [".dvc/tmp/rwlock: removed the entries of processes that have ended"]
    assert json.loads(RWLOCK.read_text()) == held()


@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_torn_lock_file_is_set_aside_and_kept(keep: float) -> None:
    torn = WHOLE[: int(len(WHOLE) * keep)]
    LOCK.write_text(torn)
    (line,) = heal()
    assert line.startswith("dvc.lock was torn by a kill: set aside as .dvc/tmp/dvc.lock.damaged-0")
    assert not LOCK.exists()
    assert aside("dvc.lock") == [torn]


@pytest.mark.parametrize("content", [b"\xff\n", b"a: [\n", b"- a\n", b"stages: 1\n", b"stages: {train: {deps: []}}\n"])
def test_lock_file_that_is_none_is_set_aside(content: bytes) -> None:
    LOCK.write_bytes(content)
    assert len(heal()) == 1
    assert not LOCK.exists()


def test_lock_file_with_a_conflict_is_the_users_to_resolve(git: dict[str, str | None]) -> None:
    git["ls-files --unmerged"] = "100644 dvc.lock"
    LOCK.write_text(f"<<<<<<< HEAD\n{WHOLE}")
    with pytest.raises(UserError, match="a merge left a conflict"):
        heal()
    assert LOCK.exists()


def test_what_a_live_dvc_is_writing_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dvc.lock.DEFAULT_TIMEOUT", 0.01)  # seconds that DVC waits for a lock
    tmp = str(RWLOCK.parent)
    RWLOCK.write_text("{")
    LOCK.write_text("")
    with make_lock(f"{tmp}/rwlock.lock", tmp_dir=tmp), make_lock(f"{tmp}/lock", tmp_dir=tmp):
        assert heal() == []
    assert (RWLOCK.read_text(), LOCK.read_text()) == ("{", "")
    assert len(heal()) == 2


def detach(git: dict[str, str | None], reflog: str) -> None:
    """Make it a repository in which DVC detached HEAD."""
    git.update({
        "symbolic-ref --quiet": None,
        "rev-parse HEAD": HEAD,
        "rev-parse --verify refs/exps/exec/EXEC_HEAD": HEAD,
        f"rev-parse --verify {BRANCH}": HEAD,
        "reflog show": reflog,
        "for-each-ref": "refs/exps/exec/EXEC_HEAD\nrefs/exps/exec/EXEC_BRANCH",
    })  # fmt: skip


MOVED = f"{HEAD} checkout: moving from work to {HEAD}"


def test_head_that_an_experiment_left_goes_back_to_its_branch(git: dict[str, str | None]) -> None:
    detach(git, f"{HEAD} reset: moving to HEAD\n{MOVED}")
    (line,) = heal()
    assert line.startswith("HEAD was left detached by a killed dvc exp run: back on work")
    assert git["changed"] == "('HEAD', 'refs/heads/work')('-d', 'refs/exps/exec/EXEC_HEAD')" + (
        "('-d', 'refs/exps/exec/EXEC_BRANCH')"
    )


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("rev-parse --verify refs/exps/exec/EXEC_HEAD", None),  # a person did it
        ("rev-parse --verify refs/exps/exec/EXEC_HEAD", "b" * 40),
        (f"rev-parse --verify {BRANCH}", "b" * 40),  # the branch has moved on
        ("reflog show", f"{'b' * 40} commit: another\n{MOVED}"),
        ("reflog show", f"{HEAD} checkout: moving from work to another"),
    ],
)
def test_head_that_no_experiment_left_there_stays(git: dict[str, str | None], command: str, answer: str | None) -> None:
    detach(git, MOVED)
    git[command] = answer
    assert heal() == []
    assert git["changed"] == ""


def test_head_of_a_live_experiment_stays(git: dict[str, str | None]) -> None:
    detach(git, MOVED)
    RWLOCK.write_text(json.dumps(held(read={"a": [os.getpid()]})))
    assert heal() == []
    RWLOCK.write_text(json.dumps(held(read={"a": [NOBODY]})))
    info = Path(".dvc/tmp/exps/run/b/b.json")
    info.parent.mkdir(parents=True)
    info.write_text(json.dumps({"pid": os.getpid()}))
    assert heal() == [".dvc/tmp/rwlock: removed the entries of processes that have ended"]
    os.utime(info, (time.time() - 10**6,) * 2)  # its number is now a later process's
    assert len(heal()) == 1
