"""`train.reduction: fast`: PyTorch's DistributedDataParallel, whose sums depend on the number of processes."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from stages.batches.plan import MicroBatch
from stages.modeling.compute import Compute
from stages.modeling.parallel import Parallel
from stages.reduction.base import Reduction


class Fast(Reduction):
    """By DDP, if there are several processes. Buffers are what the micro-batches leave one after the other, and of
    several processes the main one's."""

    def __init__(self, parallel: Parallel, compute: Compute) -> None:
        super().__init__(parallel, compute.world)
        self._device = compute.device
        self._ddp: DistributedDataParallel | None = None

    def start(self) -> None:
        super().start()
        if self._world.size > 1:
            # find_unused_parameters: a model may leave some unused; it also keeps DDP from laying out its buckets
            # anew after the first step, which would change the order of sums after a resume.
            self._ddp = DistributedDataParallel(
                self._parallel.plain,
                device_ids=[self._device] if self._device.type == "cuda" else None,
                find_unused_parameters=True,
            )
            self._ddp.register_comm_hook(None, lambda _, bucket: _sum_gradients(bucket))
            self._parallel.train_through(self._ddp)

    def stop(self) -> None:
        # DDP holds on to the processes' connection, and ending it last, with the interpreter's lock in hand, would wait
        # for threads that wait for that lock.
        if self._ddp is not None:
            self._ddp = None
            self._parallel.train_through(self._parallel.plain)
            gc.collect()

    def share(self, step: Sequence[MicroBatch]) -> list[MicroBatch]:
        # All take part in a gradient: who has nothing to do runs a micro-batch that is not counted.
        return super().share(step) or [replace(step[0], counted=False)]

    def micro_batch(self, number: int) -> AbstractContextManager[None]:
        mine = self._shares[self._world.rank]
        is_last = not mine or number == mine[-1]
        return contextlib.nullcontext() if is_last or self._ddp is None else self._ddp.no_sync()

    def finish(self) -> Tensor:
        return torch.zeros(0)

    def settle(self, changed: list[bool]) -> None: ...


def _sum_gradients(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    # DDP's own reduction is the mean over processes; the loss is a mean over rows already.
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])
