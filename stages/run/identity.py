"""A run's identity: everything that decides its result, so that two configurations never meet in one folder.

It is read off the stage's own entry in dvc.yaml: every dep and every parameter there is part of it, unless
`NOT_PART` says why not. What else decides bits (library versions, device, threads) is the environment.
"""

from __future__ import annotations

import ast
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.config.errors import UserError
from stages.config.pipeline import StageSpec
from stages.storage.files import sha256_file

# Parameters and deps of `train` that leave its result as it is, each with the reason.
NOT_PART: dict[str, str] = {
    "train.launcher": "how processes are started; the plan is the same for any number of them",
    "train.save_strategy": "when the state is saved never changes the state",
    "train.save_steps": "when the state is saved never changes the state",
    "train.save_seconds": "when the state is saved never changes the state",
    "train.loggers": "they show what the histories hold, beside the outs",
    "train.num_workers": "who collates a batch does not change it",
    "train.device": "part of the environment",
    "stages/launch.py": "it starts the process that trains, and is replaced by it",
}


def _plain(node: Any) -> Any:
    """An AST as lists: without positions, docstrings and absent fields, the same in every Python version."""
    if isinstance(node, ast.AST):
        fields = dict(ast.iter_fields(node))
        body = fields.get("body")
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and body:
            first = body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                fields["body"] = body[1:]
        return [type(node).__name__, *([key, _plain(item)] for key, item in fields.items() if item not in (None, []))]
    if isinstance(node, list):
        return [_plain(item) for item in node]
    return repr(node)


def hash_code(source: str) -> str:
    """Hex sha256 of Python source as AST without docstrings: a comment, a docstring or a blank line costs nothing."""
    return hashlib.sha256(json.dumps(_plain(ast.parse(source))).encode()).hexdigest()


def hash_path(path: Path) -> dict[str, str]:
    """Hex sha256 of a file, or of every file below a folder, by path; Python files by `hash_code`."""
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    elif path.is_file():
        found = [path]
    else:
        raise UserError(f"{path}: no such file or folder, but it is a dep of the stage; run: dvc repro")
    hashes = {}
    for file in found:
        try:
            code = file.suffix == ".py" and hash_code(file.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            code = False
        hashes[file.as_posix()] = code or sha256_file(file)
    return hashes


@dataclass(frozen=True)
class Identity:
    """`values`: what decides the result, by name: `train.seed` -> 0, `stages/train.py` -> hash."""

    values: dict[str, Any]

    @property
    def id(self) -> str:
        """12 hex digits: the name of the run's folder."""
        return hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()[:12]

    def difference(self, other: dict[str, Any]) -> list[str]:
        """What `other` has otherwise, one line an entry: `train.seed: 0 -> 1` (theirs -> ours)."""
        lines = []
        for key in sorted(self.values.keys() | other.keys()):
            theirs, ours = other.get(key, "absent"), self.values.get(key, "absent")
            if theirs != ours:
                is_hash = isinstance(ours, str) and isinstance(theirs, str) and 64 in (len(ours), len(theirs))
                lines.append(f"{key}: changed" if is_hash else f"{key}: {theirs} -> {ours}")
        return lines


def identify(stage: StageSpec, model_folder: Path | None) -> Identity:
    """The identity of a run of `stage`, from the files as they are now.

    Args:
        model_folder: the pretrained model's files, which are content and not a name; None if there are none.
    """
    values: dict[str, Any] = {key: value for key, value in stage.params.items() if key not in NOT_PART}
    for dep in stage.deps:
        if dep not in NOT_PART:
            values.update(hash_path(Path(dep)))
    if model_folder is not None:
        for file in sorted([*model_folder.glob("*.json"), *model_folder.glob("model*.safetensors")]):
            values[f"model/{file.name}"] = sha256_file(file)
    return Identity(values)
