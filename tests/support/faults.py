"""Ends a process with SIGKILL at a named point of its own choosing: before or after the n-th write to disk.

A point is `count:FILE` (write down how many operations there were, and which), `before:N` / `after:N` (die there), or
`on:REGEX` / `past:REGEX` (die before / after the first operation on a path that it matches). Operations are what
commits and publishing consist of: open for writing, fsync, rename, replace, unlink, rmdir, mkdir, truncate.
"""

from __future__ import annotations

import builtins
import functools
import io
import itertools
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "truncate")


class Faults:
    """Counts operations on files below the current folder, and dies at the chosen one."""

    def __init__(self, point: str) -> None:
        self.when, _, self.where = point.partition(":")
        self.numbers = itertools.count(1)
        self.home = str(Path.cwd())
        self.main = os.getpid()

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            ours = isinstance(args[0], int) or str(Path.cwd() / os.fspath(args[0])).startswith(self.home)
            if os.getpid() != self.main or not ours or "__pycache__" in str(args[0]):
                return function(*args, **kwargs)
            number = next(self.numbers)  # atomic: the saver counts in a thread of its own
            if self.when == "count":
                with open_file(self.where, "a") as file:
                    file.write(f"{number} {name} {args[0]}\n")
            if self.when == "before" and number == int(self.where):
                os.kill(self.main, signal.SIGKILL)
            if self.when == "on" and re.search(self.where, str(args[0])):
                os.kill(self.main, signal.SIGKILL)
            try:
                return function(*args, **kwargs)
            finally:
                if (self.when == "after" and number == int(self.where)) or (
                    self.when == "past" and re.search(self.where, str(args[0]))
                ):
                    os.kill(self.main, signal.SIGKILL)

        return counted

    def wrap_open(self, function: Callable[..., Any]) -> Callable[..., Any]:
        counted = self.wrap("open", function)

        @functools.wraps(function)
        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+") or str(file).startswith("/proc"):
                return function(file, mode, *args, **kwargs)
            return counted(file, mode, *args, **kwargs)

        return opened


open_file = open


def install(point: str) -> None:
    """Watch this process from now on."""
    faults = Faults(point)
    for name in NAMES:
        setattr(os, name, faults.wrap(name, getattr(os, name)))
    builtins.open = faults.wrap_open(builtins.open)
    io.open = faults.wrap_open(io.open)
