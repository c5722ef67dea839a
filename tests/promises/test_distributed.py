"""Several processes: the same bits in any number (`train.reduction: exact`) or in the same one (`fast`), and any may be
killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.fork_server import Forked
from tests.support.processes import launcher, start_side_by_side, train_in, train_side_by_side
from tests.support.project import Checkout
from tests.support.train_stage import SAVES, TRAIN_OUTS, executed_steps, saved_steps, train

# Three micro-batches in an epoch's last step, of which there are two: fewer than four processes.
SHAPE: dict[str, dict[str, Any]] = {
    "build_loaders": {"batch_size": 8, "micro_batch_size": 2},
    "train": {"num_train_epochs": 2, "eval_strategy": "steps", "eval_steps": 8, "class_weights": "balanced"},
}


def several(prepared: Callable[..., Checkout], processes: int, **train_params: Any) -> Checkout:
    return prepared({**SHAPE, "train": {**SHAPE["train"], **train_params, "launcher": launcher(processes)}})


def start(checkout: Checkout) -> subprocess.Popen[str] | Forked:
    return checkout.start(sys.executable, "-m", "stages.launch")


def finish(checkout: Checkout, code: int | None = 0) -> str:
    return checkout.run(sys.executable, "-m", "stages.launch", code=code)


def workers(launched: subprocess.Popen[str] | Forked) -> list[int]:
    """The pids of the training processes, main's first."""
    found = subprocess.run(["pgrep", "-P", str(launched.pid)], capture_output=True, text=True, check=False)
    ranks = {}
    for pid in found.stdout.split():
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks.update({int(entry[5:]): int(pid) for entry in environment if entry.startswith(b"RANK=")})
    return [ranks[rank] for rank in sorted(ranks)]


def wait_for_step(checkout: Checkout, process: subprocess.Popen[str] | Forked, known: set[Path]) -> None:
    deadline = time.monotonic() + 120
    while not set(checkout.folder.glob("runs/*/checkpoints/step-*")) - known:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def weights(checkout: Checkout) -> dict[str, torch.Tensor]:
    best = json.loads((checkout.folder / "metrics/train.json").read_text())["best_step"]
    return load_file(checkout.folder / f"models/candidates/step-{best:08d}/model.safetensors")


@pytest.fixture(scope="module")
def one_process(prepared: Callable[..., Checkout]) -> Checkout:
    checkout = prepared(SHAPE)
    train(checkout)
    return checkout


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_any_number_of_processes_gives_the_same_bytes(
    prepared: Callable[..., Checkout], one_process: Checkout, processes: int
) -> None:
    checkout = several(prepared, processes)
    assert f", {processes} processes" in train_in(processes, checkout)
    assert checkout.digests(*TRAIN_OUTS) == one_process.digests(*TRAIN_OUTS)


def test_killing_any_process_takes_the_job_down_and_the_next_start_goes_on_to_the_same_bytes(
    prepared: Callable[..., Checkout],
) -> None:
    settings = {"num_train_epochs": 12, "eval_steps": 20, "precision": "bf16", **SAVES}
    reference, killed = several(prepared, 2, **settings), several(prepared, 2, **settings)
    train_in(2, reference)
    generator = random.Random(0)
    for victim in (0, 1):
        known = set(killed.folder.glob("runs/*/checkpoints/step-*"))
        process = start(killed)
        wait_for_step(killed, process, known)
        time.sleep(generator.uniform(0, 0.3))
        os.kill(workers(process)[victim], signal.SIGKILL)
        process.communicate(timeout=90)
        assert process.returncode != 0
        assert not (killed.folder / "models").exists()
    train_in(2, killed)
    steps = executed_steps(killed)
    assert steps[0] == 0
    assert 0 < steps[1] <= steps[2]
    assert killed.digests(*TRAIN_OUTS) == reference.digests(*TRAIN_OUTS)


def test_stop_signal_to_the_launcher_saves_and_another_number_of_processes_goes_on(
    prepared: Callable[..., Checkout], one_process: Checkout
) -> None:
    checkout = several(prepared, 2, num_train_epochs=12, save_strategy="time", save_steps=None, save_seconds=1)
    process = start(checkout)
    wait_for_step(checkout, process, set())
    process.send_signal(signal.SIGUSR2)  # of which torchrun by itself knows nothing
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "stopped by SIGUSR2 after step" in output
    stopped = next(event["step"] for event in checkout.log() if event["event"] == "stopped")
    params = json.loads((checkout.folder / "params.yaml").read_text())
    params["train"]["launcher"] = "auto"
    (checkout.folder / "params.yaml").write_text(json.dumps(params))
    output = train(checkout)
    assert f"going on after step {stopped}" in output
    assert "environment changed" not in output
    listed = checkout.run(sys.executable, "-m", "stages", "runs")
    assert "│ 2, 1 " in listed
    alone = prepared({**SHAPE, "train": {**SHAPE["train"], "num_train_epochs": 12}})
    train(alone)
    assert checkout.digests(*TRAIN_OUTS) == alone.digests(*TRAIN_OUTS)


def test_more_processes_than_micro_batches_a_step_is_one_line(prepared: Callable[..., Checkout]) -> None:
    checkout = prepared({"build_loaders": {"batch_size": 8, "micro_batch_size": 8}, "train": {"launcher": launcher(2)}})
    begin = time.monotonic()
    output = finish(checkout, code=None)
    assert time.monotonic() - begin < 60
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "a step has 1 micro-batches" in errors[0]
    assert not list(checkout.folder.glob("runs/*/checkpoints/step-*"))


def test_signal_to_one_process_between_steps_stops_all_with_the_state_saved(prepared: Callable[..., Checkout]) -> None:
    checkout = several(prepared, 2, callbacks=[{"class": "stages.custom.own:SignalsRank1"}])
    output = train_in(2, checkout, code=75, SIGNAL_AT="5")
    assert "stopped by SIGTERM after step 5, saved" in output
    assert "/stages/" not in output, "a traceback of ours"
    assert "another process" not in output, "they did not leave together"
    train_in(2, checkout)
    assert executed_steps(checkout) == [0, 5]


def test_signal_to_one_process_in_an_evaluation_stops_all_and_it_is_done_again(
    prepared: Callable[..., Checkout], tmp_path: Path
) -> None:
    loss = {"loss": "stages.custom.own:signals_rank_1", "class_weights": None, "launcher": launcher(2)}
    params = {**SHAPE, "train": {**SHAPE["train"], **loss}, "evaluate": {"eval_batch_size": 4}}
    checkout, reference = prepared(params), prepared(params)
    # The look before training is main's alone, so the first evaluation of the second process is that of step 8.
    output = train_in(2, checkout, code=75, SIGNAL_FILE=str(tmp_path / "once"))
    assert "stopped by SIGTERM after step 8, saved" in output
    assert "/stages/" not in output, "a traceback of ours"
    assert "another process" not in output, "they did not leave together"
    train_in(2, checkout)
    train_in(2, reference)
    assert executed_steps(checkout) == [0, 8]
    assert checkout.digests(*TRAIN_OUTS) == reference.digests(*TRAIN_OUTS)


def test_validation_of_two_processes_killed_half_way_goes_on_to_the_same_bytes(
    prepared: Callable[..., Checkout],
) -> None:
    loss = {"loss": "stages.custom.own:slow_to_evaluate", "class_weights": None, "launcher": launcher(2)}
    params = {**SHAPE, "train": {**SHAPE["train"], **loss}, "evaluate": {"eval_batch_size": 2}}
    killed, reference = prepared(params), prepared(params)
    train_in(2, reference)
    started = start_side_by_side([killed, killed], SECONDS="0.7")
    while not list(killed.folder.glob("runs/*/atoms/validation*")):
        assert [process.poll() for process in started] == [None, None]
        time.sleep(0.02)
    for process in started:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    output = train_in(2, killed)
    assert "going on after 4 of 10 batches from before" in output
    assert executed_steps(killed)[1] in (6, 8)  # its state may have been half-written
    assert killed.digests(*TRAIN_OUTS) == reference.digests(*TRAIN_OUTS)


@pytest.mark.parametrize(("reduction", "are_taken"), [("exact", True), ("fast", False)])
def test_predictions_of_two_processes_are_those_of_one_if_its_weights_are_too(
    prepared: Callable[..., Checkout], one_process: Checkout, reduction: str, are_taken: bool
) -> None:
    killed = several(prepared, 2, save_steps=1000, reduction=reduction)
    for process in start_side_by_side([killed, killed], r"on:atoms/\.validation.step-00000016"):
        process.communicate(timeout=120)
    assert list(killed.folder.glob("runs/*/atoms/validation.step-00000008.*"))
    assert saved_steps(killed) == []  # so that the next start trains step 8 again
    output = train(killed)
    assert ("from before" in output) == are_taken
    assert ("were computed in another environment" in output) == (not are_taken)
    if are_taken:
        assert killed.digests(*TRAIN_OUTS) == one_process.digests(*TRAIN_OUTS)


def test_fast_reduction_gives_the_same_bytes_twice_and_nearly_those_of_another_number(
    prepared: Callable[..., Checkout],
) -> None:
    first, second = (several(prepared, 2, reduction="fast") for _ in range(2))
    alone = prepared({**SHAPE, "train": {**SHAPE["train"], "reduction": "fast"}})
    train_in(2, first)
    train_in(2, second)
    train(alone)
    assert first.digests(*TRAIN_OUTS) == second.digests(*TRAIN_OUTS)
    assert first.digests(*TRAIN_OUTS) != alone.digests(*TRAIN_OUTS)
    ours, theirs = weights(first), weights(alone)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-5, rtol=1e-4, msg=name)


def test_fast_reduction_in_another_number_of_processes_is_told(prepared: Callable[..., Checkout]) -> None:
    checkout = several(prepared, 2, reduction="fast")
    for process in start_side_by_side([checkout, checkout], r"on:checkpoints/\.step-00000012"):
        process.communicate(timeout=120)
    assert "warning: the environment changed (world_size: 2 -> 1)" in train(checkout)
    assert json.loads((checkout.folder / "metrics/train.json").read_text())["environments"] == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_launcher_that_ends_at_the_start_leaves_no_process_behind(
    prepared: Callable[..., Checkout], number: signal.Signals
) -> None:
    checkout = several(prepared, 2, num_train_epochs=60, save_strategy="time", save_steps=None)
    process = start(checkout)
    while not list(checkout.folder.glob("runs/*/lock")):
        assert process.poll() is None
        time.sleep(0.02)
    pids = workers(process)
    begin = time.monotonic()
    process.send_signal(number)
    process.communicate(timeout=60)
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() - begin < 25, "a worker outlived its launcher"
        time.sleep(0.1)


def test_process_with_other_files_or_parameters_is_refused_by_name_before_a_step(
    prepared: Callable[..., Checkout],
) -> None:
    main, other = several(prepared, 2), several(prepared, 2, learning_rate=0.5)
    outputs = train_side_by_side([main, main, other], 2, 2, 2)
    last = outputs[0].strip().splitlines()[-1]
    assert f"process 2 on {socket.gethostname()} would train another run than process 0" in last
    assert "train.learning_rate: 0.5 -> 0.0001" in last
    assert not list(main.folder.glob("runs/*/checkpoints/step-*"))


def test_finished_run_is_published_by_the_main_process_and_all_end(prepared: Callable[..., Checkout]) -> None:
    checkout = several(prepared, 2)
    train_in(2, checkout)
    expected = checkout.digests(*TRAIN_OUTS)
    shutil.rmtree(checkout.folder / "models")
    assert "nothing to train" in train_in(2, checkout)
    assert checkout.digests(*TRAIN_OUTS) == expected


def test_failure_of_one_process_alone_costs_no_step_that_was_done(prepared: Callable[..., Checkout]) -> None:
    own = {"loss": "stages.custom.own:fails_in_rank_1", "class_weights": None}
    params = {**SHAPE, "train": {**SHAPE["train"], **own, "launcher": launcher(2), "save_steps": 100}}
    checkout, reference = prepared(params), prepared(params)
    outputs = train_side_by_side([checkout] * 2, 75, 2, FAILS="yes")
    step = saved_steps(checkout)[0]
    assert "another process of this job ended" in outputs[0]
    assert f"step {step + 1} fails in the model or the loss: LookupError: no such word" in outputs[1]
    assert step > 1
    train_in(2, checkout)
    train_in(2, reference)
    assert executed_steps(checkout) == [0, step]
    assert checkout.digests(*TRAIN_OUTS) == reference.digests(*TRAIN_OUTS)
