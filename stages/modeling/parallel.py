"""One model, however it is spread: what train and its evaluations call for forward and for state."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stages.batches.collate import Batch
from stages.modeling.forward import Forward, compiled


class Parallel:
    """`model`; of several processes all call `forward` in eval mode and `state_dict` equally often and in the same
    order.

    `compile`: forward passes in training mode are compiled, from `train_through` on.
    """

    def __init__(self, model: nn.Module, compile: bool = False) -> None:
        self.model = model
        self.plain = Forward(model)
        self._compile = compile
        self._training: nn.Module = self.plain

    def train_through(self, module: nn.Module) -> None:
        """From now on forward passes in training mode are those of `module`, which calls `plain`."""
        self._training = compiled(module) if self._compile else module

    def forward(self, batch: Batch) -> Tensor:
        """Logits of shape (rows, outputs), in the model's own precision."""
        module = self._training if self.model.training else self.plain
        logits: Tensor = module(batch)
        return logits

    def state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state)
