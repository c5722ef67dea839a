"""Which files are which split, and each kind of bad folder refused in one line that says what it holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages import tokenize as stage
from stages.batches import tokenized as store
from stages.ground.running import run_command
from tests.support.project import Project
from tests.support.reading import GOOD, Refused

# ---------------------------------------------------------------------------------------------- bad input

BAD_FOLDERS: dict[str, tuple[dict[str, str], list[str]]] = {
    "nothing there": ({}, ["data/in", "no such file or folder"]),
    "no train file": ({"tran.csv": GOOD, "test.csv": GOOD}, ["no train file", "'tran.csv'", "'test.csv'"]),
    "two formats": ({"train.csv": GOOD, "train.jsonl": ""}, ["train.csv and train.jsonl", "both train"]),
    "dev and val": ({"train.csv": GOOD, "dev.csv": GOOD, "val.csv": GOOD}, ["dev.csv and val.csv", "validation"]),
    "unknown label in test": (
        {"train.csv": GOOD, "dev.csv": GOOD, "test.csv": "text,label\nx,a\ny,c\n"},
        ["test.csv", "row 2", "'label'", "'c'", "'a', 'b'"],
    ),
    "half labelled local test": (
        {"train.csv": GOOD, "dev.csv": GOOD, "test.jsonl": '{"text":"x","label":null}\n{"text":"y","label":"a"}\n'},
        ["test.jsonl", "row 1", "'label'", "null"],
    ),
    "no second row of a class": ({"train.csv": GOOD + "x,c\n"}, ["train.csv", "'c'", "one row", "validation"]),
    "too few rows to cut": ({"train.csv": "text,label\nx,a\ny,b\nx,a\ny,b\n"}, ["train.csv", "0.1", "2 classes"]),
}


@pytest.mark.parametrize(("files", "parts"), BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_bad_folder_is_refused_with_what_it_holds(
    project: Project, refused: Refused, files: dict[str, str], parts: list[str]
) -> None:
    project.write_params()
    for name, content in files.items():
        project.write(f"data/in/{name}", content)
    line = refused(project)
    assert [part for part in parts if part not in line] == [], line


def test_file_of_unknown_format_is_refused_with_the_known_ones(project: Project, refused: Refused) -> None:
    project.write_params(data={"path": "rows.xlsx"})
    project.write("rows.xlsx", b"PK")
    assert ".csv, .tsv, .jsonl, .json, .parquet" in refused(project)


# ---------------------------------------------------------------------------------------------- good input


def test_single_file_outside_the_project_is_the_train_split(project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "odd [1] * {name}"
    folder.mkdir()
    (folder / "rows.CSV").write_text(GOOD)
    project.write_params(data={"path": str(folder / "rows.CSV")})
    run_command(stage.main)
    assert store.load_split(store.TOKENIZED, "train").num_rows == 36
    assert store.load_split(store.TOKENIZED, "validation").num_rows == 4
    assert not store.has_split(store.TOKENIZED, "test")
