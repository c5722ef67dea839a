"""Rows to the shards of data/tokenized/: which rows are in which, how one is made, by one process or several.

A shard is an atom of the run (see stages.keeping.atoms): two Arrow files, of the model's inputs and of the raw rows,
which are published as they are, by link. Its bytes follow from the data alone: record batches are of a fixed number of
rows, and a shard consists of as many as are usually about a second of work. So they are the same wherever a kill came,
and whichever process made one. Where a shard takes longer (two long texts are cut in many ways), what is encoded of it
is kept too, every second.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stages.data.columns import Columns
from stages.data.encode import TRUNCATED, Encoder, raw_features, raw_rows
from stages.data.labels import target_feature
from stages.data.origin import Origin
from stages.data.tables import batches
from stages.ground import disk
from stages.ground.bar import bar
from stages.ground.errors import TransientError
from stages.ground.signals import work_for
from stages.keeping.atoms import Atoms, Pace
from stages.keeping.store import Part

BATCH_ROWS = 1_000
# Encoded at a time: few, as two long texts take 10 ms a row; and no slower than many.
PIECE_ROWS = 64
# Raw text that a process encodes in about a second. A number of a column takes as long as so many bytes of text.
SHARD_BYTES = 1_500_000
NUMBER_BYTES = 8
# Of a split; where there would be more, each is larger.
MOST_SHARDS = 2_000
# Below so many, processes cost more than they save.
FEWEST_SHARED = 4
INPUTS, RAW, COUNTS, PIECE = "inputs.arrow", "raw.arrow", "counts.json", "piece.arrow"
Job = tuple[str, int]
"""A split and the number of a shard of it."""


@dataclass(frozen=True, eq=False)
class Cut:
    """`batch_rows`: rows of a record batch. `bounds`: the first row of each shard, and one beyond the last."""

    batch_rows: int
    bounds: npt.NDArray[np.int64]

    @classmethod
    def of(cls, sizes: npt.NDArray[np.int64]) -> Cut:
        """Of a split whose rows are of these sizes in bytes, shape (rows,)."""
        total = int(sizes.sum())
        shard = max(SHARD_BYTES, total // MOST_SHARDS)
        batch_rows = max(1, min(BATCH_ROWS, SHARD_BYTES * len(sizes) // max(total, 1)))
        starts = np.arange(0, len(sizes), batch_rows)
        of_batch = np.add.reduceat(sizes, starts)
        number = (np.cumsum(of_batch) - of_batch) // shard
        return cls(batch_rows, np.append(starts[np.diff(number, prepend=-1) > 0], len(sizes)))

    @property
    def shards(self) -> int:
        return len(self.bounds) - 1

    def batches(self, shard: int) -> Iterator[tuple[int, int]]:
        """The first row of each record batch of a shard, and one beyond its last."""
        first, end = (int(row) for row in self.bounds[shard : shard + 2])
        yield from _steps(first, end, self.batch_rows)


def _steps(first: int, end: int, rows: int) -> Iterator[tuple[int, int]]:
    for start in range(first, end, rows):
        yield start, min(start + rows, end)


def row_sizes(rows: datasets.Dataset, columns: Columns) -> npt.NDArray[np.int64]:
    """How many bytes of text, or worth of text, the inputs of each row are."""
    if columns.numeric:
        return np.full(rows.num_rows, NUMBER_BYTES * len(columns.inputs), np.int64)
    parts = [
        sum(pc.binary_length(text).to_numpy().astype(np.int64) for text in table.columns)
        for table in batches(rows, columns.inputs)
    ]
    return np.concatenate(parts)


@dataclass(frozen=True)
class SplitShards:
    """What the shards of a split are made of; `rows` are as a source gives them, and `labelled` if they have labels."""

    rows: datasets.Dataset
    origin: Origin
    labelled: bool
    columns: Columns
    names: Sequence[str]
    encoder: Encoder
    atoms: Atoms

    @cached_property
    def cut(self) -> Cut:
        return Cut.of(row_sizes(self.rows, self.columns))

    @cached_property
    def input_features(self) -> datasets.Features:
        features = {name: feature for name, feature in self.encoder.features.items() if name != TRUNCATED}
        if self.labelled:
            features["labels"] = target_feature(self.columns.kind, len(self.names))
        return datasets.Features(features)

    def missing(self) -> list[int]:
        return sorted(set(range(self.cut.shards)) - set(self.atoms.numbers()))

    def write(self, number: int) -> None:
        """Make and keep a shard.

        Raises:
            UserError: a row that cannot be encoded, the first in the shard.
            SaveError: the shard cannot be kept.
        """
        first, end = self.cut.bounds[number : number + 2]
        self.atoms.write(number, int(end - first) * 100, lambda folder: self._fill(number, folder))
        self._pieces(number).remove()

    def _pieces(self, number: int) -> Atoms:
        """What is encoded of a shard that is not whole yet; the number of each is that of its first row."""
        return self.atoms.of(f"{self.atoms.scope}-of-{number}")

    def _encoded(self, number: int) -> pa.Table:
        """What the encoder makes of all rows of a shard, and `labels` if the split has them."""
        first, end = (int(row) for row in self.cut.bounds[number : number + 2])
        pieces, made = self._pieces(number), list[pa.Table]()
        for start, parts in pieces.read():
            if start == first:  # the next in order: one that was damaged is made again, and those after it
                made.append(pa.ipc.open_stream(parts[PIECE].path.read_bytes()).read_all())
                first += len(made[-1])
        kept, pace = len(made), Pace(len(made))
        # Within a record batch, and whole: what Arrow writes of a part of a table may be more than that part.
        steps = [step for batch in self.cut.batches(number) for step in _steps(*batch, PIECE_ROWS)]
        for start, stop in steps:
            if start < first:
                continue  # read above
            made.append(self._encode(start, stop))
            if pace.is_due() and stop < end:
                piece = pa.concat_tables(made[kept:])
                pieces.write(first, piece.nbytes, partial(_write_piece, piece))
                pace.kept()
                first, kept = stop, len(made)
        return pa.concat_tables(made)

    def _encode(self, first: int, end: int) -> pa.Table:
        table = self.rows.with_format("arrow")[first:end]
        made: dict[str, Any] = self.encoder(table, self.origin, first)
        if self.labelled:
            made["labels"] = self.columns.kind.targets(table[self.columns.label], list(self.names))
        return pa.table(made)

    def _fill(self, number: int, folder: Path) -> None:
        rows, encoded, begin = self.rows.with_format("arrow"), self._encoded(number), int(self.cut.bounds[number])
        truncated = pc.sum(encoded[TRUNCATED]).as_py() if TRUNCATED in encoded.column_names else 0
        encoded = encoded.select(list(self.input_features))
        with (
            _writing(folder / RAW, raw_features(self.columns)) as raw,
            _writing(folder / INPUTS, self.input_features) as inputs,
        ):
            for first, end in self.cut.batches(number):
                raw(raw_rows(rows[first:end], self.columns, first))
                inputs(encoded.slice(first - begin, end - first))
        (folder / COUNTS).write_text(disk.dumps({TRUNCATED: truncated}), encoding="utf-8")


def _write_piece(piece: pa.Table, folder: Path) -> None:
    with pa.OSFile(str(folder / PIECE), "wb") as sink, pa.RecordBatchStreamWriter(sink, piece.schema) as writer:
        writer.write_table(piece)


@contextmanager
def _writing(path: Path, features: datasets.Features) -> Iterator[Callable[[pa.Table], None]]:
    """Writes tables to `path` as `datasets` does, each as one record batch."""
    schema = features.arrow_schema
    with pa.OSFile(str(path), "wb") as sink, pa.RecordBatchStreamWriter(sink, schema) as writer:
        yield lambda table: writer.write_table(table.cast(schema).combine_chunks())


def make(splits: Mapping[str, SplitShards], num_proc: int | Literal["auto"]) -> dict[str, list[dict[str, Part]]]:
    """The shards of each split, in order: those that are kept, verified, and the others, which are made now.

    Raises:
        UserError: the first row that cannot be encoded.
        TransientError: a process was killed.
        SaveError: a shard cannot be kept.
    """
    while True:
        jobs = [(split, number) for split, shards in splits.items() for number in shards.missing()]
        for _ in bar(_work(splits, jobs, processes_for(num_proc, len(jobs))), "encoding", "shard"):
            pass
        kept = {split: [parts for _, parts in shards.atoms.read()] for split, shards in splits.items()}
        if not any(shards.missing() for shards in splits.values()):  # as one that is damaged is, from now on
            return kept


def processes_for(num_proc: int | Literal["auto"], jobs: int) -> int:
    """How many processes share the work on so many shards: 1 is this one, by itself."""
    if num_proc == "auto":
        # Elsewhere libraries of the system do not take well to a fork.
        num_proc = len(os.sched_getaffinity(0)) if sys.platform == "linux" and jobs >= FEWEST_SHARED else 1
    return min(num_proc, jobs)


def _work(splits: Mapping[str, SplitShards], jobs: Sequence[Job], processes: int) -> Iterator[None]:
    """Does the jobs, in order as far as can be told: an error is that of the first one that has one."""
    if processes <= 1:
        for split, number in jobs:
            splits[split].write(number)
            yield
        return
    for shards in splits.values():
        _ = shards.cut, shards.input_features  # once, and not in every process
    # Forked, so that what the shards are made of is there, and nothing is imported again.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _begin, (os.getpid(), splits))
    try:
        for future in [pool.submit(_write, job) for job in jobs]:
            future.result()
            yield
    except BrokenProcessPool:
        raise TransientError(
            f"a process that encodes rows (tokenize.num_proc, {processes} of them) was killed, as happens where memory "
            "runs out; what was done is kept: run the same command again to go on, with a smaller tokenize.num_proc if "
            "it happens again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_splits: Mapping[str, SplitShards] = {}  # of a process of the pool


def _begin(parent: int, splits: Mapping[str, SplitShards]) -> None:
    global _splits
    work_for(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are what is parallel
    _splits = splits


def _write(job: Job) -> None:
    _splits[job[0]].write(job[1])


def truncated(shards: Sequence[Mapping[str, Part]]) -> int:
    """How many rows of these shards were truncated."""
    return sum(json.loads(parts[COUNTS].path.read_text(encoding="utf-8"))[TRUNCATED] for parts in shards)


def publish(
    out: Path, part: str, shards: Mapping[str, Sequence[Mapping[str, Part]]], features: Mapping[str, datasets.Features]
) -> None:
    """Lay one of the two files of each shard down in `out`, as `datasets.load_from_disk` reads them. No row is written
    again: what `save_to_disk` says of a dataset is taken from one without rows."""
    names = {
        split: [f"data-{number:05d}-of-{len(found):05d}.arrow" for number in range(len(found))]
        for split, found in shards.items()
    }
    empty = {
        split: datasets.Dataset(
            datasets.table.InMemoryTable(features[split].arrow_schema.empty_table()),
            info=datasets.DatasetInfo(features=features[split]),
            split=datasets.NamedSplit(split),
            fingerprint=_fingerprint([parts[part] for parts in found]),
        )
        for split, found in shards.items()
    }
    datasets.DatasetDict(empty).save_to_disk(str(out))
    for split, found in shards.items():
        for file in (out / split).glob("*.arrow"):
            file.unlink()
        for name, parts in zip(names[split], found, strict=True):
            disk.link(parts[part].path, out / split / name)
        path = out / split / "state.json"
        state = json.loads(path.read_text(encoding="utf-8")) | {"_data_files": [{"filename": n} for n in names[split]]}
        path.write_text(json.dumps(state, indent=2, sort_keys=True), encoding="utf-8")


def _fingerprint(parts: Sequence[Part]) -> str:
    """What `datasets` keeps a user's results of these rows under: their content, and neither a time nor a place."""
    return hashlib.sha256("".join(part.record.sha256 for part in parts).encode()).hexdigest()[:16]
