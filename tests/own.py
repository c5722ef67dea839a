"""What a user may bring along: tests copy this file to stages/custom/own.py of a checkout."""

from __future__ import annotations

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


class NoCallback:
    pass


class Flawed(MLP):
    """The MLP with one mistake of those that cost a night."""

    def __init__(self, flaw: str, outputs: int) -> None:
        super().__init__(3, 16, outputs)
        self.flaw = flaw
        if flaw == "unused":
            self.unused = nn.Linear(3, 3)
        if flaw == "large":
            for parameter in self.layers[4].parameters():
                parameter.data *= 1000
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
            "raises": lambda: features @ features,
            "tuple": lambda: (logits, features),
            "nothing": lambda: {"a": logits, "b": features},
        }.get(self.flaw, lambda: logits)()


def build_flawed(flaw: str, outputs: int = 2) -> nn.Module:
    return Flawed(flaw, outputs)


def failing_metrics(evaluated: Any) -> dict[str, float]:
    raise ZeroDivisionError("no rows of class 7")


def needs_twenty_rows(evaluated: Any) -> dict[str, float]:
    if len(evaluated.label_ids) < 20:
        raise ValueError("fewer than twenty rows")
    return {"rows": len(evaluated.label_ids)}
