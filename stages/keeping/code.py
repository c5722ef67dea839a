"""Which code a stage runs: what its module imports from outside of installed packages, statically and transitively,
what the parameters name with what that imports, and whether what was imported in the end is all of it.
"""

from __future__ import annotations

import importlib.util
import os
import site
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    SourceFileLoader,
    SourcelessFileLoader,
)
from pathlib import Path

from stages import PRELOADED
from stages.config.pipeline import Stage, is_below_a_dep, lines_to_add, named_code
from stages.ground.disk import absolute
from stages.ground.errors import UserError
from stages.keeping.listed import files_below, ignored_by_dvc, listed_files
from stages.keeping.syntax import Source, digest

# Code that uses one of these reads docstrings, or source as it is written, of whatever it likes ...
READS_DOCSTRINGS = {"__doc__", "getdoc"}
READS_SOURCE = {"getsource", "getsourcelines", "getcomments", "linecache"}
READS_FILES = {"open", "read_text", "read_bytes"}  # its own, together with __file__
# ... or runs files that no import statement names.
RUNS_FILES = {"exec", "run_path", "run_module", "spec_from_file_location", "SourceFileLoader", "FileFinder"}
# Where torch.compile puts what it makes; torch sets these itself.
COMPILED = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
_LOADERS = (
    (ExtensionFileLoader, EXTENSION_SUFFIXES),
    (SourceFileLoader, SOURCE_SUFFIXES),
    (SourcelessFileLoader, BYTECODE_SUFFIXES),
)


@cache
def search_path() -> tuple[str, ...]:
    """Where imports are looked for, as it was at first: code may add to it, and differently before and after."""
    return tuple(sys.path)


@cache
def _installed_below() -> tuple[str, ...]:
    """The folders of the standard library and of installed distributions."""
    paths = [sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    paths += [*site.getsitepackages(), site.getusersitepackages()]
    paths += [entry for entry in search_path() if Path(entry).name in ("site-packages", "dist-packages")]
    return tuple(dict.fromkeys(f"{absolute(path)}{os.sep}" for path in paths))


@cache
def _installed_elsewhere() -> frozenset[str]:
    """The files of distributions that lie somewhere else on the search path, as `pip install --target` puts them."""
    found: set[str] = set()
    for entry in search_path():
        if not f"{absolute(entry)}{os.sep}".startswith(_installed_below()):
            for record in Path(entry).glob("*.dist-info/RECORD"):
                lines = record.read_text(encoding="utf-8", errors="replace").splitlines()
                found |= {str(absolute(Path(entry, line.split(",")[0]))) for line in lines}
    return frozenset(found)


def is_own(path: Path) -> bool:
    """Whether a file belongs to no installed distribution; what is installed as editable belongs to none."""
    file = str(absolute(path))
    return not file.startswith(_installed_below()) and file not in _installed_elsewhere()


@cache
def _finder(folder: str) -> FileFinder:
    return FileFinder(folder, *_LOADERS)


def _look(name: str, folders: Sequence[str]) -> tuple[Path | None, list[str]] | None:
    """What `import name` finds in `folders`, as Python does: a file, and the folders of a package. None if nothing."""
    namespace: list[str] = []
    for folder in folders:
        spec = _finder(folder).find_spec(name) if Path(folder).is_dir() else None
        inner = list((spec and spec.submodule_search_locations) or ())
        if spec and spec.has_location and spec.origin:
            return Path(spec.origin), inner
        namespace += inner
    return (None, namespace) if namespace else None


@cache
def _look_at_the_top(name: str, here: Path) -> tuple[Path | None, list[str]] | None:
    # As `python -m` does: the current folder comes first.
    found = _look(name, [str(here), *search_path()])
    if found is None:
        # Finders of packages that are installed as editable
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            return None
        if spec is None or not (spec.has_location or spec.submodule_search_locations):
            return None
        found = (
            Path(spec.origin) if spec.has_location and spec.origin else None,
            list(spec.submodule_search_locations or ()),
        )
    return found


def _walk(name: str, package: str, folders: Sequence[str] | None) -> Iterator[tuple[Path, str]]:
    """The own files that `import name` runs, with their names: those of its parents, and its own. `folders` are those
    of the `package` that it is relative to, None from the top."""
    done = [package] if package else []
    for part in name.split("."):
        if not part:
            return  # whoever imports it says what is wrong with it
        found = _look_at_the_top(part, Path.cwd()) if folders is None else _look(part, folders)
        if found is None:
            return
        file, folders = found
        if file is not None and not is_own(file):
            return
        done.append(part)
        if file is not None:
            yield absolute(file), ".".join(done)


@dataclass(frozen=True)
class Code:
    """The code of a stage: hex sha256 by the name that a message shows, and the files, as absolute paths. `content`
    are files that count whole, though nobody imports them by a statement."""

    hashes: dict[str, str]
    files: frozenset[Path]
    content: tuple[Path, ...] = ()


def find_code(stage: Stage, leave_out: Sequence[Path] = ()) -> Code:
    """The code that `stage` runs as the files are now, files that its deps list one by one included.

    Args:
        leave_out: as in `listed_files`.
    """
    listed = listed_files(stage, leave_out)
    todo = list(_walk(f"stages.{stage.name}", "", None))
    for _, code in named_code(stage):
        module, colon, _ = code.partition(":")
        todo += _walk(module, "", None) if colon else [(absolute(path), code) for path in _python_files(Path(code))]
    todo += [(absolute(path), path.as_posix()) for path in listed if path.suffix == ".py"]
    names, read = _follow(todo)
    if read & RUNS_FILES:
        custom = [absolute(path) for path in files_below(Path("stages/custom"), ignored_by_dvc())]
        names, read = _follow([*todo, *((path, path.as_posix()) for path in custom if path.suffix == ".py")])
    docstrings = bool(read & READS_DOCSTRINGS)
    as_written = bool(read & READS_SOURCE)
    hashes = {}
    for path, name in names.items():
        # Code elsewhere goes by its name, so that the place of a checkout plays no part.
        key = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else f"import {name}"
        text = path.read_bytes()
        python = path.suffix == ".py"
        hashes[key] = digest(text, docstrings=docstrings, as_written=as_written or not python)
    content = tuple(path for path in listed if path.suffix != ".py")
    return Code(hashes, frozenset(names), content)


def _follow(begin: Sequence[tuple[Path, str]]) -> tuple[dict[Path, str], set[str]]:
    """All files that these import, with a name for each, and the names in their code."""
    todo, read = list(begin), set[str]()
    names: dict[Path, str] = {}
    asked = set[tuple[str, str, str | None]]()  # most files import what others do
    for path, name in todo:  # grows while it is walked
        if path in names:
            continue
        names[path] = name
        if path.suffix != ".py":
            continue
        source = Source.parse(path.read_bytes())
        if not path.is_relative_to(absolute("stages/keeping")):  # where the names occur as they are looked for
            read |= source.names
            if "__file__" in source.names and source.names & READS_FILES:
                read |= READS_SOURCE
        for level, imported in source.imports:
            if level > len(path.parents) or (level and not imported):
                continue
            parts = name.split(".")
            package = ".".join(parts[: len(parts) - level + (path.name == "__init__.py")]) if level else ""
            folder = str(path.parents[level - 1]) if level else None
            if (imported, package, folder) not in asked:
                asked.add((imported, package, folder))
                todo += _walk(imported, package, None if folder is None else [folder])
    return names, read


def _python_files(path: Path) -> list[Path]:
    """Those of an `evaluate` module: a file, or a folder."""
    return sorted(path.rglob("*.py")) if path.is_dir() else [path] if path.is_file() else []


def require_code(stage: Stage, code: Code) -> None:
    """Refuse code that DVC does not see.

    Raises:
        UserError: with the lines to add to dvc.yaml.
    """
    unseen = sorted(path for path in code.files if not is_below_a_dep(stage, path))
    if unseen:
        raise UserError(lines_to_add(stage, unseen, "which it imports, so DVC would not see a change of it"))


def require_imported(stage: Stage, code: Code) -> None:
    """Refuse what was imported by now but is not part of `code`: by a name that was put together, say.

    Raises:
        UserError: with the lines to add to dvc.yaml.
    """
    known = code.files | {absolute(path) for path in code.content}
    stray = []
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is not None and name.partition(".")[0] not in PRELOADED and _is_own_module(name, file):
            path = absolute(file)
            # A module may come out of an archive.
            path = next(place for place in (path, *path.parents) if place.exists())
            if path not in known:
                stray.append(path)
    if stray:
        why = "which it imported by a name that no import statement and no parameter spells out"
        raise UserError(lines_to_add(stage, stray, why))


def _is_own_module(name: str, file: str) -> bool:
    """Whether a module was imported of code that is written by people, and belongs to no installed distribution."""
    # An installed package may make modules elsewhere, and torch.compile writes some that go by any name.
    top = getattr(sys.modules.get(name.partition(".")[0]), "__file__", None) or file
    made = [os.environ[key] for key in COMPILED if os.environ.get(key)]
    return is_own(Path(file)) and is_own(Path(top)) and not any(absolute(file).is_relative_to(place) for place in made)
