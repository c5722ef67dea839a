"""Columns of numbers: which are taken, how they are standardised, and what of them is refused."""

from __future__ import annotations

import hashlib
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from stages import build_loaders
from stages import tokenize as stage
from stages.batches import tokenized as store
from stages.batches.collate import make_loader
from stages.data import numbers, shards, tables
from stages.data.features import Standardizer
from stages.ground.errors import UserError
from stages.ground.running import run_command
from tests.support.project import Project

Cells = np.random.default_rng(0).normal(3.0, 2.0, (40, 3))


def csv_rows(values: Any = Cells, header: str = "pixel_1,pixel_0,width,label") -> str:
    rows = [",".join([*(str(float(cell)) for cell in row), "ab"[n % 2]]) for n, row in enumerate(values)]
    return "\n".join([header, *rows]) + "\n"


def run(project: Project, *columns: str, **data: Any) -> None:
    project.write_task_params("classification", data={"feature_columns": list(columns), **data})
    run_command(stage.main)


def refusal(project: Project, *columns: str, **data: Any) -> str:
    project.write_task_params("classification", data={"feature_columns": list(columns), **data})
    with pytest.raises(UserError) as error:
        stage.main()
    assert "\n" not in str(error.value)
    assert not store.TOKENIZED.exists() and not Path("metrics").exists()
    return str(error.value)


def matrix(split: str) -> np.ndarray:
    return np.array(store.load_split(store.TOKENIZED, split)["features"][:], np.float32)


def test_features_are_standardised_by_train_alone_after_the_cut(project: Project) -> None:
    project.write("data/in/train.csv", csv_rows())
    project.write("data/in/test.csv", csv_rows(Cells * 100))
    run(project, "pixel_*", "width", validation_size=0.25)
    raw = {split: store.load_raw(store.TOKENIZED, split).to_pandas() for split in store.SPLITS}
    columns = ["pixel_1", "pixel_0", "width"]
    assert raw["train"].columns.tolist() == ["row", "key", *columns, "label"]
    assert len(raw["train"]) == 30
    train = raw["train"][columns].to_numpy()
    for split in store.SPLITS:
        expected = (raw[split][columns].to_numpy() - train.mean(0)) / train.std(0)
        np.testing.assert_allclose(matrix(split), expected, rtol=1e-6, atol=1e-6)
    written = json.loads((store.TOKENIZED / "features.json").read_text())
    assert written["columns"] == columns
    np.testing.assert_allclose(written["mean"], train.mean(0), rtol=1e-14)
    np.testing.assert_allclose(written["std"], train.std(0), rtol=1e-14)


def test_split_holds_fixed_length_float32_and_the_task_says_so(project: Project) -> None:
    project.write("data/in/train.csv", csv_rows())
    run(project, "width", "pixel_?")
    split = store.load_split(store.TOKENIZED, "train")
    assert split.features == datasets.Features(
        {"features": datasets.List(datasets.Value("float32"), length=3), "labels": datasets.Value("int64")}
    )
    task = store.load_task()
    assert task.feature_columns == ("width", "pixel_1", "pixel_0")
    assert (task.text_columns, task.model_inputs) == ((), ("features",))
    assert store.load_tokenizer() is None and not (store.TOKENIZED / "tokenizer").exists()
    assert store.lengths(split).tolist() == [1] * 36
    raw = store.load_raw(store.TOKENIZED, "train")
    assert raw.features["width"] == datasets.Value("float64")
    key = json.dumps([raw[0][name] for name in task.feature_columns], separators=(",", ":"))
    assert raw[0]["key"] == hashlib.sha256(key.encode()).hexdigest()[:16]


def test_metrics_have_no_lengths_and_count_shared_rows(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.write("data/in/train.csv", csv_rows())
    project.write("data/in/val.csv", csv_rows(Cells[:2]))
    run(project, "pixel_*", "width")
    metrics = json.loads(Path("metrics/data.json").read_text())
    assert metrics["train"] == {"rows": 40, "labels": {"a": 20, "b": 20}}
    assert metrics["duplicates_across_splits"] == {"train_validation": 2}
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "tokenize: train: 40 rows, 3 features each"
    assert "same features" in lines[2]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_numbers(project: Project, suffix: str) -> None:
    rows = [{"x": 0.1 + n, "y": n, "z": n % 3 == 0, "label": "ab"[n % 2]} for n in range(8)]
    path = project.folder / f"data/in/train.{suffix}"
    path.parent.mkdir(parents=True)
    frame = pd.DataFrame(rows)
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pandas(frame.astype({"x": str})), path)  # text is parsed
    else:
        frame.astype({"z": int}).to_csv(path, sep="\t" if suffix == "tsv" else ",", index=False)
    project.write("data/in/val.csv", "label,z,x,y\na,1,.5,1e2\nb,0, +1 ,-0.0\n")
    run(project, "x", "y", "z")
    raw = store.load_raw(store.TOKENIZED, "train").to_pandas()
    np.testing.assert_array_equal(raw[["x", "y", "z"]], frame[["x", "y", "z"]].astype(float))
    assert store.load_raw(store.TOKENIZED, "validation").to_pandas()[["x", "y", "z"]].values.tolist() == [
        [0.5, 100.0, 1.0],
        [1.0, 0.0, 0.0],
    ]


def test_hub_columns_of_any_number_type_are_taken(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table(
        {
            "f": pa.array([1.5, 2.5] * 4, pa.float32()),
            "d": pa.array([2**60 + 1, 2] * 4, pa.uint64()),
            "label": ["a", "b"] * 4,
        }
    )
    splits = datasets.DatasetDict({"train": datasets.Dataset(table), "validation": datasets.Dataset(table)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
    run(project, "?", dataset="some/data")
    raw = store.load_raw(store.TOKENIZED, "train")
    assert raw["f"][:2] == [1.5, 2.5] and raw["d"][:2] == [float(2**60), 2.0]


def test_same_content_gives_the_same_bytes_in_another_place(
    make_project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(1).normal(size=(2_500, 3))  # several batches of every kind
    found = []
    for place in ("one", "elsewhere/two"):
        project = make_project(tmp_path / place)
        monkeypatch.chdir(project.folder)
        project.write("data/in/train.csv", csv_rows(values))
        run(project, "pixel_*", "width")
        files = [path for path in sorted(Path("data/tokenized").rglob("*")) if path.is_file()]
        found.append({path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    assert found[0] == found[1]
    assert Path("data/tokenized/features.json") in found[0]


def test_name_of_a_column_wins_over_the_pattern_it_would_be(project: Project) -> None:
    project.write("data/in/train.csv", csv_rows(header="x*,xy,z,label"))
    run(project, "x*")
    assert store.load_task().feature_columns == ("x*",)


def test_label_column_is_matched_by_no_pattern(project: Project) -> None:
    project.write("data/in/train.csv", csv_rows())
    run(project, "*")
    assert store.load_task().feature_columns == ("pixel_1", "pixel_0", "width")


@pytest.mark.parametrize(
    ("columns", "header", "parts"),
    [
        (["pixel_*", "dot_*"], None, ["train.csv", "no column matches 'dot_*'", "data.feature_columns", "'width'"]),
        (["lab*"], None, ["no column matches 'lab*'"]),
        (["Pixel_*"], None, ["no column matches 'Pixel_*'"]),
        (["pixel_*", "*_0"], None, ["'pixel_0'", "both 'pixel_*' and '*_0'"]),
        (["width", "*"], None, ["'width'", "both 'width' and '*'"]),
        (["Width"], None, ["no column 'Width'", "did you mean 'width'", "data.feature_columns"]),
        (["*"], "x,loss,z,label", ["'loss'", "predictions", "rename"]),
        (["*"], "x,x,z,label", ["'x' occurs 2 times"]),
    ],
)
def test_columns_that_are_not_clear_are_refused(
    project: Project, columns: list[str], header: str | None, parts: list[str]
) -> None:
    project.write("data/in/train.csv", csv_rows(header=header) if header else csv_rows())
    line = refusal(project, *columns)
    assert [part for part in parts if part not in line] == [], line


def test_split_that_lacks_a_column_of_the_pattern_is_refused(project: Project) -> None:
    project.write("data/in/train.csv", csv_rows())
    project.write("data/in/val.csv", csv_rows(header="pixel_1,pixel_2,width,label"))
    line = refusal(project, "pixel_*")
    assert "val.csv" in line and "no column 'pixel_0'" in line


@pytest.mark.parametrize(
    ("cell", "what"),
    [
        ("", "is empty"),
        (" ", "is empty"),
        ("NA", "holds 'NA'"),
        ("nan", "holds nan"),
        ("-inf", "holds -inf"),
        ("1,5", "holds '1,5'"),
        ("1_0", "holds '1_0'"),
        ("true", "holds 'true'"),
        ("1e39", "holds 1e+39"),
    ],
)
def test_cell_that_is_no_finite_number_is_refused_with_its_place(project: Project, cell: str, what: str) -> None:
    project.write("data/in/train.csv", csv_rows())
    project.write("data/in/test.csv", f'width,label,pixel_0\n1,a,2\n1,b,2\n1,a,"{cell}"\n')
    line = refusal(project, "width", "pixel_0")
    assert [part for part in ("test.csv", "row 3", "'pixel_0'", what) if part not in line] == [], line


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ([1.0, None], ["row 2", "null"]),
        ([1.0, float("nan")], ["row 2", "holds nan"]),
        ([[1], [2]], ["List", "numbers"]),
    ],
)
def test_parquet_column_that_is_no_number_is_refused(project: Project, values: list[Any], parts: list[str]) -> None:
    (project.folder / "data/in").mkdir(parents=True)
    pq.write_table(pa.table({"x": values, "label": ["a", "b"]}), project.folder / "data/in/train.parquet")
    line = refusal(project, "x")
    assert [part for part in ("train.parquet", "'x'", *parts) if part not in line] == [], line


def test_row_number_is_right_beyond_the_first_batch(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BATCH_ROWS", 7)
    content = csv_rows().splitlines()
    for cell in ("x", "nan"):
        changed = [*content[:23], f"{cell},1,1,a", *content[24:]]
        project.write("data/in/train.csv", "\n".join(changed) + "\n")
        assert "row 23, column 'pixel_1'" in refusal(project, "pixel_*")


def test_number_too_far_from_train_for_float32_is_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BATCH_ROWS", 1)
    project.write("data/in/train.csv", "x,label\n1e-20,a\n2e-20,b\n")
    project.write("data/in/val.csv", "x,label\n1e-20,a\n1e30,b\n")
    line = refusal(project, "x")
    assert "val.csv: row 2, column 'x' holds 1e+30" in line and "train" in line


# ---------------------------------------------------------------------------------------------- Standardizer


def test_moments_are_exact_and_no_cut_into_batches_decides_a_bit() -> None:
    values = 1e9 + np.random.default_rng(0).normal(size=10_000)
    values[[3, 9_000]] = 1e25, -1e25  # between which a sum in float64 forgets all that it had
    exact = [Fraction(value) for value in values.tolist()]
    mean = sum(exact) / len(exact)
    cuts: tuple[list[int], ...] = ([], [1, 10, 4_000], list(range(7, 10_000, 7)))
    found = [numbers.Moments.of(pa.chunked_array(np.split(values, cut))) for cut in cuts]
    assert found[0] == found[1] == found[2]
    assert found[0].mean == float(sum(exact)) / len(exact) == pytest.approx(float(mean), rel=1e-15)
    assert found[0].std == pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in exact) / len(exact)), rel=1e-15)
    assert (found[0].low, found[0].high) == (values.min(), values.max())


def test_constant_column_becomes_exactly_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BATCH_ROWS", 3)
    train = datasets.Dataset.from_dict({"x": [0.1] * 10, "y": [0.1, 0.3] * 5})
    standardizer = Standardizer.fit(train, ["x", "y"])
    assert standardizer.mean[0] == 0.1 and standardizer.std[0] == 1.0
    assert standardizer(pd.DataFrame({"x": [0.1, 1.1], "y": [0.1, 0.3]}))[:, 0].tolist() == [0.0, 1.0]


def test_saved_standardizer_gives_a_frame_the_features_that_training_had(project: Project) -> None:
    project.write("data/in/train.csv", csv_rows())
    run(project, "pixel_*", "width")
    frame = store.load_raw(store.TOKENIZED, "validation").to_pandas().assign(more="text")
    features = Standardizer.load(store.TOKENIZED)(frame.iloc[:, ::-1])
    assert features.dtype == torch.float32 and features.shape == (4, 3)
    np.testing.assert_array_equal(features.numpy(), matrix("validation"))
    as_text = Standardizer.load(store.TOKENIZED)(frame.astype(str))
    np.testing.assert_array_equal(as_text.numpy(), features.numpy())


@pytest.mark.parametrize(
    ("frame", "parts"),
    [
        ({"x": [1.0]}, ["no column 'y'", "'x'"]),
        ({"x": [1.0, 2.0], "y": [1.0, None]}, ["row 2", "'y'", "null"]),
        ({"x": [1.0, 2.0], "y": ["1", "one"]}, ["row 2", "'y'", "'one'"]),
        ({"x": [1.0], "y": [float("inf")]}, ["row 1", "'y'", "inf"]),
        ({"x": [1.0, 2.0], "y": [1.0, "1"]}, ["'y'", "several kinds"]),
        ({"x": [1.0], "y": [pd.Timestamp(0)]}, ["'y'", "timestamp"]),
    ],
)
def test_frame_that_cannot_be_standardised_is_refused(frame: dict[str, Any], parts: list[str]) -> None:
    standardizer = Standardizer(("x", "y"), np.zeros(2), np.ones(2))
    with pytest.raises(UserError) as error:
        standardizer(pd.DataFrame(frame))
    assert "\n" not in str(error.value)
    assert [part for part in ("data frame", *parts) if part not in str(error.value)] == [], error.value


def test_column_that_a_frame_has_twice_is_refused() -> None:
    with pytest.raises(UserError, match="2 columns 'x'"):
        Standardizer(("x",), np.zeros(1), np.ones(1))(pd.DataFrame([[1.0, 2.0]], columns=["x", "x"]))


def test_folder_without_features_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"features\.json.*feature_columns"):
        Standardizer.load(tmp_path)


# ---------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_of_features_follow_the_rows_asked_for(project: Project, num_workers: int) -> None:
    project.write("data/in/train.csv", csv_rows())
    run(project, "pixel_*", "width")
    split = store.load_split(store.TOKENIZED, "train")
    wanted = [[5, 2, 7], [0], [35, 1, 3, 4]]
    loader = make_loader(split, wanted, None, torch.device("cpu"), num_workers)
    for _ in range(2):
        found = list(loader)
        assert [batch["labels"].tolist() for batch in found] == [
            [split["labels"][row] for row in rows] for rows in wanted
        ]
        for rows, batch in zip(wanted, found, strict=True):
            assert (batch["features"].dtype, batch["labels"].dtype) == (torch.float32, torch.int64)
            np.testing.assert_array_equal(batch["features"].numpy(), matrix("train")[rows])


def test_plan_and_preview_of_features(project: Project) -> None:
    project.write("data/in/train.csv", csv_rows())
    run(project, "pixel_*", "width")
    run_command(build_loaders.main)
    assert json.loads(Path("metrics/loaders.json").read_text())["padding_efficiency"] == 1.0
    preview = json.loads(Path("data/loaders/preview.json").read_text())
    assert preview["tensors"] == {
        "features": {"shape": [16, 3], "dtype": "float32"},
        "labels": {"shape": [16], "dtype": "int64"},
    }
    first = preview["first_row"]
    split = store.load_split(store.TOKENIZED, "train")
    assert first == {"row": first["row"], "label": split["labels"][first["row"]], "features": first["features"]}
    np.testing.assert_array_equal(np.array(first["features"], np.float32), matrix("train")[first["row"]])
