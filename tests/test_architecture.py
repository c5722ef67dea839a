"""dvc.yaml tells the truth: every stage lists the code it imports, and train's identity covers all it lists."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest
from conftest import ROOT

from stages.config import pipeline
from stages.config.params import read_yaml
from stages.run.identity import NOT_PART, hash_code, identify

DVC = read_yaml(ROOT / "dvc.yaml")["stages"]
STAGE_MODULES = {"tokenize", "build_loaders", "train", "evaluate", "select_best", "launch", "__main__"}


def imported(path: Path) -> set[Path]:
    """The project's files that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            file = ROOT / f"{name.replace('.', '/')}.py"
            if name.startswith("stages.") and file.exists():
                found.add(file)
    return found


def closure(path: Path) -> set[Path]:
    seen, todo = set(), {path}
    while todo:
        seen |= todo
        todo = {file for path in todo for file in imported(path)} - seen
    return seen


@pytest.mark.parametrize("stage", sorted(DVC))
def test_stage_lists_all_code_it_imports(stage: str) -> None:
    deps = [ROOT / dep for dep in DVC[stage]["deps"]]
    missing = [
        str(file.relative_to(ROOT))
        for file in closure(ROOT / "stages" / f"{stage}.py")
        if not any(file.is_relative_to(dep) for dep in deps)
    ]
    assert missing == []


def test_machinery_never_imports_a_stage() -> None:
    wrong = [
        (str(file.relative_to(ROOT)), target.name)
        for file in (ROOT / "stages").rglob("*.py")
        if file.parent != ROOT / "stages"
        for target in imported(file)
        if target.parent == ROOT / "stages"
    ]
    assert wrong == []
    assert {path.stem for path in (ROOT / "stages").glob("*.py")} == STAGE_MODULES | {"__init__"}


def test_gitignore_lists_every_cached_out() -> None:
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    outs = [out for stage in DVC.values() for out in stage["outs"]]
    assert len(outs) == 7
    for out in outs:
        assert any(f"/{out}" == line or f"/{out}".startswith(f"{line}/") for line in ignored), out


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `identify` reads: the code, dvc.yaml, params.yaml, and stand-ins for the outs of earlier stages."""
    shutil.copytree(ROOT / "stages", tmp_path / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("data/tokenized", "data/loaders", "model"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model.safetensors").write_text(folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def current(checkout: Path) -> str:
    return identify(pipeline.load_stage("train"), checkout / "model").id


def test_every_dep_of_train_is_in_its_identity_or_excepted_with_a_reason(checkout: Path) -> None:
    for dep in pipeline.load_stage("train").deps:
        before = current(checkout)
        if Path(dep).is_dir():
            (Path(dep) / "new.txt").write_text("x")
        else:
            with Path(dep).open("a") as file:
                file.write("\nX = 1\n")
        assert (current(checkout) != before) == (dep not in NOT_PART), dep


def test_every_parameter_of_train_is_in_its_identity_or_excepted_with_a_reason(checkout: Path) -> None:
    stage = pipeline.load_stage("train")
    assert {key.split(".")[0] for key in stage.params} == {"model", "train", "evaluate"}
    before = current(checkout)
    for key in stage.params:
        changed = pipeline.StageSpec(stage.name, stage.deps, {**stage.params, key: "another"})
        assert (identify(changed, checkout / "model").id != before) == (key not in NOT_PART), key
    assert all(NOT_PART.values())
    assert set(NOT_PART) <= set(stage.params) | set(stage.deps)


def test_model_files_are_part_of_the_identity(checkout: Path) -> None:
    before = current(checkout)
    (checkout / "model/model.safetensors").write_text("other weights")
    assert current(checkout) != before


def test_comments_docstrings_and_bytecode_cost_nothing(checkout: Path) -> None:
    before = current(checkout)
    path = checkout / "stages/training/loop.py"
    path.write_text("# A comment.\n" + path.read_text().replace('"""The training loop.', '"""Another docstring.'))
    (checkout / "stages/training/__pycache__").mkdir()
    (checkout / "stages/training/__pycache__/loop.pyc").write_bytes(b"x")
    assert current(checkout) == before
    path.write_text(path.read_text().replace("progress.step += 1", "progress.step += 2"))
    assert current(checkout) != before


def test_text_that_is_no_docstring_counts() -> None:
    assert hash_code("def f():\n    '''doc'''\n    return 'a'") == hash_code("def f():\n    return 'a'  # why")
    assert hash_code("x = 'a'") != hash_code("x = 'b'")
    assert hash_code("f('a')") != hash_code("f('b')")


def test_difference_names_what_changed_and_both_values(checkout: Path) -> None:
    stage = pipeline.load_stage("train")
    ours = identify(stage, checkout / "model")
    theirs = {**ours.values, "train.seed": 7, "stages/train.py": "0" * 64}
    assert ours.difference(theirs) == ["stages/train.py: changed", "train.seed: 7 -> 0"]
