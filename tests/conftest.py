"""What several tests need: a model small enough to train in a second, and a project folder to run a stage in."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

# Before any test module imports a Hugging Face library.
os.environ["HF_HUB_OFFLINE"] = "1"

pytest_plugins = ["training"]
ROOT = Path(__file__).resolve().parents[1]
SENTENCE = "the cat sat on a mat and sang in the good red tree dog ran under blue bird is not bad was fine"
WORDS = list(dict.fromkeys(SENTENCE.split()))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with random weights and dropout, 64 positions, and its fast WordPiece tokenizer."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [str(digit) for digit in range(10)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *(w for w in WORDS if w not in letters), "."]
    folder = tmp_path_factory.mktemp("tiny-model")
    tokenizer = BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, model_max_length=64)
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(str(folder))
    return folder


@dataclass
class Project:
    """A folder with a params.yaml: the repository's own, changed in `overrides` ({section: {key: value}})."""

    folder: Path
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write_params(self, **sections: Mapping[str, Any]) -> None:
        from stages.config.read import read_yaml

        params = read_yaml(ROOT / "params.yaml")
        for changes in (self.overrides, sections):
            for section, values in changes.items():
                params[section].update(values)
        # JSON is YAML.
        deps = [source for source in (params["model"]["source"], params["tokenize"]["tokenizer"]) if source]
        stages = {name: {"cmd": f"exec python -m stages.{name}"} for name in ("tokenize", "build_loaders")}
        dvc = {"stages": {**stages, "tokenize": {**stages["tokenize"], "deps": deps}}}
        (self.folder / "dvc.yaml").write_text(json.dumps(dvc), encoding="utf-8")
        (self.folder / "params.yaml").write_text(json.dumps(params), encoding="utf-8")

    def write_task_params(self, task: str, **sections: Mapping[str, Any]) -> None:
        """`write_params` for `data.task`, with metrics that it has."""
        metric = {"classification": "accuracy", "multi_label": "f1_micro", "regression": "mse"}[task]
        merged: dict[str, dict[str, Any]] = {
            **{section: dict(values) for section, values in sections.items()},
            "data": {"task": task, **sections.get("data", {})},
            "evaluate": {"metrics": [metric], "metric_for_best_model": metric},
        }
        if merged["data"].get("feature_columns"):
            merged["data"]["text_columns"] = []
            merged["model"] = {"source": "factory:my_models:make"}
            merged["build_loaders"] = {"bucketing": "none"}
        self.write_params(**merged)

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return path


@pytest.fixture
def make_project(tiny_model: Path) -> Callable[[Path], Project]:
    """Makes a project folder that uses the tiny model and one text column, `text`; write params.yaml yourself."""

    def make(folder: Path) -> Project:
        folder.mkdir(parents=True, exist_ok=True)
        return Project(
            folder,
            {
                "data": {"path": "data/in", "text_columns": ["text"], "label_column": "label"},
                "model": {"source": str(tiny_model)},
                "tokenize": {"max_length": 16},
            },
        )

    return make


@pytest.fixture
def project(make_project: Callable[[Path], Project], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project folder that is the current one."""
    made = make_project(tmp_path / "project")
    monkeypatch.chdir(made.folder)
    return made
