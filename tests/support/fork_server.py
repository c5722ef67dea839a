"""Runs stages many times without paying for their imports each time.

`python -m tests.support.fork_server` imports all that the stages and DVC import, and forgets the stages themselves. It
then forks a process for every JSON line on standard input: {"folder", "arguments" (of `python -m`), "point" (of
faults.py, or null), "output" (a file), "answers" (a fifo), "env"}, and answers with the pid, and at its end with the
exit status, negative for a signal. Every run is a process of its own in a session of its own, with the checkout's own
code, real files and real SIGKILL, and so is what it starts (interpreter.py); what a start of the interpreter adds is
tested by the runs that do not come from here.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from tests.support import faults, interpreter

ROOT = Path(__file__).resolve().parents[2]
# Beside the top-level imports of the stages: what they import as they go, and takes longest.
LAZY = (
    "evaluate",
    "transformers.models.bert.modeling_bert",
    "transformers.models.bert.tokenization_bert",
    "scipy.io",
    "matplotlib.backends.backend_agg",
    "matplotlib.style",
    "networkx",
    "rich.table",
    "scmrepo.git",
    "dvc.cli.parser",
    "dvc.repo.open_repo",
)


def serve() -> None:
    """Answer requests until standard input ends."""
    import_what_stages_import()
    interpreter.install()
    gc.collect()
    gc.freeze()  # else every run looks through all of it again, and has a copy of the memory afterwards
    for line in sys.stdin:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if os.fork() == 0:
            watch(json.loads(line))


def import_what_stages_import() -> None:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from stages.config.pipeline import load_stage
    from stages.config.read import read_yaml
    from stages.keeping.code import find_code

    for stage in read_yaml(Path("dvc.yaml"))["stages"]:
        for path in find_code(load_stage(stage)).files:
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    for name in LAZY:
        importlib.import_module(name)
    get_checkpoint_conversion_mapping("bert")  # a thousand patterns, compiled once


def watch(request: dict[str, Any]) -> None:
    """A process between the server and the run: tells of its beginning and its end."""
    code = 1
    try:
        with open(request["answers"], "w") as answers:
            child = os.fork()
            if child == 0:
                run(request)
            print(child, file=answers, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)
        code = 0
    finally:
        os._exit(code)


def run(request: dict[str, Any]) -> NoReturn:
    """Become what is asked for, in a session of its own."""
    os.setsid()
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(source, target)
    point = request["point"]
    prepare = (lambda: faults.install(point)) if point else lambda: None
    interpreter.become(request["arguments"], request["folder"], request["env"], prepare)


class Forked:
    """A run that the server was asked for: of what `subprocess.Popen` can, the part that tests need."""

    def __init__(self, answers: Path, output: Path) -> None:
        self._answers = answers.open()
        self._output = output
        self.returncode: int | None = None
        self.pid = int(self._answers.readline())

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._answers], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0, self._output.read_text())
            self.returncode = int(self._answers.readline())
            self._answers.close()
        return self.returncode

    def poll(self) -> int | None:
        if self.returncode is None and not select.select([self._answers], [], [], 0)[0]:
            return None
        return self.wait()

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self._output.read_text(), None

    def send_signal(self, number: int, group: bool = False) -> None:
        """To the process, or to all of its session; nothing if it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it ended just now
                (os.killpg if group else os.kill)(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The other side."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._process = subprocess.Popen(
            # With -m, `tests` is imported before `stages`, whose runs it is then no part of.
            [sys.executable, "-m", "tests.support.fork_server"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(
        self, folder: Path, module: str, point: str | None = None, arguments: Sequence[str] = (), **env: str
    ) -> Forked:
        assert self._process.stdin
        number = next(self._numbers)
        output, answers = (folder.parent / f"{folder.name}-{name}-{number}" for name in ("output", "answers"))
        os.mkfifo(answers)
        request = {
            "folder": str(folder),
            "arguments": [module, *arguments],
            "point": point,
            "output": str(output),
            "answers": str(answers),
            "env": {**os.environ, "OMP_NUM_THREADS": "1", **env},
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Forked(answers, output)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


@cache
def fork_server() -> ForkServer:
    """Started at the first use in a process of pytest's, and ended with it."""
    started = ForkServer()
    atexit.register(started.close)
    return started


if __name__ == "__main__":
    serve()
