"""How training can end: as a value, and as what stops a step half-way."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from stages.ground.errors import UserError
from stages.ground.words import Exit


class Outcome(IntEnum):
    """How a start of train can end; the number is its exit code."""

    COMPLETE = Exit.DONE
    STOPPED = Exit.AGAIN
    DIVERGED = Exit.MEND


@dataclass(frozen=True)
class Ending:
    """How training ended: `line` says it to people where the run is not complete. `alone`: of several processes only
    this one knows, so that the others are not to be waited for."""

    outcome: Outcome
    line: str = ""
    alone: bool = False


class Unfinished(UserError):
    """A step or an evaluation cannot be done, so training ends here; nothing of it counts."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.line)
        self.ending = ending
