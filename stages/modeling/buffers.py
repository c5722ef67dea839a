"""A model's buffers, such as running statistics: a forward pass in training mode changes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def remember_buffers(model: nn.Module) -> Callable[[], None]:
    """A function that gives the model's buffers the values they have now, also those that forward replaces."""
    kept = [
        (module, name, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]

    @torch.no_grad()
    def put_back() -> None:
        for module, name, value in kept:
            buffer = module.get_buffer(name)
            if buffer.shape == value.shape and buffer.dtype == value.dtype:
                buffer.copy_(value)  # in place, as others may hold it
            else:
                setattr(module, name, value)

    return put_back
