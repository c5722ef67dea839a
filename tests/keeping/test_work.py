"""A stage at work: alone in its workspace, and what is done of it kept until DVC knows that it is done."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.config.pipeline import Stage, load_stage
from stages.ground.errors import UserError
from stages.keeping.folder import RunFolder, list_runs, runs_root
from stages.keeping.identity import Identity
from stages.keeping.work import sweep, work_of
from tests.support.project import Project

IDENTITY = Identity("tokenize", {"tokenize.max_length": 8})
HERE = {"python": "3.11", "datasets": "5.2"}
HOLD = (
    "import fcntl, sys; f = open(sys.argv[1], 'r+'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """tokenize in an empty project."""
    monkeypatch.chdir(tmp_path)
    for name in ("DVC_ROOT", "HOLDFAST_RUNS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".dvc").mkdir()
    Project(tmp_path).write_params(model={"source": "factory:my_models:make"}, tokenize={"tokenizer": "tiny"})
    monkeypatch.setattr("stages.keeping.work.identify", lambda _: IDENTITY)
    return load_stage("tokenize")


def keep(run: RunFolder, number: int = 0) -> None:
    run.atoms("train").write(number, 1, lambda folder: (folder / "part").write_text("x"))


def hold(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_what_was_done_is_there_at_the_next_start_and_goes_when_dvc_has_written_it_down(stage: Stage) -> None:
    with contextlib.suppress(UserError), work_of(stage, HERE) as run:
        keep(run)
        raise UserError("row 3")
    assert run.state == "failed: row 3"
    with work_of(stage, HERE) as run:
        assert run.atoms("train").numbers() == [0]
    sweep()
    assert [run.state for run in list_runs()] == ["finished"]
    Path("dvc.lock").touch()
    os.utime("dvc.lock", (run.used + 9, run.used + 9))
    sweep()
    assert list_runs() == []


def test_finished_work_that_is_begun_again_is_not_finished(stage: Stage) -> None:
    with work_of(stage, HERE):
        pass
    with work_of(stage, HERE) as run:
        assert not run.finished


def test_work_of_another_workspace_is_that_one_s_to_sweep(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDFAST_RUNS", str(tmp_path / "shared"))
    with work_of(stage, HERE) as run:
        pass
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    Path("dvc.lock").touch()
    os.utime("dvc.lock", (run.used + 9, run.used + 9))
    sweep()
    assert [run.id for run in list_runs()] == [IDENTITY.id]


def test_another_environment_begins_anew_with_one_line(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    with work_of(stage, HERE) as run:
        keep(run)
    with work_of(stage, HERE | {"datasets": "5.3"}) as run:
        assert run.atom_keys() == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "tokenize: the environment changed (datasets: 5.2 -> 5.3); what was done in the one before is done again"
    )


def test_work_that_somebody_else_is_at_is_done_in_a_folder_that_goes_with_its_process(stage: Stage) -> None:
    with work_of(stage, HERE):
        pass
    holder = hold(runs_root() / IDENTITY.id / "lock")
    with work_of(stage, HERE) as run:
        assert run.id != IDENTITY.id
        keep(run)
    assert [path.name for path in runs_root().iterdir()] == [IDENTITY.id]
    holder.communicate("")


def test_folder_of_a_process_that_was_killed_is_swept(stage: Stage) -> None:
    left = RunFolder(runs_root() / f".{IDENTITY.id}-4711.tmp", "tokenize")
    left.enter(IDENTITY)
    left.lock.release()
    with work_of(stage, HERE):
        assert not left.path.exists()


def test_lock_of_a_project_in_a_larger_repository_makes_no_second_one(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "ml/project"
    project.mkdir(parents=True)
    monkeypatch.chdir(project)
    with work_of(stage, HERE):
        assert not (project / ".dvc").exists()
        assert (tmp_path / ".dvc/tmp/ml/project/tokenize.lock").is_file()


def test_stage_without_a_repository_leaves_none(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / ".dvc").rmdir()
    with work_of(stage, HERE):
        assert not (tmp_path / ".dvc").exists()
