"""Atoms: the pieces of a stage's work that are done or not done, so that a kill costs the one in the making.

What is done of a piece of work (a split's rows, a candidate's predictions) is kept in numbered entries of the run's
store until the stage is done. They are named by the stage's identity and by their environment: those of another one
may differ in their last bits, and are never used.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stages.ground.errors import say
from stages.ground.watchdog import sign_of_life
from stages.keeping.sealed import DamagedError
from stages.keeping.store import Key, Part, Store

KIND = "atoms"
SECONDS = 1.0
# From here on atoms grow, so that weeks of work are some thousand of them.
MANY = 1000


class Pace:
    """Says when a piece of work is long enough to be kept: after a second, and later where there are many already.

    Args:
        done: how many there are.
        clock: monotonic seconds; another one in tests.
    """

    def __init__(self, done: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._done, self._clock = done, clock
        self._last = clock()

    def is_due(self) -> bool:
        return self._clock() - self._last >= SECONDS * max(1.0, (self._done / MANY) ** 2)

    def kept(self) -> None:
        """A piece was kept just now."""
        self._done += 1
        self._last = self._clock()


def fingerprint(environment: Mapping[str, Any]) -> str:
    """8 hex digits that name an environment (see stages.keeping.environment): another one may lead to another model at
    the same step."""
    return hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Atoms:
    """Those of the work `scope` (`validation`, `train`) of a stage's run, in the environment with that fingerprint."""

    store: Store
    stage: str
    identity: str
    scope: str
    environment: str

    def of(self, scope: str) -> Atoms:
        """Those of another piece of work."""
        return replace(self, scope=scope)

    def numbers(self) -> list[int]:
        """The numbers of those that are kept, in order; they are not verified."""
        return sorted(number for environment, number in self._found() if environment == self.environment)

    def read(self, ours: bool = True) -> Iterator[tuple[int, dict[str, Part]]]:
        """Number and parts of each, verified. One that is damaged is not there; if they are `ours`, it is removed, with
        a line."""
        for number in self.numbers():
            try:
                yield number, self.store.read(self._key(number))
            except DamagedError as error:
                if ours:
                    say(f"a piece of {self.scope} is damaged and is computed again: {error}")
                    self.store.remove(self._key(number))

    def write(self, number: int, size: int, fill: Callable[[Path], object]) -> None:
        """Keep what `fill` writes into a folder, about `size` bytes, as this number. Raises SaveError."""
        key = self._key(number)
        self.store.begin(key, size)
        self.store.put(key, fill)
        self.store.commit(key)
        sign_of_life()

    def remove_others(self) -> None:
        """Remove those of other environments, with a line."""
        others = [found for found in self._found() if found[0] != self.environment]
        for environment, number in others:
            self.store.remove(self._key(number, environment))
        if others:
            say(
                f"{self.scope}: {len(others)} pieces were computed in another environment (versions, device or "
                "threads) and are computed again"
            )

    def remove(self) -> None:
        """Remove all, of any environment."""
        for environment, number in self._found():
            self.store.remove(self._key(number, environment))

    def _key(self, number: int, environment: str | None = None) -> Key:
        return Key(self.stage, self.identity, KIND, f"{self.scope}.{environment or self.environment}.{number:08d}")

    def _found(self) -> list[tuple[str, int]]:
        found = []
        for name in self.store.names(self.stage, self.identity, KIND):
            parts = name.rsplit(".", 2)
            if len(parts) == 3 and parts[0] == self.scope and parts[2].isdecimal():
                found.append((parts[1], int(parts[2])))
        return found
