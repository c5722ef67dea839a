"""A model's buffers, such as running statistics, and its extra state: a forward pass in training mode changes them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn


def remember_buffers(model: nn.Module) -> Callable[[], None]:
    """A function that gives the model's buffers the values they have now, also those that forward replaces, and the
    extra state of modules that have one."""
    kept = [
        (module, name, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    extra = [
        (module, copy.deepcopy(module.get_extra_state()))
        for module in model.modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    ]

    @torch.no_grad()
    def put_back() -> None:
        for module, state in extra:
            module.set_extra_state(copy.deepcopy(state))
        for module, name, value in kept:
            buffer = module.get_buffer(name)
            if buffer.shape == value.shape and buffer.dtype == value.dtype:
                buffer.copy_(value)  # in place, as others may hold it
            else:
                setattr(module, name, value)

    return put_back
