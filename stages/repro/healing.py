"""Mends what a killed DVC leaves behind, so that the next `dvc repro` can start.

Three things, each measured on DVC 3.67: an empty or dead `.dvc/tmp/rwlock`, an empty or torn `dvc.lock`, and the
detached HEAD of a killed `dvc exp run`. Nothing that a live process holds is touched, and nothing is thrown away:
what is replaced is kept in `.dvc/tmp`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.ground.errors import UserError

DVC_TMP = Path(".dvc/tmp")
LOCK_FILE = Path("dvc.lock")
_MOVED = re.compile(r"checkout: moving from (\S+) to [0-9a-f]{40}$")


def heal() -> list[str]:
    """Mend the repository in the current folder; a line for each thing that was mended."""
    steps = (_heal_rwlock, _heal_dvc_lock, _heal_head)
    return [line for step in steps for line in step()]


def require_names() -> None:
    """Refuse files that DVC cannot record, before it fails without naming one. Raises UserError."""
    for dep in ("stages", "data"):
        for place, folders, names in os.walk(dep):
            for name in (*folders, *names):
                path = os.fsencode(Path(place, name))
                if path.decode("utf-8", "replace").encode() != path:
                    shown = path.decode("utf-8", "backslashreplace")
                    raise UserError(f"{shown}: its name is not UTF-8, so DVC cannot record it; rename or remove it")


@contextmanager
def _dvc_guard(name: str) -> Iterator[bool]:
    """Hold DVC's own lock file `name`; False if a live process has it."""
    from dvc.lock import LockError, make_lock

    DVC_TMP.mkdir(parents=True, exist_ok=True)
    try:
        with make_lock(str(DVC_TMP / name), tmp_dir=str(DVC_TMP)):
            yield True
    except LockError:
        yield False


def _set_aside(path: Path) -> Path:
    for number in range(1000):
        target = DVC_TMP / f"{path.name}.damaged-{number}"
        if not target.exists():
            path.rename(target)
            return target
    raise RuntimeError(f"{DVC_TMP} is full of damaged files; remove them")


def _is_gone(pid: int, since: float) -> bool:
    """Whether the process that wrote `pid` into a file last written at `since` has ended.

    A process that began later only has its number.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        return process.status() == psutil.STATUS_ZOMBIE or process.create_time() > since + 1
    except psutil.NoSuchProcess:
        return True


def _without_dead(lock: dict[str, Any], since: float) -> dict[str, Any]:
    write = {path: info for path, info in lock.get("write", {}).items() if not _is_gone(info["pid"], since)}
    read = {
        path: [info for info in infos if not _is_gone(info["pid"], since)]
        for path, infos in lock.get("read", {}).items()
    }
    return {"write": write, "read": {path: infos for path, infos in read.items() if infos}}


def _heal_rwlock() -> Iterator[str]:
    path = DVC_TMP / "rwlock"
    if not path.exists() or (path.is_file() and path.read_text(errors="replace").strip() == "{}"):
        return
    with _dvc_guard("rwlock.lock") as free:
        if not free:
            return
        try:
            lock = json.loads(path.read_text(encoding="utf-8") if path.is_file() else "")
            mended = _without_dead(lock, path.stat().st_mtime)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            yield f"{path} was torn by a kill: set aside as {_set_aside(path)}"
            return
        if mended["write"] != lock.get("write", {}) or mended["read"] != lock.get("read", {}):
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(mended), encoding="utf-8")
            os.replace(temporary, path)
            yield f"{path}: removed the entries of processes that have ended"


def _is_lock_file_whole() -> bool:
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from ruamel.yaml import YAML, YAMLError
    from voluptuous import Invalid

    if not LOCK_FILE.is_file():
        return False
    try:
        text = LOCK_FILE.read_text(encoding="utf-8")
        lock = COMPILED_LOCKFILE_SCHEMA(YAML(typ="safe").load(text))
    except (ValueError, YAMLError, Invalid, RecursionError):
        return False
    # The schema asks for neither: DVC writes a file once it has one of them.
    return text.endswith("\n") and bool(lock.keys() & {"stages", "datasets"})


def _heal_dvc_lock() -> Iterator[str]:
    if not LOCK_FILE.exists() or _is_lock_file_whole():
        return
    if _git("ls-files", "--unmerged", str(LOCK_FILE)):
        raise UserError(
            f"{LOCK_FILE}: a merge left a conflict in it; resolve it (git checkout --ours {LOCK_FILE}) first"
        )
    with _dvc_guard("lock") as free:
        if free and not _is_lock_file_whole():
            yield f"{LOCK_FILE} was torn by a kill: set aside as {_set_aside(LOCK_FILE)}; DVC's cache fills it again"


def _git(*arguments: str) -> str | None:
    """What git says; None where it refuses, or there is no git here."""
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _dvc_is_running() -> bool:
    """Whether a live process holds the repository's rwlock, or runs an experiment in the workspace."""
    pids = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        path = DVC_TMP / "rwlock"
        held = _without_dead(json.loads(path.read_text(encoding="utf-8")), path.stat().st_mtime)
        if held["write"] or held["read"]:
            return True
    for path in (DVC_TMP / "exps/run").glob("*/*.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            pids.append((json.loads(path.read_text(encoding="utf-8")).get("pid"), path.stat().st_mtime))
    return any(isinstance(pid, int) and not _is_gone(pid, since) for pid, since in pids)


def _branch_left(head: str) -> str | None:
    """The branch that HEAD was on before DVC detached it at commit `head`, from the reflog."""
    for line in (_git("reflog", "show", "--format=%H %gs", "HEAD") or "").splitlines():
        commit, _, action = line.partition(" ")
        if commit != head:
            return None
        match = _MOVED.match(action)
        if match and _git("rev-parse", "--verify", f"refs/heads/{match[1]}") == head:
            return match[1]
    return None


def _heal_head() -> Iterator[str]:
    if _git("symbolic-ref", "--quiet", "HEAD") is not None:
        return
    head = _git("rev-parse", "HEAD")
    if head is None or _git("rev-parse", "--verify", "refs/exps/exec/EXEC_HEAD") != head or _dvc_is_running():
        return
    branch = _branch_left(head)
    if branch is None:
        return
    # Only the name that HEAD goes by changes: files and index stay as the experiment left them.
    _git("symbolic-ref", "-m", "holdfast: back on the branch a killed dvc exp run left", "HEAD", f"refs/heads/{branch}")
    for name in (_git("for-each-ref", "--format=%(refname)", "refs/exps/exec") or "").split():
        _git("update-ref", "-d", name)
    yield f"HEAD was left detached by a killed dvc exp run: back on {branch}; params.yaml is as the experiment set it"
