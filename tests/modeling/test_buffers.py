"""Buffers: what a look at a model must not change."""

from __future__ import annotations

import torch

from stages.modeling.buffers import Buffers
from tests.support.user_code import Sampling


def test_buffers_are_put_back_also_where_forward_replaced_them() -> None:
    model = Sampling()
    buffers = Buffers(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    model(torch.randn(8, 3))
    assert int(model.calls) == 1
    buffers.put_back()
    assert before.keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
