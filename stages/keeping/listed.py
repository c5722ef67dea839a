"""The files below a stage's deps: which of them are content, and which are content for nobody."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from stages.config.pipeline import Stage
from stages.ground.disk import absolute

# Deps that leave a stage's result as it is, each with the reason.
NOT_PART: dict[str, str] = {
    "stages/launch.py": "it starts the process that trains, and is replaced by it",
    "stages/watching": "it looks and shows; a test removes all of it and compares every byte",
}
# What DVC ignores wherever it is; the rest of the list is .dvcignore.
IGNORED = (".git/", ".hg/", ".dvc/")
IGNORED_FILE = Path(".dvcignore")


def listed_files(stage: Stage, leave_out: Sequence[Path] = ()) -> list[Path]:
    """The files below the deps of `stage`, links followed, less what DVC ignores; of folders below stages/, where what
    is imported counts, those that are no Python. `leave_out` are deps that somebody else looks after."""
    ignored, found = ignored_by_dvc(), []
    for dep in map(Path, stage.deps):
        if not (is_no_part(dep) or any(dep.resolve() == path.resolve() for path in leave_out)):
            files = files_below(dep, ignored)
            in_a_room = dep.is_dir() and absolute(dep).is_relative_to(absolute("stages"))
            found += [file for file in files if not (in_a_room and file.suffix == ".py")]
    return found


def is_no_part(path: Path) -> bool:
    """Whether `NOT_PART` says that a file or dep decides nothing."""
    return any(path.is_relative_to(dep) for dep in NOT_PART)


def files_below(dep: Path, ignored: Callable[[Path], bool]) -> list[Path]:
    if dep.is_file():
        return [dep]
    found, seen = [], set()
    for place, folders, names in os.walk(dep, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        found += [path for name in names if not ignored(path := Path(place, name))]
    return sorted(path for path in found if path.is_file())


def ignored_by_dvc() -> Callable[[Path], bool]:
    from pathspec import GitIgnoreSpec

    lines = IGNORED_FILE.read_text(encoding="utf-8").splitlines() if IGNORED_FILE.is_file() else []
    spec = GitIgnoreSpec.from_lines([*IGNORED, *lines])
    return lambda path: spec.match_file(os.path.relpath(path))
