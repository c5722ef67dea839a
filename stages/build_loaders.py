"""Stage 2 of 5: lay down the batch plan. Writes data/loaders/ and metrics/loaders.json."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.config.pipeline import load_stage
from stages.config.schema import Params
from stages.ground.errors import UserError, run_stage
from stages.ground.places import METRICS
from stages.ground.signals import die_with_parent

if TYPE_CHECKING:
    from stages.batches.plan import BatchPlan, PlanShape

RECORD = METRICS / "loaders.json"
PREVIEW = "preview.json"
# An epoch is a file, which is written and hashed by DVC one by one: some minutes for as many as these.
MAX_EPOCHS = 100_000


def main() -> None:
    """Run the stage from params.yaml."""
    die_with_parent()
    params = load_stage("build_loaders").params

    from stages.batches.plan import LOADERS
    from stages.ground import disk

    metrics = disk.write_folder(LOADERS, lambda folder: build_loaders(params, folder))
    disk.write_text(RECORD, disk.dumps(metrics))
    print(
        f"{metrics['batches_per_epoch']} batches an epoch, {metrics['epochs']} epochs, "
        f"padding efficiency {metrics['padding_efficiency']:.3f}",
        file=sys.stderr,
    )


def build_loaders(params: Params, folder: Path) -> dict[str, Any]:
    """Write the plan of every epoch and the preview to `folder`; what metrics/loaders.json says.

    Raises:
        UserError: no batch is left, because drop_last drops the only one; or there are too many epochs.
    """
    from stages.batches.plan import BatchPlan, PlanShape, write_epoch
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
    require_room(shape, epochs, folder)
    tokens = padded = 0
    for epoch in range(epochs):
        counts = write_epoch(folder, shape, epoch, loaders.seed, token_counts, loaders.bucketing == "length")
        tokens, padded = tokens + counts[0], padded + counts[1]
    write_preview(folder, BatchPlan(folder))
    return {
        "batches_per_epoch": shape.steps_per_epoch,
        "dropped_rows_per_epoch": shape.rows - shape.rows_per_epoch,
        "epochs": epochs,
        "micro_batches_per_batch": loaders.micro_batches_per_step,
        "padding_efficiency": round(tokens / padded, 6),
        "rows": shape.rows,
    }


def require_room(shape: PlanShape, epochs: int, folder: Path) -> None:
    """Refuse a plan of more epochs than can be kept, before it is written.

    Raises:
        UserError: more than MAX_EPOCHS, or than the disk of `folder` has room for.
    """
    # A row is 8 bytes, a micro-batch 20 and an offset; a file's frame some 1,500.
    size = epochs * (8 * shape.rows_per_epoch + 24 * -(-shape.rows_per_epoch // shape.micro_batch_size) + 1500)
    disk = os.statvfs(folder)
    free, files = disk.f_bavail * disk.f_frsize, disk.f_favail if disk.f_files else epochs
    if epochs > MAX_EPOCHS or size > free or epochs > files:
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
    run_stage(main)
