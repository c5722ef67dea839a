"""The batch plan: which rows are in which micro-batch of which optimizer step of which epoch.

A plan is a pure function of (seed, epoch, lengths). It is written as one uncompressed Arrow file an epoch and
read memory-mapped, so that executing it from the middle costs nothing and "what was in step 132?" is

    pandas.read_feather("data/loaders/epoch-0000.arrow").query("step == 132")

Columns: `epoch` (int32, from 0), `step` (int64, the optimizer step from 1, counted over all epochs, as in
checkpoint and candidate names), `micro_batch` (int32, from 0 within its step), `rows` (list<int64>, positions in
the train split).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stages.batches.permutation import Permutation, hash_numbers
from stages.ground.errors import UserError

LOADERS = Path("data/loaders")
SCHEMA = pa.schema(
    [("epoch", pa.int32()), ("step", pa.int64()), ("micro_batch", pa.int32()), ("rows", pa.list_(pa.int64()))]
)
# Rows written, and shuffled or sorted by length, at a time: bounds memory whatever the split's size.
WINDOW_ROWS = 2**20
# Batches among which `bucketing: length` sorts. HF Trainer's group_by_length uses 50: enough to cut padding,
# few enough that epochs still differ.
BUCKET_BATCHES = 50


@dataclass(frozen=True)
class PlanShape:
    """The sizes that follow from the number of rows: all a plan's arithmetic in one place."""

    rows: int
    batch_size: int
    micro_batch_size: int
    drop_last: bool

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(self.rows, self.batch_size)
        return whole if self.drop_last or not rest else whole + 1

    @property
    def rows_per_epoch(self) -> int:
        return min(self.rows, self.steps_per_epoch * self.batch_size)

    def epochs(self, num_train_epochs: int, max_steps: int | None) -> int:
        """Epochs a run touches; `max_steps`, where set, overrides `num_train_epochs` as in HF."""
        return num_train_epochs if max_steps is None else -(-max_steps // self.steps_per_epoch)


def _order(shape: PlanShape, lengths: NDArray[np.integer] | None, key: int) -> Iterator[NDArray[np.int64]]:
    """The epoch's rows in order, in windows of whole batches; bucketed by length if `lengths` is given."""
    shuffle = Permutation(shape.rows, key)
    bucket = shape.batch_size * BUCKET_BATCHES
    window = max(1, WINDOW_ROWS // bucket) * bucket
    # A short batch stays the epoch's last; the others may change places.
    whole = shape.rows_per_epoch - shape.rows_per_epoch % shape.batch_size
    for start in range(0, shape.rows_per_epoch, window):
        rows = shuffle(start, min(start + window, shape.rows_per_epoch))
        if lengths is not None:
            for low in range(0, len(rows), bucket):
                part = rows[low : low + bucket]
                full = min(len(part), whole - start - low)
                head = part[:full][np.argsort(-lengths[part[:full]], kind="stable")]
                batches = head.reshape(-1, shape.batch_size)
                places = Permutation(max(len(batches), 1), hash_numbers(key, start + low))(0, len(batches))
                part[:full] = batches[places].reshape(-1)
        yield rows


def _record_batch(shape: PlanShape, rows: NDArray[np.int64], epoch: int, first_row: int) -> pa.RecordBatch:
    """Windows start at a batch boundary, so the cut into micro-batches follows from the position alone."""
    starts = np.arange(0, len(rows), shape.micro_batch_size)
    step_in_epoch, within = np.divmod(first_row + starts, shape.batch_size)
    lists = pa.ListArray.from_arrays(pa.array(np.append(starts, len(rows)), pa.int32()), pa.array(rows))
    return pa.record_batch(
        [
            pa.array(np.full(len(starts), epoch), pa.int32()),
            pa.array(epoch * shape.steps_per_epoch + step_in_epoch + 1, pa.int64()),
            pa.array(within // shape.micro_batch_size, pa.int32()),
            lists,
        ],
        schema=SCHEMA,
    )


def epoch_name(epoch: int) -> str:
    """`epoch-0000.arrow`: the file of an epoch, from 0. Beyond 9999 they sort by number, not as text."""
    return f"epoch-{epoch:04d}.arrow"


def write_epoch(
    folder: Path, shape: PlanShape, epoch: int, seed: int, lengths: NDArray[np.integer], bucketing: bool
) -> tuple[int, int]:
    """Write epoch `epoch`'s plan below `folder`; memory stays bounded by a window of rows.

    Args:
        lengths: tokens a row, shape (shape.rows,).

    Returns:
        Tokens in the epoch, and tokens after padding each micro-batch to its longest row.
    """
    tokens = padded = first_row = 0
    key = hash_numbers(seed, epoch)
    with pa.OSFile(str(folder / epoch_name(epoch)), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for rows in _order(shape, lengths if bucketing else None, key):
            writer.write_batch(_record_batch(shape, rows, epoch, first_row))
            first_row += len(rows)
            window = np.asarray(lengths[rows], dtype=np.int64)
            starts = np.arange(0, len(rows), shape.micro_batch_size)
            sizes = np.diff(np.append(starts, len(rows)))
            tokens += int(window.sum())
            padded += int((np.maximum.reduceat(window, starts) * sizes).sum())
    return tokens, padded


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass. `rows`: int64 positions in the train split; `step` as in the plan; `counted`: whether its
    rows count in the step's loss."""

    epoch: int
    step: int
    micro_batch: int
    rows: list[int]
    counted: bool = True


def shares(count: int, processes: int) -> list[range]:
    """The numbers from 0 to `count`, in one range a process; lengths differ by one at most, and may be 0."""
    return [range(i * count // processes, (i + 1) * count // processes) for i in range(processes)]


class BatchPlan:
    """The plan below a folder, memory-mapped; the number of steps and the micro-batches from any step on."""

    def __init__(self, folder: Path = LOADERS) -> None:
        epochs = sum(1 for _ in folder.glob("epoch-*.arrow"))
        self._files = [folder / epoch_name(epoch) for epoch in range(epochs)]
        if not self._files or not all(path.is_file() for path in self._files):
            raise UserError(f"{folder}: no batch plan there; run: dvc repro build_loaders")
        self.steps_per_epoch = self._last_step(self._files[0])

    @property
    def epochs(self) -> int:
        return len(self._files)

    def planned_steps(self, num_train_epochs: int, max_steps: int | None) -> int:
        """The steps that a run of so many epochs has; `max_steps`, where set, overrides them as in HF."""
        return max_steps or num_train_epochs * self.steps_per_epoch

    @staticmethod
    def _last_step(path: Path) -> int:
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
            last = reader.get_batch(reader.num_record_batches - 1)
            return last.column("step")[-1].as_py()

    def steps(self, first_step: int, last_step: int) -> Iterator[list[MicroBatch]]:
        """The micro-batches of each of the steps `first_step` to `last_step` (from 1, both included), in order."""
        for _, step in itertools.groupby(self._micro_batches(first_step, last_step), key=lambda m: m.step):
            yield list(step)

    def _micro_batches(self, first_step: int, last_step: int) -> Iterator[MicroBatch]:
        for path in self._files[(first_step - 1) // self.steps_per_epoch :]:
            with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
                for index in range(reader.num_record_batches):
                    batch = reader.get_batch(index)
                    steps = batch.column("step").to_numpy()
                    if steps[0] > last_step:
                        return
                    low, high = np.searchsorted(steps, [first_step, last_step + 1])
                    for i in range(low, high):
                        yield MicroBatch(
                            batch.column("epoch")[i].as_py(),
                            int(steps[i]),
                            batch.column("micro_batch")[i].as_py(),
                            batch.column("rows")[i].as_py(),
                        )
