"""Starts train with its launcher. The request to die with DVC is asked for first: it survives `exec`."""

from __future__ import annotations

import os
import shlex
import sys

from stages.config.errors import UserError, quote, run_stage
from stages.config.params import load_params
from stages.run.signals import die_with_parent


def main() -> None:
    """Replace this process by `<train.launcher> -m stages.train`."""
    die_with_parent()
    launcher = load_params().train.launcher
    try:
        command = [sys.executable] if launcher == "auto" else shlex.split(launcher)
        os.execvp(command[0], [*command, "-m", "stages.train"])
    except (ValueError, IndexError, FileNotFoundError) as error:
        raise UserError(f"train.launcher is {quote(launcher)}, which cannot be started: {error}") from None


if __name__ == "__main__":
    run_stage(main)
