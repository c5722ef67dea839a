"""What several tests need: a model small enough to train in a second, and a project folder to run a stage in."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.project import WORDS, Project

# Before any test module imports a Hugging Face library.
os.environ["HF_HUB_OFFLINE"] = "1"

pytest_plugins = ["tests.support.train_stage"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Which tests are kept in one process by `--dist loadgroup`, and in which order they are begun.

    A module's are, as they share its fixtures; but the long ones of promises/ only where they do, and they come first,
    the longest before all others: so all processes end at about the same time.
    """
    for item in items:
        fixtures = getattr(item, "_fixtureinfo").name2fixturedefs.values()  # noqa: B009  a private one
        shares = any(definitions[-1].scope == "module" for definitions in fixtures)
        if shares or "promises" not in item.path.parts:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: (item.path.stem != "test_storm", "promises" not in item.path.parts))


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
