"""A run's identity: everything that decides its result, so that two configurations never meet in one folder.

Parameters are part of it as `stages.config.rules` says, code as `stages.keeping.code` finds it, and the rest of the
stage's deps in dvc.yaml by content (`stages.keeping.listed`). What else decides bits (library versions, device,
threads) is the environment.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.config.pipeline import Stage
from stages.config.pretrained import resolve_model, resolve_tokenizer, weight_files
from stages.config.rules import RULES, deciding
from stages.ground.disk import sha256_file
from stages.ground.errors import UserError
from stages.keeping.code import Code, find_code
from stages.keeping.listed import is_no_part
from stages.keeping.sealed import FORMAT

CUSTOM, PLAN = "stages/custom/", "data/loaders/"
# What of a pretrained model's folder a stage loads. Weights may be in several files, which the index names.
LOADED = {
    "tokenize": ("*.json", "*.txt", "*.model", "*.jinja"),
    "train": ("config.json", "generation_config.json", "adapter_config.json", "*.safetensors", "*.index.json"),
}


@dataclass(frozen=True)
class Identity:
    """`values`: what decides the result, by name: `train.seed` -> 0, `stages/train.py` -> hash."""

    stage: str
    values: dict[str, Any]
    code: Code = field(default_factory=lambda: Code({}, frozenset()), compare=False, repr=False)

    @property
    def id(self) -> str:
        """12 hex digits: the name of the run's folder."""
        content = {"format": FORMAT, "stage": self.stage, "values": self.values}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def difference(self, other: dict[str, Any]) -> list[str]:
        """What `other` has otherwise, one line an entry: `train.seed: 0 -> 1` (theirs -> ours)."""
        lines = []
        for key in sorted(self.values.keys() | other.keys()):
            theirs, ours = other.get(key, "absent"), self.values.get(key, "absent")
            if theirs != ours:
                lines.append(f"{key}: {theirs} -> {ours}" if key in RULES else f"{key}: changed")
        return lines

    def differences_that_reset_the_optimizer(self, other: dict[str, Any]) -> list[str]:
        """Those of `other`'s entries, less its own, with which an optimizer's state or a position in the plan mean
        something else. Epochs are compared one by one, so that a run of more epochs goes on from one of fewer."""
        return [
            key
            for key in sorted(self.values.keys() | other.keys())
            if self.values.get(key) != other.get(key)
            and _concerns_the_optimizer(key)
            and not (key.startswith(PLAN) and key not in other)
        ]


def _concerns_the_optimizer(key: str) -> bool:
    if key in RULES:
        return RULES[key].optimizer
    if key.startswith(PLAN):
        return Path(key).name.startswith("epoch")
    # Of the pipeline's own code another version goes on; the user's is part of model, loss and callbacks.
    return not key.startswith("stages/") or key.startswith(CUSTOM)


def identify(stage: Stage) -> Identity:
    """The identity of `stage`'s result, from params.yaml, dvc.yaml and the files as they are now.

    Raises:
        UserError: a dep that is not there, or a model that cannot be found.
    """
    values = deciding(stage.params, stage.name)
    folders = dict(_pretrained(stage))
    for prefix, folder in folders.items():
        for file in _loaded(folder, LOADED[stage.name]):
            values[f"{prefix}/{_text(os.path.relpath(file, folder))}"] = sha256_file(file)
    for dep in stage.deps:
        if not Path(dep).exists():
            raise UserError(f"{dep}: no such file or folder, but it is a dep of the stage; run: dvc repro")
    code = find_code(stage, leave_out=list(folders.values()))
    values |= {_text(path.as_posix()): sha256_file(path) for path in code.content}
    values |= {_text(key): value for key, value in code.hashes.items() if not is_no_part(Path(key))}
    return Identity(stage.name, values, code)


def _pretrained(stage: Stage) -> Iterator[tuple[str, Path]]:
    if stage.name in LOADED:
        model = resolve_model(stage.params.model.source, stage.params.model.revision)
        if model is not None:
            yield "model", model
        if stage.name == "tokenize" and stage.params.tokenize.tokenizer is not None:
            yield "tokenizer", resolve_tokenizer(stage.params.tokenize.tokenizer)


def _loaded(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files in `folder` that match, and where weights are loaded the shards that its index names."""
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    if "*.safetensors" in patterns:
        found |= set(weight_files(folder, str(folder)))
    return sorted(path for path in found if path.is_file())


def _text(path: str) -> str:
    """A path as text that every encoder takes, also where its name is no UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
