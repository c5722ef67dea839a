"""A model's buffers, such as running statistics, and its extra state: a forward pass in training mode changes them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from stages.modeling.codec import Tree


class Buffers:
    """The buffers of `model`, also those that forward replaces, and its extra state (`nn.Module.get_extra_state`), as
    they were when this was made: in `values` and `extra_state`."""

    def __init__(self, model: nn.Module) -> None:
        self._places = [(m, name) for m in model.modules() for name, _ in m.named_buffers(recurse=False)]
        self._with_extra = [m for m in model.modules() if type(m).get_extra_state is not nn.Module.get_extra_state]
        self.values = [value.clone() for value in self.now()]
        self.extra_state = self.extra_state_now()

    def now(self) -> list[Tensor]:
        """The live ones, in the order of `values`."""
        return [module.get_buffer(name) for module, name in self._places]

    def extra_state_now(self) -> list[Tree]:
        """A copy of that of every module that has one."""
        return [copy.deepcopy(module.get_extra_state()) for module in self._with_extra]

    @torch.no_grad()
    def put(self, index: int, value: Tensor) -> None:
        """Give the model's buffer of that number another value."""
        module, name = self._places[index]
        buffer = module.get_buffer(name)
        if buffer.shape == value.shape and buffer.dtype == value.dtype:
            buffer.copy_(value)  # in place, as others may hold it
        else:
            setattr(module, name, value)

    def put_extra_state(self, states: list[Tree]) -> None:
        for module, state in zip(self._with_extra, states, strict=True):
            module.set_extra_state(copy.deepcopy(state))

    def put_back(self) -> None:
        """Give the model what it had."""
        self.put_extra_state(self.extra_state)
        for index, value in enumerate(self.values):
            self.put(index, value)
