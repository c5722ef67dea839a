"""Mixed precision: which parts run in 16 bits, and the scaling that fp16 gradients need."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Scales the loss in fp16, so that small gradients survive; passes everything through otherwise."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def overflow(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, device: torch.device) -> torch.Tensor:
    """Whether fp16 gradients, unscaled by now, were found infinite: the scaler will skip this step, as is usual, and
    lower its scale. fp32 of no dimension on `device`, 0 or 1, which may still be on its way there."""
    found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"] if scaler.is_enabled() else {}
    return next((value.float().reshape(()) for value in found.values()), torch.zeros((), device=device))
