"""Figures: any numbers and names can be drawn, and give the same bytes everywhere."""

from __future__ import annotations

import struct

import matplotlib
import numpy as np
import pandas as pd
import pytest

from stages.report import figures
from stages.report.figures import (
    candidates_figure,
    confusion_figure,
    curves_figure,
    precision_recall_figure,
    scatter_figure,
)
from stages.report.plots import precision_recall_rows
from tests.support.report_input import (
    HOSTILE,
    MULTI_LABEL,
    predictions,
    report_input,
)


def frame_curves() -> pd.DataFrame:
    return precision_recall_rows(predictions(MULTI_LABEL), MULTI_LABEL)


def pictures() -> list[bytes]:
    given_input = report_input()
    return [
        confusion_figure(np.array([[3, 1], [0, 4]]), ["no", "yes"]),
        curves_figure(given_input["train"], given_input["evals"], "accuracy", 30),
        candidates_figure(given_input["candidates"], "accuracy", "step-00000030"),
        scatter_figure(np.array([-1.0, 2.0]), np.array([0.0, 3.0])),
        precision_recall_figure(frame_curves(), ["red", "blue"]),
    ]


def test_user_style_does_not_change_figures() -> None:
    before = pictures()
    with matplotlib.rc_context({"font.size": 20, "savefig.dpi": 30, "axes.facecolor": "red", "savefig.bbox": "tight"}):
        assert pictures() == before
        assert matplotlib.rcParams["font.size"] == 20, "and the user's style is left as it was"


def test_figures_carry_no_clock_or_version() -> None:
    for png in pictures():
        chunks, position = set(), 8
        while position < len(png):
            (size,) = struct.unpack(">I", png[position : position + 4])
            chunks.add(png[position + 4 : position + 8])
            position += size + 12
        assert chunks == {b"IHDR", b"pHYs", b"IDAT", b"IEND"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["$\\frac{$", HOSTILE, "负面 😀", "", "_hidden", "x" * 100_000])
def test_any_label_name_can_be_drawn(name: str) -> None:
    assert confusion_figure(np.array([[1, 0], [1, 1]]), [name, "other"]).startswith(b"\x89PNG")
    curves = frame_curves().replace({"label": {"red": name}})
    assert precision_recall_figure(curves, [name, "blue"]).startswith(b"\x89PNG")


def test_a_label_with_an_underscore_is_in_the_legend() -> None:
    first, second = (
        precision_recall_figure(frame_curves().replace({"label": {"red": name}}), [name]) for name in ("_a", "_b")
    )
    assert first != second


@pytest.mark.parametrize(("classes", "numbered"), [(20, True), (21, False), (150, False)])
def test_many_classes_are_shaded_without_numbers(classes: int, numbered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(figures, "_write_cells", lambda *arguments: written.append(arguments))
    confusion_figure(np.eye(classes, dtype=np.int64), [f"class {index}" for index in range(classes)])
    assert bool(written) == numbered


@pytest.mark.filterwarnings("error")
def test_confusion_without_rows_can_be_drawn() -> None:
    assert confusion_figure(np.zeros((2, 2), np.int64), ["no", "yes"]).startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("label", "prediction"),
    [
        ([-3.0, -3.0], [-3.0, -3.0]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([1e9, 1e9], [1e9, 1e9]),
        ([-3e38, 3e38], [3e38, 0.0]),
        ([1.0, 2.0], [np.nan, np.inf]),
        ([np.nan], [np.nan]),
    ],
)
def test_any_numbers_can_be_drawn(label: list[float], prediction: list[float]) -> None:
    assert scatter_figure(np.array(label), np.array(prediction)).startswith(b"\x89PNG")


HUGE = [float("inf"), float("-inf"), float("nan"), 1e308, -1e308, 5e-324]


@pytest.mark.parametrize("score", HUGE)
def test_score_beyond_any_axis_leaves_the_charts_whole(score: float) -> None:
    steps = {f"step-0000000{step}": {"m": value} for step, value in enumerate((score, -score, 0.5), start=1)}
    assert candidates_figure(steps, "m", "step-00000001") != candidates_figure({**steps, "step-00000003": {"m": 0.9}},
                                                                                "m", "step-00000001")  # fmt: skip
    values = [score, -score, 0.5]
    train = pd.DataFrame({"step": [1, 2, 3], "loss": values, "learning_rate": values})
    curves_figure(train, pd.DataFrame({"step": [1, 2, 3], "loss": values, "m": values}), "m", 1)
    scatter_figure(np.array(values), np.array(values[::-1]))
