"""Labels of multi_label and regression: how they are read, what is written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from stages import build_loaders
from stages import tokenize as stage
from stages.batches import tokenized as store
from stages.batches.collate import make_loader
from stages.data import shards, tables
from stages.ground.errors import UserError
from stages.ground.running import run_command
from tests.support.project import WORDS, Project


def csv_rows(cells: list[Any]) -> str:
    return "text,label\n" + "".join(f'the {WORDS[n % 20]},"{cell}"\n' for n, cell in enumerate(cells))


def jsonl(cells: list[Any]) -> str:
    return "".join(json.dumps({"text": "the cat", "label": cell}) + "\n" for cell in cells)


def run(project: Project, task: str, **data: Any) -> None:
    project.write_task_params(task, data=data)
    run_command(stage.main)


def refusal(project: Project, task: str, **data: Any) -> str:
    project.write_task_params(task, data=data)
    with pytest.raises(UserError) as error:
        stage.main()
    assert "\n" not in str(error.value)
    assert not store.TOKENIZED.exists() and not Path("metrics").exists()
    return str(error.value)


def raw_labels(split: str = "train") -> list[Any]:
    return store.load_raw(store.TOKENIZED, split)["label"][:]


def split_labels(split: str = "train") -> list[Any]:
    return store.load_split(store.TOKENIZED, split)["labels"][:]


def metrics() -> dict[str, Any]:
    return json.loads(Path("metrics/data.json").read_text())


def hub(monkeypatch: pytest.MonkeyPatch, feature: Any, **splits: list[Any]) -> None:
    """Stands in for the network: `load_dataset` answers with one text column and labels of type `feature`."""
    features = datasets.Features({"text": datasets.Value("string"), "label": feature})
    loaded = {
        split: datasets.Dataset.from_dict(
            {"text": [f"the cat {n}" for n in range(len(cells))], "label": cells}, features=features
        )
        for split, cells in splits.items()
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(loaded))


# ---------------------------------------------------------------------------------------------- multi_label

LISTS = [["b", "a"], [], ["c"], ["a", "c"]]
TARGETS = [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 1.0]]


def write_lists(project: Project, form: str) -> None:
    cells: dict[str, list[Any]] = {"csv": ["b, a", "", " c ", "a ,c"], "text": ["b,a", "", "c", "a,c"], "list": LISTS}
    for split in ("train", "val"):
        if form == "csv":
            project.write(f"data/in/{split}.csv", csv_rows(cells["csv"]))
        elif form in ("text in jsonl", "list in jsonl"):
            project.write(f"data/in/{split}.jsonl", jsonl(cells[form.split()[0]]))
        else:
            path = project.folder / f"data/in/{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            kind = pa.list_(pa.string()) if form == "list in parquet" else pa.string()
            pq.write_table(pa.table({"text": ["the cat"] * 4, "label": pa.array(cells[form.split()[0]], kind)}), path)


@pytest.mark.parametrize("form", ["csv", "text in jsonl", "list in jsonl", "text in parquet", "list in parquet"])
def test_every_form_of_label_lists_becomes_the_same_targets(project: Project, form: str) -> None:
    write_lists(project, form)
    run(project, "multi_label")
    assert raw_labels() == LISTS
    assert split_labels() == TARGETS
    assert store.load_task().label_names == ("a", "b", "c")
    split = store.load_split(store.TOKENIZED, "train")
    assert split.features["labels"] == datasets.List(datasets.Value("float32"), length=3)
    raw = store.load_raw(store.TOKENIZED, "train")
    assert raw.features["label"] == datasets.List(datasets.Value("string"))
    assert metrics()["train"]["labels"] == {"a": 2, "b": 1, "c": 2}


def test_targets_are_right_across_batches(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BATCH_ROWS", 3)
    monkeypatch.setattr(shards, "BATCH_ROWS", 3)
    cells = [" ".join("abc"[: n % 4]) for n in range(22)]
    project.write("data/in/train.csv", csv_rows(cells))
    run(project, "multi_label", label_separator=" ", validation_size=0.5)
    for split in ("train", "validation"):
        assert split_labels(split) == [[float(name in row) for name in "abc"] for row in raw_labels(split)]
    project.write("data/in/train.csv", csv_rows([*cells[:20], "d", ""]))
    project.write_task_params("multi_label", data={"label_separator": " ", "label_names": ["a", "b", "c"]})
    with pytest.raises(UserError, match=r"row 21, column 'label' holds 'd', which is none of data\.label_names"):
        stage.main()


def test_json_numbers_and_booleans_in_a_list_become_their_text(project: Project) -> None:
    for split in ("train", "val"):
        project.write(f"data/in/{split}.jsonl", jsonl([[1, True], ["x"]]))
    run(project, "multi_label")
    assert raw_labels() == [["1", "true"], ["x"]]


@pytest.mark.parametrize("declared", [True, False])
def test_hub_sequences_are_read_with_the_classes_they_declare(
    project: Project, monkeypatch: pytest.MonkeyPatch, declared: bool
) -> None:
    inner = datasets.ClassLabel(names=["z", "y"]) if declared else datasets.Value("string")
    rows = [[0, 1], [], [1]] if declared else [["z", "y"], [], ["y"]]
    hub(monkeypatch, datasets.List(inner), train=rows, validation=rows, test=[None, None])
    run(project, "multi_label", dataset="some/data")
    assert raw_labels() == [["z", "y"], [], ["y"]]
    assert store.load_task().label_names == (("z", "y") if declared else ("y", "z"))
    assert raw_labels("test") == [None, None]
    assert "labels" not in store.load_split(store.TOKENIZED, "test").column_names
    assert metrics()["test"]["labels"] == {}


def test_one_label_alone_is_enough(project: Project) -> None:
    project.write("data/in/train.csv", csv_rows(["a", ""] * 10))
    run(project, "multi_label")
    assert store.load_task().label_names == ("a",)
    assert split_labels() == [[float(len(row))] for row in raw_labels()]


def test_given_label_names_decide_the_order(project: Project) -> None:
    write_lists(project, "csv")
    run(project, "multi_label", label_names=["c", "a", "b"])
    assert split_labels()[0] == [0.0, 1.0, 1.0]


BAD_LISTS: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "empty name": ("csv", csv_rows(["a", "a,,b"]), {}, ["train.csv", "row 2", "'label'", "['a', '', 'b']", "empty"]),
    "name twice": ("csv", csv_rows(["a", "b,a, b"]), {}, ["train.csv", "row 2", "['b', 'a', 'b']", "twice"]),
    "blank in list": ("jsonl", jsonl([["a"], [" "]]), {}, ["train.jsonl", "row 2", "empty"]),
    "null in list": ("jsonl", jsonl([["a"], [None]]), {}, ["train.jsonl", "row 2", "[None]", "empty"]),
    "null": ("jsonl", jsonl([["a"], None]), {}, ["train.jsonl", "row 2", "is null", "empty cell or list"]),
    "list in list": ("jsonl", jsonl([["a"], [["b"]]]), {}, ["line 2", "'label'", "JSON list", "list of text"]),
    "object": ("jsonl", jsonl([["a"], {"b": 1}]), {}, ["line 2", "'label'", "JSON object"]),
    "unknown": ("csv", csv_rows(["a", "", "a;c"]), {"label_names": ["a"], "label_separator": ";"}, ["row 3", "'c'"]),
    "no rows": ("csv", csv_rows(["a", ""]), {"label_names": ["a", "b"]}, ["no row of class 'b'"]),
    "all empty": ("csv", csv_rows(["", ""]), {}, ["train.csv", "'label'", "no label in any row"]),
    "rare": ("csv", csv_rows(["a", ""]), {"validation_size": 0.5, "seed": 1}, ["train.csv", "'a'", "left without"]),
    "too many": ("csv", csv_rows(list(range(1001))), {}, ["1000", "data.label_names"]),
}


@pytest.mark.parametrize(("suffix", "content", "data", "parts"), BAD_LISTS.values(), ids=BAD_LISTS.keys())
def test_bad_label_list_is_refused_with_its_place(
    project: Project, suffix: str, content: str, data: dict[str, Any], parts: list[str]
) -> None:
    project.write(f"data/in/train.{suffix}", content)
    line = refusal(project, "multi_label", **data)
    assert [part for part in parts if part not in line] == [], line


def test_label_that_only_another_split_has_is_refused(project: Project) -> None:
    project.write("data/in/train.csv", csv_rows(["a", "b"]))
    project.write("data/in/val.csv", csv_rows(["a", "b,c"]))
    line = refusal(project, "multi_label")
    assert "val.csv: row 2" in line and "'c'" in line and "the classes in train" in line


def test_list_is_refused_where_a_row_has_one_class(project: Project) -> None:
    project.write("data/in/train.jsonl", jsonl([["a"], ["b"]]))
    assert "JSON list" in refusal(project, "classification")


# ---------------------------------------------------------------------------------------------- regression


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_numbers_of_every_format_become_float32_targets(project: Project, suffix: str) -> None:
    cells = [0.1, -2, 3.5e3]
    for split in ("train", "val"):
        path = project.folder / f"data/in/{split}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == "parquet":
            pq.write_table(pa.table({"text": ["the cat"] * 3, "label": cells}), path)
        else:
            path.write_text(csv_rows(cells) if suffix == "csv" else jsonl(cells))
    run(project, "regression")
    assert raw_labels() == cells
    assert split_labels() == [float(np.float32(cell)) for cell in cells]
    assert store.load_split(store.TOKENIZED, "train").features["labels"] == datasets.Value("float32")
    assert store.load_raw(store.TOKENIZED, "train").features["label"] == datasets.Value("float64")
    assert store.load_task().label_names == ()
    found = metrics()
    assert found["label_names"] == []
    assert found["train"]["labels"] == {"mean": 1166.033333, "std": 1650.36388, "min": -2.0, "max": 3500.0}
    assert found["train"]["truncated"] == 0


@pytest.mark.parametrize("kind", [pa.int32(), pa.decimal128(5, 2), pa.string(), pa.float32()])
def test_parquet_labels_of_any_number_type_are_taken(project: Project, kind: pa.DataType) -> None:
    path = project.folder / "data/in/train.parquet"
    path.parent.mkdir(parents=True)
    values = pa.array([1, 2, 3, 4]).cast(kind if kind != pa.decimal128(5, 2) else pa.int64())
    values = values.cast(pa.decimal128(21, 2)) if kind == pa.decimal128(5, 2) else values
    pq.write_table(pa.table({"text": ["the cat"] * 4, "label": values}), path)
    run(project, "regression")
    assert sorted(raw_labels() + raw_labels("validation")) == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(("kind", "secret"), [("float32", -1.0), ("int64", -1), ("float32", None)])
def test_hub_test_split_without_scores_is_unlabelled(
    project: Project, monkeypatch: pytest.MonkeyPatch, kind: str, secret: float | None
) -> None:
    hub(monkeypatch, datasets.Value(kind), train=[1, -1, 3], validation=[2, 2], test=[secret, secret])
    run(project, "regression", dataset="some/data")
    assert raw_labels() == [1.0, -1.0, 3.0]
    assert raw_labels("test") == [None, None]
    assert "labels" not in store.load_split(store.TOKENIZED, "test").column_names
    assert metrics()["test"]["labels"] == {}


BAD_NUMBERS: dict[str, tuple[str, str, list[str]]] = {
    "text": ("csv", csv_rows([1, "two", 3]), ["train.csv", "row 2", "'label'", "'two'", "finite number"]),
    "empty": ("csv", csv_rows([1, "", 3]), ["train.csv", "row 2", "'label'", "is empty"]),
    "nan": ("csv", csv_rows([1, 2, "nan"]), ["train.csv", "row 3", "'label'", "nan"]),
    "infinite": ("jsonl", jsonl([1, 2, float("inf")]), ["train.jsonl", "row 3", "'label'", "inf"]),
    "beyond float32": ("csv", csv_rows([1, "1e39"]), ["row 2", "1e+39", "3.4e+38"]),
    "null": ("jsonl", jsonl([1, None]), ["train.jsonl", "row 2", "'label'", "is null"]),
    "boolean": ("jsonl", jsonl([1, True]), ["train.jsonl", "row 2", "'label'", "'true'"]),
    "list": ("jsonl", jsonl([1, [2]]), ["train.jsonl", "line 2", "'label'", "JSON list"]),
    "one row": ("csv", csv_rows([1]), ["train.csv", "0.1", "none of the 1 rows"]),
}


@pytest.mark.parametrize(("suffix", "content", "parts"), BAD_NUMBERS.values(), ids=BAD_NUMBERS.keys())
def test_label_that_is_no_finite_number_is_refused_with_its_place(
    project: Project, suffix: str, content: str, parts: list[str]
) -> None:
    project.write(f"data/in/train.{suffix}", content)
    line = refusal(project, "regression")
    assert [part for part in parts if part not in line] == [], line


@pytest.mark.parametrize(
    ("feature", "cells", "parts"),
    [
        (datasets.Value("bool"), [True, False], ["true and false"]),
        (datasets.ClassLabel(names=["a", "b"]), [0, 1], ["ClassLabel", "numbers"]),
        (datasets.Value("float64"), [1.0, None], ["row 2", "null"]),
        (datasets.Value("float64"), [-1.0, -1.0], ["no row has a label"]),
    ],
)
def test_hub_label_that_is_no_number_is_refused(
    project: Project, monkeypatch: pytest.MonkeyPatch, feature: Any, cells: list[Any], parts: list[str]
) -> None:
    hub(monkeypatch, feature, train=cells)
    line = refusal(project, "regression", dataset="some/data")
    assert [part for part in ("split train", *parts) if part not in line] == [], line


# ---------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("task", ["multi_label", "regression"])
def test_validation_is_cut_shuffled_and_depends_on_the_seed_alone(
    project: Project, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    monkeypatch.setattr(tables, "BATCH_ROWS", 7)
    project.write("data/in/train.csv", csv_rows(list(range(100)) if task == "regression" else ["a"] * 100))
    found = []
    for seed in (1, 1, 2):
        run(project, task, validation_size=0.2, seed=seed)
        train, validation = (store.load_raw(store.TOKENIZED, split).to_dict() for split in ("train", "validation"))
        assert (len(train["row"]), len(validation["row"])) == (80, 20)
        found.append(validation["text"])
        if task == "regression":
            assert sorted(train["label"] + validation["label"]) == [float(n) for n in range(100)]
            assert validation["label"] == sorted(validation["label"]) != [float(n) for n in range(80, 100)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("multi_label", torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])),
        ("regression", torch.tensor([0.5, 1.25])),
    ],
)
@pytest.mark.parametrize("numeric", [False, True])
def test_batches_and_preview_carry_the_targets_of_the_loss(
    project: Project, task: str, expected: torch.Tensor, numeric: bool
) -> None:
    cells = {"multi_label": ["a b", "", "c"], "regression": ["0.5", "1.25", "7"]}[task]
    rows = "x,text,label\n" + "".join(f"{n},the cat {n},{cell}\n" for n, cell in enumerate(cells))
    project.write("data/in/train.csv", rows)
    project.write("data/in/val.csv", rows)
    project.write_task_params(task, data={"label_separator": " ", **({"feature_columns": ["x"]} if numeric else {})})
    run_command(stage.main)
    split = store.load_split(store.TOKENIZED, "train")
    batch = next(iter(make_loader(split, [[0, 1]], store.load_tokenizer(), torch.device("cpu"), 0)))
    assert batch["labels"].dtype == torch.float32
    assert torch.equal(batch["labels"], expected)
    run_command(build_loaders.main)
    first = json.loads(Path("data/loaders/preview.json").read_text())["first_row"]
    assert first["label"] == split_labels()[first["row"]]
    assert set(first) == {"row", "label", "features" if numeric else "decoded"}
