"""`python -m stages.repro.dvc repro …`: DVC's own command line, as a child of `python -m stages repro`.

DVC answers 255 to nearly all that fails. What it failed with is in what it logs, and becomes this process's word.
"""

from __future__ import annotations

import logging
import os
import re
import sys

from stages.ground.errors import chain, disk_error, reason
from stages.ground.signals import PARENT_PID, die_with_parent
from stages.ground.words import Exit, leave_word

# The rooms of DVC whose errors are about what a person wrote: dvc.yaml, the arguments, the configuration.
WRITTEN_BY_USERS = (
    "dvc.parsing",
    "dvc.utils.strictyaml",
    "dvc.stage.exceptions",
    "dvc.config",
    "dvc.cli",
    "dvc.dependency",
)


class Listener(logging.Handler):
    """Keeps the exceptions that DVC logs as the end of its command."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.heard: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self.heard.append(record.exc_info[1])


def main() -> int:
    """Be DVC; its exit code."""
    die_with_parent()
    os.environ[PARENT_PID] = str(os.getpid())
    listener = Listener()
    try:
        from dvc.cli import main as dvc
        from dvc.cli.parser import DvcParserError

        logging.getLogger("dvc").addHandler(listener)
        code = int(dvc(sys.argv[1:]))
    except KeyboardInterrupt as error:
        listener.heard.append(error)
        code = 252
    if code == 254:
        listener.heard.append(DvcParserError())  # which it prints, and does not log
    for heard in listener.heard[:1]:
        leave_word(*judge(heard))
    return code


def judge(error: BaseException) -> tuple[Exit, str]:
    """How DVC ended that failed with `error`, and why. What a stage says of itself counts before it."""
    from dvc import exceptions as known
    from dvc.lock import LockError
    from dvc.stage.exceptions import StageCmdFailedError

    passing = (KeyboardInterrupt, LockError, known.FileTransferError, MemoryError)
    about_files = (
        known.ArgumentDuplicationError,
        known.BadMetricError,
        known.CircularDependencyError,
        known.CyclicGraphError,
        known.InvalidArgumentError,
        known.NoOutputOrStageError,
        known.NotDvcRepoError,
        known.OutputDuplicationError,
        known.OutputNotFoundError,
        known.OverlappingOutputPathsError,
        known.StageNotFoundError,
        known.StagePathAsOutputError,
    )
    for cause in chain(error):
        refused = disk_error(cause)
        if isinstance(cause, StageCmdFailedError):
            return of_command(str(cause)), reason(cause)
        if refused is not None:
            return refused.code, str(refused)
        if isinstance(cause, passing):
            return Exit.AGAIN, reason(cause) or type(cause).__name__
        if isinstance(cause, about_files) or type(cause).__module__.startswith(WRITTEN_BY_USERS):
            return Exit.MEND, reason(cause)
    return Exit.FAULT, reason(cause)


def of_command(failed: str) -> Exit:
    """How a stage's command ended that left no word itself, from DVC's."""
    status = re.search("exited with (-?[0-9]+)$", failed)
    code = int(status[1]) if status else 1
    if code in (126, 127):  # a shell's: it cannot be run
        return Exit.MEND
    if not 0 < code < 128 or code == Exit.AGAIN:  # a signal's
        return Exit.AGAIN
    if "-m stages." not in failed or code == Exit.MEND:
        return Exit.MEND
    # Of torchrun 1 says that a process ended, in whichever way; of another stage, that Python could not begin it.
    return Exit.AGAIN if "-m stages.launch" in failed else Exit.FAULT


if __name__ == "__main__":
    sys.exit(main())
