"""The five stages through real `dvc repro` in a real repository."""

from __future__ import annotations

import json
import math
import shutil
import socket
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from stages.config.read import read_yaml
from tests.support.damage import flip
from tests.support.project import ROOT, Checkout
from tests.support.train_stage import run_stage


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Checkout:
    """A checkout in which the whole pipeline ran once, with everything committed."""
    checkout = Checkout(tmp_path_factory.mktemp("done") / "repo", tiny_model, {})
    checkout.repro(real=True)
    checkout.commit("first run")
    return checkout


def clone(done: Checkout, folder: Path) -> Checkout:
    """A clone of `done` with its outs, and a cache of its own."""
    done.run("git", "clone", "-q", str(done.folder), str(folder))
    work = Checkout.at(folder, {**done.env, "DVC_SITE_CACHE_DIR": str(folder.parent / "site-cache")})
    shutil.copytree(done.folder / ".dvc/cache", folder / ".dvc/cache")
    work.run("dvc", "checkout", "-q")
    return work


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
        "metrics/scores.json",
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


def test_dvc_compares_commits(done: Checkout, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    done.run("git", "clone", "-q", str(done.folder), str(clone))
    work = Checkout.at(clone, done.env)
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
    assert changes["metrics/scores.json"]["train.loss"]["diff"] != 0
    assert "learning_rate" in work.run("dvc", "params", "diff", "HEAD~1")
    assert "file://" in work.run("dvc", "plots", "diff", "HEAD~1")
    # Back again, from DVC's run cache: it needs every out of a stage to be a cached one, a metric or a plot.
    work.run("git", "checkout", "-q", "HEAD~1", "params.yaml")
    output = work.repro()
    for stage in ("train", "evaluate", "select_best"):
        assert f"Stage '{stage}' is cached" in output
    assert work.digests() == done.digests()


def test_dvc_shows_at_most_twelve_numbers_the_deciding_metric_first(done: Checkout) -> None:
    shown = json.loads(done.run("dvc", "metrics", "show", "--json"))
    (scores,) = shown[""]["data"].values()
    columns = [f"{split}.{name}" for split, values in scores["data"].items() for name in values]
    assert columns[0] == "test.accuracy"
    assert len(columns) <= 12
    assert all(isinstance(value, float) for values in scores["data"].values() for value in values.values())
    best = read_json(done, "metrics/best.json")
    assert scores["data"]["test"] == best["test"]
    assert scores["data"]["validation"] == {name: best["validation"][name] for name in ("accuracy", "loss")}


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("metrics", [1, 7, 8, 9, 40])
def test_however_many_metrics_there_are_twelve_are_shown_and_loss_among_them(metrics: int, labelled: bool) -> None:
    from stages.select_best import headline

    scores = {"loss": 0.5, **{f"m{number}": float(number) for number in range(metrics)}}
    best = {"metric": f"m{metrics - 1}", "validation": scores, "test": dict(scores) if labelled else None}
    found = headline(best, 0.25)
    judged = found["test" if labelled else "validation"]
    assert next(iter(judged)) == f"m{metrics - 1}"
    assert list(judged)[-1] == "loss"
    count = sum(map(len, found.values()))
    assert count == min(12, metrics + (4 if labelled and metrics > 0 else 2)), found
    assert found["train"] == {"loss": 0.25}
    assert best["validation"] == scores


# An edit of a finished pipeline, and the stages that DVC then runs again for it: no more than it touches.
EDITS: list[tuple[str, str, str, set[str]]] = [
    ("data/sample/test.csv", "equivalent", "different", {"tokenize"}),
    ("stages/data/files.py", "not UTF-8", "no UTF-8", {"tokenize"}),
    ("stages/data/statistics.py", "(50, 90, 99)", "(50, 95, 99)", {"tokenize"}),
    ("stages/batches/plan.py", "no batch plan there", "no plan", {"build_loaders", "train", "evaluate", "select_best"}),
    ("stages/watching/loggers.py", "training goes on without it", "it is left out", {"train"}),
    ("stages/training/loop.py", "LOWEST_SCALE = 2.0**-14", "LOWEST_SCALE = 2.0**-12", {"train"}),
    ("stages/run/saver.py", "FIRST_SECONDS = 1.0", "FIRST_SECONDS = 2.0", {"train"}),
    ("stages/report/html.py", "FEW_CLASSES = 6", "FEW_CLASSES = 7", {"select_best"}),
    ("stages/custom/own.py", "class StopAt", "class Stopper", {"train", "evaluate", "select_best"}),
    ("params.yaml", '"save_seconds": 60', '"save_seconds": 30', set()),
    ("params.yaml", '"launcher": "auto"', '"launcher": "python"', set()),
    ("params.yaml", '"loggers": []', '"loggers": ["tensorboard"]', set()),
    ("params.yaml", '"num_proc": "auto"', '"num_proc": 2', set()),
    ("params.yaml", '"num_workers": 0', '"num_workers": 2', set()),
    ("params.yaml", '"device": "auto"', '"device": "cpu"', set()),
    ("params.yaml", '"threads": null', '"threads": 2', {"train", "evaluate", "select_best"}),
    ("params.yaml", '"tie_break": "earliest"', '"tie_break": "latest"', {"select_best"}),
    ("params.yaml", '"max_length": 24', '"max_length": 23', {"tokenize", "select_best"}),
    ("params.yaml", '"threshold": 0.5', '"threshold": 0.4', {"train", "evaluate", "select_best"}),
    ("params.yaml", '"drop_last": false', '"drop_last": true', {"build_loaders", "select_best"}),
]


def test_edit_runs_the_stages_that_it_touches(done: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc.repo import Repo

    monkeypatch.setenv("DVC_SITE_CACHE_DIR", done.env["DVC_SITE_CACHE_DIR"])
    monkeypatch.chdir(done.folder)  # its stages are named as seen from here
    for path, old, new, expected in EDITS:
        file = done.folder / path
        before = file.read_bytes()
        assert old.encode() in before, (path, old)
        file.write_bytes(before.replace(old.encode(), new.encode(), 1))
        with Repo(str(done.folder)) as repo:
            status = repo.status()
        file.write_bytes(before)
        # Stages after these hear of it only if outs change: that is seen when they run.
        assert set(status) == expected, (path, new, status)


def test_removed_edited_and_added_test_rows_train_no_step(done: Checkout, tmp_path: Path) -> None:
    work = clone(done, tmp_path / "clone")
    rows = (work.folder / "data/sample/test.csv").read_text()
    (work.folder / "data/sample/test.csv").unlink()
    output = work.repro()
    assert read_json(work, "metrics/best.json")["test"] is None
    assert not list((work.folder / "data/predictions/test").iterdir())
    (scores,) = json.loads(work.run("dvc", "metrics", "show", "--json"))[""]["data"].values()
    assert set(scores["data"]) == {"validation", "train"}
    # Relabelled, edited, one row more, and a column that no model sees, in train too.
    lines = rows.splitlines()
    lines[1] = lines[1].replace("different", "equivalent").replace("equivalent", "different")
    lines[2] = f"good {lines[2]}"
    (work.folder / "data/sample/test.csv").write_text("\n".join([*lines, lines[3]]) + "\n")
    train = (work.folder / "data/sample/train.csv").read_text().splitlines()
    (work.folder / "data/sample/train.csv").write_text(
        "\n".join([f"{train[0]},note", *(f"{line},n{number}" for number, line in enumerate(train[1:]))]) + "\n"
    )
    output += work.repro()
    assert output.count("Running stage 'tokenize'") == output.count("Running stage 'select_best'") == 2
    for stage in ("build_loaders", "train", "evaluate"):
        assert f"Running stage '{stage}'" not in output
        assert f"Stage '{stage}' is cached" not in output
    assert work.digests("models/candidates") == done.digests("models/candidates")
    table = pd.read_parquet(work.folder / "data/predictions/test/predictions.parquet")
    assert len(table) == 21


def test_train_that_dvc_runs_again_for_a_message_publishes_at_once(done: Checkout, tmp_path: Path) -> None:
    work = clone(done, tmp_path / "clone")
    shutil.copytree(done.folder / "runs", work.folder / "runs")
    loggers = work.folder / "stages/watching/loggers.py"
    loggers.write_text(loggers.read_text().replace("training goes on without it", "it is left out"))
    output = work.repro()
    assert "is complete since step 22: publishing it, nothing to train" in output
    assert "Running stage 'evaluate'" not in output
    assert work.digests("models", "data/predictions", "plots") == done.digests("models", "data/predictions", "plots")


def test_damaged_candidate_of_a_finished_run_comes_back_from_the_cache_of_dvc(done: Checkout, tmp_path: Path) -> None:
    work = clone(done, tmp_path / "clone")
    shutil.copytree(done.folder / "runs", work.folder / "runs")
    (run,) = work.runs()
    for model in run.glob("candidates/step-*/model.safetensors"):
        flip(model)
    (run / "candidates/step-00000011/config.json").unlink()
    output = run_stage(work, "train")
    assert output.count("was damaged and is restored, at no cost") == 2
    assert "nothing to train" in output
    assert work.digests("models/candidates") == done.digests("models/candidates")


def test_stages_after_train_compute_with_its_threads_and_say_so(done: Checkout, tmp_path: Path) -> None:
    work = clone(done, tmp_path / "clone")
    shutil.copytree(done.folder / "runs", work.folder / "runs")
    line = "intra-op threads set from 2 to 1, as the run has"
    for stage in ("evaluate", "select_best"):
        assert work.run("python", "-m", f"stages.{stage}", OMP_NUM_THREADS="2").count(line) == 1
    assert work.digests() == done.digests()
    params = work.folder / "params.yaml"
    params.write_text(params.read_text().replace('"threads": null', '"threads": 2'))
    assert "threads set from 1 to 2" in run_stage(work, "evaluate")


def test_stage_that_finished_is_published_again_without_training(done: Checkout) -> None:
    before = done.digests("models/candidates", "metrics/train.json", "plots/train.tsv")
    started = len(done.log())
    output = run_stage(done, "train")
    assert "complete since step 22: publishing it" in output
    assert done.digests("models/candidates", "metrics/train.json", "plots/train.tsv") == before
    assert [event["step"] for event in done.log()[started:]] == [22, 22]


def test_default_parameters_name_a_model_that_the_same_command_installs() -> None:
    from stages.config.pretrained import resolve_model
    from stages.ground.disk import sha256_file

    folder = resolve_model(read_yaml(ROOT / "params.yaml")["model"]["source"], None)
    assert folder is not None
    expected = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert sha256_file(folder / "model.safetensors") == expected
