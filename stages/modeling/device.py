"""Which device, and the settings that decide whether it gives the same bits twice."""

from __future__ import annotations

import os

import torch

from stages.ground.errors import UserError, quote, say


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device `train.device` names; `auto` is CUDA, else MPS, else the CPU. A CUDA device becomes the current one.

    Args:
        local_rank: of several processes on this machine, this one's number; each takes the CUDA device of its number.

    Raises:
        UserError: no such device here.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps and local_rank is None else "cpu"
    if local_rank is not None and name != "cpu":
        if name != "cuda":
            raise UserError(f"train.device is {quote(name)}, but several processes train; write auto, cpu or cuda")
        if cuda and local_rank >= torch.cuda.device_count():
            raise UserError(
                f"train.launcher starts process {local_rank + 1} of this machine, which has "
                f"{torch.cuda.device_count()} visible GPUs; start as many processes as GPUs, or write train.device: cpu"
            )
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"train.device is {quote(name)}; write auto, cpu, cuda, cuda:N or mps") from None
    missing = (device.type == "cuda" and (not cuda or (device.index or 0) >= torch.cuda.device_count())) or (
        device.type == "mps" and not mps
    )
    if missing or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"train.device is {quote(name)}, which this machine does not have; write auto")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def set_arithmetic(deterministic: bool, tf32: bool) -> None:
    """Deterministic algorithms or not, and TensorFloat-32 or plain fp32 in matrix products and convolutions."""
    # cuBLAS reads this when it is first used; without it deterministic mode refuses to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


def set_threads(threads: int | None) -> None:
    """Compute with so many intra-op threads, and say so if it is another number than now; None changes nothing.

    The number decides how sums are cut, and so bits.
    """
    now = torch.get_num_threads()
    if threads is not None and threads != now:
        say(f"intra-op threads set from {now} to {threads}, as the run has")
        torch.set_num_threads(threads)
