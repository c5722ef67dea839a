"""State as plain data: what goes in comes out, and what would need pickle is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings

from stages.modeling import codec
from tests.support.trees import TREES, same


@settings(max_examples=150, deadline=None)
@given(tree=TREES)
def test_any_state_survives_the_round_trip(tree: Any) -> None:
    assert same(codec.join(*codec.split(tree, "part")), tree)


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object(), {(1, 2): 3}, {"a": [{"b": 1j}]}])
def test_state_that_would_need_pickle_is_refused_by_name(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^callbacks"):
        codec.split({"x": value}, "callbacks")


def test_tied_weights_are_stored_once() -> None:
    weight = torch.ones(5)
    skeleton, tensors = codec.split({"a": weight, "b": weight, "part": weight[:2]}, "model")
    assert sorted(tensors) == ["model.a", "model.part"]
    assert codec.join(skeleton, tensors)["b"].tolist() == [1] * 5
