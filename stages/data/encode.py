"""Raw columns to model inputs: the tokenizer, what the model's forward takes, and the two `map` calls."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow as pa
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from stages.batches.tokenized import FEATURES
from stages.config.pretrained import require_whole_model, require_whole_tokenizer
from stages.data.columns import Columns
from stages.data.features import Standardizer
from stages.data.labels import target_feature
from stages.data.numbers import column_matrix
from stages.data.tables import map_tables
from stages.ground.disk import sha256_file
from stages.ground.errors import UserError, quote
from stages.tasks.base import Kind

# How the tokenizer was found says nothing about what it does, and holds paths.
PROVENANCE = ("name_or_path", "is_local", "local_files_only")
ITEM_TYPES = {"input_ids": "int32"}
BATCH_ROWS = 1_000
TRUNCATED = "truncated"
# What `TextEncoder` asks a tokenizer for.
MADE = ("input_ids", "token_type_ids", "attention_mask")


def load_tokenizer(folder: Path, source: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer in `folder`; `source` names it in messages. Raises `UserError` if there is none."""
    require_whole_tokenizer(folder, source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), use_fast=True, trust_remote_code=False)
    except Exception as error:  # whatever broken files make the libraries raise
        if (folder / "config.json").is_file():
            _read_config(folder, source)  # tokenizers look there too, and say less
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source}: its tokenizer cannot be loaded: {reason}") from None
    if not tokenizer.is_fast:
        raise UserError(f"{source}: it has no fast tokenizer (tokenizer.json); convert it, or use another one")
    if tokenizer.pad_token_id is None:
        raise UserError(f"{source}: its tokenizer has no pad token, which batches of rows need")
    for key in PROVENANCE:
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def load_config(folder: Path, source: str) -> Any:
    """The model's configuration. Raises `UserError` for an architecture that transformers does not know."""
    require_whole_model(folder, f"model.source {quote(source)}")
    return _read_config(folder, f"model.source {quote(source)}")


def _read_config(folder: Path, where: str) -> Any:
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # whatever broken files make the libraries raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{where}: its config.json cannot be used: {reason}") from None


def model_inputs(kind: Kind, config: Any | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the tokenizer makes and the forward of the model's class takes, in the tokenizer's order.

    Without a `config` the model is the user's own, which takes all that the tokenizer makes.

    Raises:
        UserError: if transformers has no class for this architecture and kind of task.
    """
    if config is None:
        return [name for name in tokenizer.model_input_names if name in MADE]
    mapping: Any = getattr(transformers, kind.auto_model)._model_mapping
    if type(config) not in mapping:
        raise UserError(f"model.source is a {config.model_type} model, which {kind.auto_model} does not know")
    takes = inspect.signature(mapping[type(config)].forward).parameters
    return [name for name in tokenizer.model_input_names if name in takes]


def check_vocabulary(source: str, config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `UserError` if the tokenizer in `source` makes ids that the model has no embedding for."""
    size = getattr(config, "vocab_size", None)
    if isinstance(size, int) and len(tokenizer) > size:
        raise UserError(
            f"{source}: its tokenizer has {len(tokenizer)} tokens, but model.source has {size}; "
            "write null for the model's own tokenizer"
        )


def check_max_length(max_length: int, config: Any | None, tokenizer: PreTrainedTokenizerBase, *, pair: bool) -> None:
    """Raise `UserError` if the model has fewer positions, or the special tokens alone fill `max_length`."""
    limits = {
        "the model's max_position_embeddings": getattr(config, "max_position_embeddings", None),
        "the tokenizer's model_max_length": tokenizer.model_max_length,
    }
    for name, limit in limits.items():
        if isinstance(limit, int) and 0 < limit < max_length:
            raise UserError(f"tokenize.max_length is {max_length}, but {name} is {limit}; write at most {limit}")
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length <= special:
        raise UserError(
            f"tokenize.max_length is {max_length}, which {special} special tokens fill; write more than {special}"
        )


def row_key(inputs: Sequence[str] | Sequence[float]) -> str:
    """A row's `key`: 16 hex digits of the SHA-256 of its raw inputs as a compact JSON list."""
    canonical = json.dumps(list(inputs), ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()[:16]


def raw_rows(dataset: datasets.Dataset, columns: Columns, cache: Path) -> datasets.Dataset:
    """`row`, `key`, the inputs and the label as they were read, row for row."""
    features = datasets.Features({"row": datasets.Value("int64"), "key": datasets.Value("string"), **columns.features})

    def with_key(table: pa.Table, position: int) -> pa.Table:
        inputs = table.select(list(columns.inputs))
        if columns.numeric:
            keys = [row_key(numbers) for numbers in column_matrix(inputs).T.tolist()]
        else:
            keys = [row_key(texts) for texts in zip(*(texts.to_pylist() for texts in inputs.columns), strict=True)]
        rows = pa.array(range(position, position + len(table)), pa.int64())
        return pa.table({"row": rows, "key": keys, **{name: table[name] for name in columns.names}})

    return map_tables(dataset, with_key, features, cache, "raw rows", BATCH_ROWS)


class Encoder(Protocol):
    """Makes the model's `inputs` of raw rows; `features` are the types of what it makes.

    Errors name the rows by `where` and `start`, the first one's number.
    """

    @property
    def inputs(self) -> Sequence[str]: ...

    @property
    def features(self) -> dict[str, Any]: ...

    def __call__(self, raw: pa.Table, where: str, start: int) -> dict[str, pa.Array]: ...


@dataclass(frozen=True)
class TextEncoder:
    """Tokens of one text or a pair, as lists of ints, and `truncated` (bool)."""

    tokenizer: PreTrainedTokenizerBase
    inputs: Sequence[str]
    columns: Sequence[str]
    max_length: int

    @property
    def features(self) -> dict[str, Any]:
        lists = {name: datasets.List(datasets.Value(ITEM_TYPES.get(name, "int8"))) for name in self.inputs}
        return {**lists, TRUNCATED: datasets.Value("bool")}

    def __call__(self, raw: pa.Table, where: str, start: int) -> dict[str, pa.Array]:
        encoded = self.tokenizer(
            *(raw[column].to_pylist() for column in self.columns),
            truncation=True,
            max_length=self.max_length,
            padding=False,
            return_token_type_ids="token_type_ids" in self.inputs,
            return_attention_mask="attention_mask" in self.inputs,
            verbose=False,
        )
        # What was cut off is the encoding's overflow: exact, and no second pass. A shorter row cannot have any.
        truncated = [
            len(row) == self.max_length and bool(encoding.overflowing)
            for row, encoding in zip(encoded["input_ids"], encoded.encodings or (), strict=True)
        ]
        lists = {name: pa.array(encoded[name], self.features[name].pa_type) for name in self.inputs}
        return {**lists, TRUNCATED: pa.array(truncated)}


@dataclass(frozen=True)
class FeatureEncoder:
    """Standardised numbers, one float32 list of fixed length a row."""

    standardizer: Standardizer
    inputs: Sequence[str] = (FEATURES,)

    @property
    def features(self) -> dict[str, Any]:
        return {FEATURES: datasets.List(datasets.Value("float32"), length=len(self.standardizer.columns))}

    def __call__(self, raw: pa.Table, where: str, start: int) -> dict[str, pa.Array]:
        values = column_matrix(raw.select(list(self.standardizer.columns)))
        scaled = self.standardizer.scale(values, where, start)
        return {FEATURES: pa.FixedSizeListArray.from_arrays(pa.array(scaled.ravel()), scaled.shape[1])}


def encoded_rows(
    raw: datasets.Dataset,
    encoder: Encoder,
    columns: Columns,
    names: list[str],
    *,
    labelled: bool,
    where: str,
    cache: Path,
) -> datasets.Dataset:
    """What `encoder` makes of every row, and `labels` if the split has them."""
    features = dict(encoder.features)
    if labelled:
        features["labels"] = target_feature(columns.kind, len(names))

    def encode(table: pa.Table, position: int) -> pa.Table:
        made = encoder(table, where, position + 1)
        if labelled:
            made["labels"] = columns.kind.targets(table[columns.label], names)
        return pa.table(made)

    return map_tables(raw, encode, datasets.Features(features), cache, "encoding", BATCH_ROWS)


def publishable(dataset: datasets.Dataset, columns: Sequence[str], cache: Path, split: str) -> datasets.Dataset:
    """`columns` of a mapped dataset with nothing else: what `save_to_disk` writes then depends on content alone.

    A loaded dataset carries checksums, paths and a fingerprint made of mtimes; the fingerprint becomes the hash
    of the file `cache` that holds the rows.
    """
    kept = dataset.select_columns(list(columns))
    info = datasets.DatasetInfo(features=kept.features)
    return datasets.Dataset(kept.data, info=info, split=datasets.NamedSplit(split), fingerprint=sha256_file(cache)[:16])
