"""What reports of runs told: each row is an input, and the line or value that is right for it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stages import build_loaders, healing
from stages.batches.plan import BatchPlan, PlanShape, epoch_name, write_epoch
from stages.ground import errors
from stages.ground.errors import UserError, run_stage
from stages.keeping.folder import RunFolder, left_by_a_prune, list_runs, prune, runs_root
from stages.keeping.identity import Identity
from stages.keeping.sealed import SaveError
from stages.keeping.store import DiskStore, Key
from tests.support.project import ROOT

# ---- dvc.lock is judged by DVC's own schema

OUT = "    outs:\n    - path: a\n      hash: md5\n      md5: 0123456789abcdef0123456789abcdef\n      size: 1\n"
LOCK = f"schema: '2.0'\nstages:\n  train:\n    cmd: exec python\n{OUT}"
DATASETS = "schema: '2.0'\ndatasets:\n- name: a\n  type: dvc\n  url: b\n"


@pytest.mark.parametrize(
    ("content", "whole"),
    [
        (LOCK, True),
        (DATASETS, True),
        (f"{DATASETS}stages: {{}}\n", True),
        ("schema: '2.0'\nstages:\n  train:\n    cmd: exec python\n    outs:\n", False),
        ("schema: '2.0'\nstages:\n  train:\n    cmd: exec python\n    outs:\n    - hash: md5\n", False),
        ("schema: '2.0'\nstages:\n", False),
        ("schema: '2.0'\n", False),
        ("schema: '3.0'\nstages: {}\n", False),
        (LOCK + "more: 1\n", False),
        ("", False),
    ],
)
def test_lock_file_is_whole_where_dvc_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, whole: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dvc.lock").write_text(content)
    assert healing._is_lock_file_whole() == whole


def test_every_line_end_that_dvc_would_refuse_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from ruamel.yaml import YAML

    monkeypatch.chdir(tmp_path)
    lines = LOCK.splitlines(keepends=True)
    for end in range(1, len(lines)):
        Path("dvc.lock").write_text("".join(lines[:end]))
        if healing._is_lock_file_whole():
            COMPILED_LOCKFILE_SCHEMA(YAML(typ="safe").load(Path("dvc.lock").read_text()))


def test_without_git_there_is_nothing_of_git_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    Path("dvc.lock").write_text("")
    (line,) = healing.heal()
    assert line.startswith("dvc.lock was torn by a kill")


def test_file_name_that_dvc_cannot_record_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stages/custom").mkdir(parents=True)
    Path("stages/custom/größe.txt").touch()
    healing.require_names()
    Path(os.fsdecode(b"stages/custom/\xff.txt")).touch()
    with pytest.raises(UserError, match=r"^stages/custom/\\xff.txt: its name is not UTF-8, so DVC cannot record it"):
        healing.require_names()


# ---- a shell between DVC and a stage

STAGE = "import time; from stages.ground.signals import die_with_parent; die_with_parent(); print('on', flush=True); {}"


def below_a_shell(then: str, pid: str) -> subprocess.Popen[str]:
    """A stage whose parent is a shell, whose parent is this process; `pid` is who it is told that started it."""
    script = f'{sys.executable} -c "{STAGE.format(then)}"; echo "ended with $?"'
    env = {**os.environ, "HOLDFAST_PARENT_PID": pid}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(["sh", "-c", script], cwd=ROOT, env=env, **pipes)


def test_stage_behind_a_shell_runs() -> None:
    output, _ = below_a_shell("pass", str(os.getpid())).communicate(timeout=30)
    assert output == "on\nended with 0\n"


def test_stage_whose_starter_is_gone_says_so_and_ends() -> None:
    output, _ = below_a_shell("pass", str(2**22 + 1)).communicate(timeout=30)
    assert output.splitlines()[0] == "process 4194305, which started this stage, has ended: this stage ends too"
    assert output.splitlines()[-1] == "ended with 143"


def test_stage_behind_a_shell_ends_with_the_process_that_started_it() -> None:
    between = (
        "import os, subprocess, sys; os.environ['HOLDFAST_PARENT_PID'] = str(os.getpid()); "
        "subprocess.run(['sh', '-c', sys.argv[1]])"
    )
    script = f'{sys.executable} -c "{STAGE.format("time.sleep(60)")}"; echo "ended with $?"'
    starter = subprocess.Popen([sys.executable, "-c", between, script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert starter.stdout
    assert starter.stdout.readline() == "on\n"
    starter.kill()
    starter.wait()
    assert starter.stdout.readline() == "ended with 143\n"


# ---- starts and prunes side by side


@pytest.fixture
def own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("DVC_ROOT", "HOLDFAST_RUNS", "HOLDFAST_RUNS_LIMIT"):
        monkeypatch.delenv(name, raising=False)


IDENTITY = Identity("train", {"train.seed": 1, "train.init_from_run": None})
LOOP = """
import sys
from stages.ground.errors import UserError
from stages.keeping.folder import RunFolder, prune
from stages.keeping.identity import Identity
identity = Identity("train", {"train.seed": 1, "train.init_from_run": None})
for turn in range(150):
    run = RunFolder.of(identity)
    if sys.argv[1] == "prune":
        prune([run], lambda line: None)
        continue
    try:
        run.enter(identity)
    except UserError as error:
        assert "is being trained" in str(error), error
        continue
    assert run.identity_values() == identity.values
    assert run.lock.path.stat().st_ino, "somebody removed what is locked"
    run.lock.release()
print("done")
"""


@pytest.mark.usefixtures("own_root")
def test_starts_and_prunes_of_one_run_in_a_loop_never_fail() -> None:
    kinds = ("start", "prune", "start")
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    loops = [subprocess.Popen([sys.executable, "-c", LOOP, kind], env=env, **pipes) for kind in kinds]
    assert [loop.communicate(timeout=120)[0] for loop in loops] == ["done\n"] * 3


@pytest.mark.usefixtures("own_root")
def test_start_that_waited_for_a_process_whose_run_was_removed_has_a_lock_and_a_folder_of_its_own() -> None:
    first, removes = RunFolder.of(IDENTITY), RunFolder.of(IDENTITY)
    first.enter(IDENTITY)
    prune([removes], lambda line: None)  # in the process that has it, a lock is free
    waited = RunFolder.of(IDENTITY)
    assert waited.enter(IDENTITY)
    assert os.path.samestat(os.fstat(waited.lock._file.fileno()), waited.lock.path.stat())  # type: ignore[union-attr]
    assert waited.identity_values() == IDENTITY.values
    waited.lock.release()
    first.lock.release()


@pytest.mark.usefixtures("own_root")
def test_what_a_killed_prune_left_is_listed_and_cleared_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    from stages.__main__ import list_all, prune_runs

    run = RunFolder.of(IDENTITY)
    run.enter(IDENTITY)
    run.lock.release()
    run.path.rename(runs_root() / f".{run.id}.removed.tmp")
    list_all()
    assert f".{run.id}.removed.tmp" in capsys.readouterr().out
    assert [rest.id for rest in left_by_a_prune()] == [f".{run.id}.removed.tmp"]
    prune_runs([])
    assert capsys.readouterr().out == f"removed .{run.id}.removed.tmp, left by a prune that was killed (0 MB)\n"
    assert list(runs_root().iterdir()) == []


@pytest.mark.usefixtures("own_root")
def test_prune_lists_what_it_removes_first_and_an_unfinished_run_goes_only_by_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from stages.__main__ import prune_runs

    run = RunFolder.of(IDENTITY)
    run.enter(IDENTITY)
    run.lock.release()
    prune_runs([])
    assert capsys.readouterr().out == ""
    assert len(list_runs()) == 1
    prune_runs([run.id])
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"to be removed: run {run.id}, not finished, 0 MB"
    assert last == f"removed run {run.id} (0 MB)"


# ---- what is ordered by its name is ordered by its number


def test_plan_of_more_than_ten_thousand_epochs_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    shape, epochs = PlanShape(8, 8, 8, False), 10_004
    tokens = np.ones(8, int)
    for epoch in (0, *range(999, 1003), *range(9_998, epochs)):
        write_epoch(tmp_path, shape, epoch, 0, tokens, False)
    for epoch in range(epochs):
        path = tmp_path / epoch_name(epoch)
        if not path.exists():
            path.hardlink_to(tmp_path / epoch_name(0))
    plan = BatchPlan(tmp_path)
    assert plan.epochs == epochs
    for first, last in ((1000, 1003), (9_999, 10_004), (10_002, 10_004)):
        assert [step[0].step for step in plan.steps(first, last)] == list(range(first, last + 1))


def test_plan_with_an_epoch_missing_is_none(tmp_path: Path) -> None:
    for epoch in (0, 2):
        write_epoch(tmp_path, PlanShape(8, 8, 8, False), epoch, 0, np.ones(8, int), False)
    with pytest.raises(UserError, match="no batch plan there; run: dvc repro build_loaders"):
        BatchPlan(tmp_path)


@pytest.mark.parametrize(
    ("rows", "epochs", "free", "files", "refused"),
    [
        (8, 10_004, 2**40, 10**9, False),
        (8, 10**6, 2**40, 10**9, True),
        (10**6, 1000, 2**30, 10**9, True),
        (8, 1000, 2**40, 500, True),
    ],
)
def test_plan_that_is_too_large_is_refused_before_a_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, epochs: int, free: int, files: int, refused: bool
) -> None:
    disk = SimpleNamespace(f_bavail=free, f_frsize=1, f_favail=files, f_files=10**9)
    monkeypatch.setattr(build_loaders.os, "statvfs", lambda _: disk)
    shape = PlanShape(rows, 8, 8, False)
    if not refused:
        build_loaders.require_room(shape, epochs, tmp_path)
        return
    with pytest.raises(UserError, match=rf"asks for {epochs} epochs of {shape.steps_per_epoch} steps.*{free} bytes"):
        build_loaders.require_room(shape, epochs, tmp_path)


# ---- a full disk is one line, and says in which way it is full


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "models/best"), "models/best: the disk is full"),
        (OSError("[Errno 28] Error writing bytes to file. Detail: No space left on device"), "No space left on device"),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device")]), "No space left on device"),
        (OSError(errno.EROFS, "Read-only file system", "plots"), "plots: Read-only file system"),
    ],
)
def test_full_disk_while_publishing_is_one_line(
    error: OSError, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def publish() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_stage(publish)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert line.endswith("what was saved before is kept: make room, or give permission, and run the same command again")


def test_error_of_ours_stays_a_traceback() -> None:
    with pytest.raises(OSError, match="of ours"):
        run_stage(lambda: (_ for _ in ()).throw(OSError("of ours")))


@pytest.mark.parametrize(("bytes_free", "inodes_free", "expected"), [(10**10, 0, "no inode free"), (0, 5, "is full")])
def test_full_disk_says_whether_bytes_or_inodes_are_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_free: int, inodes_free: int, expected: str
) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    disk = SimpleNamespace(f_bavail=bytes_free, f_favail=inodes_free, f_files=10**9)
    monkeypatch.setattr(errors.os, "statvfs", lambda _: disk)
    store, key = DiskStore(tmp_path), Key("train", "run", "checkpoints", "step-00000009")
    monkeypatch.setattr("stages.keeping.store.shutil.disk_usage", lambda _: SimpleNamespace(free=bytes_free))
    store.begin(key, 1200)
    with pytest.raises(SaveError, match=rf"{expected}.*it needs 1200 bytes, {bytes_free} are free"):
        store.put(key, full)
