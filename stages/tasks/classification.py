"""A row has one of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stages.ground.errors import UserError
from stages.tasks.base import Head, Kind, label_maps, smooth

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray
    from torch import Tensor

    from stages.tasks.base import RowLoss


class Classification(Kind):
    """A logit a class, or with bce_with_logits one, whose sigmoid is the probability of class 1 of two."""

    name = "classification"
    title = "classification"
    fewest_classes = 2
    label_dtype = "int64"
    losses = ("cross_entropy", "bce_with_logits")
    two_class_losses = ("bce_with_logits",)
    metrics = (
        "accuracy", "f1", "f1_micro", "f1_macro", "precision", "recall", "matthews_correlation", "roc_auc",
    )  # fmt: skip

    def targets(self, labels: pa.ChunkedArray, names: Sequence[str]) -> pa.Array:
        import pyarrow as pa
        import pyarrow.compute as pc

        return pc.cast(pc.index_in(labels, value_set=pa.array(names, pa.string())), pa.int64())

    def head(self, names: tuple[str, ...], loss: str) -> Head:
        if loss not in self.two_class_losses:
            return Head(
                self.auto_model, len(names), {"problem_type": "single_label_classification", **label_maps(names)}
            )
        if len(names) != 2:
            raise UserError(f"train.loss is {loss}, but there are {len(names)} classes; write {self.losses[0]}")
        # To Hugging Face a single label that may apply.
        return Head(self.auto_model, 1, {"problem_type": "multi_label_classification", **label_maps(names[1:])})

    def loss(self, name: str, weights: Tensor | None, smoothing: float, kwargs: dict[str, Any]) -> RowLoss:
        from torch.nn import functional

        def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
            return functional.cross_entropy(
                logits, labels, weight=weights, label_smoothing=smoothing, reduction="none", **kwargs
            )

        def one_logit(logits: Tensor, labels: Tensor) -> Tensor:
            weight = None if weights is None else weights[labels]
            return functional.binary_cross_entropy_with_logits(
                logits[:, 0], smooth(labels.float(), smoothing), weight=weight, reduction="none", **kwargs
            )

        return {"cross_entropy": cross_entropy, "bce_with_logits": one_logit}[name]

    def probabilities(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        import numpy as np
        from scipy.special import expit, softmax

        wide = logits.astype(np.float64)
        if wide.shape[1] == 1:
            positive = expit(wide[:, 0])
            return np.stack([1 - positive, positive], axis=1)
        return softmax(wide, axis=1)

    def decide(self, logits: NDArray[np.float32], cut: float) -> NDArray[np.int64]:
        wide = logits.astype("float64")
        if wide.shape[1] == 1:
            return (wide[:, 0] > cut).astype("int64")
        if wide.shape[1] == 2:
            return (wide[:, 1] - wide[:, 0] > cut).astype("int64")
        return wide.argmax(axis=1)
