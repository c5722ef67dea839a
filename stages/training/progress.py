"""Progress for people: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any


def bar_options(description: str, unit: str) -> dict[str, Any]:
    """Keywords for a tqdm bar that vanishes when done, and is silent where stderr is no terminal."""
    return {"desc": description, "unit": unit, "leave": False, "disable": not sys.stderr.isatty()}


class StepProgress:
    """The training loop's progress: running loss, learning rate, samples/s and time left."""

    LINE_SECONDS = 10.0

    def __init__(self, step: int, total: int) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(
            initial=step, total=total, unit="step", dynamic_ncols=True, desc="training", disable=not sys.stderr.isatty()
        )
        self._begin = self._said = time.monotonic()
        self._first, self._total, self._rows = step, total, 0

    def update(self, step: int, rows: int, loss: float, learning_rate: float) -> None:
        """Tell that `step` is done; `rows`: its size, `loss`: the running mean."""
        self._rows += rows
        now = time.monotonic()
        speed = self._rows / max(now - self._begin, 1e-9)
        figures = {"loss": f"{loss:.4f}", "lr": f"{learning_rate:.2e}", "samples/s": f"{speed:.1f}"}
        self._bar.set_postfix(figures, refresh=False)
        self._bar.update(1)
        if self._bar.disable and (now - self._said >= self.LINE_SECONDS or step == self._total):
            left = (now - self._begin) / (step - self._first) * (self._total - step)
            values = " ".join(f"{key} {value}" for key, value in figures.items())
            print(f"step {step}/{self._total} {values} ETA {left:.0f} s", file=sys.stderr, flush=True)
            self._said = now

    def close(self) -> None:
        self._bar.close()
