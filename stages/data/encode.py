"""Text to model inputs: the tokenizer, what the model's forward takes, and the two `map` calls."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from stages.config.errors import UserError, quote
from stages.storage.files import sha256_file

# How the tokenizer was found says nothing about what it does, and holds paths.
PROVENANCE = ("name_or_path", "is_local", "local_files_only")
ITEM_TYPES = {"input_ids": "int32"}
BATCH_ROWS = 1_000
TRUNCATED = "truncated"


def load_tokenizer(folder: Path, source: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer of the model in `folder`. Raises `UserError` if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), use_fast=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model.source {quote(source)}: its tokenizer cannot be loaded: {reason}") from None
    if not tokenizer.is_fast:
        raise UserError(
            f"model.source {quote(source)}: it has no fast tokenizer (tokenizer.json); convert it, or use another model"
        )
    if tokenizer.pad_token_id is None:
        raise UserError(f"model.source {quote(source)}: its tokenizer has no pad token, which batches of rows need")
    for key in PROVENANCE:
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def load_config(folder: Path, source: str) -> Any:
    """The model's configuration. Raises `UserError` for an architecture that transformers does not know."""
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"model.source {quote(source)}: its config.json cannot be used: {reason}") from None


def model_inputs(config: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the tokenizer makes and the forward of the model's classifier takes, in the tokenizer's order.

    Raises:
        UserError: if transformers has no sequence classifier for this architecture.
    """
    mapping: Any = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if type(config) not in mapping:
        raise UserError(f"model.source is a {config.model_type} model, for which there is no sequence classifier")
    takes = inspect.signature(mapping[type(config)].forward).parameters
    return [name for name in tokenizer.model_input_names if name in takes]


def check_max_length(max_length: int, config: Any, tokenizer: PreTrainedTokenizerBase, *, pair: bool) -> None:
    """Raise `UserError` if the model has fewer positions, or the special tokens alone fill `max_length`."""
    limits = {
        "the model's max_position_embeddings": getattr(config, "max_position_embeddings", None),
        "its tokenizer's model_max_length": tokenizer.model_max_length,
    }
    for name, limit in limits.items():
        if isinstance(limit, int) and 0 < limit < max_length:
            raise UserError(f"tokenize.max_length is {max_length}, but {name} is {limit}; write at most {limit}")
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length <= special:
        raise UserError(
            f"tokenize.max_length is {max_length}, which {special} special tokens fill; write more than {special}"
        )


def row_key(texts: Sequence[str]) -> str:
    """A row's `key`: 16 hex digits of the SHA-256 of its raw inputs as a compact JSON list."""
    canonical = json.dumps(list(texts), ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()[:16]


def _mapped(dataset: datasets.Dataset, function: Any, features: datasets.Features, cache: Path, **how: Any) -> Any:
    # Without a fingerprint of our own, datasets would pickle `function` to hash it; there is no cache to look up.
    return dataset.map(
        function,
        batched=True,
        batch_size=BATCH_ROWS,
        features=features,
        remove_columns=dataset.column_names,
        cache_file_name=str(cache),
        load_from_cache_file=False,
        new_fingerprint="0" * 16,
        **how,
    )


def raw_rows(dataset: datasets.Dataset, text_columns: list[str], label_column: str, cache: Path) -> datasets.Dataset:
    """`row`, `key`, the text columns and the label as text, row for row."""
    kept = [*text_columns, label_column]
    features = {"row": "int64", "key": "string", **dict.fromkeys(kept, "string")}

    def with_key(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        keys = [row_key(texts) for texts in zip(*(batch[column] for column in text_columns), strict=True)]
        return {"row": rows, "key": keys, **{column: batch[column] for column in kept}}

    typed = datasets.Features({name: datasets.Value(dtype) for name, dtype in features.items()})
    return _mapped(dataset, with_key, typed, cache, with_indices=True, desc="raw rows")


def tokenized_rows(
    raw: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    inputs: list[str],
    text_columns: list[str],
    label_column: str | None,
    names: list[str],
    max_length: int,
    cache: Path,
) -> datasets.Dataset:
    """The model's inputs, `labels` (unless `label_column` is None) and `truncated` (bool) of every row."""
    id_of = {name: number for number, name in enumerate(names)}

    def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded = tokenizer(
            *(batch[column] for column in text_columns),
            truncation=True,
            max_length=max_length,
            padding=False,
            return_token_type_ids="token_type_ids" in inputs,
            return_attention_mask="attention_mask" in inputs,
            verbose=False,
        )
        columns: dict[str, list[Any]] = {name: encoded[name] for name in inputs}
        # What was cut off is the encoding's overflow: exact, and no second pass. A shorter row cannot have any.
        columns[TRUNCATED] = [
            len(row) == max_length and bool(encoding.overflowing)
            for row, encoding in zip(columns["input_ids"], encoded.encodings or (), strict=True)
        ]
        if label_column is not None:
            columns["labels"] = [id_of[label] for label in batch[label_column]]
        return columns

    features: dict[str, Any] = {name: datasets.List(datasets.Value(ITEM_TYPES.get(name, "int8"))) for name in inputs}
    features[TRUNCATED] = datasets.Value("bool")
    if label_column is not None:
        features["labels"] = datasets.Value("int64")
    return _mapped(raw, encode, datasets.Features(features), cache, desc="tokenizing")


def publishable(dataset: datasets.Dataset, columns: Sequence[str], cache: Path, split: str) -> datasets.Dataset:
    """`columns` of a mapped dataset with nothing else: what `save_to_disk` writes then depends on content alone.

    A loaded dataset carries checksums, paths and a fingerprint made of mtimes; the fingerprint becomes the hash
    of the file `cache` that holds the rows.
    """
    kept = dataset.select_columns(list(columns))
    info = datasets.DatasetInfo(features=kept.features)
    return datasets.Dataset(kept.data, info=info, split=datasets.NamedSplit(split), fingerprint=sha256_file(cache)[:16])
