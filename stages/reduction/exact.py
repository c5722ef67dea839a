"""`train.reduction: exact`: the same bits for any number of processes, and for any change of it.

A step's gradient is the sum of its micro-batches' along the tree of `stages.reduction.tree`. Each micro-batch's
gradient is a fresh one; a process folds those of its share, which is contiguous, and parameters travel in buckets, each
while the backward pass of the share's last micro-batch is still at the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stages.ground.errors import UserError
from stages.modeling.buffers import Buffers
from stages.modeling.parallel import Parallel
from stages.modeling.world import World
from stages.reduction.base import Reduction
from stages.reduction.exchange import Exchange
from stages.reduction.left import Left
from stages.reduction.tree import Fold, Node, roots

BUCKET_BYTES = 25 * 2**20  # DDP's
Gradients = list[Tensor | None]


class Exact(Reduction):
    """Along the tree, and by bucket."""

    def __init__(self, parallel: Parallel, world: World) -> None:
        super().__init__(parallel, world)
        self._buckets: list[_Bucket] = []
        self._hooks: list[RemovableHandle] = []
        self._count, self._nodes = 0, list[list[Node]]()
        self._start: Buffers | None = None
        self._left: Left | None = None
        self._number: int | None = None  # of the micro-batch that runs
        self._taken = 0  # so many buckets have its gradients

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._buckets = [], []

    def begin(self, micro_batches: int, trained: Sequence[nn.Parameter], buffers: Buffers) -> None:
        super().begin(micro_batches, trained, buffers)
        for parameter in trained:  # an optimizer of one's own may have left zeros, which are no neutral element
            parameter.grad = None
        self._count, self._left, self._start = micro_batches, None, buffers
        if self._is_simple:
            return
        self._nodes = [roots(share, micro_batches) for share in self._shares]
        self._left = Left(buffers, micro_batches, self._nodes, self._world)
        self._lay_out(trained)
        for bucket in self._buckets:
            bucket.fold = Fold(micro_batches, _add)

    @contextmanager
    def micro_batch(self, number: int) -> Iterator[None]:
        if self._is_simple:
            yield
            return
        self._number, self._taken = number, 0
        for bucket in self._buckets:
            bucket.waiting = {id(parameter) for parameter in bucket.parameters}
        yield
        while self._taken < len(self._buckets):  # with parameters that were not used
            self._take_next()
        self._number = None
        assert self._left is not None
        self._left.take(number)

    def finish(self) -> Tensor:
        if self._left is None:
            return torch.zeros(0)
        if self._world.size == 1:
            for bucket in self._buckets:
                bucket.give(bucket.fold.root())
                bucket.fold.nodes.clear()
        else:
            self._finish_sending()
        return self._left.changed()

    def settle(self, changed: list[bool]) -> None:
        if self._left is not None:
            self._left.settle(changed)
        elif self._start is not None:
            self._start.keep()
        self._left = self._start = None

    @property
    def _is_simple(self) -> bool:
        """Whether what a backward pass leaves is the step's gradient already."""
        return self._count == self._world.size == 1

    def _finish_sending(self) -> None:
        if not self._shares[self._world.rank]:
            for bucket in self._buckets:
                bucket.send(self._nodes, self._world.rank)
        for bucket in self._buckets:
            bucket.exchange.combine(self._count)
        present = iter(self._world.maximum(*(int(there) for bucket in self._buckets for there in bucket.present)))
        for bucket in self._buckets:
            bucket.give([value if next(present) else None for value in bucket.exchange.result()])

    def _on_gradient(self, bucket: _Bucket, parameter: nn.Parameter) -> None:
        """A parameter's gradient of a micro-batch is whole."""
        if self._number is None:
            return
        if id(parameter) not in bucket.waiting:
            raise UserError(
                "model.source: a parameter is given its gradient in several parts of a backward pass, as gradient "
                "checkpointing with use_reentrant=True does with one that it shares, so that nobody can tell when it "
                "is whole; write use_reentrant=False, or train.reduction: fast"
            )
        bucket.waiting.remove(id(parameter))
        if parameter.is_cuda:
            bucket.streams.add(torch.cuda.current_stream(parameter.device))
        while self._taken < len(self._buckets) and not self._buckets[self._taken].waiting:
            self._take_next()

    def _take_next(self) -> None:
        """Fold a bucket's gradients, and send it if there are no more. In one order in all processes."""
        assert self._number is not None
        bucket = self._buckets[self._taken]
        for stream in bucket.streams:  # of other parts of the model, which nothing has waited for yet
            torch.cuda.current_stream(stream.device).wait_stream(stream)
        bucket.take(self._number)
        if self._world.size > 1 and self._number == self._shares[self._world.rank][-1]:
            bucket.send(self._nodes, self._world.rank)
        self._taken += 1

    def _lay_out(self, trained: Sequence[nn.Parameter]) -> None:
        """Buckets of the parameters that are trained, if those are others than before: in about the order in which
        backward passes come to them."""
        known = [parameter for bucket in self._buckets for parameter in bucket.parameters]
        if {id(parameter) for parameter in known} == {id(parameter) for parameter in trained}:
            return
        self.stop()
        groups: list[list[nn.Parameter]] = []
        room: dict[tuple[torch.dtype, torch.device], int] = {}  # bytes left in the newest group of a kind
        newest: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter in reversed(trained):
            kind = parameter.dtype, parameter.device
            if room.get(kind, 0) <= 0:
                room[kind], newest[kind] = BUCKET_BYTES, []
                groups.append(newest[kind])
            newest[kind].append(parameter)
            room[kind] -= parameter.nbytes
        self._buckets = [_Bucket(group, Exchange(group, self._world)) for group in groups]
        for bucket in self._buckets:
            hook: Callable[[nn.Parameter], None] = partial(self._on_gradient, bucket)
            self._hooks += [p.register_post_accumulate_grad_hook(hook) for p in bucket.parameters]


class _Bucket:
    """Parameters whose gradients are folded and sent together."""

    def __init__(self, parameters: list[nn.Parameter], exchange: Exchange) -> None:
        self.parameters, self.exchange = parameters, exchange
        self.fold: Fold[Gradients] = Fold(0, _add)  # anew for every step
        self.waiting: set[int] = set()  # parameters whose gradient is not whole yet
        self.streams: set[torch.cuda.Stream] = set()  # on which gradients were made
        self.present: list[bool] = []

    def take(self, number: int) -> None:
        """Fold the gradients that the micro-batch of that number left; the next one begins anew."""
        self.fold.put((0, number), [parameter.grad for parameter in self.parameters])
        self.give([None] * len(self.parameters))

    def send(self, nodes: list[list[Node]], rank: int) -> None:
        """Begin with their way; `nodes` are every process's."""
        mine = [self.fold.nodes.pop(node) for node in nodes[rank]]
        self.present = [any(value is not None for value in values) for values in zip(*mine, strict=True)] or [
            False for _ in self.parameters
        ]
        self.exchange.send(nodes, mine)

    def give(self, gradients: Gradients) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient


def _add(left: Gradients, right: Gradients) -> Gradients:
    """Where a parameter was not used there is nothing to add."""
    both = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    if both:
        torch._foreach_add_([a for a, _ in both], [b for _, b in both])
    return [b if a is None else a for a, b in zip(left, right, strict=True)]
