"""One model in any number of processes: what each of them calls for forward, for state and for sums."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stages.batches.collate import Batch
from stages.modeling.compute import Compute
from stages.modeling.forward import Forward, compiled


class Parallel:
    """`model`, which trains in all processes of `compute` side by side, from `start` on.

    In all of them `forward` and `state_dict` are called equally often and in the same order.
    """

    def __init__(self, model: nn.Module, compute: Compute, compile: bool = False) -> None:
        self.model = model
        self._compute, self._compile = compute, compile
        self._plain: nn.Module = Forward(model)
        self._training: nn.Module = self._plain
        self._ddp: DistributedDataParallel | None = None

    def start(self) -> None:
        """Before the first step, once the processes have met: gradients are summed over them in the backward passes
        inside `sync(True)`, and forward passes in training mode are compiled, if that was asked for."""
        module = self._plain
        if self._compute.world.size > 1:
            device = self._compute.device
            # find_unused_parameters: a model may leave some unused; it also keeps DDP from laying out its buckets
            # anew after the first step, which would change the order of sums after a resume.
            self._ddp = DistributedDataParallel(
                module, device_ids=[device] if device.type == "cuda" else None, find_unused_parameters=True
            )
            module = self._ddp
            self._ddp.register_comm_hook(None, lambda _, bucket: _sum_gradients(bucket))
        self._training = compiled(module) if self._compile else module

    def stop(self) -> None:
        """After the last step, while the processes are still together: DDP holds on to their connection, and ending it
        last, with the interpreter's lock in hand, would wait for threads that wait for that lock."""
        if self._ddp is not None:
            self._ddp, self._training = None, self._plain
            gc.collect()

    def forward(self, batch: Batch) -> Tensor:
        """Logits of shape (rows, outputs), in the model's own precision."""
        module = self._training if self.model.training else self._plain
        logits: Tensor = module(batch)
        return logits

    def sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around the forward and backward pass of a micro-batch: its `last` one sends the step's gradients."""
        return contextlib.nullcontext() if last or self._ddp is None else self._ddp.no_sync()

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over all processes, in place."""
        return self._compute.world.sum(value)

    def state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state)


def _sum_gradients(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    # DDP's own reduction is the mean over processes; the loss is a mean over rows already.
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])
