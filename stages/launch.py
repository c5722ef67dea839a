"""Starts train with its launcher. The request to die with DVC is asked for first: it survives `exec`."""

from __future__ import annotations

import ctypes.util
import os
import shlex
import sys

from stages.config.errors import UserError, quote, run_stage
from stages.config.params import TrainParams, load_params
from stages.run.signals import DVC_PID, die_with_parent


def main() -> None:
    """Replace this process by `<train.launcher> -m stages.train`."""
    die_with_parent()
    os.environ.pop(DVC_PID, None)  # a launcher's workers are no children of DVC, and this one is asked for already
    train = load_params().train
    try:
        command = _auto(train) if train.launcher == "auto" else shlex.split(train.launcher)
        os.execvp(command[0], [*command, "-m", "stages.train"])
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"train.launcher is {quote(train.launcher)}, which cannot be started: {error}") from None


def _auto(train: TrainParams) -> list[str]:
    """torchrun over all visible GPUs if there are several, else this Python."""
    # Where no GPU driver is installed, torch need not be imported to count them.
    if train.device in ("auto", "cuda") and (ctypes.util.find_library("cuda") or ctypes.util.find_library("amdhip64")):
        import torch

        if torch.cuda.device_count() > 1:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            return [*torchrun, f"--nproc-per-node={torch.cuda.device_count()}"]
    return [sys.executable]


if __name__ == "__main__":
    run_stage(main)
