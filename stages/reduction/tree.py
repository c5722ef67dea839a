"""The order of sums: one fixed binary tree over the numbers of a step's micro-batches, whoever runs which of them.

The node (level, index) covers the numbers from index * 2^level up to (index + 1) * 2^level, as far as there are so
many. It is the sum of its two halves, left plus right, or the left one alone where the right one is empty. Floating-
point addition is not associative, so the root's bits follow from this order alone: a process that sums whole subtrees,
and whoever adds those up along the tree, come to the bits of one process that does all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")
Node = tuple[int, int]


def roots(numbers: range, count: int) -> list[Node]:
    """The fewest whole subtrees of the tree over `count` numbers that `numbers` consists of, from left to right."""
    found, first = [], numbers.start
    while first < numbers.stop:
        level = 0
        while first % (2 << level) == 0 and min(first + (2 << level), count) <= numbers.stop and (1 << level) < count:
            level += 1
        found.append((level, first >> level))
        first += 1 << level
    return found


@dataclass
class Fold(Generic[T]):
    """Sums what is put in, in the order of the numbers that it is of, to the fewest subtrees. From number 0 on at most
    log2(numbers) + 1 are held at a time, from elsewhere twice as many. `add` may change its first argument."""

    count: int
    add: Callable[[T, T], T]
    nodes: dict[Node, T] = field(default_factory=dict)

    def put(self, node: Node, value: T) -> None:
        """Take in a node's value, and merge it upwards as far as its siblings are there."""
        level, index = node
        while True:
            if index % 2:
                if (level, index - 1) not in self.nodes:
                    break
                value = self.add(self.nodes.pop((level, index - 1)), value)
            elif ((index + 1) << level) < self.count or (1 << level) >= self.count:
                break  # the right half is to come, or this is the root
            level, index = level + 1, index // 2
        self.nodes[level, index] = value

    def root(self) -> T:
        """The sum of all, once all are in."""
        (value,) = self.nodes.values()
        return value


def total(values: Iterable[T], count: int, add: Callable[[T, T], T]) -> T:
    """The sum of `count` values along the tree."""
    fold = Fold(count, add)
    for number, value in enumerate(values):
        fold.put((0, number), value)
    return fold.root()
