"""What surrounds a run and can change its bits without being part of what was asked for."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def current(device: torch.device) -> dict[str, Any]:
    """Library versions, the kind of device (`cuda (NVIDIA H100)`), and the number of intra-op threads."""
    import numpy
    import torch
    import transformers

    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "python": _python(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "device": f"{device.type} ({kind})",
        "threads": torch.get_num_threads(),
    }


def of_libraries(*names: str) -> dict[str, Any]:
    """The versions of Python and of these packages, for work in which no tensor takes part. Nothing is imported."""
    return {"python": _python(), **{name: version(name) for name in names}}


def _python() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def difference(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`torch: 2.12.0 -> 2.13.0`, one line an entry that differs."""
    return [
        f"{key}: {before.get(key)} -> {now.get(key)}" for key in sorted(before | now) if before.get(key) != now.get(key)
    ]
