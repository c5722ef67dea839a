"""Which device, and the settings that decide whether it gives the same bits twice."""

from __future__ import annotations

import os

import torch

from stages.config.errors import UserError, quote


def pick_device(name: str) -> torch.device:
    """The device `train.device` names; `auto` is CUDA, else MPS, else the CPU.

    Raises:
        UserError: no such device here.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"train.device is {quote(name)}; write auto, cpu, cuda, cuda:N or mps") from None
    missing = (device.type == "cuda" and (not cuda or (device.index or 0) >= torch.cuda.device_count())) or (
        device.type == "mps" and not mps
    )
    if missing or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"train.device is {quote(name)}, which this machine does not have; write auto")
    return device


def set_determinism(deterministic: bool) -> None:
    """Deterministic algorithms, and plain fp32 matrix products where `deterministic`; TF32 otherwise."""
    # cuBLAS reads this when it is first used; without it deterministic mode refuses to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("highest" if deterministic else "high")
