"""What a stage says when it cannot do what was asked: one line, and whether that is to be mended or passes."""

from __future__ import annotations

import errno
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.ground.words import Exit

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# What the user's code may raise. A stage that it ended with sys.exit(0) would look as if it were done.
RAISED = (Exception, SystemExit)
# What a disk answers, and no mistake of the code; the first ones pass.
PASSING = (*NO_ROOM, errno.EIO, errno.ESTALE)
DISK_ERRORS = (*PASSING, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)


class UserError(Exception):
    """Something the user can mend. The message is one line: where, what was found, what is allowed. `code` is how a
    stage ends that raises it."""

    code = Exit.MEND


class TransientError(UserError):
    """Something that passes: the same command again goes on."""

    code = Exit.AGAIN


class Interrupted(TransientError):
    """Nothing went wrong: it was asked to stop, and has."""


class UserCodeError(UserError):
    """What the user's own code raised, in a line."""


@contextmanager
def located(where: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Adds `where` to the line of a `kind` of error that is raised in here."""
    try:
        yield
    except kind as error:
        located = kind(f"{error}; {where}")
        located.code = error.code
        raise located from error


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


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and what it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_unreachable(error: BaseException) -> bool:
    """Whether it came from a network or a server that does not answer now: what it says is no answer."""
    causes = list(chain(error))
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    statuses = [getattr(getattr(cause, "response", None), "status_code", None) for cause in causes]
    answered = next((status for status in statuses if isinstance(status, int)), None)
    if answered is not None:
        return answered == 429 or answered >= 500
    if any("OfflineModeIsEnabled" in f"{type(cause).__name__} {cause}" for cause in causes):
        return False  # as somebody said
    return bool(kinds & {"TransportError", "ConnectionError", "TimeoutError"})


def disk_error(error: BaseException) -> UserError | None:
    """What a disk refused, and where, if that is what `error` says, in whichever library's words; else None."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        place = Path(error.filename if isinstance(error.filename, str) else ".").absolute()
        reason = error.strerror
        if error.errno in NO_ROOM:
            reason = full(next(folder for folder in (place, *place.parents) if folder.exists()))
        code, line = error.errno, f"{error.filename or 'a file'}: {reason}"
    elif isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
        # shutil.Error lists what it could not copy; safetensors and Arrow know no errno.
        found = next((code for code in DISK_ERRORS if os.strerror(code) in str(error)), None)
        if found is None:
            return None
        code, line = found, f"a file: {os.strerror(found)}"
    else:
        return None
    return TransientError(line) if code in PASSING else UserError(line)


def full(place: Path) -> str:
    """In which way the disk of `place`, which exists, is full."""
    disk = os.statvfs(place)
    if disk.f_files and not disk.f_favail and disk.f_bavail:
        return "the disk has no inode free for another file"
    return "the disk is full"
