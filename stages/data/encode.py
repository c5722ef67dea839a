"""Raw columns to model inputs: the tokenizer, what the model's forward takes, and a batch of rows made of another."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow as pa
import transformers
from transformers import AutoConfig, AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from stages.batches.tokenized import FEATURES
from stages.config.pretrained import require_whole_model, require_whole_tokenizer
from stages.data.columns import Columns, listing
from stages.data.features import Standardizer
from stages.data.numbers import column_matrix
from stages.data.origin import Origin
from stages.ground.errors import UserError, quote, reason
from stages.tasks.base import Kind

# How the tokenizer was found says nothing about what it does, and holds paths.
PROVENANCE = ("name_or_path", "is_local", "local_files_only")
ITEM_TYPES = {"input_ids": "int32"}
TRUNCATED = "truncated"
# What `TextEncoder` asks a tokenizer for.
MADE = ("input_ids", "token_type_ids", "attention_mask")


def load_tokenizer(folder: Path, source: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer in `folder`; `source` names it in messages. Raises `UserError` if there is none."""
    require_whole_tokenizer(folder, source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), use_fast=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers check little of what they read, and panic in many ways
        if (folder / "config.json").is_file():
            _read_config(folder, source)  # tokenizers look there too, and say less
        raise UserError(f"{source}: its tokenizer cannot be loaded: {reason(error)}") from None
    if not tokenizer.is_fast:
        raise UserError(f"{source}: it has no fast tokenizer (tokenizer.json); convert it, or use another one")
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
    except Exception as error:  # as above: a list, a number of the wrong type
        raise UserError(f"{where}: its config.json cannot be used: {reason(error)}") from None


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


def require_ids(inputs: Sequence[str], tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Refuse a tokenizer whose `model_input_names` leave out what the model reads. Raises UserError."""
    if "input_ids" not in inputs:
        raise UserError(
            f"{source}: its tokenizer makes {listing(tokenizer.model_input_names)} (model_input_names in "
            "tokenizer_config.json), but a model of text reads 'input_ids'; name that there, too"
        )


def set_padding_side(tokenizer: PreTrainedTokenizerBase, source: str, config: Any | None) -> str | None:
    """Pad on the right, whatever the tokenizer's folder says (left, for generating); a line where that is another side.
    Most models count positions from the left, so that padding there moves a row's words; the heads of decoders look for
    the last token that is no padding. One that reads the last, as XLNet's, or one of the user's own is left as it is.
    """
    if config is None or getattr(config, "summary_type", None) == "last" or tokenizer.padding_side == "right":
        return None
    tokenizer.padding_side = "right"
    return f"{source}: its tokenizer pads on the left, which moves the positions of a row's words; the right is taken"


def set_pad_token(
    tokenizer: PreTrainedTokenizerBase, wanted: str | None, source: str, config: Any | None
) -> str | None:
    """Give the tokenizer the pad token `wanted`, or where it has none its end of sequence, as is usual for a decoder; a
    line that says so where it was chosen.

    Raises:
        UserError: `wanted` is no token, there is none to choose, or the model counts positions from another one.
    """
    models, line = getattr(config, "pad_token_id", None), None
    name = "one of its tokens"  # what to write
    if isinstance(models, int) and 0 <= models < len(tokenizer):
        name = quote(tokenizer.convert_ids_to_tokens(models))
    if wanted is not None and wanted not in tokenizer.get_vocab():
        raise UserError(
            f"tokenize.pad_token is {quote(wanted)}, which is no token of {source}; its special tokens are "
            f"{listing(tokenizer.all_special_tokens)}"
        )
    if wanted is None and tokenizer.pad_token_id is None:
        wanted = tokenizer.eos_token
        if wanted is None:
            raise UserError(
                f"{source}: its tokenizer has no pad token, which batches of rows need, and no token for the end of a "
                f"text, which would do; write {name} in tokenize.pad_token"
            )
        line = f"{source}: its tokenizer has no pad token; {quote(wanted)} is taken (tokenize.pad_token names another)"
    if wanted is not None:
        tokenizer.add_special_tokens({"pad_token": wanted})
    if _counts_from_padding(config) and tokenizer.pad_token_id != models:
        raise UserError(
            f"{source}: its tokenizer pads with {quote(tokenizer.pad_token)}, id {tokenizer.pad_token_id}, but the "
            f"model's pad_token_id is {models}, from which it counts positions; "
            + (f"write {name} in tokenize.pad_token" if isinstance(models, int) else "write one into its config.json")
        )
    return line


def _counts_from_padding(config: Any | None) -> bool:
    """Whether the first position of a text is one above the pad token's id, as in RoBERTa and all that is built on it;
    the positions up to there are never used."""
    mapping: Any = transformers.AutoModel._model_mapping
    if type(config) not in mapping or getattr(config, "position_embedding_type", "absolute") != "absolute":
        return False
    known = mapping[type(config)]
    module = vars(inspect.getmodule(known[0] if isinstance(known, tuple) else known))
    name = "create_position_ids_from_input_ids"
    return name in module or any(hasattr(thing, name) for thing in module.values() if inspect.isclass(thing))


def check_vocabulary(source: str, config: Any, tokenizer: PreTrainedTokenizerBase, advice: str) -> None:
    """Raise `UserError`, with `advice`, if the tokenizer in `source` makes ids that the model has no embedding for."""
    size = getattr(config, "vocab_size", None)
    if isinstance(size, int) and len(tokenizer) > size:
        raise UserError(f"{source}: its tokenizer has {len(tokenizer)} tokens, but model.source has {size}; {advice}")
    # A vocabulary may have holes.
    token, last = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1], default=("", 0))
    if isinstance(size, int) and last >= size:
        raise UserError(
            f"{source}: its tokenizer gives {quote(token)} the id {last}, but model.source has {size} tokens; {advice}"
        )


def check_max_length(max_length: int, config: Any | None, tokenizer: PreTrainedTokenizerBase, *, pair: bool) -> None:
    """Raise `UserError` if the model has fewer positions, or the special tokens alone fill `max_length`."""
    positions = getattr(config, "max_position_embeddings", None)
    limits = [
        (positions, f"the model's max_position_embeddings is {positions}"),
        (tokenizer.model_max_length, f"the tokenizer's model_max_length is {tokenizer.model_max_length}"),
    ]
    if isinstance(positions, int) and _counts_from_padding(config):
        left = positions - getattr(config, "pad_token_id", 0) - 1
        limits[0] = (left, f"{limits[0][1]}, of which {left} are for tokens")
    short = [(limit, what) for limit, what in limits if isinstance(limit, int) and 0 < limit < max_length]
    if short:
        least, what = min(short, key=lambda entry: entry[0])
        raise UserError(f"tokenize.max_length is {max_length}, but {what}; write at most {least}")
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length <= special:
        raise UserError(
            f"tokenize.max_length is {max_length}, which {special} special tokens fill; write more than {special}"
        )


def row_key(inputs: Sequence[str] | Sequence[float]) -> str:
    """A row's `key`: 16 hex digits of the SHA-256 of its raw inputs as a compact JSON list."""
    canonical = json.dumps(list(inputs), ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()[:16]


def raw_features(columns: Columns) -> datasets.Features:
    """The types of what `raw_rows` gives."""
    return datasets.Features({"row": datasets.Value("int64"), "key": datasets.Value("string"), **columns.features})


def raw_rows(table: pa.Table, columns: Columns, position: int) -> pa.Table:
    """`row`, `key`, the inputs and the label as they were read, row for row; the first one is at `position`."""
    inputs = table.select(list(columns.inputs))
    if columns.numeric:
        keys = [row_key(numbers) for numbers in column_matrix(inputs).T.tolist()]
    else:
        keys = [row_key(texts) for texts in zip(*(texts.to_pylist() for texts in inputs.columns), strict=True)]
    rows = pa.array(range(position, position + len(table)), pa.int64())
    return pa.table({"row": rows, "key": keys, **{name: table[name] for name in columns.names}})


class Encoder(Protocol):
    """Makes the model's `inputs` of raw rows; `features` are the types of what it makes.

    Errors name the rows as `origin` does; the first one is at `position` there.
    """

    @property
    def inputs(self) -> Sequence[str]: ...

    @property
    def features(self) -> dict[str, Any]: ...

    def __call__(self, raw: pa.Table, origin: Origin, position: int) -> dict[str, pa.Array]: ...


def settle_special_tokens(
    tokenizer: PreTrainedTokenizerBase, split: bool | None, config: Any | None
) -> tuple[list[str], str]:
    """Make the tokenizer read special tokens that a text holds (`[SEP]`, `</s>`) as text, or not, as
    `tokenize.split_special_tokens` says; the tokens that no text may be read as, and the advice where one is.

    Without a word these are all, as they change what a text means. Where they are wanted, still the end of sequence of
    an encoder-decoder, whose head reads there and refuses a batch whose rows have more or fewer.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if split is None:
        return special, "write tokenize.split_special_tokens: true to have it read as text, false as that token"
    tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = split
    if split:
        # Some have it among their pieces of text: T5's, that is Unigram. What is unknown is the unknown token, anyway.
        known = [token for token in special if token != tokenizer.unk_token]
        return known, "it is read as that even with tokenize.split_special_tokens: true; change the text"
    ends = [tokenizer.eos_token] if getattr(config, "is_encoder_decoder", False) and tokenizer.eos_token else []
    return ends, "of which the model needs one a row; write tokenize.split_special_tokens: true to have it read as text"


@dataclass(frozen=True)
class TextEncoder:
    """Tokens of one text or a pair, as lists of ints, and `truncated` (bool).

    A text that holds one of `refused`, and would be read as that token, is refused with `advice`.
    """

    tokenizer: PreTrainedTokenizerBase
    inputs: Sequence[str]
    columns: Sequence[str]
    max_length: int
    refused: Sequence[str]
    advice: str

    @property
    def features(self) -> dict[str, Any]:
        lists = {name: datasets.List(datasets.Value(ITEM_TYPES.get(name, "int8"))) for name in self.inputs}
        return {**lists, TRUNCATED: datasets.Value("bool")}

    def __call__(self, raw: pa.Table, origin: Origin, position: int) -> dict[str, pa.Array]:
        texts = [raw[column].to_pylist() for column in self.columns]
        try:
            encoded = self._encode(texts)
        except Exception as error:  # of one row, which `tokenizers` does not name
            raise self._unreadable(texts, origin, position, error) from None
        self._refuse_empty(encoded.encodings or (), origin, position)
        self._refuse_special(texts, origin, position)
        # What was cut off is the encoding's overflow: exact, and no second pass. A shorter row cannot have any.
        truncated = [
            len(row) == self.max_length and bool(encoding.overflowing)
            for row, encoding in zip(encoded["input_ids"], encoded.encodings or (), strict=True)
        ]
        lists = {name: pa.array(encoded[name], self.features[name].pa_type) for name in self.inputs}
        return {**lists, TRUNCATED: pa.array(truncated)}

    def _encode(self, texts: list[list[str]]) -> BatchEncoding:
        return self.tokenizer(
            *texts,
            truncation=True,
            max_length=self.max_length,
            padding=False,
            return_token_type_ids="token_type_ids" in self.inputs,
            return_attention_mask="attention_mask" in self.inputs,
            verbose=False,
        )

    def _unreadable(self, texts: list[list[str]], origin: Origin, position: int, error: Exception) -> UserError:
        for row, cells in enumerate(zip(*texts, strict=True)):
            try:
                self._encode([[cell] for cell in cells])
            except Exception as found:
                return UserError(
                    f"{origin.row(position + row)}: the tokenizer fails at this row: {reason(found)}; change the text, "
                    "or mend the tokenizer"
                )
        return UserError(f"{origin}: the tokenizer fails: {reason(error)}")

    def _refuse_empty(self, encodings: Sequence[Any], origin: Origin, position: int) -> None:
        for row, encoding in enumerate(encodings):
            found = set(encoding.sequence_ids)  # of a special token it is None
            for number, column in enumerate(self.columns):
                if number not in found:
                    raise UserError(
                        f"{origin.row(position + row)}, column {quote(column)} becomes no token at all: the tokenizer "
                        "knows nothing in it (it may be of signs that are not seen); change the text, remove the row, "
                        "or name another tokenizer in tokenize.tokenizer"
                    )

    def _refuse_special(self, texts: list[list[str]], origin: Origin, position: int) -> None:
        if not self.refused:
            return
        held = re.compile("|".join(map(re.escape, sorted(self.refused, key=len, reverse=True))))
        for column, cells in zip(self.columns, texts, strict=True):
            for row, cell in enumerate(cells):
                for token in dict.fromkeys(held.findall(cell)):
                    if self._reads_as(token, cell):
                        raise UserError(
                            f"{origin.row(position + row)}, column {quote(column)} holds {quote(token)}, a special "
                            f"token of the tokenizer; {self.advice}"
                        )

    def _reads_as(self, token: str, text: str) -> bool:
        as_it_is, as_text = (
            self.tokenizer(text, add_special_tokens=False, verbose=False, **split)["input_ids"]
            for split in ({}, {"split_special_tokens": True})
        )
        # Whatever is not known is the unknown token.
        if token == self.tokenizer.unk_token:
            return bool(as_it_is != as_text)
        return self.tokenizer.convert_tokens_to_ids(token) in as_it_is


@dataclass(frozen=True)
class FeatureEncoder:
    """Standardised numbers, one float32 list of fixed length a row."""

    standardizer: Standardizer
    inputs: Sequence[str] = (FEATURES,)

    @property
    def features(self) -> dict[str, Any]:
        return {FEATURES: datasets.List(datasets.Value("float32"), length=len(self.standardizer.columns))}

    def __call__(self, raw: pa.Table, origin: Origin, position: int) -> dict[str, pa.Array]:
        values = column_matrix(raw.select(list(self.standardizer.columns)))
        scaled = self.standardizer.scale(values, origin, position)
        return {FEATURES: pa.FixedSizeListArray.from_arrays(pa.array(scaled.ravel()), scaled.shape[1])}
