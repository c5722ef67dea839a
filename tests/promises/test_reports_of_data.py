"""What people reported about data: the input, and the line or value that answers it."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
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
from stages.ground.errors import UserError
from stages.ground.running import run_command
from tests.support.project import ROOT, Project
from tests.support.reports import DEV, TRAIN, Write, lay_out, refusal, says, text

NUMBERS = "text,label\n" + "a,1\nb,2\n" * 9


def packed(content: str) -> Write:
    return lambda path: path.write_bytes(gzip.compress(content.encode()))


def parquet(**columns: Any) -> Write:
    return lambda path: pq.write_table(pa.table(columns), path)


def lines(*rows: str) -> Write:
    return text("".join(f"{row}\n" for row in rows))


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
    run_command(stage.main)
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
    run_command(stage.main)
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


def test_label_of_very_many_digits_is_a_name(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    lay_out(project, {"train.csv": text(NUMBERS.replace("1", "9" * 5000))})
    project.write_params()
    assert "train: " in says(capsys)
