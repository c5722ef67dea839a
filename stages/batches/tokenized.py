"""What `tokenize` leaves for the stages after it, and how they read it: `data/tokenized/`.

    train/ validation/ test/     the model's inputs, and `labels` unless the split has none
    raw/<split>/                 row for row: `row`, `key`, the text or feature columns, the label column
    task.json
    tokenizer/ or features.json  what made the inputs from them

`datasets.load_from_disk("data/tokenized")` reads the first line, `…/raw` the second.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.ground import disk
from stages.ground.errors import UserError
from stages.tasks.base import Kind
from stages.tasks.registry import KINDS

if TYPE_CHECKING:
    import datasets
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

TOKENIZED = Path("data/tokenized")
SPLITS = ("train", "validation", "test")
FEATURES = "features"
BATCH_ROWS = 100_000


@dataclass(frozen=True)
class Task:
    """`task.json`: what is predicted (`label_names` in id order, none in regression) from what.

    `model_inputs` are the columns of a split that a model takes: those of the tokenizer, or FEATURES alone, the
    standardised `feature_columns`. Of `text_columns` and `feature_columns` one is empty.
    """

    task: str
    label_names: tuple[str, ...]
    text_columns: tuple[str, ...]
    feature_columns: tuple[str, ...]
    label_column: str
    model_inputs: tuple[str, ...]

    @property
    def kind(self) -> Kind:
        return KINDS[self.task]


def save_task(folder: Path, task: Task) -> None:
    """Write `task.json`."""
    disk.write_text(folder / "task.json", disk.dumps(asdict(task)))


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path}: not there; run `dvc repro tokenize` first")
    return path


def load_task(folder: Path = TOKENIZED) -> Task:
    """Read `task.json`. Raises `UserError` if tokenize has not run."""
    values: dict[str, Any] = json.loads(_existing(folder / "task.json").read_text(encoding="utf-8"))
    lists: dict[str, Any] = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    return Task(**(values | lists))


def has_split(folder: Path, split: str) -> bool:
    """Whether tokenize wrote `split`. Raises `UserError` if it has not run."""
    return (_existing(folder) / split).is_dir()


def load_split(folder: Path, split: str) -> datasets.Dataset:
    """The model's inputs and `labels` (absent if unlabelled), memory-mapped.

    Inputs are lists of int, or FEATURES, float32 lists of fixed length. `labels` are int64 class ids; in multi_label
    float32 lists of fixed length, 0 or 1 for each class; in regression float32.

    Raises:
        UserError: if tokenize has not run, or wrote no such split.
    """
    import datasets

    return datasets.load_from_disk(str(_existing(folder / split)), keep_in_memory=False)


def load_raw(folder: Path, split: str) -> datasets.Dataset:
    """`row` (int64), `key` (16 hex digits), the text columns (string) or feature columns (float64), and the label
    column (string, list of string or float64; null where unlabelled), memory-mapped.

    Raises:
        UserError: if tokenize has not run, or wrote no such split.
    """
    return load_split(folder / "raw", split)


def load_tokenizer(folder: Path = TOKENIZED) -> PreTrainedTokenizerBase | None:
    """The fast tokenizer that made the inputs, None where they are features. Raises `UserError` if tokenize has not
    run.
    """
    if load_task(folder).feature_columns:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(_existing(folder / "tokenizer")), trust_remote_code=False)


def label_batches(dataset: datasets.Dataset) -> Iterator[Tensor]:
    """The `labels` of a split, as `load_split` says, some rows at a time."""
    for batch in dataset.select_columns(["labels"]).with_format("torch").iter(BATCH_ROWS):
        yield batch["labels"]


def lengths(dataset: datasets.Dataset) -> npt.NDArray[np.int32]:
    """Tokens per row, int32 of shape (rows,), from the Arrow offsets: no list is materialised. Features count as 1."""
    import numpy as np
    import pyarrow.compute as pc

    if FEATURES in dataset.column_names:
        return np.ones(dataset.num_rows, np.int32)
    tables = dataset.select_columns(["input_ids"]).with_format("arrow").iter(BATCH_ROWS)
    parts = [pc.list_value_length(table["input_ids"]).to_numpy() for table in tables]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)
