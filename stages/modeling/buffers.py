"""A model's buffers, such as running statistics, and its extra state: a forward pass in training mode changes them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from stages.ground.errors import UserError
from stages.modeling.codec import Tree


class Buffers:
    """The buffers of `model`, and its extra state (`nn.Module.get_extra_state`), as they were when this was made: in
    `values` and `extra_state`. What is put is put into the tensors that were there then, as others may hold them, and
    not into those that forward has put in their place, which may be somebody else's."""

    def __init__(self, model: nn.Module) -> None:
        found = [(m, name, tensor) for m in model.modules() for name, tensor in m._buffers.items()]
        self._places = [(m, name, tensor) for m, name, tensor in found if tensor is not None]
        self._empty = [(m, name) for m, name, tensor in found if tensor is None]
        self._with_extra = [m for m in model.modules() if type(m).get_extra_state is not nn.Module.get_extra_state]
        self.values = [tensor.clone() for _, _, tensor in self._places]
        self.extra_state = self.extra_state_now()

    def now(self) -> list[Tensor]:
        """The live ones, in the order of `values`. One of another shape or type than it was, or that was not there, is
        left out where no checkpoint holds it: it counts as what it was.

        Raises:
            UserError: such a one that a checkpoint holds.
        """
        for module, name in self._empty:
            _require_not_persistent(module, name, getattr(module, name), None)
        found = []
        for (module, name, _), value in zip(self._places, self.values, strict=True):
            buffer = getattr(module, name)
            if isinstance(buffer, Tensor) and _same_layout(buffer, value):
                found.append(buffer)
            else:
                _require_not_persistent(module, name, buffer, value)
                found.append(value)
        return found

    def extra_state_now(self) -> list[Tree]:
        """A copy of that of every module that has one."""
        return [copy.deepcopy(module.get_extra_state()) for module in self._with_extra]

    @torch.no_grad()
    def put(self, values: dict[int, Tensor]) -> None:
        """Give the buffers of these numbers (in `values`) other values, of the layout that they had."""
        for index, value in values.items():
            module, name, tensor = self._places[index]
            if not _same_layout(tensor, value):  # it was resized in its place
                tensor = value.clone()
            if getattr(module, name) is not tensor:
                setattr(module, name, tensor)
            if tensor is not value:
                tensor.copy_(value)
        for module, name in self._empty:
            setattr(module, name, None)

    def put_extra_state(self, states: list[Tree]) -> None:
        for module, state in zip(self._with_extra, states, strict=True):
            module.set_extra_state(copy.deepcopy(state))

    def keep(self) -> None:
        """Leave the model what it has now, in the tensors that were there."""
        found = zip(self.now(), self._places, strict=True)
        self.put({i: value.clone() for i, (value, (_, _, tensor)) in enumerate(found) if value is not tensor})

    def put_back(self) -> None:
        """Give the model what it had."""
        self.put_extra_state(self.extra_state)
        self.put(dict(enumerate(self.values)))


def _same_layout(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _require_not_persistent(module: nn.Module, name: str, now: Tensor | None, before: Tensor | None) -> None:
    if now is None and before is None:
        return
    if name not in getattr(module, "_non_persistent_buffers_set", ()):
        raise UserError(
            f"model.source: forward changed the buffer {name} of {type(module).__name__}, which was {_layout(before)} "
            f"and is {_layout(now)}, so that no checkpoint of it can be loaded; make it where the model is built, in "
            "the shape and type that it keeps"
        )


def _layout(buffer: Tensor | None) -> str:
    return "not there" if buffer is None else f"{buffer.dtype} {tuple(buffer.shape)}"
