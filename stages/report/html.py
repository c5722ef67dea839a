"""`report.html`: one self-contained page, a pure function of what `select_best` depends on."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from scipy.special import softmax

from stages.report.figures import (
    MAX_NUMBERED_CLASSES,
    candidates_figure,
    confusion_counts,
    confusion_figure,
    curves_figure,
    step_of,
)
from stages.report.text import class_name, legible, printable

SPLITS = ("train", "validation", "test")
NAME_LENGTH = 60
TEXT_LENGTH = 300
SHOWN_LABELS = 20
SHOWN_MISTAKES = 10
SHOWN_CONFUSIONS = 10


def score(value: float | None) -> str:
    """A score with four decimals; a dash for one that is missing or not a number."""
    return "—" if value is None or math.isnan(value) else f"{value:.4f}"


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"seed": 0}} as {"train.seed": 0}; an empty dict is a value."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _environment() -> Environment:
    """Jinja that escapes every value, and leaves no control or bidi character in any of them."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if isinstance(value, str) else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["score"] = score
    return environment


def _image(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _scores(best: dict[str, Any]) -> list[dict[str, Any]]:
    validation, test = best["validation"], best["test"] or {}
    return [
        {"name": legible(name, NAME_LENGTH), "validation": validation.get(name), "test": test.get(name)}
        for name in dict.fromkeys([*validation, *test])
    ]


def _runner_up(best: dict[str, Any]) -> dict[str, Any] | None:
    if best["runner_up"] is None:
        return None
    value = best["runner_up"]["value"]
    return {"step": best["runner_up"]["step"], "value": value, "gap": abs(best["validation"][best["metric"]] - value)}


def _candidate_rows(candidates: dict[str, dict[str, float]], chosen: str, metrics: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "step": step_of(name),
            "chosen": name == chosen,
            "scores": [candidates[name].get(metric) for metric in metrics],
        }
        for name in sorted(candidates, key=step_of)
    ]


def _labelled(predictions: pd.DataFrame) -> pd.DataFrame:
    rows = predictions[predictions["label"].notna()]
    return rows.assign(label=rows["label"].astype("int64"))


def _frequent_confusions(rows: pd.DataFrame, label_names: list[str]) -> list[dict[str, Any]]:
    counts = confusion_counts(rows["label"].tolist(), rows["prediction"].tolist(), len(label_names))
    np.fill_diagonal(counts, 0)
    largest = np.argsort(-counts, axis=None, kind="stable")[:SHOWN_CONFUSIONS]
    cells = [divmod(int(cell), len(label_names)) for cell in largest]
    return [
        {
            "label": class_name(label_names[label], NAME_LENGTH),
            "prediction": class_name(label_names[prediction], NAME_LENGTH),
            "count": int(counts[label, prediction]),
        }
        for label, prediction in cells
        if counts[label, prediction]
    ]


def _confusion(split: str, predictions: pd.DataFrame | None, label_names: list[str]) -> dict[str, Any] | None:
    """A split's confusion matrix, and its largest cells where there are too many classes for numbers in it."""
    if predictions is None:
        return None
    rows = _labelled(predictions)
    if rows.empty:
        return None
    return {
        "split": split,
        "rows": len(rows),
        "image": _image(confusion_figure(rows["label"].tolist(), rows["prediction"].tolist(), label_names)),
        "frequent": _frequent_confusions(rows, label_names) if len(label_names) > MAX_NUMBERED_CLASSES else [],
    }


def _text(value: object) -> str | None:
    # Null is kept apart from the text "None".
    if value is None or (isinstance(value, float) and math.isnan(value)) or value is pd.NA:
        return None
    return legible(value, TEXT_LENGTH)


def _mistakes(validation: pd.DataFrame, text_columns: list[str], label_names: list[str]) -> list[dict[str, Any]]:
    """The wrong predictions of the largest loss: where the model was surest of something else."""
    rows = _labelled(validation)
    wrong = rows[rows["label"] != rows["prediction"]]
    worst = wrong.sort_values("loss", ascending=False, kind="stable").head(SHOWN_MISTAKES)
    return [
        {
            "row": row["row"],
            "texts": [_text(row[column]) for column in text_columns],
            "label": class_name(label_names[row["label"]], NAME_LENGTH),
            "prediction": class_name(label_names[row["prediction"]], NAME_LENGTH),
            "confidence": float(softmax(np.asarray(row["logits"], dtype=np.float64)).max()),
            "loss": row["loss"],
        }
        for row in worst.to_dict("records")
    ]


def _label_table(data: dict[str, Any], splits: list[str]) -> dict[str, Any]:
    """Rows per label and split with their share, the most frequent labels first."""
    counts = {split: data[split]["labels"] for split in splits}
    totals: dict[str, int] = {}
    for split in splits:
        for name, count in counts[split].items():
            totals[name] = totals.get(name, 0) + count
    names = sorted(totals, key=lambda name: (-totals[name], name))
    return {
        "rows": [
            {
                "name": class_name(name, NAME_LENGTH),
                "cells": [
                    {"count": count, "share": count / max(data[split]["rows"], 1)}
                    for split in splits
                    for count in [counts[split].get(name, 0)]
                ],
            }
            for name in names[:SHOWN_LABELS]
        ],
        "left_out": max(len(names) - SHOWN_LABELS, 0),
    }


def _shared_rows(data: dict[str, Any]) -> list[dict[str, Any]]:
    duplicates = data["duplicates_across_splits"]
    return [{"splits": pair.replace("_", " and "), "rows": duplicates[pair]} for pair in duplicates if duplicates[pair]]


def _parameter_groups(params: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": legible(section, NAME_LENGTH),
            "rows": [
                (legible(key, NAME_LENGTH), legible(_parameter(value), 2 * NAME_LENGTH))
                for key, value in flatten(values if isinstance(values, dict) else {section: values}).items()
            ],
        }
        for section, values in params.items()
    ]


def _parameter(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def render_report(
    *,
    best: dict[str, Any],
    candidates: dict[str, dict[str, float]],
    train: pd.DataFrame,
    evals: pd.DataFrame,
    data: dict[str, Any],
    params: dict[str, Any],
    label_names: list[str],
    validation: pd.DataFrame,
    test: pd.DataFrame | None,
    text_columns: list[str],
) -> str:
    """The page as HTML: no script, nothing fetched, the same text for the same arguments.

    `best`, `candidates` and `data` are the contents of metrics/best.json, candidates.json and data.json; `train` and
    `evals` of plots/train.tsv and eval.tsv; `validation` and `test` are predictions, with a null label where the
    split has none.
    """
    metric = best["metric"]
    chosen = f"step-{best['step']:08d}"
    metrics = list(dict.fromkeys(name for scores in candidates.values() for name in scores))
    splits = [split for split in SPLITS if split in data]
    confusions = [_confusion("validation", validation, label_names), _confusion("test", test, label_names)]
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            metric=legible(metric, NAME_LENGTH),
            step=best["step"],
            epoch=f"{best['epoch']:g}",
            reason=legible(best["reason"], TEXT_LENGTH),
            validation_score=best["validation"][metric],
            test_score=(best["test"] or {}).get(metric),
            has_test=best["test"] is not None,
            scores=_scores(best),
            runner_up=_runner_up(best),
            metrics=[legible(name, NAME_LENGTH) for name in metrics],
            candidates=_candidate_rows(candidates, chosen, metrics),
            candidates_image=_image(candidates_figure(candidates, metric, chosen)) if len(candidates) > 1 else None,
            curves_image=_image(curves_figure(train, evals, metric, best["step"])),
            confusions=[confusion for confusion in confusions if confusion],
            few_classes=len(label_names) <= 6,
            splits=splits,
            data={split: data[split] for split in splits},
            labels=_label_table(data, splits),
            shared_rows=_shared_rows(data),
            text_columns=[legible(column, NAME_LENGTH) for column in text_columns],
            mistakes=_mistakes(validation, text_columns, label_names),
            parameters=_parameter_groups(params),
        )
    )
