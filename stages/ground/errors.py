"""How a stage ends when it cannot do what was asked: one line on stderr and a non-zero exit code."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

USER_ERROR_EXIT = 2
# What a disk answers, and no mistake of the code.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG)


class UserError(Exception):
    """Something the user can mend. The message is one line: where, what was found, what is allowed."""


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Whatever code of the user's, or a library that was given the user's values, raises in here becomes one line:
    `what`, the kind of error, its message and where it was raised."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{what}: {type(error).__name__}: {reason} ({Path(place.filename).name}, line {place.lineno})"
        ) from error


def quote(value: object, limit: int = 80) -> str:
    """`value` as it would be typed, cut to `limit` characters, control characters escaped."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def one_line(message: str) -> str:
    """`message` as one line that a terminal shows as it is: names of files, and what is in them, may hold escapes."""
    text = " ".join(message.split())
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def fail(message: str) -> NoReturn:
    """Print `message` as the one line a person sees, and exit with code 2."""
    print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    sys.exit(USER_ERROR_EXIT)


def run_stage(main: Callable[[], None]) -> None:
    """Run a stage's `main`; a `UserError` becomes one line and exit code 2, never a traceback."""
    try:
        main()
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        fail(f"{error.filename or 'a file'}: {error.strerror}; what was saved before is kept: make room, or give "
             "permission, and run the same command again")  # fmt: skip
