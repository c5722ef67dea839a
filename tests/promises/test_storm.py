"""Whole `dvc repro` runs under kills, and what DVC leaves behind when it is killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stages.config.read import read_yaml
from tests.support import faults
from tests.support.project import Checkout
from tools import storm

LONG = {"train": {"num_train_epochs": 50, "eval_strategy": "steps", "eval_steps": 100, "save_seconds": 1}}
SHORT = {"train": {"num_train_epochs": 1}}
# Of what the stages take, in a storm of few kills.
SECONDS = {"tokenize": 4.0, "train": 12.0, "evaluate": 4.0, "select_best": 4.0}


def test_storm_of_kills_ends_with_the_lock_of_another_checkout(tmp_path: Path, tiny_model: Path) -> None:
    reference = Checkout(tmp_path / "reference", tiny_model, LONG)
    reference.repro()
    expected = storm.digests(reference.folder)
    killed = Checkout(tmp_path / "killed", tiny_model, LONG)
    report = storm.Report()
    storm.weather(killed.folder, killed.env, expected, report, 6, random.Random(7), SECONDS, longest=12)
    assert report.manual_repairs == 0
    assert report.completed == report.equal == 1
    # Proof that it was a storm: it was killed, in train too, and train went on from a step after the first.
    assert report.total_kills == 6
    assert report.in_stage["train"] >= 2
    assert report.resumed >= 1
    assert len(killed.runs()) == 1  # it trained, and did not find the other's result
    shutil.rmtree(killed.folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Checkout:
    checkout = Checkout(tmp_path_factory.mktemp("finished") / "repo", tiny_model, SHORT)
    checkout.repro()
    checkout.commit("done")
    return checkout


@pytest.fixture
def small(tmp_path: Path, finished: Checkout) -> Checkout:
    """A copy of `finished` with a cache, runs and history of its own."""
    return finished.copy(tmp_path / "repo")


def test_torn_rwlock_is_set_aside(finished: Checkout) -> None:
    (finished.folder / ".dvc/tmp/rwlock").write_text("{")
    assert "orrupted" in finished.run("dvc", "repro", code=None)  # plain DVC stays blocked: the reason for all this
    output = finished.repro()
    assert "mended: .dvc/tmp/rwlock" in output
    assert "up to date" in output


def test_rwlock_of_a_live_process_is_left_alone(finished: Checkout) -> None:
    rwlock = finished.folder / ".dvc/tmp/rwlock"
    me = {"pid": os.getpid(), "cmd": "dvc repro"}
    held = {"write": {str(finished.folder / "models/candidates"): me}, "read": {}}
    rwlock.write_text(json.dumps(held))
    output = finished.repro("--force", "train", code=None)
    assert "mended" not in output
    assert "busy" in output
    assert json.loads(rwlock.read_text())["write"] == held["write"]
    rwlock.write_text("{}")


def test_torn_lock_file_is_set_aside_and_filled_from_the_cache(finished: Checkout) -> None:
    lock = finished.folder / "dvc.lock"
    content = lock.read_bytes()
    started = len(finished.log())
    lock.write_bytes(content[: len(content) // 2])
    output = finished.repro()
    assert "mended: dvc.lock was torn" in output
    assert lock.read_bytes() == content
    assert [event["event"] for event in finished.log()[started:]] in ([], ["start", "finished"])
    assert list((finished.folder / ".dvc/tmp").glob("dvc.lock.damaged-*"))


LATEST: dict[str, dict[str, Any]] = {"train": {"num_train_epochs": 1}, "select_best": {"tie_break": "latest"}}


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory, finished: Checkout) -> dict[str, str]:
    """The outs and the lock of `finished` where another candidate's tie is broken, from a run that nobody disturbed:
    of what train left, all is made anew."""
    checkout = finished.copy(tmp_path_factory.mktemp("selected") / "repo")
    checkout.set_params(LATEST)
    for name in ("models", "metrics", "plots", "report.html", "data/predictions"):
        checkout.run("rm", "-rf", name)
    checkout.repro("--no-run-cache")
    return checkout.digests()


@pytest.mark.parametrize("point", [r"on:dvc\.lock$", r"past:dvc\.lock$", "past:tmp/rwlock$", "past:files/md5"])
def test_dvc_killed_in_its_own_commit_is_simply_run_again(
    small: Checkout, selected: dict[str, str], point: str
) -> None:
    checkout = small
    checkout.set_params(LATEST)
    script = f"import faults; faults.install({point!r}); from dvc.cli import main; raise SystemExit(main(['repro']))"
    process = checkout.start(sys.executable, "-c", script, PYTHONPATH=str(Path(faults.__file__).parent))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, output
    output = checkout.repro()
    if point == r"past:dvc\.lock$":
        assert "mended: dvc.lock was torn" in output
    if point == "past:tmp/rwlock$":
        assert "mended: .dvc/tmp/rwlock" in output
    assert checkout.digests() == selected


EPOCHS = 25  # long enough to be met while it trains
EXPERIMENT = ("dvc", "exp", "run", "-S", f"train.num_train_epochs={EPOCHS}")


def kill_experiment(checkout: Checkout, *command: str) -> None:
    """Run an experiment, and kill it once it has saved something."""
    known = checkout.runs()
    process = checkout.start(*command)
    while not [run for run in checkout.runs() if run not in known and list(run.glob("checkpoints/step-*"))]:
        time.sleep(0.1)
        assert process.poll() is None, process.communicate()[0]
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_detached_head_of_a_killed_experiment_goes_back_to_its_branch(small: Checkout) -> None:
    branch = small.run("git", "symbolic-ref", "HEAD").strip()
    kill_experiment(small, *EXPERIMENT)
    assert small.run("git", "symbolic-ref", "-q", "HEAD", code=1) == ""
    output = small.repro()
    assert "mended: HEAD was left detached" in output
    assert "going on after step" in output
    assert small.run("git", "symbolic-ref", "HEAD").strip() == branch
    assert read_yaml(small.folder / "params.yaml")["train"]["num_train_epochs"] == EPOCHS
    assert small.run("git", "for-each-ref", "refs/exps/exec") == ""


@pytest.mark.parametrize("where", [(), ("--temp",)])
def test_killed_experiment_that_is_run_again_goes_on(small: Checkout, where: tuple[str, ...]) -> None:
    command = (*EXPERIMENT[:3], *where, *EXPERIMENT[3:])
    kill_experiment(small, *command)
    known = {run.name for run in small.runs()}
    assert "going on after step" in small.run(*command)
    assert {run.name for run in small.runs()} == known
    assert "num_train_epochs" in small.run("dvc", "exp", "show", "--csv")


def test_head_of_a_live_experiment_is_left_alone(small: Checkout) -> None:
    process = small.start(*EXPERIMENT)
    while len(small.runs()) < 2:
        time.sleep(0.1)
        assert process.poll() is None
    assert "mended" not in small.repro(code=None)
    assert small.run("git", "symbolic-ref", "-q", "HEAD", code=1) == ""
    assert "EXEC_HEAD" in small.run("git", "for-each-ref", "refs/exps/exec")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert small.run("git", "symbolic-ref", "--short", "HEAD")


def test_head_that_a_person_detached_is_left_alone(finished: Checkout) -> None:
    branch = finished.run("git", "symbolic-ref", "--short", "HEAD").strip()
    finished.run("git", "checkout", "-q", "--detach")
    assert "mended" not in finished.repro()
    finished.run("git", "checkout", "-q", branch)


def test_earlier_configuration_comes_from_the_run_cache_without_training(small: Checkout) -> None:
    checkout = small
    first = checkout.digests()
    checkout.set_params({"train": {"num_train_epochs": 1, "learning_rate": 3e-4}})
    checkout.repro()
    assert checkout.digests() != first
    shutil.rmtree(checkout.folder / "runs")
    checkout.set_params(SHORT)
    output = checkout.repro()
    assert "is cached - skipping run" in output
    assert checkout.digests() == first
    assert not (checkout.folder / "runs").exists()


def test_fresh_trains_from_the_beginning_to_the_same_bytes(finished: Checkout) -> None:
    before, started = finished.digests(), len(finished.log())
    output = finished.repro("--fresh", "--force", "--no-run-cache", "train")
    assert "dropped run" in output
    assert len(finished.log()) <= started
    assert finished.log()[0]["step"] == 0
    assert finished.digests() == before


def test_runs_are_listed_and_pruned(finished: Checkout) -> None:
    (run,) = finished.runs()
    listing = finished.run(sys.executable, "-m", "stages", "runs")
    assert run.name in listing
    assert "finished" in listing
    other = finished.folder / "runs" / ("0" * 12)
    shutil.copytree(run, other)
    os.utime(other / "lock", (0, 0))
    assert f"removed run {other.name}" in finished.run(sys.executable, "-m", "stages", "runs", "--prune")
    assert finished.runs() == [run]
