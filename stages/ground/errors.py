"""How a stage ends when it cannot do what was asked: one line on stderr and a non-zero exit code."""

from __future__ import annotations

import errno
import gc
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

USER_ERROR_EXIT = 2
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# What the user's code may raise. A stage that it ended with sys.exit(0) would look as if it were done.
RAISED = (Exception, SystemExit)
# What a disk answers, and no mistake of the code.
DISK_ERRORS = (*NO_ROOM, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG)


class UserError(Exception):
    """Something the user can mend. The message is one line: where, what was found, what is allowed."""


class UserCodeError(UserError):
    """What the user's own code raised, in a line."""


@contextmanager
def located(where: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Adds `where` to the line of a `kind` of error that is raised in here."""
    try:
        yield
    except kind as error:
        raise kind(f"{error}; {where}") from error


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Whatever code of the user's, or a library that was given the user's values, raises in here becomes one line:
    `what`, the kind of error, its message and where it was raised. Its `sys.exit()` too, which would end a stage that
    made nothing as if it had succeeded."""
    try:
        yield
    except UserError:
        raise
    except RAISED as error:
        raise UserCodeError(f"{what}: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """The kind of error, its message and where it was raised: in the user's own code, if that is on the way to it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = next((frame for frame in reversed(frames) if _is_own(Path(frame.filename))), frames[-1])
    return f"{type(error).__name__}: {reason(error)} ({Path(place.filename).name}, line {place.lineno})"


def _is_own(file: Path) -> bool:
    """Whether it belongs to no library and not to the machinery below `stages/`, of which `custom` is the user's."""
    rooms = Path(__file__).parents[1]
    libraries = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    if any(file.is_relative_to(folder) for folder in libraries) or not file.is_file():
        return False
    return not file.is_relative_to(rooms) or file.is_relative_to(rooms / "custom")


def reason(error: BaseException, limit: int = 300) -> str:
    """What an error says, as one line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit]


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


def say(line: str) -> None:
    """One line for people, on stderr as all progress is."""
    print(one_line(line), file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    """Print `message` as the one line a person sees, and exit with code 2."""
    say(f"error: {message}")
    sys.exit(USER_ERROR_EXIT)


def run_stage(main: Callable[[], None], *, collect_rarely: bool = False) -> None:
    """Run a stage's `main`; a `UserError` becomes one line and exit code 2, never a traceback.

    Args:
        collect_rarely: for a stage that trains nothing: imports make objects by the million, all of which stay, and
            the collector of garbage takes a sixth of its start to look through them again and again.
    """
    if collect_rarely:
        gc.set_threshold(100_000, 50, 100)
    try:
        main()
    except UserError as error:
        fail(str(error))
    except Exception as error:
        refused = disk_error(error)
        if refused is None:
            raise
        fail(f"{refused}; what was saved before is kept: make room, or give permission, and run the same command again")


def disk_error(error: BaseException) -> str | None:
    """What a disk refused, and where, if that is what `error` says, in whichever library's words; else None."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        place = Path(error.filename if isinstance(error.filename, str) else ".").absolute()
        reason = error.strerror
        if error.errno in NO_ROOM:
            reason = full(next(folder for folder in (place, *place.parents) if folder.exists()))
        return f"{error.filename or 'a file'}: {reason}"
    # shutil.Error lists what it could not copy; safetensors and Arrow know no errno.
    text = str(error)
    if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
        return next((f"a file: {os.strerror(code)}" for code in DISK_ERRORS if os.strerror(code) in text), None)
    return None


def full(place: Path) -> str:
    """In which way the disk of `place`, which exists, is full."""
    disk = os.statvfs(place)
    if disk.f_files and not disk.f_favail and disk.f_bavail:
        return "the disk has no inode free for another file"
    return "the disk is full"
