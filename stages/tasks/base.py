"""What a kind of task is to the rest of the pipeline: the class that the modules beside this one fill in.

Light at import, as `config` looks here before torch or datasets are loaded: a method imports what it needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray
    from torch import Tensor

    RowLoss = Callable[[Tensor, Tensor], Tensor]
    """fp32 logits of shape (rows, outputs) and labels to a value a row (rows,), or a scalar: their mean."""


@dataclass(frozen=True)
class Head:
    """The last layer that a task and its loss ask for.

    `auto_model`: the class of transformers whose models have it; `outputs`: how many logits a row; `config`: what of
    it a Hugging Face config says, so that `pipeline` reads the logits as `Kind.probabilities` does.
    """

    auto_model: str
    outputs: int
    config: dict[str, Any]


class Kind(ABC):
    """A kind of task, without state. Nobody else asks for its name: they ask for what differs."""

    name: str
    """`data.task`, and the module of its metrics, `stages/metrics/<name>.py`."""
    title: str
    """What people call it, for the model card's heading."""
    auto_model: str = "AutoModelForSequenceClassification"
    """The class of transformers that makes its models of pretrained ones."""
    pipeline: str = "text-classification"
    """What the Hub and `transformers.pipeline` call it; to them several labels, or a number, are classification too."""
    fewest_classes: Literal[0, 1, 2]
    """Of `label_names`; 0 where a label is a number."""
    several: bool = False
    """Whether a row has any number of the classes, its labels in a list, where others have one."""
    label_dtype: str
    """Of `labels`, a value a row; where `several`, a value a class, 0 or 1."""
    losses: tuple[str, ...]
    """`train.loss` by name; the first is what null stands for."""
    two_class_losses: tuple[str, ...] = ()
    """Those of them that tell two classes apart, and no more."""
    metrics: tuple[str, ...]
    """`evaluate.metrics` by name."""
    lower_is_better: tuple[str, ...] = ()
    """Those of them of which less is better."""

    @property
    def has_classes(self) -> bool:
        """Whether a label is one or several of `label_names`, and no number."""
        return self.fewest_classes > 0

    @abstractmethod
    def targets(self, labels: pa.ChunkedArray, names: Sequence[str]) -> pa.Array:
        """A label column (text, lists of text where `several`, float64 without classes; no nulls) as what the loss
        takes: `label_dtype`, in lists of length `len(names)` where `several`."""

    @abstractmethod
    def head(self, names: tuple[str, ...], loss: str) -> Head:
        """The head for the classes `names`, trained with `loss`, one of `losses` or a custom one.

        Raises:
            UserError: a loss that cannot tell so many classes apart.
        """

    @abstractmethod
    def loss(self, name: str, weights: Tensor | None, smoothing: float, kwargs: dict[str, Any]) -> RowLoss:
        """The loss `name` of `losses`, called with `kwargs`; `weights` (classes,) and `smoothing` are
        `train.class_weights` and `train.label_smoothing`, which without classes are None and 0."""

    @abstractmethod
    def probabilities(self, logits: NDArray[np.float32]) -> NDArray[np.float64] | None:
        """Of logits (rows, outputs) those of the classes, (rows, classes); they sum to 1 unless `several`. None
        without classes."""

    @abstractmethod
    def decide(self, logits: NDArray[np.float32], cut: float) -> NDArray[Any]:
        """What is predicted of logits (rows, outputs): class ids, int64 (rows,); where `several` 0 or 1 for each,
        int64 (rows, classes); without classes the number, float32 (rows,).

        `cut` is `evaluate.threshold` as a logit. Logits are compared, as a sigmoid or softmax would round.
        """


def label_maps(names: Sequence[str]) -> dict[str, Any]:
    """The classes as a Hugging Face config names them."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def smooth(targets: Tensor, smoothing: float) -> Tensor:
    """Targets of 0 and 1 as a mixture with the undecided 0.5: cross entropy's smoothing over two classes."""
    return targets * (1 - smoothing) + smoothing / 2
