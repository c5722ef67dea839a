"""How a stage ended, as a number and in a line: DVC answers 255 to all that fails, so `python -m stages repro`, which
starts DVC, does not ask it but reads what the stages left in a folder that it names."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path

FOLDER = "HOLDFAST_WORDS"
EXIT_SECONDS = 5.0


class Exit(IntEnum):
    """The exit codes, of `repro` and of every stage."""

    DONE = 0
    FAULT = 1  # ours
    MEND = 2  # the user's to mend: another start would end as this one did
    AGAIN = 75  # stopped, or something that passes: EX_TEMPFAIL of sysexits.h


@dataclass(frozen=True)
class Word:
    """What process `pid` said of itself: `code` is None from its begin until its end. `stage` is None of DVC."""

    pid: int
    stage: str | None
    code: int | None = None
    line: str = ""


def leave_word(code: int | None = None, line: str = "") -> None:
    """Say that this process has begun, or with a `code` how it ended. Nothing where nobody asks, or the disk is full:
    no word means "killed"."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        return
    path = Path(folder, f"{os.getpid()}.json")
    with contextlib.suppress(OSError):
        made = path.with_suffix(".tmp")
        word = Word(os.getpid(), os.environ.get("DVC_STAGE"), code, line)
        made.write_text(json.dumps(asdict(word)), encoding="utf-8")
        os.replace(made, path)


def end_soon(code: int) -> None:
    """End this process with `code` in EXIT_SECONDS, whatever it is still waiting for then: a thread that hangs, a disk,
    a process that will not end."""
    timer = threading.Timer(EXIT_SECONDS, os._exit, [code])
    timer.daemon = True
    timer.start()


def withdraw_word() -> None:
    """This process becomes one that leaves none."""
    folder = os.environ.get(FOLDER)
    if folder is not None:
        Path(folder, f"{os.getpid()}.json").unlink(missing_ok=True)


def read_words(folder: Path) -> list[Word]:
    """Of all processes that left one, in no order."""
    found = []
    for path in folder.glob("*.json"):
        with contextlib.suppress(FileNotFoundError):  # withdrawn between the two
            found.append(Word(**json.loads(path.read_text(encoding="utf-8"))))
    return found
