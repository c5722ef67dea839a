"""What dvc.yaml says of a stage: its deps and parameters, with `${…}` filled in from params.yaml."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.config.errors import UserError, quote
from stages.config.params import FACTORY, PARAMS_FILE, Params, is_custom, read_yaml

DVC_FILE = "dvc.yaml"


@dataclass(frozen=True)
class StageSpec:
    """One stage of dvc.yaml. `params` maps each dotted parameter to its value in params.yaml, one leaf an entry."""

    name: str
    deps: tuple[str, ...]
    params: dict[str, Any]


def _flatten(value: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flatten(item, f"{prefix}.{key}"))
    return flat


def _lookup(values: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        if not isinstance(values, dict) or key not in values:
            raise UserError(f"{DVC_FILE}: {quote(dotted)} is not in {PARAMS_FILE}")
        values = values[key]
    return values


def load_stage(name: str) -> StageSpec:
    """Read stage `name` from dvc.yaml and params.yaml in the current folder. Raises UserError if it is not there."""
    values = read_yaml(PARAMS_FILE)
    stages = (read_yaml(DVC_FILE) or {}).get("stages", {})
    if name not in stages:
        raise UserError(f"{DVC_FILE}: no stage {quote(name)}; there are {', '.join(stages)}")
    stage = stages[name]
    for entry in (*stage.get("deps", []), *stage.get("params", [])):
        if not isinstance(entry, str):
            raise UserError(
                f"{DVC_FILE}: {quote(entry)} in stage {name}: write a path, or a key of {PARAMS_FILE}, alone"
            )
    deps = tuple(
        re.sub(r"\$\{\s*([\w.]+)\s*\}", lambda match: str(_lookup(values, match[1])), dep)
        for dep in stage.get("deps", [])
    )
    params: dict[str, Any] = {}
    for entry in stage.get("params", []):
        params.update(_flatten(_lookup(values, entry), entry))
    return StageSpec(name, deps, params)


def require_dep(stage: StageSpec, path: Path, named_by: str) -> None:
    """Refuse a local path that DVC cannot see: a change of it would go unnoticed.

    Raises:
        UserError: with the line to add to dvc.yaml.
    """
    target = path.expanduser().resolve()
    if any(target.is_relative_to(Path(dep).resolve()) for dep in stage.deps):
        return
    line = path.as_posix() if path.is_absolute() else os.path.relpath(target)
    raise UserError(
        f"{DVC_FILE}: stage {stage.name} does not depend on {line}, which {named_by} names, so DVC would not see it "
        f"change; add the line `- {line}` under stages.{stage.name}.deps"
    )


def require_code_dep(stage: StageSpec, import_path: str, named_by: str) -> None:
    """Refuse a `module:name` of this repository's whose file DVC cannot see. Raises UserError with the line to add."""
    module, colon, _ = import_path.partition(":")
    try:
        spec = importlib.util.find_spec(module) if colon and module else None
    except (ImportError, ValueError):
        return  # whoever imports it says what is wrong with it
    origin = Path(spec.origin) if spec and spec.origin else None
    if origin and origin.is_relative_to(Path.cwd()) and "site-packages" not in origin.parts:
        require_dep(stage, origin.relative_to(Path.cwd()), named_by)


def require_code_deps(stage: StageSpec, params: Params) -> None:
    """Refuse code of this repository that the parameters name and DVC cannot see from `stage`.

    Raises:
        UserError: with the line to add to dvc.yaml.
    """
    named = [("model.source", params.model.source.removeprefix(FACTORY)), ("train.loss", params.train.loss or "")]
    named += [("evaluate.metrics", name) for name in params.evaluate.metrics]
    if stage.name == "train":
        named.append(("train.lr_scheduler_type", params.train.lr_scheduler_type))
        named += [("train.callbacks", callback.class_) for callback in params.train.callbacks]
    for named_by, path in named:
        if ":" in path and not path.startswith("package:"):
            require_code_dep(stage, path, named_by)
        elif named_by == "evaluate.metrics" and is_custom(path):
            require_dep(stage, Path(path), named_by)
