"""`report.html`: one self-contained page, a pure function of what `select_best` depends on."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stages.batches.tokenized import SPLITS, Task
from stages.ground.places import step_name, step_of
from stages.report.figures import candidates_figure, curves_figure
from stages.report.outcomes import NAME_LENGTH, SHOWN_LABELS, TEXT_LENGTH, mistakes, number, outcome
from stages.report.text import class_name, legible, printable

FEW_CLASSES = 6  # two confusion matrices of so many fit beside each other


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
    environment.filters |= {"score": score, "number": number, "data_url": _data_url}
    return environment


def _data_url(png: bytes) -> str:
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


def _label_statistics(data: dict[str, Any], splits: list[str]) -> list[dict[str, Any]]:
    """Mean, standard deviation and range of a label that is a number, per split."""
    return [
        {"split": split, "values": [data[split]["labels"].get(key) for key in ("mean", "std", "min", "max")]}
        for split in splits
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
                (legible(key, NAME_LENGTH), legible(parameter_text(value), 2 * NAME_LENGTH))
                for key, value in flatten(values).items()
            ],
        }
        for section, values in params.items()
    ]


def parameter_text(value: object) -> str:
    """A parameter as a person reads it: text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def render_report(
    *,
    best: dict[str, Any],
    candidates: dict[str, dict[str, float]],
    train: pd.DataFrame,
    evals: pd.DataFrame,
    data: dict[str, Any],
    params: dict[str, Any],
    task: Task,
    validation: pd.DataFrame,
    test: pd.DataFrame | None,
) -> str:
    """The page as HTML: no script, nothing fetched, the same text for the same arguments.

    `best`, `candidates` and `data` are the contents of metrics/best.json, candidates.json and data.json; `train` and
    `evals` of plots/train.tsv and eval.tsv; `validation` and `test` are predictions, with a null label where the
    split has none.
    """
    metric = best["metric"]
    chosen = step_name(best["step"])
    metrics = list(dict.fromkeys(name for scores in candidates.values() for name in scores))
    splits = [split for split in SPLITS if split in data]
    outcomes = [outcome("validation", validation, task), outcome("test", test, task)]
    has_classes = task.kind.has_classes
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
            candidates_image=candidates_figure(candidates, metric, chosen) if len(candidates) > 1 else None,
            curves_image=curves_figure(train, evals, metric, best["step"]),
            kind=task.kind,
            outcomes=[found for found in outcomes if found],
            side_by_side=not task.kind.several and len(task.label_names) <= FEW_CLASSES,
            splits=splits,
            data={split: data[split] for split in splits},
            has_length=not task.feature_columns,
            labels=_label_table(data, splits) if has_classes else None,
            label_statistics=None if has_classes else _label_statistics(data, splits),
            shared_rows=_shared_rows(data),
            mistakes=mistakes(validation, task),
            parameters=_parameter_groups(params),
        )
    )
