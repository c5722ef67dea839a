"""What several tests need: a model small enough to train in a second, and a project folder to run a stage in."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.project import Project, make_tiny_model

# Before any test module imports a Hugging Face library.
os.environ["HF_HUB_OFFLINE"] = "1"

pytest_plugins = ["tests.support.train_stage"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In which order files are begun, each of them by one process, as its tests share fixtures: those with the long
    tests first, the longest before all others, so that all processes end at about the same time."""
    items.sort(key=lambda item: (item.path.stem != "test_storm", "promises" not in item.path.parts))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `make_tiny_model`."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))


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
