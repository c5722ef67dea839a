"""`python -m module` without the start of an interpreter: a process that has imported all that stages import forks, or
becomes, the one that is asked for.

The process is one of its own, with the pid, parent, signals, files and environment that it would have; its code is that
of the folder that it starts in. Only in processes of the fork server do DVC, `repro` and `launch` start each other so,
and only for commands that are `python -m` of stages or DVC: torchrun and a shell's pipes start as ever.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch

MODULE = re.compile(r"stages(\.\w+)*|dvc")
# What an interpreter, or a library as it is imported, reads once: it is what the server found.
READ_ONCE = {"ATEN_CPU_CAPABILITY", "PYTHONHASHSEED"}
SYNTAX = "stages.keeping.syntax"
_installed: list[str] = []  # the search path of the server, less its own folder
_syntax: list[Any] = []  # a module of the server's, with its text before it
_here: list[str] = []  # what comes before it, in the process as it is


def arguments_of(command: Sequence[str]) -> list[str] | None:
    """[module, arguments …] of a command that is `python -m module …`, in a shell or not; None of any other."""
    words = list(command)
    if len(words) > 2 and words[-2] == "-c" and Path(words[0]).name in ("sh", "bash", "dash"):
        words = shlex.split(words[-1])
        words = words[1:] if words[:1] == ["exec"] else []
    if words[:1] == ["dvc"]:
        words = ["python", "-m", *words]
    python = len(words) > 2 and words[1] == "-m" and words[0] in ("python", sys.executable)
    return words[2:] if python and MODULE.fullmatch(words[2]) else None


def become(
    arguments: Sequence[str], folder: str, environment: Mapping[str, str], prepare: Callable[[], None] = lambda: None
) -> NoReturn:
    """Go on as the process that `exec python -m *arguments` in `folder` makes of this one; `prepare` comes first."""
    code = 1
    try:
        gc.freeze()  # else every run looks through all of it again, and has a copy of the memory afterwards
        _forget_signals_and_files()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        if (threads := os.environ.get("OMP_NUM_THREADS", "1")) != str(torch.get_num_threads()):
            torch.set_num_threads(int(threads))
        _forget_code(folder)
        prepare()
        module, *sys.argv[1:] = arguments
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # an interpreter waits for its threads
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _forget_signals_and_files() -> None:
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.closerange(3, max(int(entry.name) for entry in Path("/proc/self/fd").iterdir()) + 1)


def _forget_code(folder: str) -> None:
    """Of what was imported, all that is no package of an installed distribution; the search path as at a start."""
    places = tuple(f"{place}{os.sep}" for place in {*_here, folder})
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("stages", "sitecustomize") or (
            name != "__main__" and (getattr(module, "__file__", None) or "").startswith(places)
        ):
            del sys.modules[name]
    _here[:] = [folder, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = [*_here, *_installed]
    importlib.invalidate_caches()
    _recall_syntax(Path(folder, *SYNTAX.split(".")).with_suffix(".py"))
    if "PYTHONPATH" in os.environ:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module("sitecustomize")


def _recall_syntax(file: Path) -> None:
    """Each stage parses its own code: where it does so as the server did, take what the server has parsed before, by
    content."""
    if _syntax and file.is_file() and file.read_bytes() == _syntax[0]:
        _syntax[1].__file__ = str(file)
        sys.modules[SYNTAX] = _syntax[1]


class _Child:
    """Of what `subprocess.Popen` can, the part that DVC needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def communicate(self) -> None:
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _fork(arguments: Sequence[str], folder: str, environment: Mapping[str, str]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        become(arguments, folder, environment)
    return pid


def _is_alone() -> bool:
    """Whether no other thread would be lost in the midst of what it does."""
    return threading.active_count() == 1


def _popen(command: Sequence[str], cwd: str, env: Mapping[str, str], **others: Any) -> Any:
    arguments = arguments_of(command)
    if arguments is None or not _is_alone():
        return subprocess.Popen(command, cwd=cwd, env=env, **others)
    return _Child(_fork(arguments, str(cwd), env))


def install() -> None:
    """Forget the stages, which this process has imported. From now on, what it forks and they start is forked, too."""
    from dvc.stage import run
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # a thread that redraws bars that stand still, and would keep DVC from being alone
    _installed[:] = sys.path[1:]
    syntax = sys.modules[SYNTAX]
    _syntax[:] = [Path(str(syntax.__file__)).read_bytes(), syntax]
    for name in [name for name in sys.modules if name.partition(".")[0] == "stages"]:
        del sys.modules[name]
    spawn, execute = os.posix_spawn, os.execvp

    def posix_spawn(path: Any, command: Any, environment: Any, **others: Any) -> int:
        arguments = arguments_of(command)
        if arguments is None or others or not _is_alone():
            return spawn(path, command, environment, **others)
        return _fork(arguments, str(Path.cwd()), environment)

    def execvp(path: Any, command: Any) -> NoReturn:
        arguments = arguments_of(command)
        if arguments is None or not _is_alone():
            execute(path, command)
        sys.stdout.flush()
        sys.stderr.flush()
        become(arguments, str(Path.cwd()), dict(os.environ))

    run.subprocess = SimpleNamespace(Popen=_popen)
    os.posix_spawn, os.execvp = posix_spawn, execvp  # type: ignore[assignment]
