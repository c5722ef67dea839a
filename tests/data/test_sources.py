"""Reading data: what the splits become, and bad input refused in one line that says where and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from stages import tokenize as stage
from stages.batches import tokenized as store
from stages.ground.running import run_command
from tests.support.project import Project
from tests.support.reading import GOOD, Refused, raw, write_rows

# ---------------------------------------------------------------------------------------------- bad input


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


@pytest.mark.parametrize("column", ["row", "key", "label", "prediction", "logits", "loss"])
def test_text_column_with_a_name_of_the_predictions_is_refused(project: Project, refused: Refused, column: str) -> None:
    project.write_params(data={"text_columns": [column], "label_column": "y"})
    project.write("data/in/train.csv", GOOD.replace("text,label", f"{column},y"))
    assert f"'{column}'" in refused(project)


def test_failure_keeps_the_previous_outs(project: Project, refused: Refused) -> None:
    project.write_params()
    path = project.write("data/in/train.csv", GOOD)
    run_command(stage.main)
    metrics = Path("metrics/data.json").read_bytes()
    path.write_text(GOOD + "oops\n")
    refused(project)
    assert Path("metrics/data.json").read_bytes() == metrics
    assert store.load_split(store.TOKENIZED, "train").num_rows == 36


# ---------------------------------------------------------------------------------------------- good input


def test_changed_content_is_seen_though_path_size_and_mtime_stay(project: Project) -> None:
    import os

    project.write_params()
    path = project.write("data/in/train.csv", GOOD)
    os.utime(path, (1, 1))
    run_command(stage.main)
    path.write_text(GOOD.replace("cat", "cow"))
    os.utime(path, (1, 1))
    run_command(stage.main)
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
    run_command(stage.main)
    assert list(store.load_task().label_names) == expected
    ids = [expected.index(label) for label in labels]
    assert store.load_split(store.TOKENIZED, "train")["labels"][:] == ids


def test_validation_is_cut_stratified_and_depends_on_the_seed_alone(project: Project) -> None:
    rows = [(f"the cat {n}", "rare" if n % 10 == 0 else "often") for n in range(100)]
    write_rows(project.folder / "data/in", ".csv", rows)
    found = []
    for seed in (1, 1, 2):
        project.write_params(data={"validation_size": 0.2, "seed": seed})
        run_command(stage.main)
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
    run_command(stage.main)
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
