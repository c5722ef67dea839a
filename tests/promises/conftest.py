"""What tests of promises share as fixtures."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.project import Project


@pytest.fixture
def model(project: Project, tiny_model: Path) -> Path:
    """The tiny model in the project, as `model.source`."""
    project.overrides["model"] = {"source": "./model"}
    return shutil.copytree(tiny_model, project.folder / "model")
