"""Every stage goes on where it was: a kill in a prediction costs the atom in the making, and none meets an orphan of
itself."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.project import PYTHON_BIN, ROOT, Checkout
from tests.support.train_stage import TRAIN_OUTS, executed_steps, run_stage, saved_steps, train

# Five batches a validation of 20 rows, and two candidates.
SLOW = {
    "train": {"loss": "stages.custom.own:slow_to_evaluate", "class_weights": None, "num_train_epochs": 2,
              "save_strategy": "time", "save_steps": None, "save_seconds": 600},
    "evaluate": {"eval_batch_size": 4},
}  # fmt: skip
SECONDS = "0.4"  # three batches an atom
GOING_ON = r"going on after (\d+) of 5 batches from before"
OUTS = {"evaluate": ("data/predictions/validation", "metrics/candidates.json"),
        "select_best": ("data/predictions/test", "models/best", "metrics/best.json", "report.html")}  # fmt: skip


def second_atom(scope: str) -> str:
    """The point where the first one is on disk."""
    return rf"on:atoms/\.{scope}.*\.00000001\.tmp"


@pytest.fixture(scope="module")
def trained(prepared: Callable[..., Checkout]) -> Checkout:
    checkout = prepared(SLOW)
    train(checkout)
    return checkout


def test_validation_killed_half_way_goes_on_in_the_state_that_it_began_with(
    prepared: Callable[..., Checkout], trained: Checkout
) -> None:
    killed = prepared(SLOW)
    run_stage(killed, "train", -signal.SIGKILL, second_atom("validation.step-00000011"), SECONDS=SECONDS)
    assert saved_steps(killed)[-1] == 11  # before it is due by time
    output = train(killed)
    assert re.findall(GOING_ON, output) == ["3"]
    assert executed_steps(killed) == [0, 11]
    assert killed.digests(*TRAIN_OUTS) == trained.digests(*TRAIN_OUTS)


def test_validation_that_is_asked_to_stop_keeps_what_it_did(
    prepared: Callable[..., Checkout], trained: Checkout
) -> None:
    killed = prepared(SLOW)
    process = killed.start("python", "-m", "stages.train", SECONDS="0.7")
    while not list(killed.folder.glob("runs/*/atoms/validation*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert "stopped by SIGTERM after step 11, saved" in process.communicate()[0]
    assert int(re.findall(GOING_ON, train(killed))[0]) >= 2
    assert killed.digests(*TRAIN_OUTS) == trained.digests(*TRAIN_OUTS)


def test_predictions_of_another_environment_are_made_again_and_said(prepared: Callable[..., Checkout]) -> None:
    killed = prepared(SLOW)
    point = second_atom("validation.step-00000011")
    script = f"from tests.support.faults import install; install({point!r}); from stages.train import main; main()"
    environment = {"SECONDS": SECONDS, "PYTHONPATH": f".:{ROOT}", "ATEN_CPU_CAPABILITY": "default"}
    killed.run(sys.executable, "-c", script, code=-signal.SIGKILL, real=True, **environment)
    output = train(killed)
    assert "warning: the environment changed (device: cpu (DEFAULT) -> " in output
    assert "validation.step-00000011: 1 pieces were computed in another environment" in output
    assert not re.search(GOING_ON, output)


def complete(checkout: Checkout, stage: str) -> None:
    """Run what `stage` reads."""
    if stage == "select_best":
        run_stage(checkout, "evaluate")


@pytest.mark.parametrize(("stage", "scope"), [("evaluate", "step-"), ("select_best", "test")])
def test_prediction_of_a_later_stage_killed_half_way_goes_on_to_the_same_bytes(
    trained: Checkout, tmp_path: Path, stage: str, scope: str
) -> None:
    killed, undisturbed = trained.copy(tmp_path / "a"), trained.copy(tmp_path / "b")
    for checkout in (killed, undisturbed):
        for run in checkout.runs():
            for atoms in run.glob("atoms/*"):  # of train's own evaluations
                atoms.rename(run / atoms.name)
        complete(checkout, stage)
    output = run_stage(undisturbed, stage)
    assert not re.search(GOING_ON, output)
    run_stage(killed, stage, -signal.SIGKILL, second_atom(scope), SECONDS=SECONDS)
    assert not list((killed.folder / OUTS[stage][0]).glob("*.parquet"))
    assert re.findall(GOING_ON, run_stage(killed, stage)) == ["3"]
    assert killed.digests(*OUTS[stage]) == undisturbed.digests(*OUTS[stage])


def test_evaluate_takes_the_predictions_of_train_only_for_the_same_model_and_environment(
    trained: Checkout, tmp_path: Path
) -> None:
    checkout = trained.copy(tmp_path / "a")
    taken = run_stage(checkout, "evaluate")
    assert taken.count("nothing to compute, there are 5 batches from before") == 2
    bytes_taken = checkout.digests(*OUTS["evaluate"])
    (run,) = checkout.runs("evaluate")
    other = checkout.run("python", "-m", "stages.evaluate", ATEN_CPU_CAPABILITY="default")
    assert "evaluate: the environment changed (device: cpu (" in other
    assert "from before" not in other
    (run,) = checkout.runs()
    for atoms in run.glob("atoms/*"):
        atoms.rename(run / atoms.name)
    for run in checkout.runs("evaluate"):
        run.rename(checkout.folder / "aside")
    assert "from before" not in run_stage(checkout, "evaluate")
    assert checkout.digests(*OUTS["evaluate"]) == bytes_taken
    weights = next(checkout.folder.glob("models/candidates/*/model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for atoms in run.glob("validation.*"):
        atoms.rename(run.parent / "atoms")


def test_scores_of_another_library_are_computed_again(trained: Checkout, tmp_path: Path) -> None:
    checkout = trained.copy(tmp_path / "a")
    run_stage(checkout, "evaluate")
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as metadata\nreal = metadata.version\n"
        "metadata.version = lambda name: '9.9' if name == 'scikit-learn' else real(name)\n"
    )
    output = checkout.run("python", "-m", "stages.evaluate", PYTHONPATH=str(tmp_path))
    assert re.search(r"evaluate: the environment changed \(scikit-learn: [0-9.]+ -> 9.9\)", output)
    assert output.count("nothing to compute") == 2  # those that train left: no metric has a part in them


def test_stage_that_another_process_is_at_is_refused_with_its_pid(trained: Checkout, tmp_path: Path) -> None:
    checkout = trained.copy(tmp_path / "a", "atoms")
    first = checkout.start("python", "-m", "stages.evaluate", SECONDS="3")
    while not list(checkout.folder.glob(".dvc/tmp/evaluate.lock")) or not checkout.runs("evaluate"):
        assert first.poll() is None
        time.sleep(0.02)
    listing = checkout.run("python", "-m", "stages", "runs")
    assert re.search(rf"evaluate\W+running: process {first.pid}", listing)
    second = run_stage(checkout, "evaluate", code=75)
    assert second.splitlines()[-1].startswith(
        f"error: stage evaluate of this workspace is being worked on by process {first.pid}; wait for it"
    )
    first.kill()
    first.communicate()
    assert re.search(r"evaluate\W+killed", checkout.run("python", "-m", "stages", "runs"))
    run_stage(checkout, "evaluate")


def test_same_work_in_two_workspaces_is_done_in_both(trained: Checkout, tmp_path: Path) -> None:
    one, two = trained.copy(tmp_path / "a", "atoms"), trained.copy(tmp_path / "b", "atoms")
    shared = str(one.folder / "runs")
    first = one.start("python", "-m", "stages.evaluate", SECONDS="3")
    while not one.runs("evaluate"):
        assert first.poll() is None
        time.sleep(0.02)
    run_stage(two, "evaluate", HOLDFAST_RUNS=shared)
    assert first.poll() is None
    first.kill()
    first.communicate()
    run_stage(one, "evaluate")
    assert one.digests(*OUTS["evaluate"]) == two.digests(*OUTS["evaluate"])
    assert not list(one.folder.glob("runs/.*"))


def test_what_a_stage_kept_goes_once_dvc_has_written_down_that_it_is_done(trained: Checkout, tmp_path: Path) -> None:
    checkout = trained.copy(tmp_path / "a")
    run_stage(checkout, "evaluate")
    lock = checkout.folder / "dvc.lock"
    lock.write_text("")
    os.utime(lock, (0, 0))
    run_stage(checkout, "select_best")  # DVC was killed before it wrote evaluate down
    assert checkout.runs("evaluate") and checkout.runs("select_best")
    os.utime(lock)
    run_stage(checkout, "select_best")
    assert not checkout.runs("evaluate")


SLOW_PYTHON = f"""#!/bin/sh
case "$*" in *stages.*) touch started; sleep 2;; esac
exec {PYTHON_BIN}/python "$@"
"""


def test_orphan_whose_dvc_was_killed_before_it_came_so_far_ends(trained: Checkout, tmp_path: Path) -> None:
    checkout = trained.copy(tmp_path / "a", "atoms", "runs")
    checkout.run("git", "init", "-q")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "python").write_text(SLOW_PYTHON)
    (bin_folder / "python").chmod(0o755)
    dvc = checkout.start(
        f"{PYTHON_BIN}/dvc", "repro", "--single-item", "evaluate", PATH=f"{bin_folder}:{os.environ['PATH']}"
    )
    while not (checkout.folder / "started").exists():
        assert dvc.poll() is None, dvc.communicate()[0]
        time.sleep(0.01)
    dvc.kill()
    output, _ = dvc.communicate(timeout=60)  # until the orphan, which has the pipe too, has ended
    assert re.search(r"process \d+, which started this stage, has ended: this stage ends too", output)
    assert not (checkout.folder / "runs").exists()
