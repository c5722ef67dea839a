"""Sums of tensors over all processes along the tree of `stages.reduction.tree`, at about the traffic of an all-reduce.

Laid end to end, the tensors are cut into one slice a process. Each process is sent its slice of every subtree's root,
adds them in the tree's order, and the finished slices are gathered. With n elements, p processes and s roots of its own
a process sends n (s + 1) (p - 1) / p elements; a ring's all-reduce sends 2 n (p - 1) / p.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from stages.modeling.world import World
from stages.reduction.tree import Fold, Node

# As the allocator of CUDA does: kernels that reduce a tensor may cut it otherwise where it begins elsewhere.
ALIGNMENT_BYTES = 512

# The second is its name up to torch 2.12.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Exchange:
    """The way of tensors of one type on one device, of the shapes and strides of `like`, through all processes of
    `world`: `send`, `combine` and `result`, in all of them equally often and in the same order."""

    def __init__(self, like: Sequence[Tensor], world: World) -> None:
        self._world, self._like = world, like
        item = like[0].element_size()
        align = ALIGNMENT_BYTES // item
        self._offsets, end = [], 0
        for tensor in like:
            self._offsets.append(end)
            end += -(-tensor.numel() // align) * align
        self._slice = -(-end // world.size)
        self._strides = [_strides(tensor) for tensor in like]
        self._outgoing = self._incoming = self._whole = like[0].new_zeros(0)
        self._nodes: Sequence[list[Node]] = []
        self._work: dist.Work | None = None

    def send(self, nodes: Sequence[list[Node]], values: Sequence[Sequence[Tensor | None]]) -> None:
        """Begin with the way of this process's roots.

        Args:
            nodes: those of every process, from left to right.
            values: of this process's nodes the tensors; None stands for zeros.
        """
        self._nodes = nodes
        size, length, number = self._world.size, self._slice, len(values)
        if self._outgoing.numel() != number * size * length:
            self._outgoing = self._outgoing.new_zeros(number * size * length)
        for index, tensors in enumerate(values):
            # Alone, a root lies there as it is.
            flat = self._outgoing if number == 1 else self._outgoing.new_zeros(size * length)
            self._fill(flat, tensors)
            if number > 1:
                self._outgoing.view(size, number, length)[:, index].copy_(flat.view(size, length))
        rows = [len(theirs) for theirs in nodes]
        if self._incoming.numel() != sum(rows) * length:
            self._incoming = self._incoming.new_zeros(sum(rows) * length)
        item = length * self._incoming.element_size()
        # As bytes: the backend need not know the type, as it adds nothing.
        self._work = dist.all_to_all_single(
            self._incoming.view(torch.uint8),
            self._outgoing.view(torch.uint8),
            [theirs * item for theirs in rows],
            [number * item] * size,
            async_op=True,
        )

    def combine(self, count: int) -> None:
        """Add up this process's slice, of `count` micro-batches in all, and begin to gather."""
        assert self._work is not None
        self._work.wait()
        fold = Fold(count, Tensor.add_)
        rows = self._incoming.view(-1, self._slice)
        for node, row in zip(chain.from_iterable(self._nodes), rows, strict=True):
            fold.put(node, row)
        # Not what was sent or received: who is given a gradient may hold on to it.
        self._whole = self._incoming.new_empty(self._world.size * self._slice)
        self._work = _all_gather(self._whole.view(torch.uint8), fold.root().view(torch.uint8), async_op=True)

    def result(self) -> list[Tensor]:
        """The sums."""
        assert self._work is not None
        self._work.wait()
        found = self._views(self._whole)
        self._work, self._whole = None, self._whole.new_zeros(0)
        return found

    def _fill(self, flat: Tensor, tensors: Sequence[Tensor | None]) -> None:
        pairs = list(zip(self._views(flat), tensors, strict=True))
        there = [(view, tensor) for view, tensor in pairs if tensor is not None]
        if there:
            torch._foreach_copy_([view for view, _ in there], [tensor for _, tensor in there])
        for view, tensor in pairs:
            if tensor is None:
                # Changes no number that it is added to, not even -0.0.
                (torch.view_as_real(view) if view.is_complex() else view).fill_(-0.0)

    def _views(self, flat: Tensor) -> list[Tensor]:
        places = zip(self._like, self._strides, self._offsets, strict=True)
        return [flat.as_strided(like.shape, stride, offset) for like, stride, offset in places]


def _strides(like: Tensor) -> tuple[int, ...]:
    """Those that autograd gives the gradient of such a parameter: its own where it is dense, else by rows."""
    numel = 1
    for stride, size in sorted(zip(like.stride(), like.shape, strict=True)):
        if size != 1 and stride != numel:
            return torch.empty(like.shape, device="meta").stride()
        numel *= size
    return like.stride()
