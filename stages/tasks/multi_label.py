"""A row has any number of the classes, its labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stages.tasks.base import Head, Kind, label_maps, smooth

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray
    from torch import Tensor

    from stages.tasks.base import RowLoss


class MultiLabel(Kind):
    """A logit a label, whose sigmoid is the probability that it applies."""

    name = "multi_label"
    title = "multi-label classification"
    fewest_classes = 1
    several = True
    label_dtype = "float32"
    losses = ("bce_with_logits",)
    metrics = ("accuracy", "f1_micro", "f1_macro", "precision", "recall", "roc_auc")

    def targets(self, labels: pa.ChunkedArray, names: Sequence[str]) -> pa.Array:
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        hot = np.zeros((len(labels), len(names)), np.float32)
        ids = pc.index_in(pc.list_flatten(labels), value_set=pa.array(names, pa.string())).to_numpy()
        hot[pc.list_parent_indices(labels).to_numpy(), ids] = 1
        return pa.FixedSizeListArray.from_arrays(pa.array(hot.ravel()), len(names))

    def head(self, names: tuple[str, ...], loss: str) -> Head:
        return Head(self.auto_model, len(names), {"problem_type": "multi_label_classification", **label_maps(names)})

    def loss(self, name: str, weights: Tensor | None, smoothing: float, kwargs: dict[str, Any]) -> RowLoss:
        from torch.nn import functional

        chosen = kwargs if weights is None else {"pos_weight": weights, **kwargs}

        def mean_over_labels(logits: Tensor, labels: Tensor) -> Tensor:
            return functional.binary_cross_entropy_with_logits(
                logits, smooth(labels, smoothing), reduction="none", **chosen
            ).mean(dim=1)

        return mean_over_labels

    def probabilities(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        from scipy.special import expit

        return expit(logits.astype("float64"))

    def decide(self, logits: NDArray[np.float32], cut: float) -> NDArray[np.int64]:
        return (logits.astype("float64") > cut).astype("int64")
