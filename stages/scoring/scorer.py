"""A model's predictions on a split: the same code for train, evaluate and select_best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
from stages.ground.errors import located, say, user_code
from stages.ground.watchdog import sign_of_life
from stages.keeping.atoms import Pace
from stages.modeling.buffers import Buffers
from stages.modeling.compute import Compute
from stages.modeling.losses import Objective
from stages.modeling.parallel import Parallel
from stages.scoring.kept import Kept, Scored
from stages.scoring.scores import score

# Rows of like length are batched together within windows of so many rows, in the split's order: so the batches of a
# window are those of its rows alone.
WINDOW_ROWS = 8192
SHOWN_ROWS = 64


def shown(rows: Sequence[int]) -> str:
    """Positions of rows for people; of many the first."""
    return ", ".join(map(str, rows[:SHOWN_ROWS])) + (", ..." if len(rows) > SHOWN_ROWS else "")


class Stopped(Exception):
    """An evaluation was left because the process was asked to stop; what was to be kept of it is kept."""


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

    def __call__(
        self,
        load: Callable[[], Parallel],
        stop_requested: Callable[[], bool] = lambda: False,
        kept: Kept | None = None,
        on_keep: Callable[[], None] = lambda: None,
    ) -> Predictions:
        """Predict all rows; of several processes the main one's result is whole. The model is in the mode that it was
        in afterwards, with the buffers that it had.

        Args:
            load: gives the model; called if a batch is left to compute.
            stop_requested: looked at before each batch.
            kept: the batches that are done already, and where those that will be are kept; of the main process.
            on_keep: called in every process before some are kept on the way, which takes a second; not at the end.

        Raises:
            Stopped: in every process, if `stop_requested()` was true in one of them.
            UserError: the model or the loss raised, with the rows.
            SaveError: what is done could not be kept.
        """
        found = _Found(self)
        if kept is not None:
            found.add(kept.read(self.batches))
        done = set(self.compute.world.broadcast_object(sorted(found.numbers)))
        left = [number for number in range(len(self.batches)) if number not in done]
        if done and self.compute.world.is_main:
            how = f"going on after {len(done)} of" if left else "nothing to compute, there are"
            say(f"{self.name}: {how} {len(self.batches)} batches from before")
        if left:
            parallel = load()
            model, was_training = parallel.model, parallel.model.training
            self.compute.world.broadcast_buffers(model)
            model.eval()
            try:
                self._predict(left, parallel, stop_requested, kept, on_keep, found)
            finally:
                model.train(was_training)
        return found.predictions()

    @torch.no_grad()
    def _predict(
        self,
        left: list[int],
        parallel: Parallel,
        stop_requested: Callable[[], bool],
        kept: Kept | None,
        on_keep: Callable[[], None],
        found: _Found,
    ) -> None:
        """Compute this process's share of the batches that are `left`, and put together those of all.

        Every process makes the same number of forward passes, as a model may be spread over all: one that has no
        batch left runs another's again, and nothing of that counts.
        """
        world, pending, turns = self.compute.world, list[Scored](), 0
        rounds = -(-len(left) // world.size)
        mine = [left[turn % len(left)] for turn in range(world.rank, rounds * world.size, world.size)]
        loader = make_loader(self.split, [self.batches[i] for i in mine], self.tokenizer, self.compute.device, 0)
        # A batch is a function of its rows and its number alone, also where forward changes buffers in eval mode.
        buffers = Buffers(parallel.model)
        pace = Pace(kept.count if kept is not None else 0)
        for turn, (number, batch) in enumerate(zip(mine, bar(loader, "evaluating", "batch"), strict=True)):
            stops, due = world.maximum(int(stop_requested()), int(kept is not None and turns > 0 and pace.is_due()))
            if due or (stops and turns):
                on_keep()
                self._keep(pending, turns, kept, found)
                pace.kept()
                pending, turns = [], 0
            if stops:
                raise Stopped
            try:
                scored = self._score(number, batch, parallel.forward)
            finally:
                buffers.put_back()
            sign_of_life()
            turns += 1
            if turn * world.size + world.rank < len(left):
                pending.append(scored)
        self._keep(pending, turns, kept, found)

    def _score(self, number: int, batch: Batch, forward: Callable[[Batch], Tensor]) -> Scored:
        self.compute.seed_at(EVALUATION, number)
        inputs = self.compute.put(batch)
        labels = inputs.pop("labels", None)
        where = f"its rows of {self.name} are {shown(self.batches[number])}"
        with located(where), user_code("the model or the loss fails in eval mode"):
            with self.compute.autocast():
                logits = forward(inputs)
            logits = logits.detach().float()  # a compiled script may forget that there are no gradients
            losses = None if labels is None else self.objective.each_row(logits, labels)
        return Scored(number, logits.cpu(), None if losses is None else losses.cpu())

    def _keep(self, pending: list[Scored], turns: int, kept: Kept | None, found: _Found) -> None:
        """Put together what all processes computed in so many turns."""
        scored = self._gather(pending, turns) if self.compute.world.size > 1 else pending
        found.add(scored)
        if kept is not None:
            kept.write(scored)

    def _gather(self, pending: list[Scored], turns: int) -> list[Scored]:
        world = self.compute.world
        (outputs,) = world.maximum(max((scored.logits.shape[1] for scored in pending), default=0))
        numbers = torch.full((turns,), -1)
        logits, losses = torch.zeros(turns, self.batch_size, outputs), torch.zeros(turns, self.batch_size)
        for turn, scored in enumerate(pending):
            numbers[turn], logits[turn, : len(scored.logits)] = scored.number, scored.logits
            if scored.losses is not None:
                losses[turn, : len(scored.losses)] = scored.losses
        gathered = []
        for theirs in zip(*(world.gather(tensor) for tensor in (numbers, logits, losses)), strict=True):
            for number, row_logits, row_losses in zip(*theirs, strict=True):
                if number >= 0:
                    rows = len(self.batches[int(number)])
                    labelled = self.labels is not None
                    gathered.append(Scored(int(number), row_logits[:rows], row_losses[:rows] if labelled else None))
        return gathered


class _Found:
    """The predictions of a split as they come in, batch by batch."""

    def __init__(self, scorer: Scorer) -> None:
        rows = scorer.split.num_rows
        self._scorer = scorer
        self._logits, self._losses = torch.zeros(rows, 0), torch.zeros(rows)
        self.numbers: set[int] = set()

    def add(self, batches: Iterable[Scored]) -> None:
        for scored in batches:
            rows = self._scorer.batches[scored.number]
            if not self._logits.shape[1]:
                self._logits = torch.zeros(len(self._logits), scored.logits.shape[1])
            self._logits[rows] = scored.logits
            if scored.losses is not None:
                self._losses[rows] = scored.losses
            self.numbers.add(scored.number)

    def predictions(self) -> Predictions:
        labels, losses = self._scorer.labels, self._losses
        return Predictions(
            self._logits.numpy(),
            None if labels is None else labels.numpy(),
            None if labels is None else losses.numpy(),
            # Summed in the split's order and in fp64, so that neither the batch size nor the processes play a part.
            None if labels is None else float(losses.double().sum() / self._scorer.objective.weight(labels)),
        )
