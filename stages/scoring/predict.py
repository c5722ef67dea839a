"""A model's predictions on a split, and their scores: the same code for train, evaluate and select_best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from stages.batches.collate import make_loader, to_device
from stages.batches.randomness import EVALUATION, seed_all
from stages.batches.tokenized import Task, lengths
from stages.config.schema import EvaluateParams
from stages.ground.bar import bar
from stages.modeling.forward import Forward
from stages.modeling.losses import Objective
from stages.modeling.precision import autocast
from stages.modeling.world import World
from stages.scoring.scores import score


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


@torch.no_grad()
def predict(
    model: nn.Module,
    split: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    objective: Objective,
    batch_size: int,
    device: torch.device,
    precision: str,
    seed: int,
    stop_requested: Callable[[], bool] = lambda: False,
    world: World = World(),  # noqa: B008  frozen
) -> Predictions:
    """Run `model` over `split` in eval mode, rows of like length together, and give the results in the split's order.

    The processes of `world` share the batches, which are the same for any number of them; every row is in one, so
    every process gets each row's result once. A model that draws random numbers even so draws the same each time.

    Raises:
        Stopped: in every process, as soon as `stop_requested()` is true in one at the start of a batch.
    """
    order = np.argsort(-lengths(split), kind="stable")
    batches = [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
    numbers = range(world.rank, len(batches), world.size)
    labelled = "labels" in split.column_names
    forward, outputs = Forward(model), 0
    logits, losses = torch.zeros(0), torch.zeros(split.num_rows)
    world.tell_buffers(model)
    was_training, stopped = model.training, False
    model.eval()
    try:
        loader = make_loader(split, [batches[number] for number in numbers], tokenizer, device, 0)
        for number, batch in zip(numbers, bar(loader, "evaluating", "batch"), strict=True):
            if stopped := stop_requested():
                break
            seed_all(seed, EVALUATION, number)
            inputs = to_device(batch, device)
            targets = inputs.pop("labels") if labelled else None
            with autocast(device, precision):
                output = forward(inputs)
            output = output.float()
            if not outputs:
                outputs = output.shape[1]
                logits = torch.zeros(split.num_rows, outputs)
            logits[batches[number]] = output.cpu()
            if targets is not None:
                losses[batches[number]] = objective.each_row(output, targets).cpu()
    finally:
        model.train(was_training)
    any_stopped, outputs = world.maximum(int(stopped), outputs)
    if any_stopped:
        raise Stopped
    if world.size > 1:
        # Each row is nought in all processes but one.
        logits = world.sum(logits if len(logits) else torch.zeros(split.num_rows, outputs))
        losses = world.sum(losses)
    labels = _labels(split) if labelled else None
    return Predictions(
        logits.numpy(),
        None if labels is None else labels.numpy(),
        losses.numpy() if labelled else None,
        # Summed in the split's order and in fp64, so that neither the batch size nor the processes play a part.
        None if labels is None else float(losses.double().sum() / objective.weight(labels)),
    )


def _labels(split: datasets.Dataset) -> Tensor:
    parts = [batch["labels"] for batch in split.select_columns(["labels"]).with_format("torch").iter(100_000)]
    return torch.cat(parts)
