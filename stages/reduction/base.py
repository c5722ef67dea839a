"""What the loop asks of whoever puts a step's gradient together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn

from stages.batches.plan import MicroBatch, shares
from stages.modeling.buffers import Buffers
from stages.modeling.parallel import Parallel
from stages.modeling.world import World


class Reduction(ABC):
    """Of the model in `parallel`, in the processes of `world`, which go through it side by side. In a step: `begin`,
    each of this process's micro-batches inside `micro_batch`, `finish`, and, once it is known that the step counts,
    `settle`."""

    def __init__(self, parallel: Parallel, world: World) -> None:
        self._parallel, self._world = parallel, world
        self._shares: list[range] = []

    def start(self) -> None:
        """Before the first step, once the processes have met."""
        self._parallel.train_through(self._parallel.plain)

    @abstractmethod
    def stop(self) -> None:
        """After the last step, while the processes are still together."""

    def share(self, step: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Those of the step's micro-batches that this process runs."""
        mine = shares(len(step), self._world.size)[self._world.rank]
        return list(step[mine.start : mine.stop])

    def begin(self, micro_batches: int, trained: Sequence[nn.Parameter], buffers: Buffers) -> None:
        """A step of so many micro-batches begins: gradients of these parameters, with these buffers."""
        self._shares = shares(micro_batches, self._world.size)

    def gather(self, values: Tensor) -> Tensor:
        """A number a micro-batch: of shape (this process's,) in, (all of the step,) in their order out."""
        return self._world.gather_shares(values, self._shares)

    @abstractmethod
    def micro_batch(self, number: int) -> AbstractContextManager[None]:
        """Around the forward and backward pass of the step's micro-batch of that number."""

    @abstractmethod
    def finish(self) -> Tensor:
        """The parameters' `grad` is the step's now, in every process. Returns, for `settle`, bool (buffers,): which
        ones changed; still on its way on the device."""

    @abstractmethod
    def settle(self, changed: list[bool]) -> None:
        """The buffers are those after the step now, in every process."""
