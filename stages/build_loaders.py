"""Stage 2 of 5: lay down the batch plan. Writes data/loaders/ and metrics/loaders.json."""

from __future__ import annotations

import itertools
import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.config.pipeline import load_stage
from stages.config.schema import Params
from stages.ground.errors import UserError, say
from stages.ground.places import METRICS
from stages.ground.running import run_stage
from stages.ground.signals import die_with_parent

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from stages.batches.plan import BatchPlan, PlanShape
    from stages.keeping.folder import RunFolder

RECORD = METRICS / "loaders.json"
PREVIEW = "preview.json"
# An epoch is a file, which is written and hashed by DVC one by one: some minutes for as many as these.
MAX_EPOCHS = 100_000
# Tokens of an epoch, and after padding, by the name of its file: how an atom holds them.
COUNTS = "counts.json"
Counts = dict[str, tuple[int, int]]


def main() -> None:
    """Run the stage from params.yaml."""
    die_with_parent()
    stage = load_stage("build_loaders")

    from stages.batches.plan import LOADERS
    from stages.ground import disk
    from stages.keeping.environment import of_libraries
    from stages.keeping.work import work_of

    with work_of(stage, of_libraries("datasets", "numpy", "pyarrow")) as run:
        metrics = disk.write_folder(LOADERS, lambda folder: build_loaders(stage.params, folder, run))
        disk.write_text(RECORD, disk.dumps(metrics))
    say(
        f"{metrics['batches_per_epoch']} batches an epoch, {metrics['epochs']} epochs, "
        f"padding efficiency {metrics['padding_efficiency']:.3f}"
    )


def build_loaders(params: Params, folder: Path, run: RunFolder) -> dict[str, Any]:
    """Write the plan of every epoch and the preview to `folder`; what metrics/loaders.json says. Epochs are kept in
    `run` as they are made.

    Raises:
        UserError: no batch is left, because drop_last drops the only one; or there are too many epochs.
    """
    from stages.batches.plan import BatchPlan, PlanShape
    from stages.batches.tokenized import TOKENIZED, lengths, load_split

    loaders = params.build_loaders
    token_counts = lengths(load_split(TOKENIZED, "train"))
    shape = PlanShape(len(token_counts), loaders.batch_size, loaders.micro_batch_size, loaders.drop_last)
    if not shape.steps_per_epoch:
        raise UserError(
            f"build_loaders.batch_size is {shape.batch_size}, the train split has {shape.rows} rows and drop_last is "
            "true, so no batch is left; write a smaller batch_size, or drop_last: false"
        )
    epochs = shape.epochs(params.train.num_train_epochs, params.train.max_steps)
    counts = lay_down(params, shape, token_counts, folder, run).values()
    write_preview(folder, BatchPlan(folder))
    return {
        "batches_per_epoch": shape.steps_per_epoch,
        "dropped_rows_per_epoch": shape.rows - shape.rows_per_epoch,
        "epochs": epochs,
        "micro_batches_per_batch": loaders.micro_batches_per_step,
        "padding_efficiency": round(sum(tokens for tokens, _ in counts) / sum(padded for _, padded in counts), 6),
        "rows": shape.rows,
    }


def lay_down(params: Params, shape: PlanShape, lengths: NDArray[np.int32], folder: Path, run: RunFolder) -> Counts:
    """Write the plan of every epoch to `folder`; the tokens of each, before and after padding, by the name of its file.

    An atom is as many epochs as a second makes, at least one, and has the number of the first of them.

    Raises:
        UserError: the disk has no room for those that are not made yet.
        SaveError: they cannot be kept.
    """
    from stages.batches.plan import epoch_name, write_epoch
    from stages.ground import disk
    from stages.keeping.atoms import Pace

    loaders, epochs = params.build_loaders, shape.epochs(params.train.num_train_epochs, params.train.max_steps)
    atoms = run.atoms("plan")
    counts: Counts = {}
    begun = []
    for first, parts in atoms.read():
        begun.append(first)
        counts |= json.loads(parts[COUNTS].path.read_text(encoding="utf-8"))
        for name in parts.keys() - {COUNTS}:
            disk.link(parts[name].path, folder / name)
    for place in (folder, run.path):
        require_room(shape, epochs, epochs - len(counts), place)
    pace = Pace(len(begun))

    def fill(first: int, end: int, place: Path) -> None:
        made: Counts = {}
        for epoch in range(first, end):
            name = epoch_name(epoch)
            made[name] = write_epoch(place, shape, epoch, loaders.seed, lengths, loaders.bucketing == "length")
            disk.link(place / name, folder / name)
            if pace.is_due():
                break
        disk.write_text(place / COUNTS, disk.dumps(made))
        counts.update(made)

    first = 0
    while len(counts) < epochs:
        first = next(epoch for epoch in itertools.count(first) if epoch_name(epoch) not in counts)
        end = min((number for number in begun if number > first), default=epochs)
        atoms.write(first, plan_bytes(shape), partial(fill, first, end))
        pace.kept()
    return counts


def plan_bytes(shape: PlanShape) -> int:
    """About how large the file of an epoch is."""
    # A row is 8 bytes, a micro-batch 20 and an offset; its frame is some 1,500.
    return 8 * shape.rows_per_epoch + 24 * -(-shape.rows_per_epoch // shape.micro_batch_size) + 1500


def require_room(shape: PlanShape, epochs: int, left: int, folder: Path) -> None:
    """Refuse a plan whose files, those of the epochs that are `left`, cannot be kept, before they are written.

    Raises:
        UserError: more than MAX_EPOCHS in all, or than the disk of `folder` has room for.
    """
    disk, size = os.statvfs(folder), left * plan_bytes(shape)
    free, files = disk.f_bavail * disk.f_frsize, disk.f_favail if disk.f_files else left
    if epochs > MAX_EPOCHS or size > free or left > files:
        raise UserError(
            f"train.num_train_epochs or max_steps asks for {epochs} epochs of {shape.steps_per_epoch} steps, and "
            f"build_loaders writes a file for each: about {size} bytes, {free} bytes are free and {files} files, and "
            f"{MAX_EPOCHS} are the most; write a smaller number (an early stop needs no more than it trains)"
        )


def write_preview(folder: Path, plan: BatchPlan) -> None:
    """Collate the first micro-batch as train will, and write down what it looks like."""
    import torch

    from stages.batches.collate import make_loader
    from stages.batches.tokenized import FEATURES, TOKENIZED, load_split, load_tokenizer
    from stages.ground import disk

    tokenizer = load_tokenizer()
    first = next(itertools.chain.from_iterable(plan.steps(1, 1)))
    batch = next(iter(make_loader(load_split(TOKENIZED, "train"), [first.rows], tokenizer, torch.device("cpu"), 0)))
    first_row: dict[str, Any] = {"row": first.rows[0], "label": batch["labels"][0].tolist()}
    if tokenizer is None:
        first_row[FEATURES] = batch[FEATURES][0].tolist()
    else:
        first_row["decoded"] = tokenizer.decode(batch["input_ids"][0])
    preview = {
        "tensors": {
            name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            for name, tensor in batch.items()
        },
        "first_row": first_row,
    }
    disk.write_text(folder / PREVIEW, disk.dumps(preview))


if __name__ == "__main__":
    run_stage(main, collect_rarely=True)
