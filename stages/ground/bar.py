"""Progress for people: a bar on a terminal, silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def bar(items: Iterable[Item], description: str, unit: str) -> Iterator[Item]:
    """`items`, shown as a tqdm bar that vanishes when done."""
    from tqdm.auto import tqdm

    yield from tqdm(items, desc=description, unit=unit, leave=False, disable=not sys.stderr.isatty())
