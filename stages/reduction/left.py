"""What a step leaves in a model's buffers: every micro-batch begins with those of the step's beginning; afterwards a
float buffer is the mean of what they left, summed along the tree, and any other one and the extra state are the last's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.modeling.buffers import Buffers
from stages.modeling.codec import Tree
from stages.modeling.world import World
from stages.reduction.exchange import Exchange
from stages.reduction.tree import Fold, Node


class Left:
    """Of a step of `count` micro-batches that begins with `start`: `take` after each of this process's, `settle` once
    all are done; `nodes` are every process's in the tree. In between the model has the buffers of the beginning."""

    def __init__(self, start: Buffers, count: int, nodes: Sequence[list[Node]], world: World) -> None:
        self._start, self._count, self._nodes, self._world = start, count, nodes, world
        self._floats = [i for i, value in enumerate(start.values) if value.is_floating_point() or value.is_complex()]
        self._before = _bytes(start.values)
        self._differs = torch.zeros_like(self._before, dtype=torch.bool)
        self._fold: Fold[list[Tensor]] = Fold(
            count, lambda left, right: [a.add_(b) for a, b in zip(left, right, strict=True)]
        )
        self._last: tuple[list[Tensor], list[Tree]] = (start.values, start.extra_state)

    @torch.no_grad()
    def take(self, number: int) -> None:
        """Take in what the micro-batch of that number left, and give the model what it had before."""
        now = self._start.now()
        self._differs |= _bytes(now) != self._before
        self._fold.put((0, number), [_summable(now[index]) for index in self._floats])
        if number == self._count - 1:
            self._last = [value.clone() for value in now], self._start.extra_state_now()
        self._start.put_back()

    def changed(self) -> Tensor:
        """bool (buffers,): which ones this process's micro-batches left another value in."""
        sizes = [value.numel() * value.element_size() for value in self._start.values]
        return torch.stack([part.any() for part in self._differs.split(sizes)]) if sizes else self._differs

    def settle(self, changed: list[bool]) -> None:
        """Give the model what is left of the step, in every process; `changed` is what `changed` returned here."""
        values, extra_state = self._last
        last = max(rank for rank, theirs in enumerate(self._nodes) if theirs)
        anywhere = self._world.maximum(*map(int, changed)) if changed else []
        found = self._means([index for index in self._floats if anywhere[index]])
        for index, is_changed in enumerate(anywhere):
            if is_changed and index not in found:
                found[index] = values[index].clone()  # of who does not know it, it is what is put back if this fails
                self._world.broadcast(found[index], last)
        if extra_state:
            extra_state = self._world.broadcast_tree(extra_state, last)
        # Only now: another process may have ended on the way.
        self._start.put(found)
        self._start.put_extra_state(extra_state)

    def _means(self, wanted: Sequence[int]) -> dict[int, Tensor]:
        """Of those float buffers, by their numbers; computed in fp32 at least."""
        place = {index: place for place, index in enumerate(self._floats)}
        found: dict[int, Tensor] = {}
        like = {index: _summable(self._start.values[index]) for index in wanted}
        for dtype in dict.fromkeys(value.dtype for value in like.values()):
            group = [index for index in wanted if like[index].dtype == dtype]
            mine = [[self._fold.nodes[node][place[index]] for index in group] for node in self._nodes[self._world.rank]]
            sums = _everywhere([like[index] for index in group], self._nodes, mine, self._count, self._world)
            found |= {
                index: (value / self._count).to(self._start.values[index].dtype)
                for index, value in zip(group, sums, strict=True)
            }
        return found


def _everywhere(
    like: Sequence[Tensor], nodes: Sequence[list[Node]], mine: list[list[Tensor]], count: int, world: World
) -> list[Tensor]:
    if world.size == 1:
        return mine[0]
    exchange = Exchange(like, world)
    exchange.send(nodes, mine)
    exchange.combine(count)
    return exchange.result()


def _summable(value: Tensor) -> Tensor:
    """A copy, in a type whose sums do not overflow at once."""
    return value.float() if value.is_floating_point() and value.element_size() < 4 else value.clone()


def _bytes(values: Sequence[Tensor]) -> Tensor:
    """As uint8, end to end: NaN is NaN, and every type can be compared."""
    flat = [value.contiguous().reshape(-1).view(torch.uint8) for value in values]
    return torch.cat(flat) if flat else torch.zeros(0, dtype=torch.uint8)
