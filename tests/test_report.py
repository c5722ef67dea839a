"""The report, its figures, the model card and DVC's plot rows: what they promise for any data set."""

from __future__ import annotations

import hashlib
import os
import re
import struct
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stages.report import figures
from stages.report.figures import candidates_figure, confusion_figure, curves_figure
from stages.report.html import render_report
from stages.report.model_card import model_card
from stages.report.plots import MAX_POINTS, confusion_rows, precision_recall_rows
from stages.report.text import legible, printable

ROOT = Path(__file__).parents[1]
HOSTILE = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>|`*\n---\n\u202egnp\u2066 \x00\x1b[31m \ud800 $\\frac{"
)
CSP = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def predictions(classes: int, rows: int, columns: list[str], text: str = "some text") -> pd.DataFrame:
    label = np.arange(rows) % classes
    prediction = np.where(np.arange(rows) % 4 == 0, (label + 1) % classes, label)
    logits = np.eye(classes, dtype=np.float32)[prediction] * 3
    frame = pd.DataFrame({"row": range(rows), "key": [f"{row:016x}" for row in range(rows)]})
    for column in columns:
        frame[column] = [f"{column} {row} {text}" for row in range(rows)]
    return frame.assign(label=label, prediction=prediction, logits=list(logits), loss=np.arange(rows) / rows)


def report_input(
    label_names: list[str] | None = None, columns: list[str] | None = None, text: str = "some text"
) -> dict[str, Any]:
    names = label_names or ["no", "yes"]
    columns = columns or ["premise", "hypothesis"]
    scores = [{"accuracy": 0.70123 + step / 10, "f1": 0.6, "loss": 0.5} for step in range(3)]
    evals = pd.DataFrame([{"step": 10 * i + 10, "epoch": i + 1.0, **score} for i, score in enumerate(scores)])
    steps = np.arange(1, 31)
    length = {"p50": 20, "p90": 30, "p99": 40, "max": 64}
    split = {"rows": 40, "labels": {name: 40 // len(names) for name in names}, "length": length, "truncated": 1}
    return {
        "best": {
            "step": 30,
            "epoch": 3.0,
            "metric": "accuracy",
            "validation": scores[2],
            "test": scores[1],
            "runner_up": {"step": 20, "value": scores[1]["accuracy"]},
            "reason": f"highest accuracy {text}",
        },
        "candidates": {f"step-{10 * i + 10:08d}": score for i, score in enumerate(scores)},
        "train": pd.DataFrame(
            {"step": steps, "epoch": steps / 10, "loss": 1 / steps, "learning_rate": steps * 1e-6, "grad_norm": 1.0}
        ),
        "evals": evals,
        "data": {
            "train": split,
            "validation": split,
            "test": split,
            "duplicates_across_splits": {"train_validation": 0, "train_test": 0, "validation_test": 0},
        },
        "params": {
            "data": {"path": "data/sample", "dataset": None, "config": None, "label_column": text},
            "model": {"source": "org/model", "kwargs": {"nested": {"dropout": 0.1}}},
            "tokenize": {"max_length": 64},
            "build_loaders": {"batch_size": 16},
            "train": {"learning_rate": 1e-4, "seed": 7, "freeze": [text]},
        },
        "label_names": names,
        "validation": predictions(len(names), 40, columns, text),
        "test": predictions(len(names), 40, columns, text),
        "text_columns": columns,
    }


def hostile_input() -> dict[str, Any]:
    given_input = report_input([HOSTILE, HOSTILE + "2", "x" * 100_000], [HOSTILE, "text"], HOSTILE + "A" * 100_000)
    given_input["best"]["validation"][HOSTILE] = 0.5
    given_input["candidates"]["step-00000010"][HOSTILE] = 0.5
    given_input["params"][HOSTILE] = {HOSTILE: HOSTILE}
    given_input["data"]["duplicates_across_splits"][HOSTILE] = 1
    return given_input


def card_input(**changes: Any) -> dict[str, Any]:
    source = report_input()
    return {key: source[key] for key in ("best", "label_names", "text_columns", "params")} | changes


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


def test_dataset_text_cannot_run_script_in_report() -> None:
    page = Page(render_report(**hostile_input()))
    harmless = report_input(["a", "b", "c"])
    harmless["data"]["duplicates_across_splits"]["train_test"] = 1
    plain = Page(render_report(**harmless))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags}
    names = {name for _, attributes in page.tags for name in attributes}
    assert names == {name for _, attributes in plain.tags for name in attributes}
    assert not any(name.startswith("on") for name in names)
    assert "<script>alert(1)</script>" in page.text, "the text is shown, as text"


def test_report_needs_no_network() -> None:
    html = render_report(**hostile_input())
    page = Page(html)
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": CSP}) in page.tags
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    sources = [str(attributes["src"]) for _, attributes in page.tags if "src" in attributes]
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_report_is_a_pure_function_of_its_input(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("savefig.dpi: 33\nfont.family: serif\nsavefig.bbox: tight\n")
    program = (
        "import hashlib, sys; sys.path[:0] = sys.argv[1:]\n"
        "from test_report import render_report, report_input\n"
        "print(hashlib.sha256(render_report(**report_input()).encode()).hexdigest())"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", program, str(ROOT), str(ROOT / "tests")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONHASHSEED": "77", "TZ": "Pacific/Apia", "MPLBACKEND": "svg", "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert elsewhere.stdout.strip() == hashlib.sha256(render_report(**report_input()).encode()).hexdigest()


def test_report_leaves_its_input_alone() -> None:
    given_input, untouched = report_input(), report_input()
    render_report(**given_input)
    for key, value in untouched.items():
        if isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(given_input[key], value)
        else:
            assert given_input[key] == value


def test_no_control_or_bidi_character_reaches_report() -> None:
    html = render_report(**hostile_input())
    assert {character for character in html if unicodedata.category(character) in {"Cc", "Cf", "Cs"}} == {"\n"}
    assert "\\u202e" in html, "it is shown as an escape"


def test_long_dataset_text_is_cut() -> None:
    assert max(map(len, re.findall(r"A+", Page(render_report(**hostile_input())).text))) <= 300


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


@pytest.mark.parametrize("absent", ["split", "labels"])
def test_report_does_without_test_labels(absent: str) -> None:
    given_input = report_input()
    given_input["best"]["test"] = None
    if absent == "split":
        given_input["test"] = None
    else:
        given_input["test"]["label"] = None
    html = render_report(**given_input)
    assert "no labelled test split" in html
    assert html.count("Confusion matrix of") == 1


def test_report_does_without_runner_up_and_training_rows() -> None:
    given_input = report_input()
    given_input["best"]["runner_up"] = None
    given_input["candidates"] = {"step-00000030": given_input["best"]["validation"]}
    given_input["train"] = given_input["train"].iloc[:0]
    given_input["evals"] = given_input["evals"].iloc[2:]
    assert "no other candidate" in render_report(**given_input)


def test_mistakes_are_wrong_and_the_surest_come_first() -> None:
    page = render_report(**report_input())
    rows = [int(row) for row in re.findall(r"· row (\d+)", page)]
    assert rows == list(range(36, -1, -4)), "every fourth row is wrong, and the loss grows with the row"


def test_null_text_is_not_the_word_none() -> None:
    given_input = report_input()
    given_input["validation"]["premise"] = None
    assert '<span class="muted">null</span>' in render_report(**given_input)


def test_report_shows_every_parameter() -> None:
    html = render_report(**report_input())
    assert '<th scope="row">kwargs.nested.dropout</th><td>0.1</td>' in html
    assert '<th scope="row">seed</th><td>7</td>' in html


def pictures() -> list[bytes]:
    given_input = report_input()
    rows = given_input["validation"]
    return [
        confusion_figure(rows["label"].tolist(), rows["prediction"].tolist(), given_input["label_names"]),
        curves_figure(given_input["train"], given_input["evals"], "accuracy", 30),
        candidates_figure(given_input["candidates"], "accuracy", "step-00000030"),
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
@pytest.mark.parametrize("name", ["$\\frac{$", HOSTILE, "负面 😀", "", "x" * 100_000])
def test_any_label_name_can_be_drawn(name: str) -> None:
    assert confusion_figure([0, 1, 1], [0, 1, 0], [name, "other"]).startswith(b"\x89PNG")


@pytest.mark.parametrize(("classes", "numbered"), [(20, True), (21, False), (150, False)])
def test_many_classes_are_shaded_without_numbers(classes: int, numbered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(figures, "_write_cells", lambda *arguments: written.append(arguments))
    labels = list(range(classes))
    confusion_figure(labels, labels, [f"class {index}" for index in labels])
    assert bool(written) == numbered


def test_many_classes_have_their_confusions_listed() -> None:
    html = render_report(**report_input([f"class {index}" for index in range(30)]))
    assert html.count("Most frequent confusions") == 2
    assert "Most frequent confusions" not in render_report(**report_input())


@pytest.mark.filterwarnings("error")
def test_confusion_without_rows_can_be_drawn() -> None:
    assert confusion_figure([], [], ["no", "yes"]).startswith(b"\x89PNG")


def front_matter(card: str) -> dict[str, Any]:
    _, header, _ = card.split("---\n", 2)
    parsed: dict[str, Any] = yaml.safe_load(header)
    return parsed


@pytest.mark.parametrize(
    ("source", "base_model"),
    [
        ("bert-base-cased", "bert-base-cased"),
        ("google/bert_uncased_L-2", "google/bert_uncased_L-2"),
        ("package:some_package/model", None),
        ("factory:module:callable", None),
        ("./models/mine", None),
        ("/home/me/models/mine", None),
        ("a/b\nlicense: mit", None),
    ],
)
def test_card_names_only_a_hub_id_as_base_model(source: str, base_model: str | None) -> None:
    params = report_input()["params"] | {"model": {"source": source}}
    card = model_card(**card_input(params=params))
    assert front_matter(card).get("base_model") == base_model
    assert set(front_matter(card)) <= {"library_name", "pipeline_tag", "tags", "metrics", "base_model"}
    assert "/home" not in card


def test_hostile_names_cannot_break_card() -> None:
    given_input = hostile_input()
    card = model_card(**{key: given_input[key] for key in ("best", "label_names", "text_columns", "params")})
    assert front_matter(card)["metrics"] == ["accuracy", "f1", HOSTILE]
    body = card.split("---\n", 2)[2]
    assert not re.search(r"(?<!\\)<", body), "no HTML"
    table = [line for line in body.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {3, 4}
    assert not any(line.startswith("---") for line in body.splitlines())
    assert body.isprintable() or {c for c in body if not c.isprintable()} == {"\n"}


def test_card_shows_both_splits_and_how_to_call_the_model() -> None:
    card = model_card(**card_input())
    assert "| accuracy | 0.9012 | 0.8012 |" in card
    assert '{"text": "First text.", "text_pair": "Second text."}' in card
    assert "`text` is premise, `text_pair` is hypothesis" in card
    assert "text_pair" not in model_card(**card_input(text_columns=["review"]))


def test_confusion_rows_hold_names() -> None:
    frame = confusion_rows([0, 1, 1], [1, 1, 0], ["no", "yes"])
    assert frame.to_dict("list") == {"label": ["no", "yes", "yes"], "prediction": ["yes", "yes", "no"]}


def test_plot_names_are_distinct_and_cannot_end_a_script() -> None:
    frame = confusion_rows([0, 1, 2, 3], [0, 1, 2, 3], ["y" * 200, "y" * 201, "</script>", ""])
    assert frame["label"].nunique() == 4
    assert not frame["label"].str.contains("<").any()


def test_two_classes_have_one_precision_recall_curve() -> None:
    frame = precision_recall_rows([0, 1, 1, 0], [[2, 0], [0, 1], [1, 0.5], [1, 0.8]], ["no", "yes"])
    assert set(frame["label"]) == {"yes"}
    surest = frame.iloc[-1]
    assert (surest["precision"], surest["recall"]) == (1.0, 0.5)
    assert surest["threshold"] == pytest.approx(1 / (1 + np.exp(-1)))


def test_precision_recall_curves_stay_small_and_keep_their_ends() -> None:
    random = np.random.default_rng(0)
    label = random.integers(0, 3, 5000)
    frame = precision_recall_rows(label.tolist(), random.normal(size=(5000, 4)).tolist(), ["a", "b", "c", "never"])
    assert set(frame["label"]) == {"a", "b", "c"}, "a class without rows has no recall"
    assert frame.groupby("label").size().max() <= MAX_POINTS
    assert (frame.groupby("label")["recall"].max() == 1).all()
    assert list(precision_recall_rows([], [], ["no", "yes"]).columns) == ["precision", "recall", "threshold", "label"]


def test_report_imports_neither_torch_nor_a_stage() -> None:
    program = (
        "import sys, stages.report.html, stages.report.model_card, stages.report.plots\n"
        "ours = [name for name in sys.modules if name.startswith(('torch', 'stages'))]\n"
        "print([name for name in ours if not name.startswith('stages.report')])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['stages']"
