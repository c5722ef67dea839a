"""What dvc.yaml says of a stage: its deps, with `${…}` filled in from params.yaml, and whether it lists enough."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.config.pretrained import MODEL, TOKENIZER, local_folder
from stages.config.read import PARAMS_FILE, parse_params, read_yaml
from stages.config.schema import FACTORY, Params, is_custom
from stages.ground.disk import absolute
from stages.ground.errors import UserError, quote

DVC_FILE = "dvc.yaml"
# What makes inputs of raw rows, for each kind of column; tokenize leaves one of them.
ENCODERS = {"text_columns": "data/tokenized/tokenizer", "feature_columns": "data/tokenized/features.json"}


@dataclass(frozen=True)
class Stage:
    """One stage of dvc.yaml, and all of params.yaml."""

    name: str
    deps: tuple[str, ...]
    params: Params


def _lookup(values: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        if not isinstance(values, dict) or key not in values:
            raise UserError(f"{DVC_FILE}: {quote(dotted)} is not in {PARAMS_FILE}")
        values = values[key]
    return values


def read_stages() -> dict[str, Any]:
    """What dvc.yaml in the current folder says of each stage, as it is written there."""
    return (read_yaml(DVC_FILE) or {}).get("stages") or {}


def load_stage(name: str) -> Stage:
    """Read stage `name` from dvc.yaml, and params.yaml, in the current folder.

    Raises:
        UserError: there is no such stage, or anything is wrong with params.yaml.
    """
    values = read_yaml(PARAMS_FILE)
    params = parse_params(values)
    stages = read_stages()
    if name not in stages:
        raise UserError(f"{DVC_FILE}: no stage {quote(name)}; there are {', '.join(stages)}")
    deps = stages[name].get("deps", [])
    for entry in deps:
        if not isinstance(entry, str):
            raise UserError(f"{DVC_FILE}: {quote(entry)} in stage {name}: write a path alone")
    return Stage(
        name,
        tuple(re.sub(r"\$\{\s*([\w.]+)\s*\}", lambda match: str(_lookup(values, match[1])), dep) for dep in deps),
        params,
    )


def as_dep(path: Path) -> str:
    """`path` as a dep names it: relative to the project, unless it was written as an absolute path."""
    return path.as_posix() if path.is_absolute() and not path.is_relative_to(Path.cwd()) else os.path.relpath(path)


def lines_to_add(stage: Stage, paths: Iterable[Path], why: str) -> str:
    """One line that says which lines the deps of `stage` lack, `why` after the first. Of a package outside of stages/
    its folder is the line."""
    lines = list(dict.fromkeys(as_dep(_package(path)) for path in paths))
    missing = " and ".join(f"`- {line}`" for line in lines)
    return (
        f"{DVC_FILE}: stage {stage.name} does not depend on {lines[0]}, {why}; "
        f"add the line{'s' if len(lines) > 1 else ''} {missing} under stages.{stage.name}.deps"
    )


def _package(path: Path) -> Path:
    """The outermost package that a Python file is in; the file itself where there is none, or it is below stages/."""
    found = path
    if path.suffix == ".py" and not absolute(path).is_relative_to(absolute("stages")):
        for folder in absolute(path).parents:
            if not (folder / "__init__.py").is_file():
                break
            found = folder
    return found


def is_below_a_dep(stage: Stage, path: Path) -> bool:
    """Whether DVC sees a change of `path`: as it is written, as a link below a dep is content of it, or resolved."""
    path = absolute(path.expanduser())
    if any(path.is_relative_to(absolute(dep)) for dep in stage.deps):
        return True
    path = path.resolve()
    return any(path.is_relative_to(Path(dep).resolve()) for dep in stage.deps)


def require_dep(stage: Stage, path: Path, named_by: str) -> None:
    """Refuse a local path that DVC cannot see: a change of it would go unnoticed.

    Raises:
        UserError: with the line to add to dvc.yaml.
    """
    if not is_below_a_dep(stage, path):
        raise UserError(lines_to_add(stage, [path.expanduser()], f"which {named_by}, so DVC would not see it change"))


def require_folders(stage: Stage) -> None:
    """Refuse a local model or tokenizer folder that the stage's deps lack. Raises UserError with the line to add."""
    wanted = {MODEL: stage.params.model.source}
    if stage.name == "tokenize" and stage.params.tokenize.tokenizer is not None:
        wanted[TOKENIZER] = stage.params.tokenize.tokenizer
    for named_by, source in wanted.items():
        folder = local_folder(source)
        if folder is not None:
            require_dep(stage, folder, f"{named_by} names")


def require_rows(path: Path) -> None:
    """Refuse what DVC and the readers of data would wait for, or read, without end: a pipe or a device, at `path` or in
    the folder there. Raises UserError with its name."""
    for file in [path, *(path.rglob("*") if path.is_dir() else ())]:
        if file.exists() and not file.is_file() and not file.is_dir():
            raise UserError(f"{file}: a pipe, a device or a socket, and no file; write the rows to a file")


def require_inputs(params: Params) -> None:
    """Refuse deps on what tokenize does not write for this kind of input. Raises UserError with the line to write."""
    kind = "text_columns" if params.data.text_columns else "feature_columns"
    there, missing = (ENCODERS[key] for key in sorted(ENCODERS, key=lambda key: key != kind))
    wrong = [name for name, stage in read_stages().items() if missing in stage.get("deps", [])]
    if wrong:
        raise UserError(
            f"{DVC_FILE}: {', '.join(wrong)} depend on {missing}, but there is none with data.{kind}; "
            f"write `- {there}` there instead"
        )


def named_code(stage: Stage) -> Iterator[tuple[str, str]]:
    """The code that parameters name and `stage` runs: the parameter, and `module:name` or the path of an `evaluate`
    module."""
    if stage.name not in ("train", "evaluate", "select_best"):
        return
    params = stage.params
    if params.model.source.startswith(FACTORY):
        yield MODEL, params.model.source.removeprefix(FACTORY)
    if ":" in (params.train.loss or ""):
        yield "train.loss", params.train.loss or ""
    for name in params.evaluate.metrics:
        yield "evaluate.metrics", name if is_custom(name) else f"stages/metrics/{params.data.task}.py"
    if stage.name == "train":
        for key in ("optim", "lr_scheduler_type"):
            if ":" in getattr(params.train, key):
                yield f"train.{key}", getattr(params.train, key)
        for callback in params.train.callbacks:
            yield "train.callbacks", callback.class_
