"""What people reported about data, tokenizers and hostile text: the input, and the line or value that answers it."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import tokenize as stage
from stages.batches import tokenized as store
from stages.config.pipeline import require_rows
from stages.ground.errors import UserError, run_stage
from stages.modeling.head import head_of
from stages.report.html import render_report
from stages.report.model_card import model_card
from stages.report.plots import plot_names
from stages.select_best import write_plots
from tests.support.project import ROOT, WORDS, Project
from tests.support.report_input import CLASSIFICATION, predictions, report_input

TRAIN = "text,label\n" + "the cat sat,a\nthe dog ran,b\n" * 10
NUMBERS = "text,label\n" + "a,1\nb,2\n" * 9
DEV = "text,label\nthe cat,a\n"
Write = Callable[[Path], Any]


def text(content: str) -> Write:
    return lambda path: path.write_text(content, encoding="utf-8")


def packed(content: str) -> Write:
    return lambda path: path.write_bytes(gzip.compress(content.encode()))


def parquet(**columns: Any) -> Write:
    return lambda path: pq.write_table(pa.table(columns), path)


def lines(*rows: str) -> Write:
    return text("".join(f"{row}\n" for row in rows))


def lay_out(project: Project, files: dict[str, Write]) -> None:
    for name, write in files.items():
        path = project.folder / "data/in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """What the stage prints as it refuses: one line, exit code 2, nothing written."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_stage(stage.main)
    assert ended.value.code == 2
    *before, line = capsys.readouterr().err.splitlines(keepends=True)
    assert line.startswith("error: ") and all(other.startswith("tokenize: ") for other in before), before
    assert not store.TOKENIZED.exists()
    return line


def says(capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    run_stage(stage.main)
    return capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- values

REFUSED: dict[str, tuple[dict[str, Write], list[str]]] = {
    "NaN as a label, JSON": (
        {"train.jsonl": lines('{"text": "a", "label": 1}', '{"text": "b", "label": NaN}')},
        ["train.jsonl: line 2, 'label' holds nan", "fill it in"],
    ),
    "Infinity as a text, JSON": (
        {"train.json": lines('{"text": -Infinity, "label": 1}')},
        ["train.json: line 1, 'text' holds -inf"],
    ),
    "NaN as a label, Parquet": (
        {"train.parquet": parquet(text=["a", "b", "c"], label=[0.0, 1.0, float("nan")])},
        ["train.parquet: row 3, column 'label' holds nan"],
    ),
    "NaN as a text, second shard": (
        {
            "train-00000-of-00002.parquet": parquet(text=[1.0, 2.0], label=["a", "b"]),
            "train-00001-of-00002.parquet": parquet(text=[1.0, float("inf")], label=["a", "b"]),
        },
        ["train-00001-of-00002.parquet: row 2, column 'text' holds inf"],
    ),
    "empty text, second shard": (
        {"train-0.csv": text(TRAIN), "train-1.csv": text("text,label\nx,a\n,b\n")},
        ["data/in/train-1.csv: row 2, column 'text' is empty"],
    ),
    "two names of one split": (
        {"train.csv": text(TRAIN), "valid.csv": text(DEV), "validation.csv": text(DEV)},
        ["valid.csv and validation.csv are both validation files", "keep one of them"],
    ),
    "eval is test to datasets": (
        {"train.csv": text(TRAIN), "eval.csv": text(DEV), "test.csv": text(DEV)},
        ["eval.csv and test.csv are both test files (test, testing, eval, evaluation stand for it)"],
    ),
    "packed and not": (
        {"train.csv": text(TRAIN), "test.csv": text(DEV), "test.csv.gz": packed(DEV)},
        ["test.csv and test.csv.gz are both test files"],
    ),
    "two spellings": ({"train.csv": text(TRAIN), "Train.csv": text(TRAIN)}, ["Train.csv and train.csv"]),
    "a file and shards": (
        {"train.csv": text(TRAIN), "train-00000-of-00001.csv": text(TRAIN)},
        ["train-00000-of-00001.csv and train.csv are both train files"],
    ),
    "a missing shard": (
        {"train-00000-of-00003.csv": text(TRAIN), "train-00002-of-00003.csv": text(TRAIN)},
        ["one of 3 shards", "there are 2"],
    ),
    "a broken archive": ({"train.csv.gz": lambda path: path.write_bytes(gzip.compress(TRAIN.encode())[:-9])},
                         ["train.csv.gz: cannot be unpacked"]),
    "no archive": ({"train.csv.gz": text(TRAIN)}, ["train.csv.gz: cannot be read"]),
    "semicolons": ({"train.csv": text(TRAIN.replace(",", ";"))},
                   ["line 1 is 'text;label'", "separated by a semicolon", "a comma"]),
    "quoted semicolons": ({"train.csv": text('"text";"label"\n"a";"b"\n')}, ["separated by a semicolon"]),
    "commas in a tsv": ({"train.tsv": text(TRAIN)}, ["separated by a comma", ".tsv file it is a tab"]),
    "sep=": ({"train.csv": text("sep=;\n" + TRAIN.replace(",", ";"))}, ["line 1 is 'sep=;'", "remove it", "a comma"]),
    "sep= of the right one": ({"train.csv": text("sep=,\n" + TRAIN)}, ["line 1 is 'sep=,'", "names the columns\n"]),
    "half labelled": (
        {"train.csv": text(TRAIN), "dev.csv": text(DEV),
         "test.jsonl": lines('{"text": "a"}', '{"text": "b", "label": "a"}')},
        ["test.jsonl: line 2 has a 'label'", "or none"],
    ),
    "empty labels": (
        {"train.csv": text(TRAIN), "dev.csv": text(DEV), "test.csv": text("text,label\nx,\ny,a\n")},
        ["test.csv: row 1, column 'label' is empty", "or remove the column, to predict without labels"],
    ),
    "empty labels, first shard": (
        {"train.csv": text(TRAIN), "dev.csv": text(DEV), "test-0.csv": text("text,label\nx,\n"),
         "test-1.csv": text("text,label\ny,a\n")},
        ["test-0.csv: row 1, column 'label' is empty"],
    ),
    "blank line in a file of one column": (
        {"train.csv": text(TRAIN), "dev.csv": text(DEV), "test.csv": text("text\nthe cat\n \na dog\n")},
        ["test.csv: line 3 is only whitespace; remove it"],
    ),
    "save_to_disk": (
        {"dataset_dict.json": text("{}"), "train/state.json": text("{}"), "train/data-00000-of-00001.arrow": text("")},
        ["dataset_dict.json says that `datasets` saved it with save_to_disk", "to_parquet"],
    ),
    "save_to_disk of one split": (
        {"state.json": text("{}"), "dataset_info.json": text("{}"), "data-00000-of-00001.arrow": text("")},
        ["state.json says that `datasets` saved it with save_to_disk"],
    ),
    "misspelt label column": (
        {"train.csv": text(TRAIN), "dev.csv": text(DEV), "test.csv": text("text,labels\nx,a\n")},
        ["test.csv: no column 'label'", "did you mean 'labels'?"],
    ),
    "validation without labels": (
        {"train.csv": text(TRAIN), "dev.csv": text("text\nx\n")}, ["dev.csv: no column 'label'"],
    ),
    "pipe for a file": ({"train.csv": text(TRAIN), "test.csv": lambda path: os.mkfifo(path)}, ["test.csv: a pipe"]),
    "device for a file": ({"train.csv": lambda path: path.symlink_to("/dev/zero")}, ["train.csv: a pipe, a device"]),
}  # fmt: skip


@pytest.mark.parametrize(("files", "parts"), REFUSED.values(), ids=REFUSED.keys())
def test_what_would_become_something_else_is_refused_with_its_place(
    project: Project, capsys: pytest.CaptureFixture[str], files: dict[str, Write], parts: list[str]
) -> None:
    project.write_params()
    lay_out(project, files)
    line = refusal(capsys)
    assert [part for part in parts if part not in line] == [], line


@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "/dev/null"])
def test_data_path_that_never_ends_is_refused_at_once(
    project: Project, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    os.mkfifo(project.folder / "pipe")
    project.write_params(data={"path": name})
    assert f"{name}: a pipe, a device" in refusal(capsys)


def test_home_in_data_path_is_refused_before_dvc_looks_for_it(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.write_params(data={"path": "~/rows.csv"})
    assert "data.path is '~/rows.csv', but DVC knows no ~; write the whole path" in refusal(capsys)


TAKEN: dict[str, tuple[dict[str, Write], dict[str, int], list[str]]] = {
    "valid": ({"train.csv": text(TRAIN), "valid.csv": text(DEV)}, {"train": 20, "validation": 1}, ["valid.csv"]),
    "Validation": ({"train.csv": text(TRAIN), "Validation.csv": text(DEV)}, {"train": 20, "validation": 1}, []),
    "Test": ({"train.csv": text(TRAIN), "dev.csv": text(DEV), "Test.csv": text(DEV)}, {"test": 1}, ["Test.csv"]),
    "eval": ({"train.csv": text(TRAIN), "dev.csv": text(DEV), "eval.csv": text(DEV)}, {"test": 1},
             ["test: 'data/in/eval.csv'"]),
    "as on the Hub, and more": (
        {"data/train.csv": text(TRAIN), "data/dev.csv": text(DEV), "data/notes.csv": text(DEV), "test.csv": text(DEV)},
        {"train": 20, "validation": 1}, ["'test.csv'", "'data/notes.csv'"],
    ),
    "a word in a name": ({"mrpc-train.csv": text(TRAIN), "mrpc_dev_v2.csv": text(DEV)},
                         {"train": 20, "validation": 1}, []),
    "one shard": (
        {"train.csv": text(TRAIN),
         "validation-00000-of-00001.parquet": parquet(text=["the cat", "a dog"], label=["a", "b"])},
        {"train": 20, "validation": 2}, [],
    ),
    "gzip": (
        {"train.csv.gz": packed(TRAIN), "dev.tsv.gz": packed(DEV.replace(",", "\t")),
         "test.jsonl.gz": packed('{"text": "the cat", "label": "a"}\n')},
        {"train": 20, "validation": 1, "test": 1}, [],
    ),
    "a folder a split": (
        {"train/1.csv": text(TRAIN), "train/2.csv": text(TRAIN), "validation/a.csv": text(DEV)},
        {"train": 40, "validation": 1}, [],
    ),
    "a repository of the Hub": (
        {"data/train-00000-of-00001.parquet": parquet(text=["a", "b"] * 9, label=["a", "b"] * 9), "README.md": text(""),
         "data/validation-00000-of-00001.parquet": parquet(text=["a", "b"], label=["a", "b"])},
        {"train": 18, "validation": 2}, [],
    ),
    "left aside": (
        {"train.csv": text(TRAIN), "dev.csv": text(DEV), "train_and_test.csv": text(DEV), "extra.csv": text(DEV),
         "test.xlsx": text(""), "old/test.csv": text(DEV), "README.md": text(""), ".hidden.csv": text("")},
        {"train": 20, "validation": 1},
        ["left aside: 'extra.csv', 'old/', 'test.xlsx', 'train_and_test.csv'\n"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("files", "rows", "parts"), TAKEN.values(), ids=TAKEN.keys())
def test_files_are_taken_for_the_splits_that_datasets_takes_them_for(
    project: Project,
    capsys: pytest.CaptureFixture[str],
    files: dict[str, Write],
    rows: dict[str, int],
    parts: list[str],
) -> None:
    project.write_params()
    lay_out(project, files)
    said = says(capsys)
    assert {split: store.load_split(store.TOKENIZED, split).num_rows for split in rows} == rows
    assert store.has_split(store.TOKENIZED, "test") == ("test" in rows)
    assert [part for part in parts if part not in said] == [], said


def test_shards_are_read_in_the_order_of_their_numbers(project: Project) -> None:
    project.write_params()
    lay_out(project, {f"train-{n}.csv": text(f"text,label\nrow {n},a\nrow {n},b\n") for n in (10, 9, 2)})
    lay_out(project, {"dev.csv": text(DEV)})
    run_stage(stage.main)
    assert store.load_raw(store.TOKENIZED, "train")["text"][::2] == ["row 2", "row 9", "row 10"]


def test_default_data_say_nothing_more(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.write_params()
    lay_out(project, {"train.csv": text(TRAIN), "validation.csv": text(DEV), "test.csv": text(DEV)})
    said = [line.partition(":")[2].partition(":")[0].strip() for line in says(capsys).splitlines()]
    assert [line for line in said if line != "warning"] == ["train", "validation", "test"]


UNLABELLED: dict[str, tuple[str, Write, str, Write]] = {
    "no column": ("classification", text(TRAIN), "test.csv", text("text\nthe cat\na dog\n")),
    "all -1": ("classification", text(TRAIN), "test.csv", text("text,label\nthe cat,-1\na dog,-1\n")),
    "all -1, Parquet": ("classification", text(TRAIN), "test.parquet", parquet(text=["the", "a"], label=[-1, -1])),
    "no key": ("classification", text(TRAIN), "test.jsonl", lines('{"text": "the"}', '{"text": "a"}')),
    "no column, regression": ("regression", text(NUMBERS), "test.csv", text("text\na\nb\n")),
    "all -1, regression": (
        "regression", text(NUMBERS), "test.csv", text("text,label\na,-1\nb,-1.0\n")
    ),
    "empty cells": ("classification", text(TRAIN), "test.csv", text("text,label\nthe cat,\na dog,  \n")),
    "null, JSON": ("classification", text(TRAIN), "test.jsonl", lines(*['{"text": "the", "label": null}'] * 2)),
    "null, Parquet": ("classification", text(NUMBERS), "test.parquet", parquet(text=["the", "a"], label=pa.nulls(2))),
    "NaN, Parquet": (
        "classification", text(NUMBERS), "test.parquet", parquet(text=["the", "a"], label=[float("nan")] * 2)
    ),
    "empty cells, regression": ("regression", text(NUMBERS), "test.csv", text("text,label\na,\nb,\n")),
    "empty cells, multi_label": (
        "multi_label", text('text,label\n' + 'a,"x,y"\nb,x\n' * 9), "test.csv", text("text,label\na,\nb,\n")
    ),
    "no column, multi_label": (
        "multi_label", text('text,label\n' + 'a,"x,y"\nb,x\n' * 9), "test.csv", text("text\na\nb\n")
    ),
}  # fmt: skip


@pytest.mark.parametrize(("task", "train", "name", "test"), UNLABELLED.values(), ids=UNLABELLED.keys())
def test_local_test_split_without_labels_is_predicted_like_one_of_the_hub(
    project: Project, capsys: pytest.CaptureFixture[str], task: str, train: Write, name: str, test: Write
) -> None:
    project.write_task_params(task)
    lay_out(project, {"train.csv": train, "dev.csv": train, name: test})
    assert f"data/in/{name}: " in says(capsys)
    assert "labels" not in store.load_split(store.TOKENIZED, "test").column_names
    assert store.load_raw(store.TOKENIZED, "test")["label"][:] == [None, None]


def test_class_ids_of_minus_one_in_parquet_are_secret_labels(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})

    def rows(*labels: int) -> Write:
        made = datasets.Dataset.from_dict({"text": ["the cat"] * len(labels), "label": labels}, features=features)
        return lambda path: made.to_parquet(str(path))

    project.write_params()
    lay_out(project, {"train.parquet": rows(*[0, 1] * 9), "dev.parquet": rows(1), "test.parquet": rows(-1, -1)})
    assert "predicted, and not scored" in says(capsys)
    assert store.load_raw(store.TOKENIZED, "test")["label"][:] == [None, None]
    lay_out(project, {"test.parquet": rows(-1, 1)})
    shutil.rmtree(store.TOKENIZED)
    assert "test.parquet: row 1, column 'label' is null" in refusal(capsys)


def test_minus_one_is_a_label_where_train_has_it(project: Project) -> None:
    project.write_params()
    lay_out(project, {"train.csv": text("text,label\n" + "a,1\nb,-1\n" * 9), "test.csv": text("text,label\nx,-1\n")})
    run_stage(stage.main)
    assert store.load_split(store.TOKENIZED, "test")["labels"][:] == [0]


ALIKE: dict[str, tuple[Write, list[str]]] = {
    "numbers": (lines(*['{"text": "a", "label": 1}', '{"text": "b", "label": 1.0}', '{"text": "c", "label": 0}'] * 2),
                ["'1', '1.0'"]),
    "blanks": (lines(*['{"text": "a", "label": "neg"}', '{"text": "b", "label": "neg "}'] * 2), ["'neg', 'neg '"]),
    "case": (lines(*['{"text": "a", "label": "Neg"}', '{"text": "b", "label": "neg"}'] * 2), ["'Neg', 'neg'"]),
    "unseen": (lines(*['{"text": "a", "label": "x"}', '{"text": "b", "label": "x\\u200b"}'] * 2), ["'x\\u200b'"]),
    "quotes": (lines(*['{"text": "a", "label": "x"}', '{"text": "b", "label": "\'x\'"}'] * 2), ["'x'"]),
    "joined": (lines(*['{"text": "a", "label": "not_so"}', '{"text": "b", "label": "not-so"}'] * 2),
               ["'not-so', 'not_so'"]),
    "form": (lines(*['{"text": "a", "label": "\\u00e9"}', '{"text": "b", "label": "e\\u0301"}'] * 2), ["warning"]),
}  # fmt: skip


@pytest.mark.parametrize(("train", "parts"), ALIKE.values(), ids=ALIKE.keys())
def test_classes_that_are_two_spellings_of_one_are_both_named(
    project: Project, capsys: pytest.CaptureFixture[str], train: Write, parts: list[str]
) -> None:
    project.write_params()
    lay_out(project, {"train.jsonl": train, "dev.jsonl": train})
    said = says(capsys)
    assert all(part in said for part in [*parts, "separate classes", "one spelling"]), said
    names = list(store.load_task().label_names)
    project.write_params(data={"label_names": names})
    assert "separate classes" not in says(capsys), "who names them knows"


@pytest.mark.parametrize("signs", [("-1", "1"), ("A", "A-"), ("'", '"'), ("_", "-")])
def test_labels_of_signs_are_no_two_spellings(
    project: Project, capsys: pytest.CaptureFixture[str], signs: tuple[str, str]
) -> None:
    project.write_params()
    lay_out(project, {"train.parquet": parquet(text=["a", "b"] * 9, label=[*signs] * 9)})
    assert "separate classes" not in says(capsys)


@pytest.mark.parametrize("name", ["nan", "NaN", "<NA>", "None", "null"])
def test_class_that_stands_for_a_missing_value_is_named(
    project: Project, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    project.write_params()
    lay_out(project, {"train.csv": text(TRAIN + f"the cat,{name}\n" * 2)})
    assert f"warning: data/in/train.csv: column 'label' holds '{name}', a class of its own" in says(capsys)
    project.write_params(data={"label_names": ["a", "b", name]})
    assert "of its own" not in says(capsys)


@pytest.mark.parametrize("cell", ["['x', 'y']", '["x", "y"]', "['x']", "[1, 2]", "['x' 'y']", "[]"])
def test_list_of_labels_that_was_written_as_text_is_refused(
    project: Project, capsys: pytest.CaptureFixture[str], cell: str
) -> None:
    project.write_task_params("multi_label")
    rows = pd.DataFrame({"text": ["a", "b", "c"], "label": ["x", "x,y", cell]})
    lay_out(project, {"train.csv": lambda path: rows.to_csv(path, index=False), "dev.csv": text(DEV)})
    assert "train.csv: row 3, column 'label' holds" in (line := refusal(capsys))
    assert "a list that was written as text" in line


# ---------------------------------------------------------------------------------------------- tokenizers


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def model(project: Project, tiny_model: Path) -> Path:
    """The tiny model in the project, as `model.source`."""
    project.overrides["model"] = {"source": "./model"}
    return shutil.copytree(tiny_model, project.folder / "model")


def roberta(model: Path, **config: Any) -> None:
    # [PAD] of the tiny tokenizer is id 0, so that one position is never used.
    edit(model / "config.json", **{"model_type": "roberta", "max_position_embeddings": 34, "pad_token_id": 0, **config})
    edit(model / "tokenizer_config.json", model_max_length=64)


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "esm", "bert"])
def test_positions_below_the_padding_are_not_advised(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    roberta(model, model_type=family)
    lay_out(project, {"train.csv": text(TRAIN)})
    usable = 34 if family == "bert" else 33
    project.write_params(tokenize={"max_length": 40})
    assert f"write at most {usable}\n" in refusal(capsys)
    project.write_params(tokenize={"max_length": usable})
    run_stage(stage.main)


def test_roberta_has_two_positions_fewer_where_the_pad_token_is_1(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roberta(model, pad_token_id=1)
    lay_out(project, {"train.csv": text(TRAIN)})
    project.write_params(tokenize={"max_length": 34, "pad_token": "[UNK]"})
    assert "max_position_embeddings is 34, of which 32 are for tokens; write at most 32\n" in refusal(capsys)


def test_tokenizer_that_pads_otherwise_than_a_model_that_counts_from_padding_is_refused(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roberta(model, pad_token_id=1)
    lay_out(project, {"train.csv": text(TRAIN)})
    project.write_params()
    assert "pads with '[PAD]', id 0, but the model's pad_token_id is 1" in (line := refusal(capsys))
    assert "write '[UNK]' in tokenize.pad_token" in line


def test_end_of_sequence_pads_where_nothing_else_does_and_a_line_says_so(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay_out(project, {"train.csv": text(TRAIN)})
    edit(model / "tokenizer_config.json", pad_token=None, eos_token="[SEP]")
    project.write_params()
    assert "no pad token; '[SEP]' is taken (tokenize.pad_token names another)" in says(capsys)
    loaded = store.load_tokenizer()
    assert loaded is not None and loaded.pad_token == "[SEP]"
    project.write_params(tokenize={"pad_token": "[MASK]"})
    assert "is taken" not in says(capsys)
    loaded = store.load_tokenizer()
    assert loaded is not None and loaded.pad_token == "[MASK]"


@pytest.mark.parametrize(
    ("wanted", "part"),
    [
        ("<nothing>", "tokenize.pad_token is '<nothing>', which is no token"),
        (None, "write '[PAD]' in tokenize.pad_token"),
    ],
)
def test_pad_token_that_is_none_is_refused(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str], wanted: str | None, part: str
) -> None:
    edit(model / "tokenizer_config.json", pad_token=None)
    lay_out(project, {"train.csv": text(TRAIN)})
    project.write_params(tokenize={"pad_token": wanted})
    assert part in refusal(capsys)


SPECIAL = TRAIN + "the cat [SEP] a dog,a\n"


@pytest.mark.parametrize("token", ["[SEP]", "[MASK]", "[PAD]", "[CLS]"])
def test_special_token_in_a_text_is_refused_with_its_row(
    project: Project, capsys: pytest.CaptureFixture[str], token: str
) -> None:
    # Rows of what is cut off keep the numbers that they have in the file.
    project.write_params(data={"validation_size": 0.5})
    lay_out(project, {"train.csv": text(SPECIAL.replace("[SEP]", token))})
    line = refusal(capsys)
    assert f"data/in/train.csv: row 21, column 'text' holds '{token}'" in line
    assert "tokenize.split_special_tokens: true" in line


@pytest.mark.parametrize(("split", "count"), [(True, 1), (False, 2)])
def test_special_token_in_a_text_is_read_as_one_says(project: Project, split: bool, count: int) -> None:
    project.write_params(tokenize={"split_special_tokens": split})
    lay_out(project, {"train.csv": text(SPECIAL), "dev.csv": text(SPECIAL)})
    run_stage(stage.main)
    tokenizer = store.load_tokenizer()
    assert tokenizer is not None
    ids = store.load_split(store.TOKENIZED, "train")[20]["input_ids"]
    assert ids.count(tokenizer.sep_token_id) == count
    assert ids == tokenizer("the cat [SEP] a dog")["input_ids"], "whoever loads the tokenizer reads it alike"


def test_what_only_looks_like_a_special_token_is_text(project: Project) -> None:
    project.write_params()
    lay_out(project, {"train.csv": text(TRAIN + "the [sep] cat,a\n[ SEP ] [X],b\n")})
    run_stage(stage.main)


def test_end_of_sequence_in_a_text_of_an_encoder_decoder_is_never_read_as_that(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(model / "config.json", model_type="bart", is_encoder_decoder=True)
    edit(model / "tokenizer_config.json", eos_token="[SEP]")
    lay_out(project, {"train.csv": text(SPECIAL)})
    project.write_params(tokenize={"split_special_tokens": False})
    assert "row 21, column 'text' holds '[SEP]'" in refusal(capsys)


def test_special_token_that_is_a_piece_of_text_too_is_refused_though_it_should_be_split(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import T5Config, T5Tokenizer

    letters = sorted({*"".join(WORDS), "<", "/", ">"})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0), *((letter, -2.0) for letter in letters)]
    for path in model.glob("tokenizer*"):
        path.unlink()
    T5Tokenizer(vocab=pieces, extra_ids=3).save_pretrained(str(model))
    T5Config(vocab_size=64).save_pretrained(str(model))
    lay_out(project, {"train.csv": text(TRAIN + "a <unk> 😀,b\nthe </s> cat,a\n")})
    project.write_params(tokenize={"split_special_tokens": True})
    assert "row 22, column 'text' holds '</s>'" in (line := refusal(capsys)) and "change the text" in line


def test_models_own_tokenizer_with_tokens_that_the_model_lacks_is_refused(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    size = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(str(model))
    lay_out(project, {"train.csv": text(TRAIN)})
    project.write_params()
    line = refusal(capsys)
    assert f"its tokenizer has {size + 1} tokens, but model.source has {size}; give the model an embedding" in line


@pytest.mark.parametrize("cell", ["\u200b", "\x01\x02"])
@pytest.mark.parametrize("columns", [["text"], ["other", "text"]])
def test_row_of_nothing_but_special_tokens_is_refused(
    project: Project, capsys: pytest.CaptureFixture[str], cell: str, columns: list[str]
) -> None:
    rows = "text,other,label\nthe cat,a,x\na dog,a,y\n"
    lay_out(project, {"train.csv": text(f"{rows}{cell},a,x\n"), "dev.csv": text(rows)})
    project.write_params(data={"text_columns": columns})
    assert "train.csv: row 3, column 'text' becomes no token at all" in refusal(capsys)


def vocabulary(change: Callable[[dict[str, int]], object]) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        content = json.loads((model / "tokenizer.json").read_text())
        change(content["model"]["vocab"])
        (model / "tokenizer.json").write_text(json.dumps(content))

    return write


def names_inputs(*names: str) -> Callable[[Path], None]:
    return lambda model: edit(model / "tokenizer_config.json", model_input_names=list(names))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (vocabulary(lambda vocab: vocab.pop("[UNK]")), "train.csv: row 21: the tokenizer fails at this row: WordPiece"),
        (vocabulary(lambda vocab: vocab.update(cat=5000)), "its tokenizer gives 'cat' the id 5000, but model.source"),
        (names_inputs(), "its tokenizer makes nothing (model_input_names in tokenizer_config.json)"),
        (names_inputs("pixel_values"), "a model of text reads 'input_ids'; name that there, too"),
    ],
)
def test_tokenizer_that_the_model_or_a_row_does_not_fit_is_refused(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], part: str
) -> None:
    change(model)
    lay_out(project, {"train.csv": text(TRAIN + "a 😀 cat,a\n"), "dev.csv": text(DEV)})
    project.write_params()
    assert part in refusal(capsys)


XLNET = {"model_type": "xlnet", "vocab_size": 200}


@pytest.mark.parametrize(("config", "side"), [(None, "right"), (XLNET, "left")])
def test_padding_that_moves_positions_is_put_on_the_other_side(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str], config: dict[str, Any] | None, side: str
) -> None:
    edit(model / "tokenizer_config.json", padding_side="left")
    if config:
        (model / "config.json").write_text(json.dumps(config))
    lay_out(project, {"train.csv": text(TRAIN)})
    project.write_params()
    assert ("pads on the left, which moves the positions" in says(capsys)) == (side == "right")
    loaded = store.load_tokenizer()
    assert loaded is not None and loaded.padding_side == side


def test_architecture_with_two_base_models_is_looked_at_too(project: Project, model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "funnel", "vocab_size": 200}))
    lay_out(project, {"train.csv": text(TRAIN)})
    project.write_params()
    run_stage(stage.main)


@pytest.mark.parametrize("columns", [["text"], ["text", "other"]])
def test_row_of_no_token_is_refused(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str], columns: list[str]
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(sorted({*"".join(WORDS), "_"}))}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="_").save_pretrained(str(model))
    lay_out(project, {"train.csv": text("text,other,label\nthe cat,a,x\n😀,😀,y\na dog,a,x\nthe,a,y\n")})
    lay_out(project, {"dev.csv": text("text,other,label\nthe cat,a,x\n")})
    project.write_params(data={"text_columns": columns})
    assert "train.csv: row 2, column 'text'" in (line := refusal(capsys)) and "no token at all" in line


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


def test_pipe_in_a_folder_of_data_is_refused_before_dvc_waits_for_it(project: Project) -> None:
    lay_out(project, {"train.csv": text(TRAIN), "deep/er/pipe": lambda path: os.mkfifo(path)})
    with pytest.raises(UserError, match="data/in/deep/er/pipe: a pipe"):
        require_rows(Path("data/in"))
    project.write_params()
    command = [sys.executable, "-m", "stages", "repro"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("error: data/in/deep/er/pipe: a pipe, a device or a socket")


def test_two_classes_never_have_one_name_in_a_plot() -> None:
    for names in (["<a", "\u2039a", "\u2039a (0)"], ["=a b", "'=a b", "'=a b (1)"], ["a", "a", "a (0)", "a (0) (0)"]):
        assert len(set(plot_names(names))) == len(names)


def test_label_of_very_many_digits_is_a_name(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    lay_out(project, {"train.csv": text(NUMBERS.replace("1", "9" * 5000))})
    project.write_params()
    assert "train: " in says(capsys)
