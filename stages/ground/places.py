"""Where stages leave what other stages read, and how checkpoints and candidates are named."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

CANDIDATES = Path("models/candidates")
BEST = Path("models/best")
VALIDATION = Path("data/predictions/validation")
TEST = Path("data/predictions/test")
REPORT = Path("report.html")
METRICS = Path("metrics")
PLOTS = Path("plots")
_NAME = re.compile("step-([0-9]+)")


def repository() -> Path | None:
    """The folder, this one or one above it, that DVC takes for its repository; None if there is none."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), None)


def step_name(step: int) -> str:
    """`step-00000230`: the name of a checkpoint's or candidate's folder."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """The step in such a name: 230 of `step-00000230`. Raises ValueError for any other name."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} names no step")
    return int(match[1])


def steps_in(names: Iterable[str]) -> list[int]:
    """The steps of those `names` that name one as `step_name` does, the newest first."""
    steps = [(name, step_of(name)) for name in names if _NAME.fullmatch(name)]
    return sorted((step for name, step in steps if name == step_name(step)), reverse=True)
