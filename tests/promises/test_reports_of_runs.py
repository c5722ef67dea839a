"""What reports of runs told: each row is an input, and the line or value that is right for it."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stages import build_loaders, healing
from stages.batches.plan import BatchPlan, PlanShape, epoch_name, write_epoch
from stages.batches.tokenized import Task
from stages.config.imports import import_object
from stages.config.read import parse_params, read_yaml
from stages.config.schema import EvaluateParams
from stages.ground import errors
from stages.ground.errors import UserError, run_stage
from stages.keeping.folder import RunFolder, list_runs, runs_root
from stages.keeping.identity import Identity
from stages.keeping.lock import Lock
from stages.keeping.pruning import left_by_a_prune
from stages.keeping.sealed import SaveError
from stages.keeping.store import DiskStore, Key
from stages.run.state import Progress
from stages.scoring.ranking import ranked
from stages.scoring.scores import score
from stages.training.endings import Outcome, Unfinished
from stages.training.optim import make_schedule
from stages.training.session import require_threshold_of_use
from stages.training.steps import load_steps
from tests.promises.test_reports_of_models import trained
from tests.support.project import ROOT, Checkout, line_of
from tests.support.runs import make_params
from tests.support.train_stage import TRAIN_OUTS, saved_steps, start_training, train
from tests.support.train_stage import run_stage as run_stage_of

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
        (LOCK.replace("size: 1", "size: " + "9" * 5000), False),
        (LOCK.replace("hash: md5", "hash: 2001-13-45"), False),
        ("", False),
    ],
)
def test_lock_file_is_whole_where_dvc_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, whole: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dvc.lock").write_text(content)
    assert healing._is_lock_file_whole() == whole


@pytest.mark.parametrize("content", ["[" * 100_000, "null", '{"write": {"a": {"pid": "x"}}}', None])
def test_rwlock_that_is_none_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".dvc/tmp").mkdir(parents=True)
    Path("dvc.lock").mkdir()
    if content is None:
        Path(".dvc/tmp/rwlock").mkdir()
    else:
        Path(".dvc/tmp/rwlock").write_text(content)
    first, second = healing.heal()
    assert first.startswith(".dvc/tmp/rwlock was torn by a kill") and second.startswith("dvc.lock was torn by a kill")


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


# ---- only a later batch fails

LATER = """
import os

import torch
from torch import nn
from torch.nn import functional

from stages.training.callbacks import Callback


class Later(nn.Module):
    def __init__(self, where):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        self.where = where
        self.calls = 0

    def forward(self, features):
        self.calls += self.training
        if self.training and self.where == "model" and os.environ.get("FAILS") and self.calls == 20:
            raise LookupError("no such word")
        if self.training and self.where == "exit" and os.environ.get("FAILS") and self.calls == 20:
            raise SystemExit(0)
        if not self.training and self.where == "eval" and os.environ.get("FAILS") and self.calls > 20:
            torch.zeros(2) @ torch.zeros(3)
        return self.layers(features)


def build(where="nowhere"):
    return Later(where)


def loss(logits, labels):
    CALLS.append(torch.is_grad_enabled())
    if os.environ.get("FAILS") and sum(CALLS) == 20:
        return torch.zeros(7)
    return functional.cross_entropy(logits, labels, reduction="none")


CALLS = []
SCORED = []


def metric(evaluated):
    SCORED.append(1)
    if os.environ.get("FAILS") and len(SCORED) == 3:
        raise ZeroDivisionError("no rows of class 7")
    return {"mine": float(len(evaluated.label_ids))}


class Raises(Callback):
    def __init__(self, event):
        self.event = event

    def _fail(self, event, state):
        if event == self.event and os.environ.get("FAILS") and state.progress.step >= 7:
            raise LookupError("no such file")

    def on_pre_optimizer_step(self, state):
        self._fail("on_pre_optimizer_step", state)

    def on_step_end(self, state):
        self._fail("on_step_end", state)
        if self.event == "exit" and os.environ.get("FAILS") and state.progress.step >= 7:
            raise SystemExit(0)

    def state_dict(self):
        if self.event == "state_dict":
            raise LookupError("no such file")
        return {}


class LeavesEvalMode(Callback):
    def on_step_end(self, state):
        state.model.eval()


class GivesUp(torch.optim.SGD):
    def step(self, closure=None):
        if os.environ.get("FAILS") and len(STEPS) > 6:
            raise LookupError("no such group")
        STEPS.append(1)
        return super().step(closure)


STEPS = []


def exits(evaluated):
    if os.environ.get("FAILS"):
        raise SystemExit(0)
    return {"mine": 1.0}


def huge(evaluated):
    return {"mine": 10**400}


def nan_metric(evaluated):
    return {"mine": float("nan")}


def nan_loss(logits, labels):
    value = functional.cross_entropy(logits, labels, reduction="none")
    return value if torch.is_grad_enabled() or len(value) < 16 else value * float("nan")


def huge_loss(logits, labels):
    return functional.cross_entropy(logits, labels, reduction="none") * 1e36
"""

FEATURES: dict[str, dict[str, Any]] = {
    "data": {"text_columns": [], "feature_columns": ["x*"]},
    "model": {"source": "factory:stages.custom.later:build"},
    "build_loaders": {"bucketing": "none"},
    "train": {"loss": "stages.custom.later:loss"},
}


def later(prepared: Callable[..., Checkout], **changes: dict[str, Any]) -> Checkout:
    """A checkout with the code above, of 11 steps an epoch."""
    merged = {section: {**FEATURES.get(section, {}), **changes.get(section, {})} for section in {**FEATURES, **changes}}
    checkout = prepared(merged)
    (checkout.folder / "stages/custom/later.py").write_text(LATER)
    return checkout


def last_line(output: str) -> str:
    assert "Traceback" not in output, output
    return output.strip().splitlines()[-1]


PLAIN: dict[str, Any] = {"loss": None}
ROWS = r"its rows of train are \d+(, \d+){7}; the state before it is saved$"
PLACE = r"\(later.py, line \d+\)"


@pytest.mark.parametrize(
    ("changes", "saved", "line"),
    [
        (
            {"model": {"kwargs": {"where": "model"}}, "train": PLAIN},
            8,
            rf"^error: step 9 fails in the model or the loss: LookupError: no such word {PLACE}; {ROWS}",
        ),
        (
            {"model": {"kwargs": {"where": "exit"}}, "train": PLAIN},
            8,
            rf"^error: step 9 fails in the model or the loss: SystemExit: 0 {PLACE}; {ROWS}",
        ),
        ({}, 8, rf"^error: train.loss stages.custom.later:loss gives shape \(7,\) for 4 rows.*; {ROWS}"),
        (
            {"model": {"kwargs": {"where": "eval"}}, "train": PLAIN, "evaluate": {"eval_batch_size": 8}},
            11,
            rf"^error: the model or the loss fails in eval mode: RuntimeError: .* {PLACE}; its rows of validation are "
            r"\d+(, \d+){7}; at the evaluation of step 11, whose state is saved$",
        ),
        (
            {
                "train": {**PLAIN, "eval_strategy": "steps", "eval_steps": 8},
                "evaluate": {"metrics": ["accuracy", "stages.custom.later:metric"]},
            },
            16,
            r"^error: evaluate.metrics: 'stages.custom.later:metric' raised ZeroDivisionError: no rows of class 7 "
            rf"{PLACE}; at the evaluation of step 16, whose state is saved$",
        ),
    ],
)
def test_code_of_ones_own_that_fails_on_a_later_batch_is_one_line_and_costs_nothing(
    prepared: Callable[..., Checkout], changes: dict[str, Any], saved: int, line: str
) -> None:
    reference, failing = later(prepared, **changes), later(prepared, **changes)
    train(reference)
    found = last_line(train(failing, code=2, FAILS="1"))
    assert re.search(line, found), found
    assert saved_steps(failing)[-1] == saved
    assert f"going on after step {saved}" in train(failing)
    assert failing.digests(*TRAIN_OUTS) == reference.digests(*TRAIN_OUTS)


@pytest.mark.parametrize("event", ["on_pre_optimizer_step", "on_step_end"])
def test_callback_that_raises_on_a_later_batch_names_step_and_rows_and_its_event_is_not_lost(
    prepared: Callable[..., Checkout], event: str
) -> None:
    callbacks = [{"class": "stages.custom.later:Raises", "kwargs": {"event": event}}]
    checkout = later(prepared, train={**PLAIN, "callbacks": callbacks})
    rows = r"its rows of train are \d+(, \d+){7}; the last checkpoint counts$"
    line = rf"^error: Raises.{event} at step 7: LookupError: no such file {PLACE}; {rows}"
    for _ in range(2):
        found = last_line(train(checkout, code=2, FAILS="1"))
        assert re.search(line, found), found
        assert saved_steps(checkout)[-1] == 6
    assert "going on after step 6" in train(checkout)


def test_callback_that_exits_does_not_look_like_success(prepared: Callable[..., Checkout]) -> None:
    callbacks = [{"class": "stages.custom.later:Raises", "kwargs": {"event": "exit"}}]
    checkout = later(prepared, train={**PLAIN, "callbacks": callbacks})
    found = last_line(train(checkout, code=2, FAILS="1"))
    assert re.search(rf"^error: Raises.on_step_end at step 7: SystemExit: 0 {PLACE}; .*the last checkpoint", found), (
        found
    )


def test_state_of_a_callback_that_raises_is_one_line(prepared: Callable[..., Checkout]) -> None:
    callbacks = [{"class": "stages.custom.later:Raises", "kwargs": {"event": "state_dict"}}]
    checkout = later(prepared, train={**PLAIN, "callbacks": callbacks})
    assert "error: Raises.state_dict: LookupError: no such file" in last_line(train(checkout, code=2))


def test_optimizer_that_raises_on_a_later_step_is_one_line_and_the_last_checkpoint_counts(
    prepared: Callable[..., Checkout],
) -> None:
    checkout = later(prepared, train={**PLAIN, "optim": "stages.custom.later:GivesUp"})
    found = last_line(train(checkout, code=2, FAILS="1"))
    assert "error: train.optim stages.custom.later:GivesUp fails in step 7: LookupError: no such group" in found
    assert found.endswith("; the last checkpoint counts") and saved_steps(checkout)[-1] == 6
    assert "going on after step 6" in train(checkout)


def test_module_that_exits_as_it_is_imported_is_one_line(prepared: Callable[..., Checkout]) -> None:
    checkout = later(prepared)
    (checkout.folder / "stages/custom/later.py").write_text(f"{LATER}\nraise SystemExit(0)\n")
    assert "which cannot be imported: SystemExit: 0" in last_line(train(checkout, code=2))


def test_metric_that_exits_or_fits_no_number_is_one_line_that_names_the_split(
    prepared: Callable[..., Checkout],
) -> None:
    mine = {"metric_for_best_model": "mine", "greater_is_better": True}
    checkout = later(prepared, train=PLAIN, evaluate={"metrics": ["stages.custom.later:huge"], **mine})
    assert "gives 'mine', a number that no float holds" in last_line(train(checkout, code=2))
    checkout = later(prepared, train=PLAIN, evaluate={"metrics": ["stages.custom.later:exits"], **mine})
    train(checkout)
    run_stage_of(checkout, "evaluate")
    found = last_line(run_stage_of(checkout, "select_best", 2, FAILS="1"))
    assert re.search(rf"'stages.custom.later:exits' raised SystemExit: 0 {PLACE}; for the rows of test$", found), found


def test_mode_that_a_callback_leaves_the_model_in_plays_no_part(prepared: Callable[..., Checkout]) -> None:
    callbacks = [{"class": "stages.custom.later:LeavesEvalMode"}]
    reference, checkout = (later(prepared, train={**PLAIN, "callbacks": used}) for used in ([], callbacks))
    train(reference)
    train(checkout)
    assert checkout.digests("models/candidates") == reference.digests("models/candidates")


def test_what_is_new_of_a_model_is_said_once_a_run(prepared: Callable[..., Checkout], tiny_model: Path) -> None:
    callbacks = [{"class": "stages.custom.later:Raises", "kwargs": {"event": "on_step_end"}}]
    checkout = prepared({"train": {"callbacks": callbacks}})
    (checkout.folder / "stages/custom/later.py").write_text(LATER)
    trained(tiny_model, checkout.folder / "tiny")
    line = "its head has 3 outputs, and 2 are needed; the head is a new one"
    assert line in train(checkout, code=2, FAILS="1")
    assert "going on after step 6" in (output := train(checkout)) and line not in output


# ---- a process that collates batches dies


@pytest.mark.parametrize("seconds", [0.0, 0.7])
def test_killed_loader_process_ends_the_start_in_one_line_with_all_steps_saved(
    prepared: Callable[..., Checkout], seconds: float
) -> None:
    import psutil

    changes: dict[str, Any] = {"num_workers": 2, "max_steps": 3000, "save_strategy": "time", "save_steps": None}
    checkout = prepared({"train": changes})
    process = start_training(checkout)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) == 2
    time.sleep(seconds)
    workers[0].kill()
    begin = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - begin < 10
    line = last_line(output)
    assert process.returncode == 1, output
    step = saved_steps(checkout)[-1]
    assert line.startswith(
        "a process that collates batches (train.num_workers is 2) was killed, as happens where memory"
    )
    assert f"the state after step {step} is saved; run the same command again to go on" in line


@pytest.mark.parametrize("early", [True, False])
def test_loader_process_that_dies_before_it_is_listed_is_told_as_a_killed_one(
    monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    class Loader:
        def __init__(self, *_: Any) -> None: ...

        def __iter__(self) -> Any:
            if early:
                raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
            return self

        def __next__(self) -> None:
            raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly")

    monkeypatch.setattr("stages.training.steps.make_loader", Loader)
    step = [SimpleNamespace(step=1, micro_batch=0, rows=[0])]
    world = SimpleNamespace(rank=0, size=1)
    inputs: Any = SimpleNamespace(
        compute=SimpleNamespace(device=None, world=world),
        plan=SimpleNamespace(steps=lambda first, last: iter([step])),
        total_steps=1,
        train_split=None,
        tokenizer=None,
    )
    before = signal.getsignal(signal.SIGCHLD)
    try:
        with pytest.raises(Unfinished) as ended:
            next(load_steps(inputs, Progress(), 2))
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert ended.value.ending.outcome is Outcome.STOPPED
    assert ended.value.ending.line.startswith("a process that collates batches (train.num_workers is 2) was killed")


# ---- decisions that are told


def test_warm_up_that_is_longer_than_the_run_is_told(prepared: Callable[..., Checkout]) -> None:
    output = train(later(prepared, train={**PLAIN, "warmup_steps": 22}))
    assert "warning: train.warmup_steps is 22, of 22 steps in all, so the learning rate never reaches" in output
    assert "warmup_steps" not in train(later(prepared, train={**PLAIN, "warmup_steps": 21}))


def test_plan_of_fewer_steps_than_are_to_be_trained_is_refused(prepared: Callable[..., Checkout]) -> None:
    checkout = later(prepared, train=PLAIN)
    checkout.set_params({**FEATURES, "train": {**PLAIN, "num_train_epochs": 4}})
    assert last_line(train(checkout, code=2)).startswith(
        "error: the batch plan has 22 steps, and 44 are to be trained; run: dvc repro build_loaders"
    )


def test_fp16_that_overflows_in_every_step_is_told_when_it_begins_and_ends_the_run(
    prepared: Callable[..., Checkout],
) -> None:
    checkout = later(prepared, train={"loss": "stages.custom.later:huge_loss", "precision": "fp16"})
    output = train(checkout, code=2)
    assert output.count("fp16: the gradient of step 1 overflowed, so the step is skipped and the scale halved") == 1
    assert last_line(output).startswith(
        "error: fp16: the gradient of every step from 1 to 22 overflowed, down to a scale of 0.015625, so nothing was "
        "trained in them; the state is saved: write train.precision bf16 or fp32"
    )
    assert not (checkout.folder / "models").exists()
    assert "every step from 1 to 22" in last_line(train(checkout, code=2))


def test_fp16_whose_scale_has_fallen_to_its_floor_stops_the_run(prepared: Callable[..., Checkout]) -> None:
    checkout = later(
        prepared, train={"loss": "stages.custom.later:huge_loss", "precision": "fp16", "num_train_epochs": 4}
    )
    assert "every step from 1 to 30 overflowed, down to a scale of 6.10352e-05" in last_line(train(checkout, code=2))
    assert saved_steps(checkout)[-1] == 30


def test_model_without_a_validation_loss_is_never_published(prepared: Callable[..., Checkout]) -> None:
    checkout = later(prepared, train={"loss": "stages.custom.later:nan_loss"}, evaluate={"eval_batch_size": 16})
    output = train(checkout, code=2)
    rows = ", ".join(map(str, range(16)))
    assert f"warning: the validation loss of step 11 is nan, so it is no candidate; it is that of rows {rows}" in output
    assert last_line(output).startswith("error: no evaluation gave a validation loss that is a number")
    assert not (checkout.folder / "models").exists()
    assert "no evaluation gave a validation loss" in last_line(train(checkout, code=2))


def test_state_that_itself_holds_nan_says_so_and_since_when_at_every_start(prepared: Callable[..., Checkout]) -> None:
    changes = {"optim": "sgd", "learning_rate": 1e38, "max_grad_norm": None, "warmup_steps": 0}
    checkout = later(prepared, train={**PLAIN, **changes})
    for _ in range(2):
        line = last_line(train(checkout, code=2))
        assert "the state itself holds NaN, infinity or as good as that (layers." in line
        assert "since step 1 at the latest" in line
        assert "so that no row is to blame and another start does not help: begin anew with" in line


def test_metric_that_is_nan_at_every_evaluation_is_told_and_the_loss_decides(prepared: Callable[..., Checkout]) -> None:
    changes = {"early_stopping_patience": 1, "num_train_epochs": 4, "keep_candidates": 2}
    evaluate = {
        "metrics": ["stages.custom.later:nan_metric"],
        "metric_for_best_model": "mine",
        "greater_is_better": True,
    }
    checkout = later(prepared, train={**PLAIN, **changes}, evaluate=evaluate)
    output = train(checkout)
    assert "warning: mine of step 11 is nan (evaluate.metric_for_best_model): the validation loss decides" in output
    record = json.loads((checkout.folder / "metrics/train.json").read_text())
    losses = {int(row["step"]): float(row["loss"]) for row in checkout_rows(checkout)}
    assert record["best_step"] == min(losses, key=lambda step: losses[step])
    assert record["steps"] > 11


def checkout_rows(checkout: Checkout) -> list[dict[str, str]]:
    with (checkout.folder / "plots/eval.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


NAN = float("nan")


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({1: (NAN, 0.9), 2: (NAN, 0.7), 3: (NAN, 0.8)}, [2, 3, 1]),
        ({1: (NAN, 0.1), 2: (-0.5, 0.9), 3: (0.6, 0.9)}, [3, 2, 1]),
        ({1: (NAN, NAN), 2: (NAN, 0.7), 3: (NAN, NAN)}, [2, 1, 3]),
    ],
)
def test_loss_ranks_what_the_metric_cannot(scores: dict[int, tuple[float, float]], best: list[int]) -> None:
    evaluate = make_params().evaluate
    table = {step: {"accuracy": metric, "loss": loss} for step, (metric, loss) in scores.items()}
    assert ranked(table, evaluate) == best


@pytest.mark.parametrize(
    ("kwargs", "evaluate", "followed"),
    [
        ({}, {}, "loss"),
        ({"mode": "min"}, {}, "loss"),
        ({"mode": "max"}, {}, "accuracy"),
        ({"mode": "max"}, {"metric_for_best_model": "loss"}, "refused"),
        ({}, {"metric_for_best_model": "loss"}, "loss"),
        ({}, {"metric_for_best_model": "errors", "greater_is_better": False}, "errors"),
        ({"mode": "max"}, {"metric_for_best_model": "errors", "greater_is_better": False}, "refused"),
    ],
)
@pytest.mark.parametrize("name", ["ReduceLROnPlateau", "torch.optim.lr_scheduler:ReduceLROnPlateau"])
def test_plateau_is_given_what_its_mode_is_made_for(
    name: str, kwargs: dict[str, Any], evaluate: dict[str, Any], followed: str
) -> None:
    plateau = {"lr_scheduler_type": name, "lr_scheduler_kwargs": {"patience": 0, **kwargs}, "warmup_steps": 0}
    train = make_params(**plateau).train
    wanted = EvaluateParams.model_validate(read_yaml(ROOT / "params.yaml")["evaluate"] | evaluate)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    if followed == "refused":
        with pytest.raises(UserError, match=r"mode is max, but evaluate.metric_for_best_model is .*; write mode: min"):
            make_schedule(optimizer, train, 10, wanted)
        return
    schedule = make_schedule(optimizer, train, 10, wanted)
    # It gets better first, and then worse; what is not followed does the opposite.
    better = {"loss": (1.0, 0.5, 0.9), "accuracy": (0.5, 0.9, 0.6), "errors": (1.0, 0.5, 0.9)}
    rates = []
    for turn in range(3):
        other = "accuracy" if followed == "loss" else "loss"
        schedule.after_evaluation({followed: better[followed][turn], other: 1.0})
        rates.append(optimizer.param_groups[0]["lr"])
    schedule.after_evaluation({"loss": NAN, followed: NAN})
    rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1.0, 1.0, 0.1, 0.1])


@pytest.mark.parametrize(
    ("task", "names", "threshold", "refused"),
    [
        ("classification", ("a", "b", "c"), 0.7, True),
        ("classification", ("a", "b", "c"), 0.5, False),
        ("classification", ("a", "b"), 0.7, False),
        ("multi_label", ("a", "b", "c"), 0.7, False),
    ],
)
def test_threshold_that_nothing_looks_at_is_refused(
    task: str, names: tuple[str, ...], threshold: float, refused: bool
) -> None:
    evaluate = make_params().evaluate.model_copy(update={"threshold": threshold})
    kind = Task(task, names, (), ("x",), "label", ("features",))
    values = read_yaml(ROOT / "params.yaml")
    metrics = {"multi_label": ["f1_micro"]}.get(task, ["accuracy"])
    values["data"] |= {"task": task, "label_names": list(names)}
    values["evaluate"] |= {"threshold": threshold, "metrics": metrics, "metric_for_best_model": metrics[0]}
    if not refused:
        require_threshold_of_use(evaluate, kind)
        parse_params(values)
        return
    with pytest.raises(UserError, match=r"evaluate.threshold is 0.7, but of 3 classes the likeliest is predicted"):
        require_threshold_of_use(evaluate, kind)
    with pytest.raises(UserError, match=r"evaluate.threshold is 0.7, but of the 3 classes in data.label_names"):
        parse_params(values)
