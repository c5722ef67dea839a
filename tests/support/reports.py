"""What tests of reports share: raw files and what tokenize says of them, models with a head, code that fails late."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from stages import tokenize as stage
from stages.batches import tokenized as store
from stages.batches.tokenized import Task
from stages.ground.running import run_command
from stages.modeling.head import head_of
from tests.support.project import Checkout, Project

TRAIN = "text,label\n" + "the cat sat,a\nthe dog ran,b\n" * 10
DEV = "text,label\nthe cat,a\n"
Write = Callable[[Path], Any]


def text(content: str) -> Write:
    return lambda path: path.write_text(content, encoding="utf-8")


def lay_out(project: Project, files: dict[str, Write]) -> None:
    for name, write in files.items():
        path = project.folder / "data/in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """What the stage prints as it refuses: one line, exit code 2, nothing written."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_command(stage.main)
    assert ended.value.code == 2
    *before, line = capsys.readouterr().err.splitlines(keepends=True)
    assert line.startswith("error: ") and all(other.startswith("tokenize: ") for other in before), before
    assert not store.TOKENIZED.exists()
    return line


def says(capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    run_command(stage.main)
    return capsys.readouterr().err


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


HEAD = head_of(Task("classification", ("no", "yes"), ("text",), (), "label", ("input_ids",)), "")


def without(part: str) -> Write:
    """A folder whose weights lack those with `part` in their name."""

    def write(folder: Path) -> None:
        kept = {name: value for name, value in load_file(folder / "model.safetensors").items() if part not in name}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})

    return write


NAMES = ("negative", "neutral", "positive")


def trained(
    tiny_model: Path, folder: Path, kind: Any = AutoModelForSequenceClassification, **changes: Any
) -> nn.Module:
    """A folder with a model that has a head of its own; the model."""
    torch.manual_seed(5)
    settings = AutoConfig.from_pretrained(tiny_model)
    settings.update({"problem_type": None, "id2label": dict(enumerate(NAMES))} | changes)
    model = kind.from_config(settings)
    for parameter in model.classifier.parameters():
        nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model.eval()


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
