"""Runs `python -m stages.train` many times without paying for its imports each time.

`python -m tests.support.fork_server` imports them once and then forks a process for every JSON line on standard input:
{"folder", "point" (of faults.py, or null), "output" (a file), "env"}. It answers with the exit status, negative for a
signal. Every run is a process of its own, with real files and real SIGKILL; what a start of the interpreter adds is
tested by the runs that do not come from here.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import stages
from stages.config.pipeline import load_stage
from stages.keeping.code import find_code
from tests.support import faults

ROOT = Path(__file__).resolve().parents[2]


def serve() -> None:
    """Answer requests until standard input ends."""
    import evaluate  # noqa: F401  the slowest import, and train's only lazy one

    os.chdir(ROOT)
    for path in sorted(find_code(load_stage("train")).files):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        # Those of stages.metrics are imported by `evaluate` alone, from a copy, and which depends on the task.
        if name != "stages.train" and not name.startswith("stages.metrics"):
            importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            run(request)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run(request: dict[str, Any]) -> None:
    """The child: become train."""
    code = 1
    try:
        os.setsid()
        os.chdir(request["folder"])
        os.environ.update(request["env"])
        # Modules come from the repository, but what a user brings along from the checkout.
        stages.__path__.insert(0, str(Path("stages").absolute()))
        sys.modules.pop("__mp_main__", None)  # multiprocessing's second name for this file
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "stages" and module.__file__:
                module.__file__ = module.__file__.replace(str(ROOT), str(Path.cwd()))
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if request["point"]:
            faults.install(request["point"])
        runpy.run_module("stages.train", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Forker:
    """The other side: `run` gives a run's exit status and what it printed."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            # With -m, `tests` is imported before `stages`, whose runs it is then no part of.
            [sys.executable, "-m", "tests.support.fork_server"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, folder: Path, point: str | None, env: dict[str, str]) -> tuple[int, str]:
        assert self._process.stdin and self._process.stdout
        output = folder.parent / "output"
        request = {"folder": str(folder), "point": point, "output": str(output), "env": env}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline()), output.read_text()

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


if __name__ == "__main__":
    serve()
