"""Stage 1 of 5: read the data, check every row, tokenize it. Writes data/tokenized/ and metrics/data.json."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.config.errors import UserError, quote, run_stage
from stages.config.params import DataParams, Params, load_params
from stages.config.pipeline import load_stage
from stages.modeling.source import require_visible
from stages.run.signals import die_with_parent

if TYPE_CHECKING:
    from stages.data.sources import Source

METRICS = Path("metrics/data.json")
# Columns that the predictions add to the raw ones.
RESERVED = ("row", "key", "label", "prediction", "logits", "loss")


def main() -> None:
    """Run the stage from params.yaml. A failure leaves the outs as they were."""
    die_with_parent()
    params = load_params()
    require_visible(load_stage("tokenize"), params.model.source)
    _refuse_reserved(params.data)
    _quieten()

    from stages.data.store import TOKENIZED
    from stages.storage import files

    metrics: dict[str, Any] = {}

    def fill(folder: Path) -> None:
        # Inside the temporary folder: on the disk that has to hold the result, and gone with it if anything fails.
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            metrics.update(tokenize(params, folder, Path(cache)))

    files.write_folder(TOKENIZED, fill)
    files.write_text(METRICS, files.dumps(metrics))


def tokenize(params: Params, out: Path, cache: Path) -> dict[str, Any]:
    """Write the tokenized splits, the raw rows, the tokenizer and task.json to `out`; what metrics/data.json says.

    `cache` is a folder for intermediate Arrow files.

    Raises:
        UserError: anything about parameters, data or model that the user has to mend.
    """
    import datasets

    from stages.data import encode, labels, sources, statistics, store
    from stages.modeling.source import resolve_model

    data, text_columns = params.data, params.data.text_columns
    model = resolve_model(params.model.source, params.model.revision)
    tokenizer = encode.load_tokenizer(model, params.model.source)
    config = encode.load_config(model, params.model.source)
    inputs = encode.model_inputs(config, tokenizer)
    encode.check_max_length(params.tokenize.max_length, config, tokenizer, pair=len(text_columns) == 2)
    tokenizer.save_pretrained(str(out / "tokenizer"))  # before its first call, which leaves a trace in its state

    source = sources.load_source(data, cache)
    names = labels.check_source(source, data)
    if "validation" not in source.splits:
        source = labels.cut_validation(source, data, names, cache)
        _say(f"{source.where['train']}: no validation split; cut {data.validation_size} of train off for it")

    tokenized, raw, metrics = {}, {}, {}
    for split in [name for name in store.SPLITS if name in source.splits]:
        label_column = _label_column(source, split, data)
        raw_cache, input_cache = cache / f"raw-{split}.arrow", cache / f"inputs-{split}.arrow"
        rows = encode.raw_rows(source.splits[split], text_columns, data.label_column, raw_cache)
        encoded = encode.tokenized_rows(
            rows, tokenizer, inputs, text_columns, label_column, names, params.tokenize.max_length, input_cache
        )
        truncated = statistics.count_true(encoded, encode.TRUNCATED)
        columns = [name for name in encoded.column_names if name != encode.TRUNCATED]
        tokenized[split] = encode.publishable(encoded, columns, input_cache, split)
        raw[split] = encode.publishable(rows, rows.column_names, raw_cache, split)
        metrics[split] = statistics.split_summary(tokenized[split], raw[split], data.label_column, names, truncated)
        _say(f"{split}: {rows.num_rows} rows, {truncated} truncated to {params.tokenize.max_length} tokens")

    datasets.DatasetDict(tokenized).save_to_disk(str(out))
    datasets.DatasetDict(raw).save_to_disk(str(out / "raw"))
    store.save_task(
        out,
        store.Task(
            task=data.task,
            label_names=tuple(names),
            text_columns=tuple(text_columns),
            label_column=data.label_column,
            model_inputs=tuple(inputs),
            problem_type="single_label_classification",
        ),
    )
    shared = statistics.duplicates(raw)
    if any(shared.values()):
        found = ", ".join(f"{count} {pair.replace('_', '/')}" for pair, count in shared.items() if count)
        _say(f"warning: rows with the same text are in two splits, so scores flatter the model: {found}")
    return {"label_names": names, **metrics, "duplicates_across_splits": shared}


def _label_column(source: Source, split: str, data: DataParams) -> str | None:
    from stages.data.labels import is_unlabelled

    return None if is_unlabelled(source.splits[split], data.label_column) else data.label_column


def _refuse_reserved(data: DataParams) -> None:
    # The label column goes by its own name beside row and key; the predictions call it label.
    for column, reserved in [*((name, RESERVED) for name in data.text_columns), (data.label_column, RESERVED[:2])]:
        if column in reserved:
            raise UserError(
                f"column {quote(column)} of the data has a name that the predictions need for themselves "
                f"({', '.join(reserved)}); rename it in the data and in params.yaml"
            )


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
    print(f"tokenize: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_stage(main)
