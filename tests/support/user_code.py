"""What a user may bring along: tests copy this file to stages/custom/own.py of a checkout."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.training.callbacks import Callback


class MLP(nn.Module):
    """On features, with what makes resuming hard: dropout and running statistics. Returns a dict."""

    def __init__(self, columns: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(columns, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.2), nn.Linear(hidden, outputs)
        )

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layers(features)}


class Bag(nn.Module):
    """On text: takes `input_ids` by position, has tied weights, returns a tensor."""

    def __init__(self, tokens: int, outputs: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, 16)
        self.tied = nn.Embedding(tokens, 16)
        self.tied.weight = self.embedding.weight
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(16, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.embedding(x) + self.tied(x.flip(1))).mean(dim=1))


def build_mlp(columns: int = 3, hidden: int = 16, outputs: int = 2) -> nn.Module:
    return MLP(columns, hidden, outputs)


def build_bag(tokens: int, outputs: int = 2) -> nn.Module:
    return Bag(tokens, outputs)


def focal_loss(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """A value a row."""
    entropy = functional.cross_entropy(logits, labels, reduction="none")
    return (1 - torch.exp(-entropy)) ** gamma * entropy


def a_value_a_class(logits: Tensor, labels: Tensor) -> Tensor:
    """Neither a value a row nor a scalar."""
    return functional.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits), reduction="none")


def sum_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """A scalar, but not the mean."""
    return functional.cross_entropy(logits, labels, reduction="sum")


class LearnedLoss(nn.Module):
    """Has a parameter that nothing would train."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.scale * functional.cross_entropy(logits, labels)


def huge_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Overflows in fp16 until the scale is down."""
    return 3e4 * functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=1)


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """A scalar: the mean over the rows."""
    return functional.cross_entropy(logits, labels)


def compute_metrics(evaluated: Any) -> dict[str, float]:
    """As HF's Trainer takes it."""
    predicted = evaluated.predictions.argmax(-1)
    return {"errors": int((predicted != evaluated.label_ids).sum()), "share": float(predicted.mean())}


class GradientNoise(Callback):
    """Adds noise to the gradients, and a trace of all gradients so far: random numbers, and a tensor as state."""

    def __init__(self, std: float) -> None:
        self.std = std
        self.trace = torch.zeros(())

    def on_pre_optimizer_step(self, state: Any) -> None:
        for parameter in state.model.parameters():
            if parameter.grad is not None:
                self.trace = self.trace * 0.9 + parameter.grad.sum()
                parameter.grad += self.std * torch.randn_like(parameter.grad) + 1e-4 * self.trace

    def state_dict(self) -> dict[str, Any]:
        return {"trace": self.trace}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trace = state["trace"]


class StopAt(Callback):
    """Ends the run after a step, evaluation or not."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, state: Any) -> None:
        if state.progress.step == self.step:
            state.stop(f"step {self.step} is enough")


class NotANumber(Callback):
    def on_pre_optimizer_step(self, state: Any) -> None:
        next(p for p in state.model.parameters() if p.grad is not None).grad.fill_(float("nan"))


class UnsavableState(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"when": object()}


class Raises(Callback):
    def on_step_end(self, state: Any) -> None:
        raise LookupError("no such file")


class Hangs(Callback):
    """After step 7, where HANGS is set: nothing ends it but a signal."""

    def on_step_end(self, state: Any) -> None:
        if state.progress.step == 7 and "HANGS" in os.environ:
            time.sleep(1000)


class NoCallback:
    pass


class Flawed(MLP):
    """The MLP with one mistake of those that cost a night."""

    directions: Tensor
    seen: Tensor

    def __init__(self, flaw: str, outputs: int) -> None:
        super().__init__(3, 16, outputs)
        self.flaw = flaw
        if flaw == "unused":
            self.unused = nn.Linear(3, 3)
        if flaw == "large":
            for parameter in self.layers[4].parameters():
                parameter.data *= 1000
        if flaw == "outside":
            self.directions = torch.randn(3, 3)
        if flaw == "not persistent":
            self.register_buffer("seen", torch.zeros(()), persistent=False)
        if flaw == "frozen":
            self.requires_grad_(False)
            self.idle = nn.Parameter(torch.zeros(1))

    def forward(self, features: Tensor) -> Any:
        logits = self.layers(features)
        return {
            "softmax": lambda: logits.softmax(dim=1),
            "sigmoid": lambda: torch.sigmoid(logits),
            "hidden sigmoid": lambda: torch.sigmoid(logits) * 1.0,
            "nan": lambda: logits / 0,
            "integers": lambda: logits.argmax(dim=1, keepdim=True).expand(-1, 2),
            "transposed": lambda: logits.T,
            "outside": lambda: self.layers(features @ self.directions),
            "not persistent": lambda: logits + self.seen.add_(1),
            "object": lambda: SimpleNamespace(logits=logits),
            "asserts": lambda: self._assert(logits),
            "raises": lambda: features @ features,
            "tuple": lambda: (logits, features),
            "nothing": lambda: {"a": logits, "b": features},
        }.get(self.flaw, lambda: logits)()

    @staticmethod
    def _assert(logits: Tensor) -> Tensor:
        assert logits.shape[1] == 7, "seven classes"
        return logits


def build_flawed(flaw: str, outputs: int = 2) -> nn.Module:
    return Flawed(flaw, outputs)


def failing_metrics(evaluated: Any) -> dict[str, float]:
    raise ZeroDivisionError("no rows of class 7")


def needs_twenty_rows(evaluated: Any) -> dict[str, float]:
    if len(evaluated.label_ids) < 20:
        raise ValueError("fewer than twenty rows")
    return {"rows": len(evaluated.label_ids)}


class Sampling(MLP):
    """Draws in eval mode too, counts its calls in a buffer that it replaces, as user code does."""

    calls: Tensor

    def __init__(self, columns: int = 3) -> None:
        super().__init__(columns, 16, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.calls = self.calls + 1
        return super().forward(functional.dropout(features, 0.3, training=True))


def build_sampling() -> nn.Module:
    return Sampling()


def nan_once(logits: Tensor, labels: Tensor) -> Tensor:
    """NaN in the training step's loss that the environment names by the number of calls."""
    loss = functional.cross_entropy(logits, labels, reduction="none")
    if torch.is_grad_enabled():
        CALLS.append(1)
        if len(CALLS) == int(os.environ.get("NAN_AT", "0")):
            return loss * float("nan")
    return loss


CALLS: list[int] = []


def slow_to_evaluate(logits: Tensor, labels: Tensor) -> Tensor:
    """Takes $SECONDS a batch where nothing is trained."""
    if not torch.is_grad_enabled():
        time.sleep(float(os.environ.get("SECONDS", 0)))
    return functional.cross_entropy(logits, labels, reduction="none")


def signals_rank_1(logits: Tensor, labels: Tensor) -> Tensor:
    """Asks the second process alone to stop, in the middle of an evaluation."""
    evaluates, once = not torch.is_grad_enabled(), os.environ.get("SIGNAL_FILE", "")
    if evaluates and os.environ.get("RANK") == "1" and once and not Path(once).exists():
        Path(once).touch()
        os.kill(os.getpid(), signal.SIGTERM)
    return functional.cross_entropy(logits, labels, reduction="none")


def fails_in_rank_1(logits: Tensor, labels: Tensor) -> Tensor:
    """As a row might that the second process alone has, in its fifth call in training."""
    if os.environ.get("RANK") == "1" and torch.is_grad_enabled() and "FAILS" in os.environ:
        CALLS.append(1)
        if len(CALLS) == 9:
            raise LookupError("no such word")
    return functional.cross_entropy(logits, labels, reduction="none")


class SignalsRank1(Callback):
    """Asks the second process alone to stop, after a step."""

    def on_step_end(self, state: Any) -> None:
        if os.environ.get("RANK") == "1" and state.progress.step == int(os.environ.get("SIGNAL_AT", "0")):
            os.kill(os.getpid(), signal.SIGTERM)
