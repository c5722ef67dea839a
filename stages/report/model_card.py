"""README.md of models/best, in the form the Hugging Face Hub reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from stages.batches.tokenized import Task
from stages.config.pretrained import local_folder
from stages.config.schema import FACTORY
from stages.report.html import parameter_text, score
from stages.report.rows import by_answer
from stages.report.text import class_name, legible
from stages.tasks.base import Head

NAME_LENGTH = 60
VALUE_LENGTH = 200
SHOWN_LABELS = 50
SHOWN_COLUMNS = 6
HYPERPARAMETERS = (
    ("model", "kwargs"),
    ("data", "feature_columns"),
    ("train", "num_train_epochs"),
    ("train", "max_steps"),
    ("build_loaders", "batch_size"),
    ("train", "optim"),
    ("train", "learning_rate"),
    ("train", "lr_scheduler_type"),
    ("train", "warmup_steps"),
    ("train", "weight_decay"),
    ("train", "max_grad_norm"),
    ("train", "loss"),
    ("train", "loss_kwargs"),
    ("train", "label_smoothing"),
    ("train", "class_weights"),
    ("train", "precision"),
    ("train", "freeze"),
    ("train", "callbacks"),
    ("train", "seed"),
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_MARKUP = re.compile(r"([\\`*_{}\[\]<>|~#$&])")


def hub_id(source: str) -> str | None:
    """`source` if it is written like a Hub id and no folder, which would have been taken for it, has that name."""
    return source if _HUB_ID.fullmatch(source) and local_folder(source) is None else None


def escape_markdown(value: object, limit: int = NAME_LENGTH) -> str:
    """The value as one line of literal text, in a sentence or in a table's cell."""
    return _MARKUP.sub(r"\\\1", legible(value, limit))


def _front_matter(best: dict[str, Any], source: str, pipeline: str) -> str:
    fields: dict[str, Any] = {
        "tags": ["holdfast"],
        "metrics": [name for name in best["validation"] if name != "loss"],
    }
    if not source.startswith(FACTORY):
        fields = {"library_name": "transformers", "pipeline_tag": pipeline, **fields}
    if hub_id(source):
        fields["base_model"] = source
    return yaml.safe_dump(fields, sort_keys=False)


def _origin(source: str) -> str:
    if source.startswith(FACTORY):
        return f"Made by {escape_markdown(source.removeprefix(FACTORY))} and trained"
    if hub_id(source):
        return f"Fine-tuned from [{escape_markdown(source)}](https://huggingface.co/{source})"
    if source.startswith("package:"):
        package = source.removeprefix("package:").partition("/")[0]
        return f"Fine-tuned from the model of the Python package {escape_markdown(package)}"
    # A published card tells nobody how the author's disk is laid out.
    return f"Fine-tuned from the local model {escape_markdown(source.rstrip('/').rpartition('/')[2])}"


def _data_origin(data: dict[str, Any]) -> str:
    if data["dataset"] is None:
        return "a local data set"
    parts = [data["dataset"], data["config"]]
    return "the data set " + " ".join(escape_markdown(part) for part in parts if part)


def _listing(names: Sequence[str], shown: int) -> str:
    listed = [escape_markdown(class_name(name, NAME_LENGTH)) for name in names[:shown]]
    if len(names) > shown:
        listed.append(f"{len(names) - shown} more")
    return " and ".join(filter(None, [", ".join(listed[:-1]), listed[-1]]))


def _purpose(task: Task) -> str:
    """What it was trained for, and the names or the column of what it answers."""
    columns = _listing(task.text_columns or task.feature_columns, SHOWN_COLUMNS)
    count, names = len(task.label_names), _listing(task.label_names, SHOWN_LABELS) if task.label_names else ""
    if not task.kind.has_classes:
        return f"to predict the number {escape_markdown(task.label_column)}\nfrom {columns}."
    if task.kind.several:
        return f"to say which of {count} labels, any number of them, apply\nto {columns}.\n\nLabels: {names}."
    return f"to tell {count} labels apart\nfrom {columns}.\n\nLabels: {names}."


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
        if value not in (None, [], {}):
            text = escape_markdown(parameter_text(value), VALUE_LENGTH)
            lines.append(f"| {escape_markdown(f'{section}.{key}')} | {text} |")
    return "\n".join(lines)


def _example(task: Task) -> str:
    return '{"text": "First text.", "text_pair": "Second text."}' if len(task.text_columns) == 2 else '"Some text."'


def _pipeline_usage(task: Task, head: Head, max_length: int, threshold: float) -> str:
    """How `transformers.pipeline` is called, and what its scores mean."""
    cut = f"truncation=True, max_length={max_length}"
    if task.kind.several:
        lines = f"""scores = classify({_example(task)}, top_k=None, {cut})
[score["label"] for score in scores if score["score"] > {threshold}]"""
        meaning = f"A `score` is the probability of its label; above {threshold} it was taken to apply."
    else:
        lines = f"classify({_example(task)}, {cut})"
        meaning = "`score` is the probability of `label`, the likeliest."
        if not task.kind.has_classes:
            meaning = "`score` is the predicted number; `label` says nothing."
        elif head.outputs == 1 or (len(task.label_names) == 2 and threshold != 0.5):
            negative, positive = (escape_markdown(class_name(name, NAME_LENGTH)) for name in task.label_names)
            meaning = f"The answer is {positive} where its probability is above {threshold}, else {negative}; " + (
                "`score` is that probability." if head.outputs == 1 else "`label` is only the likelier of the two."
            )
    roles = ""
    if len(task.text_columns) == 2:
        first, second = map(escape_markdown, task.text_columns)
        roles = f" `text` is {first}, `text_pair` is {second}."
    return f"""```python
from transformers import pipeline

classify = pipeline("{task.kind.pipeline}", model="models/best")
{lines}
```

The path is the folder of this card. {meaning}{roles}"""


def _factory_usage(task: Task, source: str, max_length: int, threshold: float) -> str:
    """How a model that transformers does not know is loaded, with this pipeline's own code."""
    # Other code than that in stages/custom is called only because these lines say so.
    is_other = re.fullmatch(rf"{FACTORY}(?!stages\.custom\b)[\w.]+:\w+", source)
    trusted = f', "{source}"' if is_other else ""
    if task.feature_columns:
        imports, ours = "import pandas as pd\nimport torch", "from stages.data.features import Standardizer\n"
        lines = """frame = pd.read_csv("new.csv")  # with the columns that features.json names
batch = {"features": Standardizer.load(folder)(frame)}"""
    else:
        imports, ours = "import torch\nfrom transformers import AutoTokenizer", ""
        texts = '"First text.", "Second text."' if len(task.text_columns) == 2 else '"Some text."'
        lines = f"""tokenizer = AutoTokenizer.from_pretrained("models/best")
batch = tokenizer({texts}, truncation=True, max_length={max_length}, return_tensors="pt")"""
    answer = by_answer(
        task.kind,
        one="the position of its label in task.json, from 0",
        several="a 1 for every label that applies, else 0, in the order of task.json",
        number="the predicted number",
    )
    return f"""```python
from pathlib import Path

{imports}

{ours}from stages.modeling.build import load_model
from stages.modeling.forward import Forward
from stages.modeling.head import decide

folder = Path("models/best")
model = load_model(folder, torch.device("cpu"){trusted})
{lines}
with torch.no_grad():
    logits = Forward(model)(batch)
decide("{task.task}", logits.numpy(), {threshold})
```

The path is the folder of this card. `stages` is the code of the pipeline, and the code of the model has to be there
too: model.json names it. Of each row `decide` gives {answer}."""


def _limits(task: Task, max_length: int) -> str:
    lines = []
    if task.text_columns:
        lines.append(f"Texts longer than {max_length} tokens are cut; what comes after has no influence.")
    lines.append(
        by_answer(
            task.kind,
            one="It always answers with one of its labels, also for an input that fits none of them.",
            several="It knows no labels but its own, and can answer with none of them.",
            number="It always answers with a number, also for an input unlike all it was trained on.",
        )
    )
    if task.kind.has_classes:
        lines.append("The probabilities were not calibrated: a high one is not a promise.")
    lines += [
        "The validation scores chose this model among several, so they are a little too good; the test scores had no "
        "say.",
        "What the training data gets wrong or leaves out, the model repeats.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def model_card(*, best: dict[str, Any], task: Task, head: Head, params: dict[str, Any]) -> str:
    """The card's markdown with its YAML front matter; `best` is the content of metrics/best.json."""
    source, threshold = params["model"]["source"], params["evaluate"]["threshold"]
    max_length = params["tokenize"]["max_length"]
    factory = source.startswith(FACTORY)
    usage = (
        _factory_usage(task, source, max_length, threshold)
        if factory
        else _pipeline_usage(task, head, max_length, threshold)
    )
    no_test = "" if best["test"] else "\nThere was no labelled test split.\n"
    title = f"{'Text ' if task.text_columns else ''}{task.kind.title} model"
    return f"""---
{_front_matter(best, source, task.kind.pipeline)}---

# {title[0].upper()}{title[1:]}

{_origin(source)} on {_data_origin(params["data"])}, {_purpose(task)}

## Scores

{_scores(best)}
{no_test}
These are the weights of step {best["step"]} (epoch {best["epoch"]:g}), chosen by the validation split's \
{escape_markdown(best["metric"])}.

## How to use it

{usage}

## How it was trained

{_hyperparameters(params)}

## Limits

{_limits(task, max_length)}

Made with Holdfast, a DVC pipeline; the parameters and the data's hashes are in its `dvc.lock`.
"""
