"""dvc.yaml tells the truth: a stage lists the rooms whose code it imports, nearly whole, and the parameters that decide
its result; imports point one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from stages.config.pipeline import is_below_a_dep, load_stage
from stages.config.read import read_yaml
from stages.config.rules import RULES, decides
from stages.config.schema import Params
from stages.keeping.code import find_code
from stages.keeping.syntax import Source
from tests.support.project import ROOT

DVC = read_yaml(ROOT / "dvc.yaml")["stages"]
STAGE_MODULES = {"tokenize", "build_loaders", "train", "evaluate", "select_best", "launch", "__main__"}
# Rooms, from the ground up: each may import those before it. A stage imports rooms, and no room a stage.
ROOMS = ("ground", "tasks", "config", "keeping", "batches", "data", "modeling", "metrics", "scoring", "reduction",
         "run", "training", "watching", "report", "custom", "repro")  # fmt: skip
# What a stage lists, as it is in a room that the stage needs, and does not import.
NOT_IMPORTED = {
    "tokenize": {
        "stages/keeping/pruning.py": "removes no run",
        "stages/config/imports.py": "runs no code of the user's",
    },
    "build_loaders": {
        "stages/keeping/pruning.py": "removes no run",
        "stages/ground/bar.py": "predicts nothing",
        "stages/config/imports.py": "runs no code of the user's",
        "stages/batches/randomness.py": "draws by the permutation alone",
    },
    "train": {
        "stages/launch.py": "the command, which becomes train",
        "stages/scoring/predictor.py": "makes tables, which train does not publish",
    },
    "evaluate": {
        "stages/keeping/pruning.py": "removes no run",
        "stages/scoring/ranking.py": "scores candidates, and does not compare them",
        "stages/batches/plan.py": "runs the rows in an order of their lengths",
    },
    "select_best": {
        "stages/keeping/pruning.py": "removes no run",
        "stages/batches/plan.py": "runs the rows in an order of their lengths",
    },
}
MOST_LINES_NOT_IMPORTED = 310


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", sorted(DVC))
def test_stage_lists_all_code_it_imports(name: str) -> None:
    stage = load_stage(name)
    found = find_code(stage).files
    assert ROOT / f"stages/{name}.py" in found
    assert [str(path) for path in sorted(found) if not is_below_a_dep(stage, path)] == []


@pytest.mark.parametrize("name", sorted(DVC))
def test_stage_imports_nearly_all_code_it_lists(name: str) -> None:
    stage = load_stage(name)
    listed = [path for dep in stage.deps if dep.startswith("stages")
              for path in ([Path(dep)] if Path(dep).is_file() else Path(dep).rglob("*.py"))]  # fmt: skip
    imported = find_code(stage).files
    left = {path.as_posix() for path in listed if path.absolute() not in imported}
    # Which of them is used is up to the parameters.
    by_parameters = {path for path in left if path.startswith(("stages/metrics/", "stages/custom/"))}
    assert left - by_parameters == set(NOT_IMPORTED[name])
    assert sum(len(Path(path).read_text().splitlines()) for path in NOT_IMPORTED[name]) <= MOST_LINES_NOT_IMPORTED


def room_of(path: Path) -> str:
    inner = path.relative_to(ROOT / "stages")
    return inner.parts[0] if len(inner.parts) > 1 else inner.stem


def test_imports_point_from_stages_to_machinery_and_down_the_rooms() -> None:
    assert {path.parent.name for path in (ROOT / "stages").glob("*/__init__.py")} == set(ROOMS)
    wrong = []
    for path in (ROOT / "stages").glob("*/*.py"):
        for level, name in Source.parse(path.read_bytes()).imports:
            parts = name.split(".")
            if not level and parts[0] == "stages" and len(parts) > 1 and parts[1] != "PRELOADED":
                here, there = room_of(path), parts[1]
                if there not in ROOMS or ROOMS.index(there) > ROOMS.index(here):
                    wrong.append((str(path.relative_to(ROOT)), name))
    assert wrong == []
    assert {path.stem for path in (ROOT / "stages").glob("*.py")} == STAGE_MODULES | {"__init__"}


def test_every_room_has_a_line_at_its_door() -> None:
    for room in ROOMS:
        lines = ast.get_docstring(ast.parse((ROOT / f"stages/{room}/__init__.py").read_text()))
        assert lines and "\n" not in lines, room


def test_rooms_up_to_keeping_import_no_torch() -> None:
    import subprocess
    import sys

    rooms = [path.relative_to(ROOT).with_suffix("") for room in ("ground", "tasks", "config", "keeping")
             for path in (ROOT / f"stages/{room}").glob("*.py")]  # fmt: skip
    names = [".".join(path.parts).removesuffix(".__init__") for path in rooms]
    script = f"import importlib, sys; [importlib.import_module(n) for n in {names}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


def test_every_parameter_has_one_rule_and_a_reason_where_it_decides_nothing() -> None:
    leaves = [
        f"{section}.{key}"
        for section, field in Params.model_fields.items()
        for key in field.annotation.model_fields  # type: ignore[union-attr]
    ]
    assert set(RULES) == set(leaves)
    for key, rule in RULES.items():
        assert set(rule.stages) <= set(DVC), key
        assert bool(rule.stages) != bool(rule.why), key
        assert not rule.optimizer or "train" in rule.stages, key


@pytest.mark.parametrize("name", sorted(DVC))
def test_stage_lists_exactly_the_parameters_that_decide_its_result(name: str) -> None:
    assert DVC[name]["params"] == decides(name)


def test_what_does_not_decide_the_result_is_in_no_stage() -> None:
    listed = {key for stage in DVC.values() for key in stage["params"]}
    for key in ("launcher", "save_strategy", "save_steps", "save_seconds", "loggers", "num_workers", "device"):
        assert f"train.{key}" not in listed
    assert "tokenize.num_proc" not in listed
    assert "train.threads" in listed


def test_gitignore_lists_every_cached_out() -> None:
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    outs = [out for stage in DVC.values() for out in stage["outs"]]
    assert len(outs) == 12
    for out in outs:
        assert any(f"/{out}" == line or f"/{out}".startswith(f"{line}/") for line in ignored), out
