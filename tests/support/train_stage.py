"""Driving the train stage alone, where every point can be named. A pytest plugin: see conftest.py."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.fork_server import Forked, fork_server
from tests.support.project import Checkout

TRAIN_OUTS = ("models/candidates", "metrics/train.json", "plots/train.tsv", "plots/eval.tsv")
# Eight saves in 22 steps, so that a kill finds one behind it and one in the making.
SAVES = {"save_strategy": "steps", "save_steps": 3}
EARLY_STOPPING: dict[str, dict[str, Any]] = {
    "train": {
        "num_train_epochs": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "early_stopping_patience": 4,
        "early_stopping_threshold": 0.05,
        "learning_rate": 1e-5,
    }
}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[..., Checkout]:
    """Makes a checkout in which only train is left to run, each time in a folder of its own."""
    made: dict[str, Checkout] = {}

    def make(params: dict[str, dict[str, Any]]) -> Checkout:
        merged = {**params, "train": {**SAVES, **params.get("train", {})}}
        before = [merged.get(section) for section in ("data", "model", "tokenize", "build_loaders")]
        key = json.dumps([before, merged["train"].get("num_train_epochs"), merged["train"].get("max_steps")])
        if key not in made:
            made[key] = Checkout(tmp_path_factory.mktemp("base") / "repo", tiny_model, merged)
            for stage in ("tokenize", "build_loaders"):
                run_stage(made[key], stage)
        copy = made[key].copy(tmp_path_factory.mktemp("copy") / "repo", "runs", ".git", "models")
        copy.set_params(merged)
        return copy

    return make


def run_stage(checkout: Checkout, name: str, code: int = 0, point: str | None = None, **env: str) -> str:
    """Run a stage in `checkout` to its end, or to `point` of faults.py; what it printed."""
    process = fork_server().start(checkout.folder, f"stages.{name}", point, **env)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def train(checkout: Checkout, code: int = 0, point: str | None = None, **env: str) -> str:
    return run_stage(checkout, "train", code, point, **env)


def die_at(checkout: Checkout, point: str) -> None:
    run_stage(checkout, "train", -signal.SIGKILL, point)


def executed_steps(checkout: Checkout) -> list[int]:
    """The steps at which training was started or gone on with."""
    return [event["step"] for event in checkout.log() if event["event"] == "start"]


def saved_steps(checkout: Checkout) -> list[int]:
    (run,) = checkout.runs()
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def start_training(checkout: Checkout, **env: str) -> Forked:
    """Start a long run and return once it has saved something."""
    known = set(checkout.folder.glob("runs/*/checkpoints/step-*"))
    process = fork_server().start(checkout.folder, "stages.train", **env)
    deadline = time.monotonic() + 90
    while not set(checkout.folder.glob("runs/*/checkpoints/step-*")) - known:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process
