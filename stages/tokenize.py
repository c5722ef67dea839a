"""Stage 1 of 5: read the data, check every row, tokenize it. Writes data/tokenized/ and metrics/data.json.

Columns of numbers are standardised instead.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.config.pipeline import load_stage, require_folders, require_inputs
from stages.config.pretrained import MODEL, TOKENIZER, resolve_model, resolve_tokenizer
from stages.config.schema import Params
from stages.ground.errors import quote, say
from stages.ground.places import METRICS
from stages.ground.running import run_stage
from stages.ground.signals import die_with_parent

if TYPE_CHECKING:
    from stages.data.encode import FeatureEncoder, TextEncoder
    from stages.data.sources import Source
    from stages.keeping.folder import RunFolder

RECORD = METRICS / "data.json"
# Whose versions decide what is kept: they read, cut, encode and write the rows.
LIBRARIES = ("datasets", "numpy", "pandas", "pyarrow", "scikit-learn", "tokenizers", "transformers")


def main() -> None:
    """Run the stage from params.yaml. A failure leaves the outs as they were."""
    die_with_parent()
    stage = load_stage("tokenize")
    params = stage.params
    require_folders(stage)
    require_inputs(params)
    _quieten()

    from stages.batches.tokenized import TOKENIZED
    from stages.ground import disk
    from stages.keeping.environment import of_libraries
    from stages.keeping.work import work_of

    with work_of(stage, of_libraries(*LIBRARIES)) as run:
        record = disk.write_folder(TOKENIZED, lambda folder: tokenize(params, folder, run))
        disk.write_text(RECORD, disk.dumps(record))


def tokenize(params: Params, out: Path, run: RunFolder) -> dict[str, Any]:
    """Write the splits, the raw rows, the tokenizer or features.json, and task.json to `out`; what metrics/data.json
    says. What is done on the way is kept in `run`.

    Raises:
        UserError: anything about parameters, data or model that the user has to mend.
    """
    from stages.batches.tokenized import SPLITS, Task, load_raw, load_split, save_task
    from stages.data import encode, labels, shards, sources, statistics
    from stages.data.columns import listing
    from stages.data.kept import Keeper

    data, keeper = params.data, Keeper(run)
    text_encoder = _text_encoder(params, out) if data.text_columns else None
    source = sources.load_source(data, keeper)
    columns = source.columns
    names = labels.check_source(source, data)
    for line in source.remarks:
        _say(line)
    for group in labels.spelled_alike(names) if data.label_names is None else ():
        _say(
            f"warning: {source.where['train']}: column {quote(data.label_column)} holds {listing(group)}, which are "
            "separate classes; give one class one spelling, or name all of them in data.label_names"
        )
    missing = labels.looks_missing(names) if data.label_names is None else []
    if missing:
        _say(
            f"warning: {source.where['train']}: column {quote(data.label_column)} holds {listing(missing)}, a class of "
            "its own; if that stands for a missing value, remove those rows, else name it in data.label_names"
        )
    if "validation" not in source.splits:
        source = labels.cut_validation(source, data, names, keeper)
        _say(f"{source.where['train']}: no validation split; cut {data.validation_size} of train off for it")
    encoder = text_encoder or _feature_encoder(source, out)

    splits = {
        split: shards.SplitShards(
            rows=source.splits[split],
            origin=source.where[split],
            labelled=not labels.is_unlabelled(source.splits[split], columns.label),
            columns=columns,
            names=names,
            encoder=encoder,
            atoms=run.atoms(f"encode-{split}-{source.version}"),
        )
        for split in SPLITS
        if split in source.splits
    }
    kept = shards.make(splits, params.tokenize.num_proc)
    shards.publish(out, shards.INPUTS, kept, {split: made.input_features for split, made in splits.items()})
    shards.publish(out / "raw", shards.RAW, kept, dict.fromkeys(splits, encode.raw_features(columns)))
    raw, metrics = {split: load_raw(out, split) for split in splits}, {}
    for split in splits:
        truncated = shards.truncated(kept[split]) if text_encoder else None
        metrics[split] = statistics.split_summary(load_split(out, split), raw[split], columns, names, truncated)
        done = f"{truncated} truncated to {params.tokenize.max_length} tokens"
        rows = raw[split].num_rows
        _say(f"{split}: {rows} rows, {done if text_encoder else f'{len(columns.inputs)} features each'}")
    save_task(
        out,
        Task(
            task=data.task,
            label_names=tuple(names),
            text_columns=tuple(data.text_columns),
            feature_columns=columns.inputs if columns.numeric else (),
            label_column=data.label_column,
            model_inputs=tuple(encoder.inputs),
        ),
    )
    shared = statistics.duplicates(raw)
    if any(shared.values()):
        found = ", ".join(f"{count} {pair.replace('_', '/')}" for pair, count in shared.items() if count)
        what = "text" if text_encoder else "features"
        _say(f"warning: rows with the same {what} are in two splits, so scores flatter the model: {found}")
    return {"label_names": names, **metrics, "duplicates_across_splits": shared}


def _text_encoder(params: Params, out: Path) -> TextEncoder:
    """The tokenizer of the model, or the one that `tokenize.tokenizer` names; written to `out`."""
    from stages.data import encode

    own, max_length = params.tokenize.tokenizer, params.tokenize.max_length
    model = resolve_model(params.model.source, params.model.revision)
    folder, source = model, f"{MODEL} {quote(params.model.source)}"
    if own is not None:
        folder, source = resolve_tokenizer(own), f"{TOKENIZER} {quote(own)}"
    assert folder is not None, "a factory model comes with tokenize.tokenizer"
    tokenizer = encode.load_tokenizer(folder, source)
    config = encode.load_config(model, params.model.source) if model else None
    inputs = encode.model_inputs(params.data.kind, config, tokenizer)
    encode.require_ids(inputs, tokenizer, source)
    advice = "write null for the model's own tokenizer"
    if own is None:
        advice = "give the model an embedding for each (resize_token_embeddings) and save both again"
    encode.check_vocabulary(source, config, tokenizer, advice)
    lines = (
        encode.set_pad_token(tokenizer, params.tokenize.pad_token, source, config),
        encode.set_padding_side(tokenizer, source, config),
    )
    for line in filter(None, lines):
        _say(line)
    encode.check_max_length(max_length, config, tokenizer, pair=len(params.data.text_columns) == 2)
    refused, advice = encode.settle_special_tokens(tokenizer, params.tokenize.split_special_tokens, config)
    tokenizer.save_pretrained(str(out / "tokenizer"))  # before its first call, which leaves a trace in its state
    return encode.TextEncoder(tokenizer, inputs, params.data.text_columns, max_length, refused, advice)


def _feature_encoder(source: Source, out: Path) -> FeatureEncoder:
    """The standardisation of the features by the train split; written to `out`."""
    from stages.data.encode import FeatureEncoder
    from stages.data.features import Standardizer

    standardizer = Standardizer.fit(source.splits["train"], source.columns.inputs)
    standardizer.save(out)
    return FeatureEncoder(standardizer)


def _quieten() -> None:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets
    import huggingface_hub
    import transformers

    # Errors are reported once, by us, in one line.
    huggingface_hub.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()


def _say(line: str) -> None:
    say(f"tokenize: {line}")


if __name__ == "__main__":
    run_stage(main, collect_rarely=True)
