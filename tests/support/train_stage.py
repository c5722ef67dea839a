"""Driving the train stage alone, where every point can be named. A pytest plugin: see conftest.py."""

from __future__ import annotations

import atexit
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.support.fork_server import Forker
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
                made[key].run("python", "-m", f"stages.{stage}")
        copy = object.__new__(Checkout)
        copy.folder = tmp_path_factory.mktemp("copy") / "repo"
        copy.env = made[key].env
        shutil.copytree(made[key].folder, copy.folder, ignore=shutil.ignore_patterns("runs", ".git", "models"))
        copy.set_params(merged)
        return copy

    return make


@cache
def forker() -> Forker:
    """Started at the first use in a process of pytest's, and ended with it."""
    started = Forker()
    atexit.register(started.close)
    return started


def train(checkout: Checkout, code: int = 0, point: str | None = None, **env: str) -> str:
    """Run train in `checkout` to its end, or to `point` of faults.py; what it printed."""
    status, output = forker().run(checkout.folder, point, env)
    assert status == code, output
    return output


def die_at(checkout: Checkout, point: str) -> int:
    return forker().run(checkout.folder, point, {})[0]


def executed_steps(checkout: Checkout) -> list[int]:
    """The steps at which training was started or gone on with."""
    return [event["step"] for event in checkout.log() if event["event"] == "start"]


def saved_steps(checkout: Checkout) -> list[int]:
    (run,) = checkout.runs()
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def start_training(checkout: Checkout, **env: str) -> subprocess.Popen[str]:
    """Start a long run and return once it has saved something."""
    known = set(checkout.folder.glob("runs/*/checkpoints/step-*"))
    process = checkout.start("python", "-m", "stages.train", **env)
    deadline = time.monotonic() + 90
    while not set(checkout.folder.glob("runs/*/checkpoints/step-*")) - known:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process
