"""Reading data: every cell as typed, and each kind of bad input refused in one line that says where and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import tokenize as stage
from stages.batches import tokenized as store
from stages.ground.errors import run_stage
from tests.support.project import Project

GOOD = "text,label\n" + "the cat sat,a\nthe dog ran,b\n" * 20
Refused = Callable[[Project], str]


def written(project: Project) -> list[str]:
    """All that is in the folder of the project, but what a start after a kill goes on from, and locks."""
    names = {path.relative_to(project.folder).as_posix() for path in project.folder.rglob("*")}
    return sorted(name for name in names - {"data"} if not name.startswith((".dvc", "runs")) or name.endswith(".tmp"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs the stage, which must refuse: exit code 2, one line on stderr, nothing written. Returns the line."""

    def run(project: Project) -> str:
        capsys.readouterr()
        before = written(project)
        with pytest.raises(SystemExit) as exit_:
            run_stage(stage.main)
        assert exit_.value.code == 2
        printed = capsys.readouterr()
        lines = printed.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), printed.err
        assert not printed.out
        assert written(project) == before
        return lines[0]

    return run


def raw(split: str) -> dict[str, list[Any]]:
    return store.load_raw(store.TOKENIZED, split).to_dict()


def parquet(path: Path, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# ---------------------------------------------------------------------------------------------- bad input

BAD_FILES: dict[str, tuple[str, str | bytes, list[str]]] = {
    "short row": ("train.csv", "text,label\na b,x\nc d\n", ["train.csv", "line 3", "1 field", "2"]),
    "long row": ("train.csv", 'text,label\n"a\nb",x\nc, d,y\n', ["train.csv", "line 4", "3 fields", "quotes"]),
    "long row, TSV": ("train.tsv", "text\tlabel\na\tx\ty\n", ["train.tsv", "line 2", "3 fields", "a tab in"]),
    "open quote": ("train.csv", 'text,label\na,x\n"b,y\nc,z\n', ["train.csv", "starts on line 3", "quote"]),
    "text after quote": ("train.csv", 'text,label\n"b"c,y\n', ["train.csv", "line 2", "quote"]),
    "NUL": ("train.csv", "text,label\na\0b,y\n", ["train.csv", "line 2", "NUL"]),
    "Latin-1": ("train.csv", b"text,label\na,x\ncaf\xe9,y\n", ["train.csv", "line 3", "byte 4", "0xe9", "UTF-8"]),
    "Latin-1, JSON": ("train.jsonl", b'{"text":"a","label":"x"}\n{"text":"\xe9"}\n', ["line 2", "0xe9", "UTF-8"]),
    "empty CSV": ("train.csv", "", ["train.csv", "empty"]),
    "empty JSONL": ("train.jsonl", "\n", ["train.jsonl", "empty"]),
    "header only": ("train.csv", "text,label\n", ["train.csv", "no rows"]),
    "double column": ("train.csv", "text,label,text\na,x,b\n", ["train.csv", "'text'", "2 times"]),
    "double key": ("train.jsonl", '{"text":"a","text":"b","label":"x"}\n', ["train.jsonl", "line 1", "twice"]),
    "lacking column": ("train.csv", "Text,label\na,x\n", ["train.csv", "no column 'text'", "did you mean 'Text'"]),
    "lacking key": ("train.jsonl", jsonl({"text": "a", "label": "x"}, {"text": "b"}), ["line 2", "'label'"]),
    "broken JSON": ("train.jsonl", '{"text":"a","label":"x"}\n\n{"text": b}\n', ["train.jsonl", "line 3", "column 10"]),
    "JSON array": ("train.json", '[{"text":"a","label":"x"}]\n', ["train.json", "line 1", "list", "one object a line"]),
    "nested JSON": ("train.jsonl", jsonl({"text": ["a"], "label": "x"}), ["line 1", "'text'", "list", "allowed"]),
    "half surrogate": ("train.jsonl", '{"text":"\\ud83d","label":"x"}\n', ["line 1", "'text'", "surrogate"]),
    "broken Parquet": ("train.parquet", b"PAR1 nothing", ["train.parquet", "not a readable Parquet"]),
    "empty text": ("train.csv", "text,label\na,x\n,y\n", ["train.csv", "row 2", "'text'", "is empty"]),
    "blank text": ("train.csv", "text,label\na,x\nb,y\n \u00a0\t,y\n", ["row 3", "'text'", "only whitespace"]),
    "empty label": ("train.csv", "text,label\na,x\nb,\n", ["train.csv", "row 2", "'label'", "is empty"]),
    "null": ("train.jsonl", jsonl({"text": "a", "label": "x"}, {"text": "b", "label": None}), ["row 2", "is null"]),
    "one class": ("train.csv", "text,label\na,x\nb,x\n", ["train.csv", "one class 'x'", "two"]),
    "too many classes": (
        "train.csv",
        "text,label\n" + "".join(f"a,{n}\n" for n in range(1001)),
        ["train.csv", "'label'", "1000", "data.label_column"],
    ),
}


@pytest.mark.parametrize(("name", "content", "parts"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_file_is_refused_with_its_place(
    project: Project, refused: Refused, name: str, content: str | bytes, parts: list[str]
) -> None:
    project.write_params()
    project.write(f"data/in/{name}", content)
    line = refused(project)
    assert "cannot be read" not in line  # that is what is left to say where no check found the reason
    assert [part for part in parts if part not in line] == [], line


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


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["a", "b", "c"], ["train.csv", "no row of class 'c'", "data.label_names"]),
        (["a", "c"], ["train.csv", "row 2", "'label'", "'b'", "data.label_names", "'a', 'c'"]),
    ],
)
def test_label_names_that_do_not_match_the_data_are_refused(
    project: Project, refused: Refused, names: list[str], parts: list[str]
) -> None:
    project.write_params(data={"label_names": names})
    project.write("data/in/train.csv", GOOD)
    line = refused(project)
    assert [part for part in parts if part not in line] == [], line


def test_file_of_unknown_format_is_refused_with_the_known_ones(project: Project, refused: Refused) -> None:
    project.write_params(data={"path": "rows.xlsx"})
    project.write("rows.xlsx", b"PK")
    assert ".csv, .tsv, .jsonl, .json, .parquet" in refused(project)


@pytest.mark.parametrize("column", ["row", "key", "label", "prediction", "logits", "loss"])
def test_text_column_with_a_name_of_the_predictions_is_refused(project: Project, refused: Refused, column: str) -> None:
    project.write_params(data={"text_columns": [column], "label_column": "y"})
    project.write("data/in/train.csv", GOOD.replace("text,label", f"{column},y"))
    assert f"'{column}'" in refused(project)


@pytest.mark.parametrize(
    ("values", "kind"), [([[1], [2]], "int64"), ([b"a", b"b"], "binary"), ([date(2020, 1, 31)] * 2, "date32")]
)
def test_parquet_column_that_is_no_text_is_refused_with_its_type(
    project: Project, refused: Refused, values: list[Any], kind: str
) -> None:
    project.write_params()
    parquet(project.folder / "data/in/train.parquet", text=values, label=["a", "b"])
    line = refused(project)
    assert "train.parquet" in line and "'text'" in line and kind in line


def test_parquet_with_damaged_pages_is_refused(project: Project, refused: Refused) -> None:
    project.write_params()
    path = project.folder / "data/in/train.parquet"
    parquet(path, text=["the cat"] * 40, label=["a", "b"] * 20)
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56
    path.write_bytes(content)
    assert "train.parquet: cannot be read" in refused(project)


def test_failure_keeps_the_previous_outs(project: Project, refused: Refused) -> None:
    project.write_params()
    path = project.write("data/in/train.csv", GOOD)
    run_stage(stage.main)
    metrics = Path("metrics/data.json").read_bytes()
    path.write_text(GOOD + "oops\n")
    refused(project)
    assert Path("metrics/data.json").read_bytes() == metrics
    assert store.load_split(store.TOKENIZED, "train").num_rows == 36


# ---------------------------------------------------------------------------------------------- good input

ODD = [
    "None",
    "NA",
    "null",
    "1",
    "01",
    "1.0",
    "nan",
    "true",
    "2020-01-31",
    ' x "y" z ',
    "a\nb",
    "#",
    "\\N",
    "é€😀",
    "''",
]


def write_rows(folder: Path, suffix: str, rows: list[tuple[str, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if suffix == ".parquet":
        parquet(folder / "train.parquet", text=[text for text, _ in rows], label=[label for _, label in rows])
    elif suffix in (".jsonl", ".json"):
        lines = jsonl(*({"text": text, "label": label, "other": 1} for text, label in rows))
        (folder / f"train{suffix}").write_text(lines, encoding="utf-8")
    else:
        import csv

        with (folder / f"train{suffix}").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
            writer.writerows([("other", "text", "label"), *(("1", text, label) for text, label in rows)])


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_text_cells_and_labels_are_read_exactly_as_typed(project: Project, suffix: str) -> None:
    project.write_params(data={"validation_size": 0.5})
    write_rows(project.folder / "data/in", suffix, [(text, text) for text in ODD for _ in range(2)])
    run_stage(stage.main)
    for split in ("train", "validation"):
        assert raw(split)["text"] == ODD
        assert raw(split)["label"] == ODD


def test_json_and_parquet_numbers_and_booleans_become_their_text(project: Project) -> None:
    project.write_params(data={"text_columns": ["text", "more"]})
    rows = '{"text": 1, "more": 2.50, "label": true}\n{"text": "x", "more": 1e5, "label": false}\n'
    project.write("data/in/train.jsonl", rows)
    parquet(project.folder / "data/in/dev.parquet", text=[1, 2], more=[0.5, 2.5], label=[True, False])
    run_stage(stage.main)
    assert [raw("train")[name] for name in ("text", "more", "label")] == [
        ["1", "x"],
        ["2.50", "1e5"],
        ["true", "false"],
    ]
    assert [raw("validation")[name] for name in ("text", "more", "label")] == [
        ["1", "2"],
        ["0.5", "2.5"],
        ["true", "false"],
    ]


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl"])
def test_byte_order_mark_is_no_part_of_the_first_column(project: Project, name: str) -> None:
    project.write_params(data={"label_names": ["b", "a"]})
    content = GOOD if name.endswith("csv") else jsonl({"text": "x", "label": "a"}, {"text": "y", "label": "b"})
    project.write(f"data/in/{name}", b"\xef\xbb\xbf" + content.encode())
    project.write("data/in/val.csv", GOOD)
    run_stage(stage.main)
    assert raw("train")["label"][:2] == ["a", "b"]


def test_single_file_outside_the_project_is_the_train_split(project: Project, tmp_path: Path) -> None:
    folder = tmp_path / "odd [1] * {name}"
    folder.mkdir()
    (folder / "rows.CSV").write_text(GOOD)
    project.write_params(data={"path": str(folder / "rows.CSV")})
    run_stage(stage.main)
    assert store.load_split(store.TOKENIZED, "train").num_rows == 36
    assert store.load_split(store.TOKENIZED, "validation").num_rows == 4
    assert not store.has_split(store.TOKENIZED, "test")


def test_changed_content_is_seen_though_path_size_and_mtime_stay(project: Project) -> None:
    import os

    project.write_params()
    path = project.write("data/in/train.csv", GOOD)
    os.utime(path, (1, 1))
    run_stage(stage.main)
    path.write_text(GOOD.replace("cat", "cow"))
    os.utime(path, (1, 1))
    run_stage(stage.main)
    assert "the cow sat" in raw("train")["text"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [(["10", "9", "-1"], ["-1", "9", "10"]), (["10", "9", "x"], ["10", "9", "x"]), (["b", "B", "a"], ["B", "a", "b"])],
)
def test_class_names_are_sorted_as_numbers_only_if_all_are(
    project: Project, labels: list[str], expected: list[str]
) -> None:
    project.write_params()
    rows = "text,label\n" + "".join(f"the cat,{label}\n" for label in labels)
    project.write("data/in/train.csv", rows)
    project.write("data/in/val.csv", rows)
    run_stage(stage.main)
    assert list(store.load_task().label_names) == expected
    ids = [expected.index(label) for label in labels]
    assert store.load_split(store.TOKENIZED, "train")["labels"][:] == ids


def test_validation_is_cut_stratified_and_depends_on_the_seed_alone(project: Project) -> None:
    rows = [(f"the cat {n}", "rare" if n % 10 == 0 else "often") for n in range(100)]
    write_rows(project.folder / "data/in", ".csv", rows)
    found = []
    for seed in (1, 1, 2):
        project.write_params(data={"validation_size": 0.2, "seed": seed})
        run_stage(stage.main)
        validation, train = raw("validation"), raw("train")
        assert sorted(validation["label"]) == ["often"] * 18 + ["rare"] * 2
        assert sorted(validation["text"] + train["text"]) == sorted(text for text, _ in rows)
        assert train["row"] == list(range(80))
        found.append(validation["text"])
    assert found[0] == found[1] != found[2]


# ---------------------------------------------------------------------------------------------- the Hub


def hub(monkeypatch: pytest.MonkeyPatch, **splits: datasets.Dataset) -> None:
    """Stands in for the network: `load_dataset` answers with `splits`."""

    def load(*_: Any, **__: Any) -> datasets.DatasetDict:
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load)


def classified(ids: list[int | None], text: Any = None, names: tuple[str, ...] = ("no", "yes")) -> datasets.Dataset:
    data = {"text": text or [f"the cat {n}" for n in range(len(ids))], "label": ids, "idx": list(range(len(ids)))}
    return datasets.Dataset.from_dict(data).cast_column("label", datasets.ClassLabel(names=list(names)))


@pytest.mark.parametrize("secret", [-1, None])
def test_hub_class_ids_become_names_and_a_secret_test_split_is_unlabelled(
    project: Project, monkeypatch: pytest.MonkeyPatch, secret: int | None
) -> None:
    project.write_params(data={"dataset": "some/data"})
    hub(monkeypatch, train=classified([1, 0] * 4), val=classified([0, 1]), test=classified([secret, secret]))
    run_stage(stage.main)
    assert list(store.load_task().label_names) == ["no", "yes"]
    assert raw("train")["label"] == ["yes", "no"] * 4
    assert raw("test")["label"] == [None, None]
    assert "labels" not in store.load_split(store.TOKENIZED, "test").column_names
    assert json.loads(Path("metrics/data.json").read_text())["test"]["labels"] == {}


BAD_HUB: dict[str, tuple[dict[str, datasets.Dataset], list[str]]] = {
    "no train": ({"test": classified([0, 1])}, ["no train split", "'test'"]),
    "no text": ({"train": classified([0, 1], text=[1, 2])}, ["'text'", "int64", "split train"]),
    "no column": ({"train": classified([0, 1]).remove_columns("text")}, ["no column 'text'", "'label', 'idx'"]),
    "unlabelled train": ({"train": classified([-1, -1])}, ["split train", "no row has a label"]),
    "unlabelled validation": (
        {"train": classified([0, 1]), "validation": classified([-1])},
        ["split validation", "no row has a label"],
    ),
    "one label missing": ({"train": classified([0, 1, -1])}, ["split train", "row 3", "'label'"]),
    "class without rows": ({"train": classified([0, 1], names=("no", "yes", "so"))}, ["'so'", "data.label_names"]),
    "two validations": (
        {"train": classified([0, 1]), "dev": classified([0]), "val": classified([0])},
        ["split dev", "val is a validation split as well"],
    ),
}


@pytest.mark.parametrize(("splits", "parts"), BAD_HUB.values(), ids=BAD_HUB.keys())
def test_hub_data_that_cannot_serve_is_refused_with_its_split(
    project: Project,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
    splits: dict[str, datasets.Dataset],
    parts: list[str],
) -> None:
    project.write_params(data={"dataset": "some/data"})
    hub(monkeypatch, **splits)
    line = refused(project)
    assert [part for part in ["some/data", *parts] if part not in line] == [], line


def test_hub_dataset_that_cannot_be_reached_points_to_local_files(project: Project, refused: Refused) -> None:
    project.write_params(data={"dataset": "nobody/nothing", "config": "x"})
    line = refused(project)
    assert "nobody/nothing" in line and "Hub" in line and "data.path" in line


def test_hub_dataset_that_needs_its_own_code_is_refused(
    project: Project, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found data.py")

    monkeypatch.setattr(datasets, "load_dataset", load)
    project.write_params(data={"dataset": "some/data"})
    assert "its own Python code" in refused(project)


@pytest.mark.parametrize("name", ["data/in", "csv"])
def test_local_path_or_format_as_hub_id_is_refused(project: Project, refused: Refused, name: str) -> None:
    project.write("data/in/train.csv", GOOD)
    project.write_params(data={"dataset": name})
    line = refused(project)
    assert f"'{name}'" in line and "data.path" in line
