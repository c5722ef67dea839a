"""A model's buffers, such as running statistics, and its extra state: a forward pass in training mode changes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from stages.modeling.codec import remember_extra_state


def remember_buffers(model: nn.Module) -> Callable[[], None]:
    """A function that gives the model's buffers, also those that forward replaces, and its extra state, as of now."""
    kept = [(m, name, buffer.clone()) for m in model.modules() for name, buffer in m.named_buffers(recurse=False)]
    put_extra_state_back = remember_extra_state(model)

    @torch.no_grad()
    def put_back() -> None:
        put_extra_state_back()
        for module, name, value in kept:
            buffer = module.get_buffer(name)
            if buffer.shape == value.shape and buffer.dtype == value.dtype:
                buffer.copy_(value)  # in place, as others may hold it
            else:
                setattr(module, name, value)

    return put_back
