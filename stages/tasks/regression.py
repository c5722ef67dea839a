"""A row has a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stages.tasks.base import Head, Kind

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray
    from torch import Tensor

    from stages.tasks.base import RowLoss


class Regression(Kind):
    """One logit, the number itself."""

    name = "regression"
    title = "regression"
    fewest_classes = 0
    label_dtype = "float32"
    losses = ("mse", "l1", "huber")
    metrics = ("mse", "mae", "r_squared", "pearsonr", "spearmanr")
    lower_is_better = ("mse", "mae")

    def targets(self, labels: pa.ChunkedArray, names: Sequence[str]) -> pa.Array:
        import pyarrow as pa
        import pyarrow.compute as pc

        return pc.cast(labels, pa.float32(), safe=False)

    def head(self, names: tuple[str, ...], loss: str) -> Head:
        return Head(self.auto_model, 1, {"problem_type": "regression", "num_labels": 1})

    def loss(self, name: str, weights: Tensor | None, smoothing: float, kwargs: dict[str, Any]) -> RowLoss:
        from torch.nn import functional

        function: Any = {"mse": functional.mse_loss, "l1": functional.l1_loss, "huber": functional.huber_loss}[name]

        def numbers(logits: Tensor, labels: Tensor) -> Tensor:
            return function(logits[:, 0], labels, reduction="none", **kwargs)

        return numbers

    def probabilities(self, logits: NDArray[np.float32]) -> None:
        return None

    def decide(self, logits: NDArray[np.float32], cut: float) -> NDArray[np.float32]:
        return logits[:, 0]
