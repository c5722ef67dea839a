"""What both reductions do alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from stages.modeling import parallel as modeling
from stages.modeling.compute import Compute
from stages.modeling.parallel import Parallel
from stages.modeling.world import World
from stages.reduction.base import Reduction
from stages.reduction.exact import Exact
from stages.reduction.fast import Fast


@pytest.mark.parametrize(
    "make", [lambda parallel: Exact(parallel, World()), lambda parallel: Fast(parallel, Compute(torch.device("cpu")))]
)
def test_training_is_compiled_where_that_is_asked_for_and_evaluation_never(
    make: Callable[[Parallel], Reduction], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling, "compiled", lambda module: lambda batch: "compiled")
    for compile in (True, False):
        parallel = Parallel(nn.Linear(2, 2), compile)
        make(parallel).start()
        batch = {"features": torch.ones(1, 2)}
        assert (parallel.forward(batch) == "compiled") is compile
        parallel.model.eval()
        assert isinstance(parallel.forward(batch), torch.Tensor)
