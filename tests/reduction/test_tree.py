"""The order of sums: the same for every way to share micro-batches out."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from stages.batches.plan import shares
from stages.reduction.tree import Fold, roots, total


def add(left: str, right: str) -> str:
    """Addition that remembers its order."""
    return f"({left}+{right})"


def written_out(low: int, size: int, count: int) -> str:
    """The tree over the numbers from `low` to `low + size`, a power of two, of which there are `count`."""
    if size == 1:
        return str(low)
    left, middle = written_out(low, size // 2, count), low + size // 2
    return left if middle >= count else add(left, written_out(middle, size // 2, count))


def expected(count: int) -> str:
    return written_out(0, 1 << (count - 1).bit_length(), count)


@given(st.integers(1, 200))
def test_one_process_adds_along_the_tree(count: int) -> None:
    assert total(map(str, range(count)), count, add) == expected(count)


@given(st.integers(1, 200), st.lists(st.integers(0, 200), max_size=12))
def test_any_contiguous_shares_come_to_the_same_root(count: int, cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, count) for cut in cuts), count]
    whole = Fold(count, add)
    for share in itertools.starmap(range, itertools.pairwise(bounds)):
        mine = Fold(count, add)
        for number in share:
            mine.put((0, number), str(number))
            assert len(mine.nodes) <= count.bit_length() * (1 if share.start == 0 else 2)
        assert list(mine.nodes) == roots(share, count)
        for node, value in mine.nodes.items():
            whole.put(node, value)
    assert whole.root() == expected(count)


@given(st.integers(1, 6), st.integers(0, 4))
def test_shares_of_a_power_of_two_are_one_subtree_each(level: int, fewer: int) -> None:
    processes = 1 << max(level - fewer, 0)
    assert {len(roots(share, 1 << level)) for share in shares(1 << level, processes)} == {1}


@given(st.integers(0, 300), st.integers(1, 20))
def test_shares_hold_every_number_once_and_differ_by_one_at_most(count: int, processes: int) -> None:
    found = shares(count, processes)
    assert list(itertools.chain.from_iterable(found)) == list(range(count))
    assert len(found) == processes
    assert max(map(len, found)) - min(map(len, found)) <= 1
