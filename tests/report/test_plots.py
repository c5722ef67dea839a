"""The rows that DVC draws, for any task."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stages.batches.tokenized import Task
from stages.report.plots import CURVE_COLUMNS, MAX_POINTS, confusion_rows, precision_recall_rows
from stages.select_best import write_plots
from tests.support.report_input import CLASSIFICATION, FEATURES, MULTI_LABEL, REGRESSION, predictions, without_labels


def classified(label: list[int], logits: list[list[float]]) -> pd.DataFrame:
    prediction = [int(np.argmax(row)) for row in logits]
    return pd.DataFrame({"label": label, "prediction": prediction, "logits": logits})


def test_confusion_rows_hold_names() -> None:
    frame = confusion_rows(classified([0, 1, 1], [[0, 1], [0, 1], [1, 0]]), CLASSIFICATION)
    assert frame.to_dict("list") == {"label": ["no", "yes", "yes"], "prediction": ["yes", "yes", "no"]}


def test_plot_names_are_distinct_and_cannot_end_a_script() -> None:
    names = ("y" * 200, "y" * 201, "</script>", "")
    classification, multi_label = (replace(task, label_names=names) for task in (CLASSIFICATION, MULTI_LABEL))
    frames = [
        confusion_rows(predictions(classification), classification),
        precision_recall_rows(predictions(classification), classification),
        precision_recall_rows(predictions(multi_label), multi_label),
    ]
    for frame in frames:
        assert frame["label"].nunique() == 4
        assert not frame["label"].str.contains("<").any()


def test_two_classes_have_one_precision_recall_curve() -> None:
    frame = precision_recall_rows(classified([0, 1, 1, 0], [[2, 0], [0, 1], [1, 0.5], [1, 0.8]]), CLASSIFICATION)
    assert set(frame["label"]) == {"yes"}
    surest = frame.iloc[-1]
    assert (surest["precision"], surest["recall"]) == (1.0, 0.5)
    assert surest["threshold"] == pytest.approx(1 / (1 + np.exp(-1)))


def test_one_logit_has_the_curve_of_two() -> None:
    two = classified([0, 1, 1, 0], [[2, 0], [0, 1], [1, 0.5], [1, 0.8]])
    one = two.assign(logits=two["logits"].map(lambda row: [row[1] - row[0]]))
    pd.testing.assert_frame_equal(
        precision_recall_rows(one, CLASSIFICATION), precision_recall_rows(two, CLASSIFICATION), rtol=1e-6
    )


def test_each_label_of_a_multi_label_has_its_own_curve() -> None:
    logits = [[0.0, 2, 0], [1, 1, 0], [2, 0, 0]]
    frame = pd.DataFrame({"label": [[], [0, 1], [0]], "prediction": [[], [], []], "logits": logits})
    curves = precision_recall_rows(frame, MULTI_LABEL).groupby("label")
    assert list(curves.groups) == ["green", "red"], "no row is blue"
    assert curves["precision"].max().to_dict() == {"red": 1.0, "green": 0.5}
    assert curves["threshold"].max()["red"] == pytest.approx(1 / (1 + np.exp(-2)))


def test_precision_recall_curves_stay_small_and_keep_their_ends() -> None:
    random = np.random.default_rng(0)
    label = random.integers(0, 3, 5000)
    task = replace(CLASSIFICATION, label_names=("a", "b", "c", "never"))
    frame = precision_recall_rows(classified(label.tolist(), random.normal(size=(5000, 4)).tolist()), task)
    assert set(frame["label"]) == {"a", "b", "c"}, "a class without rows has no recall"
    assert frame.groupby("label").size().max() <= MAX_POINTS
    assert (frame.groupby("label")["recall"].max() == 1).all()


def test_rows_whose_model_says_nan_are_on_no_curve() -> None:
    sure = classified([0, 1, 1, 0], [[2, 0], [0, 1], [1, 0.5], [1, 0.8]])
    lost = classified([1], [[np.nan, np.nan]])
    pd.testing.assert_frame_equal(
        precision_recall_rows(pd.concat([sure, lost]), CLASSIFICATION), precision_recall_rows(sure, CLASSIFICATION)
    )
    assert precision_recall_rows(lost, CLASSIFICATION).empty


@pytest.mark.parametrize(
    ("task", "confusion", "curves"),
    [(CLASSIFICATION, True, True), (FEATURES, True, True), (MULTI_LABEL, False, True), (REGRESSION, False, False)],
)
def test_every_task_writes_both_files(
    task: Task, confusion: bool, curves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    frame = predictions(task)
    write_plots(frame, None, task)
    first, second = pd.read_csv("plots/confusion_matrix.csv"), pd.read_csv("plots/precision_recall.csv")
    assert list(first) == ["label", "prediction"] and list(second) == CURVE_COLUMNS
    assert (len(first) > 0, len(second) > 0) == (confusion, curves)
    assert confusion_rows(without_labels(frame), task).empty
    assert precision_recall_rows(without_labels(frame), task).empty


@pytest.mark.parametrize("task", [CLASSIFICATION, MULTI_LABEL], ids=lambda task: task.task)
def test_test_labels_are_plotted_where_there_are_any(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    curves = Path("plots/precision_recall.csv")
    validation, test = predictions(task, 40), predictions(task, 21)
    found = []
    for given_test in (None, without_labels(test), test):
        write_plots(validation, given_test, task)
        found.append(curves.read_text(encoding="utf-8"))
    assert found[0] == found[1] != found[2]


def test_dvc_shows_and_compares_plots_with_a_header_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    declared = [
        {"plots/confusion_matrix.csv": {"template": "confusion", "x": "prediction", "y": "label"}},
        {"plots/precision_recall.csv": {"x": "recall", "y": "precision"}},
    ]
    # JSON is YAML.
    Path("dvc.yaml").write_text(str({"plots": declared}).replace("'", '"'), encoding="utf-8")
    dvc = [sys.executable, "-m", "dvc"]
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["git", "init", "-q"], [*dvc, "init", "-q"]):
        subprocess.run(command, check=True)
    for task in (REGRESSION, CLASSIFICATION, REGRESSION):
        write_plots(predictions(task), None, task)
        subprocess.run(["git", "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", task.task], check=True)
    for command in (["show"], ["diff", "HEAD~1", "HEAD"], ["diff", "HEAD~2", "HEAD"]):
        done = subprocess.run([*dvc, "plots", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "index.html" in done.stdout and not done.stderr
