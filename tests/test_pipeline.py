"""The five stages through real `dvc repro` in a real repository."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from checkout import Checkout
from conftest import ROOT

from stages.config.params import read_yaml


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Checkout:
    """A checkout in which the whole pipeline ran once, with everything committed."""
    checkout = Checkout(tmp_path_factory.mktemp("done") / "repo", tiny_model, {})
    checkout.repro()
    checkout.commit("first run")
    return checkout


def read_json(checkout: Checkout, name: str) -> Any:
    return json.loads((checkout.folder / name).read_text(encoding="utf-8"))


def test_every_stage_leaves_what_the_design_lists(done: Checkout) -> None:
    names = done.digests()
    for name in (
        "data/tokenized/dataset_dict.json",
        "data/loaders/epoch-0000.arrow",
        "data/loaders/epoch-0001.arrow",
        "data/loaders/preview.json",
        "models/candidates/step-00000011/model.safetensors",
        "models/candidates/step-00000022/config.json",
        "data/predictions/validation/step-00000022.parquet",
        "data/predictions/test/predictions.parquet",
        "models/best/model.safetensors",
        "models/best/tokenizer.json",
        "models/best/README.md",
        "metrics/data.json",
        "metrics/loaders.json",
        "metrics/train.json",
        "metrics/candidates.json",
        "metrics/best.json",
        "plots/train.tsv",
        "plots/eval.tsv",
        "plots/confusion_matrix.csv",
        "plots/precision_recall.csv",
        "report.html",
    ):
        assert name in names, name


def test_metrics_and_plots_have_the_keys_of_the_design(done: Checkout) -> None:
    best = read_json(done, "metrics/best.json")
    assert set(best) == {"step", "epoch", "metric", "validation", "test", "runner_up", "reason"}
    metrics = {"loss", "accuracy", "f1", "precision", "recall", "matthews_correlation"}
    candidates = read_json(done, "metrics/candidates.json")
    assert set(candidates) == {"step-00000011", "step-00000022"}
    assert set(best["test"]) == set(best["validation"]) == set(candidates["step-00000011"]) == metrics
    assert best["validation"] == candidates[f"step-{best['step']:08d}"]
    train = read_json(done, "metrics/train.json")
    assert set(train) == {"steps", "epochs", "stopped_early", "best_step", "train_loss", "environments"}
    assert (train["steps"], train["epochs"], train["stopped_early"], train["environments"]) == (22, 2, False, 1)
    assert train["best_step"] == best["step"]
    assert {"padding_efficiency", "batches_per_epoch"} <= set(read_json(done, "metrics/loaders.json"))
    data = read_json(done, "metrics/data.json")
    assert data["label_names"] == ["different", "equivalent"]
    assert data["train"]["rows"] == 84
    history = pd.read_csv(done.folder / "plots/train.tsv", sep="\t")
    assert list(history) == ["step", "epoch", "loss", "learning_rate", "grad_norm"]
    assert history["step"].tolist() == [3, 6, 9, 12, 15, 18, 21, 22]
    evals = pd.read_csv(done.folder / "plots/eval.tsv", sep="\t")
    assert list(evals)[:3] == ["step", "epoch", "loss"]
    assert set(evals) == metrics | {"step", "epoch"}
    assert evals["step"].tolist() == [11, 22]


def test_what_train_measured_is_what_evaluate_measures(done: Checkout) -> None:
    candidates = read_json(done, "metrics/candidates.json")
    for row in pd.read_csv(done.folder / "plots/eval.tsv", sep="\t").to_dict("records"):
        scores = candidates[f"step-{row['step']:08d}"]
        assert {name: row[name] for name in scores} == scores


def test_predictions_stand_beside_the_rows_they_are_of(done: Checkout) -> None:
    table = pd.read_parquet(done.folder / "data/predictions/test/predictions.parquet")
    raw = pd.read_csv(done.folder / "data/sample/test.csv")
    assert list(table) == ["row", "key", "sentence1", "sentence2", "label", "prediction", "logits", "loss"]
    assert table["row"].tolist() == list(range(20))
    assert table["sentence1"].tolist() == raw["sentence1"].tolist()
    assert table["label"].tolist() == (raw["label"] == "equivalent").astype(int).tolist()
    for row in table.to_dict("records"):
        assert row["logits"].dtype == "float32"
        assert row["prediction"] == row["logits"].argmax()
        a, b = (math.exp(value) for value in row["logits"])
        assert row["loss"] == pytest.approx(-math.log((a, b)[row["label"]] / (a + b)), rel=1e-4)
    best = read_json(done, "metrics/best.json")
    assert best["test"]["accuracy"] == (table["label"] == table["prediction"]).mean()
    assert best["test"]["loss"] == pytest.approx(table["loss"].mean(), rel=1e-6)


def test_best_model_is_an_ordinary_hugging_face_folder(done: Checkout) -> None:
    from transformers import pipeline

    best = str(done.folder / "models/best")
    answer: Any = pipeline("text-classification", model=best)({"text": "the cat sat", "text_pair": "the cat sat"})
    assert answer["label"] in ("different", "equivalent")
    config = read_json(done, "models/best/config.json")
    assert config["id2label"] == {"0": "different", "1": "equivalent"}
    assert config["problem_type"] == "single_label_classification"
    step = read_json(done, "metrics/best.json")["step"]
    candidate = f"models/candidates/step-{step:08d}/model.safetensors"
    assert done.digests(candidate)[candidate] == done.digests("models/best")["models/best/model.safetensors"]


def test_nothing_in_the_outs_tells_where_or_when_they_were_made(done: Checkout) -> None:
    for name in done.digests():
        content = (done.folder / name).read_bytes()
        for trace in (str(done.folder), str(ROOT), "/tmp/", f"@{socket.gethostname()}"):
            assert trace.encode() not in content, (name, trace)


def test_nothing_changed_starts_no_stage(done: Checkout) -> None:
    output = done.repro()
    assert "Running stage" not in output
    assert "up to date" in output


def test_a_second_clone_ends_with_the_same_lock(done: Checkout, tmp_path: Path, tiny_model: Path) -> None:
    second = Checkout(tmp_path / "elsewhere", tiny_model, {})
    second.repro()
    assert second.digests() == done.digests()
    assert len(second.runs()) == 1  # it trained, and did not find the other's result
    assert [event["step"] for event in second.log() if event["event"] == "start"] == [0]


def test_dvc_compares_commits(done: Checkout, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    done.run("git", "clone", "-q", str(done.folder), str(clone))
    work = object.__new__(Checkout)
    work.folder, work.env = clone, done.env
    train = read_json(work, "params.yaml")
    train["train"]["learning_rate"] = 5e-3
    (clone / "params.yaml").write_text(json.dumps(train, indent=1))
    work.run("dvc", "config", "cache.dir", str(done.folder / ".dvc/cache"))
    assert "train.learning_rate" in work.run("dvc", "params", "diff")
    output = work.repro()
    assert "differs" not in output  # the clone has no other run to differ from
    assert "Stage 'tokenize' is cached" in output or "didn't change" in output
    work.commit("higher learning rate")
    changes = json.loads(work.run("dvc", "metrics", "diff", "HEAD~1", "--json"))
    assert changes["metrics/train.json"]["train_loss"]["diff"] != 0
    assert "learning_rate" in work.run("dvc", "params", "diff", "HEAD~1")
    assert "file://" in work.run("dvc", "plots", "diff", "HEAD~1")


def test_stage_that_finished_is_published_again_without_training(done: Checkout) -> None:
    before = done.digests("models/candidates", "metrics/train.json", "plots/train.tsv")
    started = len(done.log())
    output = done.run("python", "-m", "stages.train")
    assert "complete since step 22: publishing it" in output
    assert done.digests("models/candidates", "metrics/train.json", "plots/train.tsv") == before
    assert [event["step"] for event in done.log()[started:]] == [22, 22]


def test_test_split_is_not_needed(tmp_path: Path, tiny_model: Path) -> None:
    checkout = Checkout(tmp_path / "repo", tiny_model, {"train": {"num_train_epochs": 1}})
    (checkout.folder / "data/sample/test.csv").unlink()
    (checkout.folder / "data/sample/validation.csv").unlink()
    checkout.repro()
    assert read_json(checkout, "metrics/best.json")["test"] is None
    assert read_json(checkout, "metrics/data.json")["validation"]["rows"] == 9
    assert not list((checkout.folder / "data/predictions/test").iterdir())


def test_default_parameters_name_a_model_that_the_same_command_installs() -> None:
    from stages.modeling.source import resolve_model
    from stages.storage.files import sha256_file

    folder = resolve_model(read_yaml(ROOT / "params.yaml")["model"]["source"], None)
    assert folder is not None
    expected = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert sha256_file(folder / "model.safetensors") == expected
