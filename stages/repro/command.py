"""`python -m stages repro`: mend, start DVC, and start again where that was asked for."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from stages.config.pipeline import load_stage, read_stages, require_rows
from stages.config.read import PARAMS_FILE, load_params
from stages.ground.errors import UserError, say
from stages.ground.words import Exit
from stages.keeping.folder import RunFolder
from stages.keeping.identity import identify
from stages.repro.healing import heal, require_names
from stages.repro.progress import count_start, forget_starts, uncount_start
from stages.repro.supervisor import Ended, Supervisor

# Starts in a row that add nothing to what is done, after which --until-done gives up.
STARTS = 3
PAUSE_SECONDS = 30.0
# A start that was told to stop earlier could not have got anywhere.
FAIR_SECONDS = 60.0
GO_ON = "run the same command again"


def repro(arguments: Sequence[str], *, fresh: bool, stop_after: float | None, until_done: bool) -> None:
    """Run `dvc repro` with these `arguments`, and end with its exit code: raises SystemExit.

    Args:
        fresh: drop the matching runs' state first.
        stop_after: seconds after which it is to stop; None: never.
        until_done: start again after an end that passes, unless this process was told to stop.
    """
    if {"-q", "--quiet"} & set(arguments):
        raise UserError("-q keeps DVC from saying what fails, which decides the exit code; redirect its output")
    supervisor = Supervisor(stop_after)
    ended = Ended(Exit.AGAIN, "whoever stopped or killed them")
    while True:
        mend()
        if fresh:
            drop_matching_runs()
            fresh = False
        starts = count_start() if until_done else 1
        if starts > STARTS:
            ended = Ended(Exit.FAULT, f"given up: {STARTS} starts in a row got nowhere, the last for: {ended.line}")
            break
        begin = time.monotonic()
        ended = supervisor.run(arguments)
        if ended.code != Exit.AGAIN:
            break
        if not until_done or supervisor.told is not None:
            if until_done and time.monotonic() - begin < FAIR_SECONDS:
                uncount_start()
            if GO_ON not in ended.line:  # else the stage has said so
                say(f"repro: {ended.line}; {GO_ON} to go on")
            sys.exit(ended.code)
        say(f"repro: {ended.line}; starting again")
        supervisor.wait(PAUSE_SECONDS * (starts - 1))
        if supervisor.told is not None:
            sys.exit(Exit.AGAIN)
    if until_done:
        forget_starts()  # whoever starts it now has been told, or it is done
    if ended.code == Exit.FAULT:
        say(f"repro: {ended.line}")
    sys.exit(ended.code)


def mend() -> None:
    """What DVC would stumble over: left by a kill, or to be said before it starts. Raises UserError."""
    require_names()
    for line in heal():
        say(f"mended: {line}")
    if Path(PARAMS_FILE).is_file():
        require_rows(Path(load_params().data.path))  # DVC reads it before any stage can refuse it


def drop_matching_runs() -> None:
    """Remove the state of the runs, one a stage, that the files and parameters as they are now would continue."""
    for name in read_stages():
        try:
            run = RunFolder.of(identify(load_stage(name)))
        except UserError as error:
            say(f"--fresh: no run of {name} to drop ({error})")
            continue
        if run.path.exists():
            run.remove()
            say(f"--fresh: dropped run {run.id} of {name}")
