"""Starts train with its launcher. The request to die with DVC is asked for first: it survives `exec`."""

from __future__ import annotations

import ctypes
import os
import shlex
import sys
from pathlib import Path

from stages.config.read import load_params
from stages.config.schema import Params
from stages.ground.errors import UserError, quote, say
from stages.ground.running import run_stage
from stages.ground.signals import PARENT_PID, STOP_SIGNALS, die_with_parent
from stages.ground.words import withdraw_word


def main() -> None:
    """Replace this process by `<train.launcher> -m stages.train`."""
    die_with_parent()
    params = load_params()
    launcher = params.train.launcher
    try:
        command = _auto(params) if launcher == "auto" else shlex.split(launcher)
        # This process becomes torchrun and so the parent of the workers; of other launchers nobody knows.
        os.environ.pop(PARENT_PID, None)
        if any(word.endswith(("torchrun", "torch.distributed.run")) for word in command[:3]):
            os.environ[PARENT_PID] = str(os.getpid())
            # What torchrun does not know to hand on ends it, and its workers with it.
            os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(number.name for number in STOP_SIGNALS))
        withdraw_word()
        os.execvp(command[0], [*command, "-m", "stages.train"])
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"train.launcher is {quote(launcher)}, which cannot be started: {error}") from None


def _auto(params: Params) -> list[str]:
    """torchrun over all visible GPUs, as far as a step has micro-batches for them, if that is more than one; else
    this Python."""
    gpus = count_gpus() if params.train.device in ("auto", "cuda") else 0
    used = min(gpus, params.build_loaders.micro_batches_per_step)
    if used < gpus:
        say(
            f"{gpus} GPUs are visible, but a step has {used} micro-batches: training on {used}; "
            "write a smaller build_loaders.micro_batch_size to use more"
        )
    if used > 1:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={used}"]
    return [sys.executable]


def count_gpus() -> int:
    """The GPUs that CUDA or ROCm sees."""
    # Where no driver is there, torch need not be imported to count them.
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        if not Path("/dev/kfd").exists():
            return 0
    import torch

    return torch.cuda.device_count()


if __name__ == "__main__":
    run_stage(main)
