"""One way to call any model: a batch in, logits out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from stages.batches.collate import Batch
from stages.ground.errors import UserError


class Forward(nn.Module):
    """Calls `model` as its own forward wants it; a module, so that DDP and torch.compile see a tensor come out.

    Columns that `model.forward` names are given by name; those it does not take are left out. If it names none, the
    first column (`features`, `input_ids`) is given by position.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        try:
            parameters = list(inspect.signature(model.forward).parameters.values())
        except ValueError:  # a traced module has none
            parameters = []
        self._names = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.POSITIONAL_ONLY)}
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)

    def forward(self, batch: Batch) -> Tensor:
        """Logits of shape (rows, outputs), in the model's own precision, of a batch without its labels.

        Raises:
            UserError: the model returns no logits.
        """
        named = {name: tensor for name, tensor in batch.items() if self._takes_all or name in self._names}
        logits = _logits(self.model(**named) if named else self.model(next(iter(batch.values()))))
        return logits.unsqueeze(1) if logits.ndim == 1 else logits


def compiled(module: nn.Module) -> nn.Module:
    """`module` through torch.compile, with symbolic sizes: its code depends little on which batch came first."""
    return cast(nn.Module, torch.compile(module, dynamic=True))


def _logits(output: Any) -> Tensor:
    """Of a tensor, a mapping with `logits` (or a single tensor), or an object that has them, such as HF's outputs."""
    found = output
    if isinstance(output, Mapping):
        found = output["logits"] if "logits" in output else next(iter(output.values())) if len(output) == 1 else None
    elif not isinstance(output, torch.Tensor):
        found = getattr(output, "logits", None)
    if isinstance(found, torch.Tensor):
        return found
    what = f"a mapping of {', '.join(map(str, output))}" if isinstance(output, Mapping) else type(output).__name__
    raise UserError(f"model.source: forward returns {what}; it should return a tensor, or a dict or object with logits")
