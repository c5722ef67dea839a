"""The promise: killed at any point, any number of times, train ends with the same bytes.

Kills of the train stage alone, where every point can be named; test_storm.py kills whole `dvc repro` runs.
"""

from __future__ import annotations

import fcntl
import json
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.ground.disk import remove
from stages.keeping.folder import RunFolder
from tests.support.damage import flip
from tests.support.project import ROOT, Checkout
from tests.support.train_stage import (
    EARLY_STOPPING,
    TRAIN_OUTS,
    die_at,
    executed_steps,
    run_stage,
    saved_steps,
    start_training,
    train,
)

# With two checkpoints behind it, of steps 3 and 6.
MID_RUN = r"on:checkpoints/\.step-00000009"
# With an evaluation behind it too, that of step 11.
LATE = r"on:checkpoints/\.step-00000018"


def test_kill_at_every_kind_of_write_ends_with_the_same_bytes(prepared: Callable[..., Checkout]) -> None:
    params = {
        "train": {"max_steps": 8, "num_train_epochs": 1, "eval_strategy": "steps", "eval_steps": 4, "save_steps": 4}
    }
    reference = prepared(params)
    operations = reference.folder.parent / "operations"
    train(reference, point=f"count:{operations}")
    expected = reference.digests(*TRAIN_OUTS)
    lines = operations.read_text().splitlines()
    # One point for each operation on each kind of file, the last time it happens and a random time.
    kinds: dict[str, list[int]] = {}
    for line in lines:
        number, operation, target = line.split(" ", 2)
        kinds.setdefault(f"{operation} {'fd' if target.isdigit() else Path(target).name.lstrip('.')[:8]}", []).append(
            int(number)
        )
    generator = random.Random(0)
    points = sorted(
        {f"{generator.choice(['before', 'after'])}:{generator.choice(numbers)}" for numbers in kinds.values()}
    )
    assert len(points) > 15
    for point in generator.sample(points, 12):
        killed = prepared(params)
        die_at(killed, point)
        train(killed)
        assert killed.digests(*TRAIN_OUTS) == expected, (point, lines[int(point.split(":")[1]) - 1])
        shutil.rmtree(killed.folder)


LONG = {"train": {"num_train_epochs": 60, "eval_strategy": "steps", "eval_steps": 30, "save_strategy": "time",
                  "save_steps": None, "save_seconds": 1}}  # fmt: skip


# Long enough for a signal to come, and trained to its end many times.
STOPPED = {"train": {**LONG["train"], "num_train_epochs": 25}}


@pytest.fixture(scope="module")
def stopped_reference(prepared: Callable[..., Checkout]) -> dict[str, str]:
    reference = prepared(STOPPED)
    train(reference)
    return reference.digests(*TRAIN_OUTS)


@pytest.mark.parametrize(
    ("number", "target"),
    [
        (signal.SIGINT, "group"),  # Ctrl-C
        (signal.SIGTERM, "process"),
        (signal.SIGTERM, "group"),
        (signal.SIGUSR1, "process"),
        (signal.SIGUSR2, "process"),
        (signal.SIGHUP, "process"),
    ],
)
def test_stop_signal_saves_says_what_to_run_and_exits_non_zero(
    prepared: Callable[..., Checkout], stopped_reference: dict[str, str], number: signal.Signals, target: str
) -> None:
    checkout = prepared({"train": {**STOPPED["train"], "num_workers": 2 if target == "group" else 0}})
    process = start_training(checkout)
    begin = time.monotonic()
    for _ in range(3):  # repeats change nothing
        process.send_signal(number, group=target == "group")
        time.sleep(0.05)
    output, _ = process.communicate(timeout=30)
    assert time.monotonic() - begin < 20
    assert process.returncode == 75
    last = output.strip().splitlines()[-1]
    assert f"stopped by {number.name} after step" in last
    assert "run the same command again" in last
    stopped_at = next(event["step"] for event in checkout.log() if event["event"] == "stopped")
    assert saved_steps(checkout)[-1] == stopped_at
    assert not (checkout.folder / "models").exists()
    train(checkout)
    assert executed_steps(checkout) == [0, stopped_at]
    assert checkout.digests(*TRAIN_OUTS) == stopped_reference


@pytest.mark.parametrize(("pause", "ends"), [(0.3, False), (2.2, True)])
def test_only_a_second_ctrl_c_two_seconds_later_ends_a_step_that_hangs(pause: float, ends: bool) -> None:
    script = (
        "import time; from stages.ground.signals import StopRequest\n"
        "stop = StopRequest(); stop.install(); print('ready', flush=True)\n"
        "begin = time.monotonic()\n"
        "while time.monotonic() - begin < 5: time.sleep(0.1)\n"
        "raise SystemExit(7 if stop.signal else 8)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(pause)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == (75 if ends else 7)


def test_start_that_hangs_ends_with_75_and_its_stacks_in_the_log(prepared: Callable[..., Checkout]) -> None:
    own = {"callbacks": [{"class": "stages.custom.own:Hangs", "kwargs": {}}], "hang_seconds": 3}
    checkout, reference = prepared({"train": own}), prepared({"train": own})
    output = train(checkout, code=75, HANGS="yes")
    assert "no step, atom or save for" in output.strip().splitlines()[-1]
    (event,) = (event for event in checkout.log() if event["event"] == "hang")
    assert "on_step_end" in event["stacks"]["MainThread"]
    step = saved_steps(checkout)[-1]
    train(checkout)
    train(reference)
    assert executed_steps(checkout) == [0, step]
    assert checkout.digests(*TRAIN_OUTS) == reference.digests(*TRAIN_OUTS)


def test_second_trainer_is_refused_with_the_pid_of_the_first(prepared: Callable[..., Checkout]) -> None:
    checkout = prepared(LONG)
    first = start_training(checkout)
    second = train(checkout, code=75)
    assert f"being worked on by process {first.pid}" in second.strip().splitlines()[-1]
    first.kill()
    first.communicate()
    third = start_training(checkout)  # a stale lock never blocks
    third.kill()
    third.communicate()
    assert len(executed_steps(checkout)) == 2


def test_trainer_dies_with_its_parent(prepared: Callable[..., Checkout]) -> None:
    checkout = prepared(LONG)
    script = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'stages.launch'])"
    parent = checkout.start("python", "-c", script)
    while not list(checkout.folder.glob("runs/*/checkpoints/step-*")):
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    (run,) = checkout.runs()
    with (run / "lock").open("r+") as file:
        deadline = time.monotonic() + 20
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                assert time.monotonic() < deadline, "the trainer outlived its parent"
                time.sleep(0.1)
    parent.communicate()
    assert checkout.log()[-1] | {"time": 0, "pid": 0, "step": 0} == {
        "event": "stopped", "signal": "SIGTERM", "time": 0, "pid": 0, "step": 0,
    }  # fmt: skip


def test_kills_that_always_come_before_save_seconds_still_end(prepared: Callable[..., Checkout]) -> None:
    params = {**LONG, "train": {**LONG["train"], "save_seconds": 3600}}
    checkout, steps = prepared(params), []
    for _ in range(3):
        process = start_training(checkout)
        process.kill()
        process.communicate()
        steps.append(saved_steps(checkout)[-1])
    assert steps == sorted(set(steps)), "no progress between two kills"
    assert steps[0] > 0


def test_stopped_run_that_is_started_again_trains_no_step(prepared: Callable[..., Checkout]) -> None:
    checkout = prepared(EARLY_STOPPING)
    train(checkout)
    shutil.rmtree(checkout.folder / "models")
    step = json.loads((checkout.folder / "metrics/train.json").read_text())["steps"]
    output = train(checkout)
    assert f"complete since step {step}: publishing it, nothing to train" in output
    assert executed_steps(checkout) == [0, step]


def test_other_parameters_get_a_run_of_their_own_and_the_first_goes_on(prepared: Callable[..., Checkout]) -> None:
    checkout = prepared({})
    die_at(checkout, MID_RUN)
    params = json.loads((checkout.folder / "params.yaml").read_text())
    other = {**params, "train": {**params["train"], "learning_rate": 1e-3}}
    (checkout.folder / "params.yaml").write_text(json.dumps(other))
    output = train(checkout)
    (first,) = [run for run in checkout.runs() if not (run / "result/final").exists()]
    assert f"differs from run {first.name} in train.learning_rate: 0.0001 -> 0.001" in output
    assert re.search(rf"train.init_from_run: {first.name}/step-00000006@[0-9a-f]{{8}}\n", output)
    (checkout.folder / "params.yaml").write_text(json.dumps(params))
    assert "going on after step" in train(checkout)
    reference = prepared({})
    train(reference)
    assert checkout.digests(*TRAIN_OUTS) == reference.digests(*TRAIN_OUTS)


@pytest.mark.parametrize(
    ("path", "edit", "continues"),
    [
        ("stages/training/loop.py", lambda text: "# a comment\n" + text, True),
        ("stages/modeling/losses.py", lambda text: text + "\nNEW = 1\n", False),
        ("data/tokenized/task.json", lambda text: text + "\n", False),
        ("tiny/config.json", lambda text: text.replace("0.1", "0.2"), False),
    ],
)
def test_edit_between_kill_and_rerun_starts_anew_unless_it_is_a_comment(
    prepared: Callable[..., Checkout], path: str, edit: Callable[[str], str], continues: bool
) -> None:
    checkout = prepared({})
    die_at(checkout, MID_RUN)
    file = checkout.folder / path
    file.write_text(edit(file.read_text()))
    output = train(checkout)
    assert ("going on after step" in output) == continues
    assert (Path(path).name in output) != continues
    assert len(checkout.runs()) == (1 if continues else 2)


def test_edit_while_it_trains_publishes_nothing(prepared: Callable[..., Checkout]) -> None:
    checkout = prepared({**LONG, "train": {**LONG["train"], "num_train_epochs": 20}})
    process = start_training(checkout)
    losses = checkout.folder / "stages/modeling/losses.py"
    before = losses.read_text()
    losses.write_text(before + "\nNEW = 1\n")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "nothing is published: stages/modeling/losses.py: changed" in output
    assert not (checkout.folder / "models").exists()
    losses.write_text(before)
    assert "nothing to train" in train(checkout)


def test_thread_count_is_restored_and_said(prepared: Callable[..., Checkout]) -> None:
    checkout, reference = prepared({}), prepared({})
    train(reference)
    die_at(checkout, MID_RUN)
    output = checkout.run("python", "-m", "stages.train", real=True, OMP_NUM_THREADS="2")
    assert "intra-op threads set from 2 to 1" in output
    assert checkout.digests(*TRAIN_OUTS) == reference.digests(*TRAIN_OUTS)


def test_other_library_version_goes_on_and_is_counted(prepared: Callable[..., Checkout]) -> None:
    checkout = prepared({})
    die_at(checkout, MID_RUN)
    fake = checkout.folder.parent / "fake"
    fake.mkdir()
    (fake / "sitecustomize.py").write_text("import numpy\nnumpy.__version__ = '9.9.9'\n")
    output = checkout.run("python", "-m", "stages.train", PYTHONPATH=str(fake))
    assert "warning: the environment changed (numpy:" in output
    assert json.loads((checkout.folder / "metrics/train.json").read_text())["environments"] == 2


def flip_newest(checkout: Checkout, pattern: str) -> Path:
    """Flip a bit in the newest file of the run that matches."""
    (run,) = checkout.runs()
    path = max(run.glob(pattern))
    flip(path)
    return path


@pytest.mark.parametrize(
    ("pattern", "said", "step"),
    [
        ("checkpoints/step-*/model.safetensors", "checkpoint of step 15 is damaged and was set aside", 12),
        ("checkpoints/step-*/history.json", "checkpoint of step 15 is damaged and was set aside", 12),
        # All checkpoints name it.
        ("candidates/step-*/model.safetensors", "training again from step 0 of the 15 that were done", 0),
    ],
)
def test_damage_in_a_killed_run_costs_the_damaged_file_alone(
    prepared: Callable[..., Checkout], pattern: str, said: str, step: int
) -> None:
    checkout, reference = prepared({}), prepared({})
    train(reference)
    die_at(checkout, LATE)
    damaged = flip_newest(checkout, pattern)
    output = train(checkout)
    assert said in output
    assert damaged.name in output
    assert executed_steps(checkout) == [0, step]
    assert checkout.digests(*TRAIN_OUTS) == reference.digests(*TRAIN_OUTS)


@pytest.mark.parametrize(
    ("pattern", "said", "step"),
    [
        ("checkpoints/step-*/optimizer.safetensors", "publishing it, nothing to train", 22),
        ("result/final/train.tsv", "the result of run", 22),
        ("candidates/step-*/model.safetensors", "training again from step 0 of the 22 that were done", 0),
    ],
)
def test_damage_in_a_finished_run_never_reaches_what_is_published(
    prepared: Callable[..., Checkout], pattern: str, said: str, step: int
) -> None:
    checkout = prepared({})
    train(checkout)
    expected = checkout.digests(*TRAIN_OUTS)
    flip_newest(checkout, pattern)
    for out in ("models", "plots", "metrics/train.json"):
        remove(checkout.folder / out)
    assert said in train(checkout)
    assert executed_steps(checkout) == [0, step]
    assert checkout.digests(*TRAIN_OUTS) == expected


def test_finished_run_keeps_one_checkpoint_and_what_publishing_needs(prepared: Callable[..., Checkout]) -> None:
    checkout = prepared({})
    train(checkout)
    (run,) = checkout.runs()
    assert saved_steps(checkout) == [22]
    shutil.rmtree(run / "checkpoints")
    expected = checkout.digests(*TRAIN_OUTS)
    remove(checkout.folder / "models")
    assert "nothing to train" in train(checkout)
    assert checkout.digests(*TRAIN_OUTS) == expected


def test_full_disk_keeps_the_last_good_state_and_names_the_bytes(prepared: Callable[..., Checkout]) -> None:
    checkout, reference = prepared({}), prepared({})
    train(reference)
    limit = 60_000  # bytes a file may have: the model fits, the optimizer's state does not

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    process = subprocess.run(
        [sys.executable, "-m", "stages.train"], cwd=checkout.folder, env=checkout.env, preexec_fn=small_files,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 2
    line = process.stderr.strip().splitlines()[-1]
    assert "could not be written" in line
    assert "bytes" in line
    assert "Traceback" not in process.stderr
    train(checkout)
    assert checkout.digests(*TRAIN_OUTS) == reference.digests(*TRAIN_OUTS)


def test_init_from_run_goes_on_with_everything_where_optimizer_and_plan_are_the_same(
    prepared: Callable[..., Checkout],
) -> None:
    checkout = prepared({})
    train(checkout)
    (first,) = checkout.runs()
    params = json.loads((checkout.folder / "params.yaml").read_text())
    source = RunFolder(first).newest_reference()
    assert source is not None
    params["train"] |= {"num_train_epochs": 3, "init_from_run": source}
    (checkout.folder / "params.yaml").write_text(json.dumps(params))
    run_stage(checkout, "build_loaders")
    assert f"continuing {source}: same optimizer and plan" in train(checkout)
    assert json.loads((checkout.folder / "metrics/train.json").read_text())["steps"] == 33
    assert len((checkout.folder / "plots/eval.tsv").read_text().splitlines()) == 4
    params["train"] |= {"learning_rate": 1e-5}
    (checkout.folder / "params.yaml").write_text(json.dumps(params))
    output = train(checkout)
    assert f"starting with the weights of {source} only, as train.learning_rate differs" in output
    params["train"] |= {"init_from_run": f"{'0' * 12}/step-00000022@{'0' * 8}"}
    (checkout.folder / "params.yaml").write_text(json.dumps(params))
    assert "no such run" in train(checkout, code=2).strip().splitlines()[-1]
    params["train"] |= {"init_from_run": source, "learning_rate": 1e-4, "max_steps": 12}
    (checkout.folder / "params.yaml").write_text(json.dumps(params))
    assert "is at step 22, but this run has 12 steps" in train(checkout, code=2).strip().splitlines()[-1]


def test_models_that_are_no_candidates_any_more_are_removed_as_it_goes(prepared: Callable[..., Checkout]) -> None:
    checkout = prepared({"train": {"eval_strategy": "steps", "eval_steps": 1, "keep_candidates": 1}})
    die_at(checkout, "after:250")
    (run,) = checkout.runs()
    assert saved_steps(checkout)[-1] >= 6
    assert len(list(run.glob("candidates/step-*"))) <= 4


def test_unwritable_place_for_runs_is_one_line(prepared: Callable[..., Checkout]) -> None:
    output = train(prepared({}), code=2, HOLDFAST_RUNS="/proc/holdfast")
    assert len(output.strip().splitlines()) == 1
    assert "/proc/holdfast" in output
    assert "HOLDFAST_RUNS" in output


def test_nothing_in_a_run_folder_is_ever_unpickled(prepared: Callable[..., Checkout]) -> None:
    checkout, reference = prepared({}), prepared({})
    train(reference)
    die_at(checkout, LATE)
    ran = checkout.folder.parent / "ran"
    bomb = pickle.dumps(Bomb(ran))
    (run,) = checkout.runs()
    planted = [path for path in run.rglob("*") if path.is_file()]
    assert len(planted) > 15
    for path in planted:
        path.write_bytes(bomb)
    train(checkout)
    assert not ran.exists()
    assert checkout.digests(*TRAIN_OUTS) == reference.digests(*TRAIN_OUTS)
    pickle.loads(bomb)  # it is a live one
    assert ran.exists()


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.target, "ran")
