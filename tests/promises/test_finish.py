"""Finish now with the best so far: what stops a run is a parameter, and what it did until then is taken over."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.config.read import change_param
from tests.support.project import ROOT, Checkout
from tests.support.train_stage import TRAIN_OUTS, die_at, executed_steps, saved_steps, start_training, train

# Evaluations at 8, 16, ..., 40 of 44 steps; logged and saved every third step.
PARAMS = {"train": {"num_train_epochs": 4, "eval_strategy": "steps", "eval_steps": 8, "lr_scheduler_type": "cosine"}}


def finish(checkout: Checkout, code: int = 0) -> str:
    return checkout.run(sys.executable, "-m", "stages", "finish", code=code)


def stop_step(checkout: Checkout) -> int | None:
    step: int | None = json.loads((checkout.folder / "params.yaml").read_text())["train"]["stop_step"]
    return step


def yaml_to_json(checkout: Checkout) -> None:
    from stages.config.read import read_yaml

    path = checkout.folder / "params.yaml"
    path.write_text(json.dumps(read_yaml(path)))


def test_killed_run_that_is_finished_is_the_run_that_had_the_step_from_the_beginning(
    prepared: Callable[..., Checkout],
) -> None:
    checkout = prepared(PARAMS)
    die_at(checkout, r"on:checkpoints/\.step-00000021\.tmp")
    assert saved_steps(checkout)[-1] == 18
    assert "train.stop_step: 24 is written into params.yaml" in finish(checkout)
    yaml_to_json(checkout)
    assert stop_step(checkout) == 24
    output = train(checkout)
    assert "taken over from run" in output and "going on after step 18 of 24" in output
    reference = prepared({"train": {**PARAMS["train"], "stop_step": 24}})
    train(reference)
    assert executed_steps(reference) == [0]
    assert checkout.digests(*TRAIN_OUTS) == reference.digests(*TRAIN_OUTS)
    record = json.loads((checkout.folder / "metrics/train.json").read_text())
    assert (record["steps"], record["stopped_early"]) == (24, False)


def test_finish_where_the_step_was_evaluated_trains_no_step_and_null_trains_on(
    prepared: Callable[..., Checkout],
) -> None:
    checkout = prepared({"train": {**PARAMS["train"], "save_steps": 4}})
    die_at(checkout, r"on:checkpoints/\.step-00000020\.tmp")
    finish(checkout)
    yaml_to_json(checkout)
    assert stop_step(checkout) == 16
    assert "going on after step" not in train(checkout)
    reference = prepared({"train": {**PARAMS["train"], "save_steps": 4, "stop_step": 16}})
    train(reference)
    assert checkout.digests(*TRAIN_OUTS) == reference.digests(*TRAIN_OUTS)
    checkout.set_params({"train": {**PARAMS["train"], "save_strategy": "steps", "save_steps": 4}})
    assert "going on after step 16 of 44" in train(checkout)


def test_finish_refuses_in_one_line_where_there_is_nothing_to_cut_off(prepared: Callable[..., Checkout]) -> None:
    checkout = prepared({"train": {**PARAMS["train"], "num_train_epochs": 60, "save_strategy": "time",
                                   "save_steps": None, "save_seconds": 1}})  # fmt: skip
    before = (checkout.folder / "params.yaml").read_bytes()
    assert "so none can be finished" in finish(checkout, code=2)
    process = start_training(checkout)
    assert f"is being trained by process {process.pid}; stop it first" in finish(checkout, code=2)
    process.kill()
    process.wait()
    assert (checkout.folder / "params.yaml").read_bytes() == before
    checkout = prepared({"train": {**PARAMS["train"], "eval_steps": 44}})
    die_at(checkout, r"on:checkpoints/\.step-00000021\.tmp")
    assert "is its last, at step 44" in finish(checkout, code=2)
    train(checkout)
    assert "is finished; run: python -m stages repro" in finish(checkout, code=2)
    checkout.set_params({"train": {**PARAMS["train"], "stop_step": 45}})
    assert "train.stop_step is 45, but there are 44 steps" in train(checkout, code=2)
    assert "train.stop_step is 45 already" in finish(checkout, code=2)


def test_one_line_of_params_yaml_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = (ROOT / "params.yaml").read_text().splitlines()
    Path("params.yaml").write_text("\n".join(lines) + "\n")
    change_param("train", "stop_step", 24)
    changed = Path("params.yaml").read_text().splitlines()
    assert len(changed) == len(lines)
    (pair,) = [(old, new) for old, new in zip(lines, changed, strict=True) if old != new]
    assert pair[1].startswith("  stop_step: 24 ") and pair[0].partition("#")[2] == pair[1].partition("#")[2]
