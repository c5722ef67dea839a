"""README.md of models/best, in the form the Hugging Face Hub reads."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from stages.report.html import score
from stages.report.text import class_name, legible

NAME_LENGTH = 60
SHOWN_LABELS = 50
HYPERPARAMETERS = (
    ("train", "num_train_epochs"),
    ("train", "max_steps"),
    ("build_loaders", "batch_size"),
    ("train", "optim"),
    ("train", "learning_rate"),
    ("train", "lr_scheduler_type"),
    ("train", "warmup_steps"),
    ("train", "weight_decay"),
    ("train", "max_grad_norm"),
    ("train", "label_smoothing"),
    ("train", "class_weights"),
    ("train", "precision"),
    ("train", "freeze"),
    ("train", "seed"),
    ("tokenize", "max_length"),
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_MARKUP = re.compile(r"([\\`*_{}\[\]<>|~#$&])")


def hub_id(source: str) -> str | None:
    """`source` if it is written like a Hub id, else None: by its form alone, as the card must not depend on a disk."""
    return source if _HUB_ID.fullmatch(source) else None


def escape_markdown(value: object) -> str:
    """The value as one line of literal text, in a sentence or in a table's cell."""
    return _MARKUP.sub(r"\\\1", legible(value, NAME_LENGTH))


def _front_matter(best: dict[str, Any], source: str) -> str:
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["holdfast"],
        "metrics": [name for name in best["validation"] if name != "loss"],
    }
    if hub_id(source):
        fields["base_model"] = source
    return yaml.safe_dump(fields, sort_keys=False)


def _origin(source: str) -> str:
    if hub_id(source):
        return f"[{escape_markdown(source)}](https://huggingface.co/{source})"
    if source.startswith("package:"):
        return f"the model of the Python package {escape_markdown(source.removeprefix('package:').partition('/')[0])}"
    # A published card tells nobody how the author's disk is laid out.
    return f"the local model {escape_markdown(source.rstrip('/').rpartition('/')[2])}"


def _data_origin(data: dict[str, Any]) -> str:
    if data["dataset"] is None:
        return "a local data set"
    parts = [data["dataset"], data["config"]]
    return "the data set " + " ".join(escape_markdown(part) for part in parts if part)


def _listing(names: list[str]) -> str:
    shown = ", ".join(escape_markdown(class_name(name, NAME_LENGTH)) for name in names[:SHOWN_LABELS])
    return shown if len(names) <= SHOWN_LABELS else f"{shown} and {len(names) - SHOWN_LABELS} more"


def _scores(best: dict[str, Any]) -> str:
    test = best["test"] or {}
    lines = ["| metric | validation | test |", "|---|---:|---:|"]
    for name in dict.fromkeys([*best["validation"], *test]):
        lines.append(f"| {escape_markdown(name)} | {score(best['validation'].get(name))} | {score(test.get(name))} |")
    return "\n".join(lines)


def _hyperparameters(params: dict[str, Any]) -> str:
    lines = ["| parameter | value |", "|---|---|"]
    for section, key in HYPERPARAMETERS:
        value = params[section].get(key)
        if value not in (None, []):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            lines.append(f"| {escape_markdown(f'{section}.{key}')} | {escape_markdown(text)} |")
    return "\n".join(lines)


def _usage(text_columns: list[str], max_length: int) -> str:
    call = '{"text": "First text.", "text_pair": "Second text."}' if len(text_columns) == 2 else '"Some text."'
    return f"""```python
from transformers import pipeline

classify = pipeline("text-classification", model="models/best")
classify({call}, truncation=True, max_length={max_length})
```"""


def model_card(*, best: dict[str, Any], label_names: list[str], text_columns: list[str], params: dict[str, Any]) -> str:
    """The card's markdown with its YAML front matter; `best` is the content of metrics/best.json."""
    source = params["model"]["source"]
    max_length = params["tokenize"]["max_length"]
    columns = [escape_markdown(column) for column in text_columns]
    roles = f" `text` is {columns[0]}, `text_pair` is {columns[1]}." if len(columns) == 2 else ""
    no_test = "" if best["test"] else "\nThere was no labelled test split.\n"
    return f"""---
{_front_matter(best, source)}---

# Text classification model

Fine-tuned from {_origin(source)} on {_data_origin(params["data"])}, to tell {len(label_names)} labels apart
from {" and ".join(columns)}.

Labels: {_listing(label_names)}.

## Scores

{_scores(best)}
{no_test}
These are the weights of step {best["step"]} (epoch {best["epoch"]:g}), chosen by the validation split's \
{escape_markdown(best["metric"])}.

## How to use it

{_usage(text_columns, max_length)}

The path is the folder of this card.{roles}

## How it was trained

{_hyperparameters(params)}

## Limits

- Texts longer than {max_length} tokens are cut; what comes after has no influence.
- It always answers with one of its labels, also for a text that fits none of them, or in another language.
- The probabilities were not calibrated: a high one is not a promise.
- The validation scores chose this model among several, so they are a little too good; the test scores had no say.
- What the training data gets wrong or leaves out, the model repeats.

Made with Holdfast, a DVC pipeline; the parameters and the data's hashes are in its `dvc.lock`.
"""
