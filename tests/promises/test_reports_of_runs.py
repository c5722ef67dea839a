"""What reports of runs told: each row is an input, and the line or value that is right for it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stages import build_loaders
from stages.batches.plan import BatchPlan, PlanShape, epoch_name, write_epoch
from stages.batches.tokenized import Task
from stages.config.imports import import_object
from stages.ground import errors
from stages.ground.errors import UserError
from stages.ground.running import run_command
from stages.keeping.folder import RunFolder, list_runs, runs_root
from stages.keeping.identity import Identity
from stages.keeping.lock import Lock
from stages.keeping.pruning import left_by_a_prune
from stages.keeping.sealed import SaveError
from stages.keeping.store import DiskStore, Key
from stages.scoring.scores import score
from tests.support.project import ROOT, line_of
from tests.support.runs import make_params

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
from stages.keeping.folder import RunFolder
from stages.keeping.pruning import prune
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
def test_start_whose_run_is_removed_as_it_takes_the_lock_has_a_lock_and_a_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, lockf = RunFolder.of(IDENTITY), fcntl.lockf

    def removed_and_made_anew_before(*arguments: Any) -> None:
        monkeypatch.setattr(fcntl, "lockf", lockf)
        shutil.rmtree(run.path)
        run.path.mkdir()
        lockf(*arguments)

    monkeypatch.setattr(fcntl, "lockf", removed_and_made_anew_before)
    assert run.enter(IDENTITY)
    assert os.path.samestat(os.fstat(run.lock._file.fileno()), run.lock.path.stat())  # type: ignore[union-attr]
    assert run.identity_values() == IDENTITY.values
    run.lock.release()


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


@pytest.mark.usefixtures("own_root")
def test_prune_of_the_finished_decides_with_the_lock_held(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stages.__main__ import prune_runs

    runs = [RunFolder.of(Identity("train", {"train.seed": seed})) for seed in range(2)]
    for seed, run in enumerate(runs):
        run.enter(Identity("train", {"train.seed": seed}))
        run.lock.release()
        (run.path / "result/final").mkdir(parents=True)
        os.utime(run.lock.path, (seed, seed))
    acquire = Lock.acquire

    def begun_anew(lock: Lock) -> None:
        """Waits for a start that found the result damaged."""
        shutil.rmtree(lock.path.parent / "result")
        acquire(lock)

    monkeypatch.setattr(Lock, "acquire", begun_anew)
    prune_runs([])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"kept run {runs[0].id}: it is not finished any more; name it to remove it all the same"
    prune_runs([runs[1].id])
    assert capsys.readouterr().out.splitlines()[-1] == f"removed run {runs[1].id} (0 MB)"


def instead_a_pipe(run: Path) -> None:
    (run / "identity.json").unlink()
    os.mkfifo(run / "identity.json")


ODD_RUNS: dict[str, Callable[[Path], object]] = {
    "markup": lambda run: (run / "identity.json").write_text('{"format": "[/red]"}'),
    "escapes": lambda run: (run / "identity.json").write_text('{"format": "\\u001b]0;evil\\u0007"}'),
    "a name with escapes": lambda run: run.rename(run.with_name("a\x1b[2J\nb")),
    "a number as source": lambda run: (run / "identity.json").write_text(
        json.dumps({"format": 3, "values": {"train.init_from_run": 5}})
    ),
    "a pipe": instead_a_pipe,
    "a pipe as lock": lambda run: os.mkfifo(run / "lock"),
    "another's threads": lambda run: (run / "environment.json").write_text('{"format": 3, "values": {"threads": [1]}}'),
    "a step not as we name it": lambda run: (run / "checkpoints/step-5").mkdir(parents=True),
}


@pytest.mark.usefixtures("own_root")
@pytest.mark.parametrize("make", ODD_RUNS.values(), ids=ODD_RUNS.keys())
def test_whatever_is_in_a_runs_folder_is_listed_and_changes_nothing(
    make: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    from stages.__main__ import list_all, prune_runs
    from stages.keeping.folder import threads_of_run

    path = runs_root() / "aaaaaaaaaaaa"
    path.mkdir(parents=True)
    (path / "identity.json").write_text('{"format": 3, "values": {}}')
    make(path)
    list_all()
    assert "\x1b" not in capsys.readouterr().out
    prune_runs([])
    assert threads_of_run(1) is None
    (run,) = list_runs()
    assert run.checkpoints.steps() == []
    assert "\x1b" not in capsys.readouterr().out


def test_runs_of_nobody_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_RUNS", "~no-such-user/runs")
    assert "HOLDFAST_RUNS is '~no-such-user/runs', but there is no such user" in line_of(runs_root)


# ---- what user code can do to a stage


def test_exit_of_user_code_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "exits_at_import.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "exits_when_called.py").write_text("import sys\ndef f(*_): sys.exit(0)\n")
    assert "SystemExit: 0" in line_of(lambda: import_object("exits_at_import:f", "train.loss"))

    def called() -> None:
        with errors.user_code("the model"):
            sys.exit(0)

    assert "the model: SystemExit: 0" in line_of(called)
    assert "raised SystemExit: 0" in line_of(lambda: scores_of("exits_when_called:f"))


def scores_of(metric: str) -> dict[str, float]:
    evaluate = make_params().evaluate.model_copy(update={"metrics": [metric], "metric_for_best_model": "loss"})
    return score(
        Task("classification", ("a", "b"), (), ("x",), "label", ("features",)),
        evaluate,
        np.zeros((2, 2), np.float32),
        NONE,
    )


NONE = np.zeros(2, int)


def huge(evaluated: Any) -> dict[str, int]:
    return {"huge": 10**400}


def test_metric_that_no_float_holds_is_one_line() -> None:
    assert "gives 'huge', a number that no float holds" in line_of(lambda: scores_of(f"{__name__}:huge"))


def test_line_for_people_is_one_line_without_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    errors.say("its head is one for \x1b[2J\n\x07")
    assert capsys.readouterr().err == "its head is one for \\x1b[2J \\x07\n"


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
        build_loaders.require_room(shape, epochs, epochs, tmp_path)
        return
    with pytest.raises(UserError, match=rf"asks for {epochs} epochs of {shape.steps_per_epoch} steps.*{free} bytes"):
        build_loaders.require_room(shape, epochs, epochs, tmp_path)


# ---- a full disk is one line, and says in which way it is full


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "models/best"), 75, "models/best: the disk is full"),
        (OSError("[Errno 28] Error writing bytes to file. Detail: No space left on device"), 75, "No space left on"),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device")]), 75, "No space left on device"),
        (OSError(errno.EROFS, "Read-only file system", "plots"), 2, "plots: Read-only file system"),
    ],
)
def test_full_disk_while_publishing_is_one_line(
    error: OSError, code: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def publish() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(publish)
    assert ended.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert line.endswith("what was saved is kept: make room, or give permission, and run the same command again")


def test_error_of_ours_stays_a_traceback_and_is_called_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: (_ for _ in ()).throw(OSError("of ours")))
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.splitlines()[-1].startswith("error: this is a fault of Holdfast (OSError: of ours")


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
