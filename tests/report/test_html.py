"""The report and its figures: what they promise for any task and data set."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import unicodedata
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.report.html import render_report
from stages.report.text import legible, printable
from tests.support.project import ROOT
from tests.support.report_input import (
    CLASSIFICATION,
    FEATURES,
    MULTI_LABEL,
    REGRESSION,
    TASKS,
    answers,
    hostile_input,
    predictions,
    report_input,
    with_sets,
    without_labels,
)

CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
any_task = pytest.mark.parametrize("name", TASKS)


@cache
def hostile_page(name: str) -> str:
    return render_report(**hostile_input(name))


class Page(HTMLParser):
    """The tags with their attributes, and the text between them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@any_task
def test_dataset_text_cannot_run_script_in_report(name: str) -> None:
    page = Page(hostile_page(name))
    harmless = report_input(TASKS[name])
    harmless["data"]["duplicates_across_splits"]["train_test"] = 1
    plain = Page(render_report(**harmless))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags}
    names = {name for _, attributes in page.tags for name in attributes}
    assert names == {name for _, attributes in plain.tags for name in attributes}
    assert not any(name.startswith("on") for name in names)
    assert "<script>alert(1)</script>" in page.text, "the text is shown, as text"


@any_task
def test_report_needs_no_network(name: str) -> None:
    html = hostile_page(name)
    page = Page(html)
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": CSP}) in page.tags
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    sources = [str(attributes["src"]) for _, attributes in page.tags if "src" in attributes]
    assert len(sources) == 4 and all(source.startswith("data:image/png;base64,") for source in sources)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_report_is_a_pure_function_of_its_input(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("savefig.dpi: 33\nfont.family: serif\nsavefig.bbox: tight\n")
    program = (
        "import hashlib, sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.report.test_html import TASKS, render_report, report_input\n"
        "for task in TASKS.values():\n"
        "    print(hashlib.sha256(render_report(**report_input(task)).encode()).hexdigest())"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", program, str(ROOT)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONHASHSEED": "77", "TZ": "Pacific/Apia", "MPLBACKEND": "svg", "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = [hashlib.sha256(render_report(**report_input(task)).encode()).hexdigest() for task in TASKS.values()]
    assert elsewhere.stdout.split() == here


@any_task
def test_report_is_the_same_from_parquet(name: str, tmp_path: Path) -> None:
    given_input = report_input(TASKS[name])
    before = render_report(**given_input)
    given_input["validation"].to_parquet(tmp_path / "validation.parquet", index=False)
    given_input["validation"] = pd.read_parquet(tmp_path / "validation.parquet")
    assert render_report(**given_input) == before


@any_task
def test_report_leaves_its_input_alone(name: str) -> None:
    given_input, untouched = report_input(TASKS[name]), report_input(TASKS[name])
    render_report(**given_input)
    for key, value in untouched.items():
        if isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(given_input[key], value)
        else:
            assert given_input[key] == value


@any_task
def test_no_control_or_bidi_character_reaches_report(name: str) -> None:
    html = hostile_page(name)
    assert {character for character in html if unicodedata.category(character) in {"Cc", "Cf", "Cs"}} == {"\n"}
    assert "\\u202e" in html, "it is shown as an escape"


@any_task
def test_long_dataset_text_is_cut(name: str) -> None:
    assert max(map(len, re.findall(r"A+", Page(hostile_page(name)).text))) <= 300


@given(st.text(), st.integers(2, 40))
def test_legible_text_is_short_and_visible(text: str, limit: int) -> None:
    shown = legible(text, limit)
    assert len(shown) <= limit
    assert printable(shown) == shown


def test_joiners_survive_because_emoji_and_persian_need_them() -> None:
    text = "👩\u200d💻 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    assert printable(text) == text


def test_rows_shared_by_splits_are_warned_about() -> None:
    given_input = report_input()
    assert 'class="warning"' not in render_report(**given_input)
    given_input["data"]["duplicates_across_splits"]["train_test"] = 3
    html = render_report(**given_input)
    assert html.count('class="warning"') == 1
    assert "train and test share 3 rows" in html


def test_report_shows_validation_and_test_side_by_side() -> None:
    html = render_report(**report_input())
    row = re.search(r"<tr class=\"deciding\">.*?</tr>", html)
    assert row and re.findall(r"\d\.\d{4}", row[0]) == ["0.9012", "0.8012"]


def test_only_the_chosen_candidate_is_highlighted() -> None:
    html = render_report(**report_input())
    (row,) = re.findall(r"<tr class=\"chosen\">.*?</tr>", html)
    assert '<th scope="row">30</th>' in row


@any_task
@pytest.mark.parametrize("absent", ["split", "labels"])
def test_report_does_without_test_labels(absent: str, name: str) -> None:
    task = TASKS[name]
    given_input = report_input(task)
    given_input["best"]["test"] = None
    given_input["test"] = None if absent == "split" else without_labels(given_input["test"])
    if absent == "split":
        del given_input["data"]["test"]
    else:
        given_input["data"]["test"] = given_input["data"]["test"] | {"labels": {}}
    html = render_report(**given_input)
    assert "no labelled test split" in html
    assert "<figcaption>Validation" in html and "<figcaption>Test" not in html


def test_report_does_without_runner_up_and_training_rows() -> None:
    given_input = report_input()
    given_input["best"]["runner_up"] = None
    given_input["candidates"] = {"step-00000030": given_input["best"]["validation"]}
    given_input["train"] = given_input["train"].iloc[:0]
    given_input["evals"] = given_input["evals"].iloc[2:]
    assert "no other candidate" in render_report(**given_input)


def mistaken_rows(html: str) -> list[int]:
    return [int(row) for row in re.findall(r"· row (\d+)", html)]


@any_task
def test_mistakes_are_wrong_and_the_surest_come_first(name: str) -> None:
    rows = mistaken_rows(render_report(**report_input(TASKS[name])))
    # Regression's first row is wrong by nothing: it is not among them.
    assert rows == list(range(36, 0 if name == "regression" else -1, -4))


@pytest.mark.parametrize("loss", ["cross_entropy", "bce_with_logits"])
def test_confidence_of_a_mistake_is_the_probability_of_what_was_predicted(loss: str) -> None:
    given_input = report_input()
    given_input["validation"] = predictions(CLASSIFICATION, 1, loss=loss)
    logit = float(given_input["validation"]["logits"][0].max())
    assert logit == 3
    html = render_report(**given_input)
    assert "label <b><bdi>no</bdi></b> · predicted <b><bdi>yes</bdi></b> at 95.3%" in html
    # Predicted although unlikely: with evaluate.threshold 0.01.
    given_input["validation"]["logits"] = [np.asarray([-4.0] if loss == "bce_with_logits" else [4, 0], np.float32)]
    assert "predicted <b><bdi>yes</bdi></b> at 1.8%" in render_report(**given_input)


def test_a_wrong_label_set_is_shown_by_name_and_the_empty_one_is_seen() -> None:
    given_input = report_input(MULTI_LABEL)
    html = render_report(**given_input)
    assert "label <b><bdi>(none)</bdi></b> · predicted <b><bdi>red</bdi></b> · loss" in html, "row 0, 8, ..."
    assert "label <b><bdi>blue</bdi></b> · predicted <b><bdi>red, blue</bdi></b> · loss" in html, "row 4, 12, ..."


def test_a_large_label_set_is_cut() -> None:
    task = replace(MULTI_LABEL, label_names=tuple(f"l{index}" for index in range(50)))
    given_input = report_input(task)
    rows = given_input["validation"].head(1)
    given_input["validation"] = rows.assign(prediction=[list(range(50))])
    assert "<bdi>l0, l1, l2, l3, l4, l5, l6, l7, and 42 more</bdi>" in render_report(**given_input)


def test_regression_shows_signed_errors_and_the_largest_first() -> None:
    given_input = report_input(REGRESSION)
    frame = predictions(REGRESSION, 4)
    label, prediction = (np.array(values, np.float32) for values in ([-1.5, 2, 7, 7], [-11.75, 6, 7, np.nan]))
    given_input["validation"] = frame.assign(label=label, prediction=prediction)
    html = render_report(**given_input)
    assert mistaken_rows(html) == [3, 0, 1], "not a number is the largest error, and 7 for 7 is none"
    assert "label <b><bdi>-1.5</bdi></b> · predicted <b><bdi>-11.75</bdi></b>, off by -10.25 · loss" in html
    assert ", off by +4 ·" in html
    given_input["validation"] = frame.assign(prediction=frame["label"])
    assert "No validation example was predicted wrongly." in render_report(**given_input)


def test_regression_shows_the_range_of_its_labels() -> None:
    given_input = report_input(REGRESSION)
    given_input["data"]["test"] = given_input["data"]["test"] | {"labels": {}}
    html = render_report(**given_input)
    cells = dict(re.findall(r'<tr><th scope="row">(\w+)</th>((?:<td class="number">[^<]*</td>){4})</tr>', html))
    assert re.findall(">([^<]+)</td>", cells["train"]) == ["-0.5", "11.5434", "-20", "19"]
    assert re.findall(">([^<]+)</td>", cells["test"]) == ["—"] * 4


def test_many_features_are_shown_by_the_first_few() -> None:
    html = render_report(**report_input(FEATURES))
    article = html[html.index('<article class="mistake">') :].partition("</article>")[0]
    assert re.findall(r">(pixel_\d+)</dt><dd dir=\"auto\">([^<]+)<", article) == [
        (f"pixel_{n}", "12") for n in range(6)
    ]
    assert '<dt>…</dt><dd class="muted">58 more columns</dd>' in article
    assert "Median tokens" not in html and "Truncated" not in html


def test_null_text_is_not_the_word_none() -> None:
    given_input = report_input()
    given_input["validation"]["premise"] = None
    assert '<span class="muted">null</span>' in render_report(**given_input)


def test_report_shows_every_parameter() -> None:
    html = render_report(**report_input())
    assert '<th scope="row">kwargs.nested.dropout</th><td>0.1</td>' in html
    assert '<th scope="row">seed</th><td>7</td>' in html


def per_label(html: str) -> dict[str, list[str]]:
    rows = re.findall(r'<tr><th scope="row" dir="auto">(\w+)</th>((?:<td class="number">[^<]*</td>){5})</tr>', html)
    return {name: re.findall(">([^<]+)</td>", cells) for name, cells in rows}


def test_each_label_of_a_multi_label_has_its_scores() -> None:
    task = replace(MULTI_LABEL, label_names=("never", "red", "green"))
    given_input = report_input(task)
    frame = predictions(task, 4)
    given_input["validation"] = with_sets(frame, [[1], [1, 2], [], [1]], [[1], [1], [1], []])
    given_input["test"] = None
    assert per_label(render_report(**given_input)) == {
        "red": ["3", "3", "0.6667", "0.6667", "0.6667"],
        "green": ["1", "0", "—", "0.0000", "0.0000"],
        "never": ["0", "0", "—", "—", "—"],
    }


def test_of_many_labels_the_most_frequent_are_shown() -> None:
    task = replace(MULTI_LABEL, label_names=tuple(f"l{index}" for index in range(30)))
    given_input = report_input(task)
    frame = predictions(task, 30)
    sets = [list(range(30 - row, 30)) for row in range(30)]  # l29 in 29 of 30 rows, l1 in one, l0 in none
    given_input["validation"] = with_sets(frame, sets, sets)
    given_input["test"] = None
    html = render_report(**given_input)
    assert list(per_label(html)) == [f"l{index}" for index in range(29, 9, -1)]
    assert "And 10 more labels." in html


def test_labels_that_no_row_has_leave_a_table_without_curves() -> None:
    given_input = report_input(MULTI_LABEL)
    empty: list[list[int]] = [[] for _ in range(40)]
    given_input["validation"] = with_sets(given_input["validation"], empty, empty)
    html = render_report(**given_input)
    assert 'alt="Precision and recall of the test split"' in html
    assert 'alt="Precision and recall of the validation split"' not in html


@pytest.mark.filterwarnings("error")
@any_task
def test_a_model_that_diverged_still_has_its_report(name: str) -> None:
    task = TASKS[name]
    given_input = report_input(task)
    nan = float("nan")
    for scores in given_input["candidates"].values():
        scores |= dict.fromkeys(scores, nan)
    given_input["evals"][["accuracy", "f1", "loss"]] = nan
    given_input["train"]["loss"] = nan
    given_input["best"]["runner_up"]["value"] = nan
    for split in ("validation", "test"):
        logits = given_input[split]["logits"].map(lambda values: values * np.float32(nan))
        given_input[split] = given_input[split].assign(
            logits=logits, prediction=answers(task, logits), loss=np.float32(nan)
        )
    html = render_report(**given_input)
    assert "nan" not in Page(html).text
    assert '<div class="tile chosen"><b>—</b>' in html


def test_many_classes_have_their_confusions_listed() -> None:
    html = render_report(**report_input(replace(CLASSIFICATION, label_names=tuple(f"class {n}" for n in range(30)))))
    assert html.count("Most frequent confusions") == 2
    assert '<td dir="auto">class 0</td><td dir="auto">class 1</td><td class="number">1</td>' in html
    assert "Most frequent confusions" not in render_report(**report_input())


def test_report_imports_neither_torch_nor_a_stage() -> None:
    program = (
        "import sys, stages.report.html, stages.report.model_card, stages.report.plots\n"
        "print([name for name in sys.modules if name == 'torch' or name.startswith(('stages.to', 'stages.train'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
