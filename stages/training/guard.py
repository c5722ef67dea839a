"""Looks that what is imported while it trains is part of the run's identity, before a checkpoint holds what it did."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from stages.config.pipeline import Stage
from stages.keeping.code import Code, require_imported
from stages.training.callbacks import Callback

if TYPE_CHECKING:
    from stages.run.state import TrainState


class ImportGuard(Callback):
    """Raises UserError at the end of the step, or evaluation, in which `stage` imported something that is not part of
    `code`."""

    def __init__(self, stage: Stage, code: Code) -> None:
        self._stage, self._code = stage, code
        self._modules = 0

    def check(self) -> None:
        if len(sys.modules) != self._modules:
            require_imported(self._stage, self._code)
            self._modules = len(sys.modules)

    def on_evaluate(self, state: TrainState, scores: dict[str, float]) -> None:
        self.check()

    def on_log(self, state: TrainState, row: dict[str, float]) -> None:
        self.check()

    def on_step_end(self, state: TrainState) -> None:
        self.check()

    def on_train_end(self, state: TrainState) -> None:
        self.check()
