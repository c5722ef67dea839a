"""What the loop asks of whoever puts a step's gradient together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn

from stages.batches.plan import MicroBatch
from stages.modeling.buffers import Buffers


class Reduction(Protocol):
    """Of a step: `begin`, each of this process's micro-batches inside `micro_batch`, `finish`, and, once it is known
    that the step counts, `settle`. All processes go through it side by side."""

    def start(self) -> None:
        """Before the first step, once the processes have met."""

    def stop(self) -> None:
        """After the last step, while the processes are still together."""

    def share(self, step: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Those of the step's micro-batches that this process runs."""

    def begin(self, micro_batches: int, trained: Sequence[nn.Parameter], buffers: Buffers) -> None:
        """A step of so many micro-batches begins: gradients of these parameters, with these buffers."""

    def gather(self, values: Tensor) -> Tensor:
        """A number a micro-batch: of shape (this process's,) in, (all of the step,) in their order out."""

    def micro_batch(self, number: int) -> AbstractContextManager[None]:
        """Around the forward and backward pass of the step's micro-batch of that number."""

    def finish(self) -> Tensor:
        """The parameters' `grad` is the step's now, in every process. Returns, for `settle`, bool (buffers,): which
        ones changed; still on its way on the device."""

    def settle(self, changed: list[bool]) -> None:
        """The buffers are those after the step now, in every process."""
