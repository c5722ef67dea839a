"""A model's predictions on a split: the same code for train, evaluate and select_best."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stages.batches.collate import Batch, make_loader
from stages.batches.randomness import EVALUATION
from stages.batches.tokenized import Task, label_batches, lengths
from stages.config.schema import EvaluateParams
from stages.ground.bar import bar
from stages.ground.errors import located, user_code
from stages.modeling.compute import Compute
from stages.modeling.losses import Objective
from stages.modeling.parallel import Parallel
from stages.scoring.scores import score

# Rows of like length are batched together within windows of so many rows, in the split's order: so the batches of a
# window are those of its rows alone.
WINDOW_ROWS = 8192
SHOWN_ROWS = 64


def shown(rows: Sequence[int]) -> str:
    """Positions of rows for people; of many the first."""
    return ", ".join(map(str, rows[:SHOWN_ROWS])) + (", ..." if len(rows) > SHOWN_ROWS else "")


class Stopped(Exception):
    """An evaluation was left because the process was asked to stop; nothing of it counts."""


@dataclass(frozen=True)
class Predictions:
    """Row for row of a split: `logits` float32 (rows, outputs) and, unless the split has no labels, `labels` as they
    are in the split, `row_losses` float32 (rows,) and their (weighted) mean `loss`."""

    logits: NDArray[np.float32]
    labels: NDArray[np.int64] | NDArray[np.float32] | None
    row_losses: NDArray[np.float32] | None
    loss: float | None

    def scores(self, task: Task, params: EvaluateParams) -> dict[str, float]:
        """`loss` and every metric of `evaluate.metrics`; the split must have labels."""
        assert self.labels is not None and self.loss is not None
        return {"loss": self.loss, **score(task, params, self.logits, self.labels)}


@dataclass(frozen=True)
class Scored:
    """A batch that was computed: its `number`, the `rows` of the split, their `logits` float32 (rows, outputs) and,
    unless the split has no labels, `losses` float32 (rows,), both on the CPU."""

    number: int
    rows: list[int]
    logits: Tensor
    losses: Tensor | None


@dataclass(frozen=True)
class Scorer:
    """Predicts `split`, which people know by its `name`, in batches of `batch_size` rows whose composition and random
    numbers depend on the split alone, and not on the number of processes."""

    split: datasets.Dataset
    tokenizer: PreTrainedTokenizerBase | None
    objective: Objective
    batch_size: int
    compute: Compute
    name: str = "validation"

    @cached_property
    def batches(self) -> list[list[int]]:
        """The rows of each batch, by the batch's number."""
        size, length = self.batch_size, lengths(self.split)
        found = []
        for begin in range(0, len(length), WINDOW_ROWS):
            window = begin + np.argsort(-length[begin : begin + WINDOW_ROWS], kind="stable")
            found += [window[i : i + size].tolist() for i in range(0, len(window), size)]
        return found

    @cached_property
    def labels(self) -> Tensor | None:
        """Those of all rows; None where the split has none."""
        return torch.cat(list(label_batches(self.split))) if "labels" in self.split.column_names else None

    @torch.no_grad()
    def run(self, forward: Callable[[Batch], Tensor], stop_requested: Callable[[], bool]) -> Iterator[Scored]:
        """Compute this process's share of the batches, with a model in eval mode.

        Every process makes the same number of forward passes, as a model may be spread over all: one that has no
        batch left runs another's again, and nothing of that counts.

        Raises:
            Stopped: in every process, if `stop_requested()` was true in one at the start of a batch.
            UserError: the model or the loss raised, with the rows.
        """
        batches, world = self.batches, self.compute.world
        rounds = -(-len(batches) // world.size)
        mine = [number % len(batches) for number in range(world.rank, rounds * world.size, world.size)]
        loader = make_loader(self.split, [batches[i] for i in mine], self.tokenizer, self.compute.device, 0)
        for turn, (number, batch) in enumerate(zip(mine, bar(loader, "evaluating", "batch"), strict=True)):
            if any(world.maximum(int(stop_requested()))):
                raise Stopped
            self.compute.seed_at(EVALUATION, number)
            inputs = self.compute.put(batch)
            labels = inputs.pop("labels", None)
            where = f"its rows of {self.name} are {shown(batches[number])}"
            with located(where), user_code("the model or the loss fails in eval mode"):
                with self.compute.autocast():
                    logits = forward(inputs)
                logits = logits.detach().float()  # a compiled script may forget that there are no gradients
                losses = None if labels is None else self.objective.each_row(logits, labels)
            if turn * world.size + world.rank < len(batches):
                yield Scored(number, batches[number], logits.cpu(), None if losses is None else losses.cpu())

    def __call__(self, parallel: Parallel, stop_requested: Callable[[], bool] = lambda: False) -> Predictions:
        """Predict all rows; the model is in the mode that it was in afterwards.

        Raises:
            Stopped: in every process, if `stop_requested()` is true in one at the start of a batch.
        """
        world, rows = self.compute.world, self.split.num_rows
        logits, losses = torch.zeros(rows, 0), torch.zeros(rows)
        model = parallel.model
        world.broadcast_buffers(model)
        was_training = model.training
        model.eval()
        try:
            for scored in self.run(parallel.forward, stop_requested):
                if not logits.shape[1]:
                    logits = torch.zeros(rows, scored.logits.shape[1])
                logits[scored.rows] = scored.logits
                if scored.losses is not None:
                    losses[scored.rows] = scored.losses
        finally:
            model.train(was_training)
        if world.size > 1:
            # Each row is nought in all processes but one.
            (outputs,) = world.maximum(logits.shape[1])
            logits = world.sum(logits if logits.shape[1] else torch.zeros(rows, outputs))
            losses = world.sum(losses)
        labels = self.labels
        return Predictions(
            logits.numpy(),
            None if labels is None else labels.numpy(),
            None if labels is None else losses.numpy(),
            # Summed in the split's order and in fp64, so that neither the batch size nor the processes play a part.
            None if labels is None else float(losses.double().sum() / self.objective.weight(labels)),
        )
