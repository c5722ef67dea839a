"""Mixed precision: which parts run in 16 bits, and the scaling that fp16 gradients need."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context in which the forward pass runs in `precision`; in fp32 it changes nothing."""
    return torch.autocast(device.type, dtype=DTYPES.get(precision), enabled=precision in DTYPES)


def make_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Scales the loss in fp16, so that small gradients survive; passes everything through otherwise."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
