"""A command from its begin to its end, which is one line on stderr and an exit code of `Exit`."""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

from stages.ground.errors import Interrupted, UserError, describe, disk_error, reason, say
from stages.ground.signals import on_stop_signals
from stages.ground.words import Exit, end_soon, leave_word


def run_stage(main: Callable[[], None], *, collect_rarely: bool = False) -> None:
    """Run a stage's `main`, and leave the word how it ended. A stop signal ends it at once, where it has no other use
    for them: what is done is kept.

    Args:
        collect_rarely: for a stage that trains nothing: imports make objects by the million, all of which stay, and
            the collector of garbage takes a sixth of its start to look through them again and again.
    """
    on_stop_signals(_stop)
    leave_word()
    if collect_rarely:
        gc.set_threshold(100_000, 50, 100)
    try:
        run_command(main)
    except SystemExit as ending:
        # However it ends: a process that is waited for, and will not end, would keep the locks.
        end_soon(int(ending.code or 0))
        raise


def run_command(main: Callable[[], None]) -> None:
    """Run `main`; a `UserError` becomes one line and its exit code, never a traceback. Raises SystemExit unless it is
    done."""
    code, line = _outcome(main)
    leave_word(code, line)
    if code:
        sys.exit(code)


def _outcome(main: Callable[[], None]) -> tuple[int, str]:
    try:
        main()
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None), ""
    except UserError as error:
        say(str(error) if isinstance(error, Interrupted) else f"error: {error}")
        return error.code, str(error)
    except MemoryError as error:
        code, line = Exit.AGAIN, f"memory ran out ({reason(error) or 'MemoryError'})"
    except Exception as error:
        refused = disk_error(error)
        if refused is None:
            traceback.print_exc()
            code, line = Exit.FAULT, f"this is a fault of Holdfast ({describe(error)}): report it, with the lines above"
        else:
            code = refused.code
            line = f"{refused}; what was saved is kept: make room, or give permission, and run the same command again"
    else:
        return Exit.DONE, ""
    say(f"error: {line}")
    return code, line


def _stop(number: int, frame: FrameType | None) -> None:
    line = f"stopped by {signal.Signals(number).name}; run the same command again to go on"
    leave_word(Exit.AGAIN, line)
    os.write(2, f"{line}\n".encode())
    os._exit(Exit.AGAIN)
