"""What people reported about hostile text: the input, and the line or value that answers it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from stages.batches import tokenized as store
from stages.modeling.head import head_of
from stages.report.html import render_report
from stages.report.model_card import model_card
from stages.report.plots import plot_names
from stages.select_best import write_plots
from tests.support.project import Project
from tests.support.report_input import CLASSIFICATION, predictions, report_input
from tests.support.reports import DEV, TRAIN, edit, lay_out, refusal, says, text

# ---------------------------------------------------------------------------------------------- hostile text

HOSTILE = {
    "colours": "\x1b[31mred\x1b[0m",
    "title and bell": "\x1b]0;owned\x07",
    "one byte escape": "\x9b31m",
    "right to left": "\u202egnp.exe\u2066",
    "script": "</script><script>alert(1)</script>",
    "image": "<img src=x onerror=alert(1)>",
    "formula": "=cmd|' /C calc'!A0",
    "formula with a sign": "+1+cmd|' /C calc'!A0",
    "formula with an at": "@SUM(1+1)*cmd|' /C calc'!A0",
    "wide formula": "\uff1dcmd|' /C calc'!A0",
    "link": "[x](javascript:alert(1))",
}
# All that moves a cursor, rings, or turns the order of what stands beside it.
UNSEEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
hostile = pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE.keys())
# What a terminal obeys; the others are harmless there.
OBEYED = {key: name for key, name in HOSTILE.items() if UNSEEN.search(name)}
obeyed = pytest.mark.parametrize("name", OBEYED.values(), ids=OBEYED.keys())


@obeyed
def test_hostile_label_and_column_reach_a_terminal_as_they_are_written(
    project: Project, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    rows = pd.DataFrame({"text": ["a", "b"], "label": [name, f"{name} "]})
    project.write_params()
    lay_out(project, {"train.parquet": rows.to_parquet, "dev.parquet": rows.to_parquet})
    assert not UNSEEN.search(said := says(capsys)) and "separate classes" in said
    shutil.rmtree(store.TOKENIZED)
    project.write_params(data={"label_column": name})
    assert not UNSEEN.search(refusal(capsys))


@obeyed
def test_hostile_file_name_reaches_a_terminal_as_it_is_written(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    project.write_params()
    lay_out(project, {"train.csv": text(TRAIN), f"{name}.csv": text(TRAIN), f"dev.{name}.csv": text(DEV)})
    assert not UNSEEN.search(said := says(capsys)) and "left aside" in said
    shutil.rmtree(store.TOKENIZED)
    (model / "model.safetensors").rename(model / f"{name}.bin")
    assert not UNSEEN.search(line := refusal(capsys)) and "found" in line


@obeyed
def test_hostile_model_type_and_token_reach_a_terminal_as_they_are_written(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    lay_out(project, {"train.csv": text(TRAIN)})
    project.write_params(tokenize={"pad_token": name})
    assert not UNSEEN.search(refusal(capsys))
    project.write_params()
    edit(model / "config.json", model_type=name)
    assert not UNSEEN.search(refusal(capsys))


@hostile
def test_hostile_label_is_text_in_report_card_and_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    task = replace(CLASSIFICATION, label_names=(name, "other"))
    given_input = report_input(task)
    page = render_report(**given_input)
    assert not UNSEEN.search(page) and "<script>alert" not in page and "<img src=x" not in page
    card = model_card(best=given_input["best"], task=task, head=head_of(task, ""), params=given_input["params"])
    assert not UNSEEN.search(card)
    assert not re.search(r"(?<!\\)(<script|<img|\]\(javascript)", card)
    write_plots(predictions(task), None, task)
    for path in Path("plots").iterdir():
        assert not UNSEEN.search(content := path.read_text(encoding="utf-8")) and "<" not in content
        cells = pd.read_csv(path, dtype=str, keep_default_na=False).stack()
        assert not cells.str.match("[=+@\uff1d]").any(), "what a spreadsheet computes"


def test_labels_that_are_numbers_or_signs_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    task = replace(CLASSIFICATION, label_names=("-1", "+1.5e3", "-", "+"))
    write_plots(predictions(task), None, task)
    cells = pd.read_csv("plots/confusion_matrix.csv", dtype=str)
    assert set(cells["label"]) == {"-1", "+1.5e3", "-", "+"}


def test_page_that_dvc_draws_holds_hostile_labels_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    task = replace(CLASSIFICATION, label_names=tuple(HOSTILE.values()))
    write_plots(predictions(task, 44), None, task)
    shown = {"plots/confusion_matrix.csv": {"template": "confusion", "x": "prediction", "y": "label"}}
    Path("dvc.yaml").write_text(json.dumps({"plots": [shown]}), encoding="utf-8")
    for command in (["init", "-q", "--no-scm"], ["plots", "show"]):
        subprocess.run([sys.executable, "-m", "dvc", *command], check=True, capture_output=True)
    page = Path("dvc_plots/index.html").read_text(encoding="utf-8")
    assert "owned" in page and "alert(1)" in page
    assert "<script>alert" not in page and "<img src=x" not in page


def test_card_links_no_folder_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given_input = report_input(CLASSIFICATION)  # its model.source is org/model
    given = {"best": given_input["best"], "task": CLASSIFICATION, "head": head_of(CLASSIFICATION, "")}
    card = model_card(**given, params=given_input["params"])
    assert "https://huggingface.co/org/model" in card and "base_model: org/model" in card
    (tmp_path / "org/model").mkdir(parents=True)
    card = model_card(**given, params=given_input["params"])
    assert "huggingface.co" not in card and "base_model" not in card and "the local model model" in card


def test_two_classes_never_have_one_name_in_a_plot() -> None:
    for names in (["<a", "\u2039a", "\u2039a (0)"], ["=a b", "'=a b", "'=a b (1)"], ["a", "a", "a (0)", "a (0) (0)"]):
        assert len(set(plot_names(names))) == len(names)
