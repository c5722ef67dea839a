"""Projects in temporary folders, with a model and data small enough to train in a second.

`Project` is a folder with a params.yaml, to call a stage's parts in; `Checkout` a real repository with DVC.
"""

from __future__ import annotations

import compileall
import csv
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from stages.config.pretrained import local_folder
from stages.config.read import read_yaml
from stages.ground.errors import UserError
from tests.support.fork_server import Forked, fork_server
from tests.support.interpreter import READ_ONCE, arguments_of

ROOT = Path(__file__).resolve().parents[2]
SENTENCE = "the cat sat on a mat and sang in the good red tree dog ran under blue bird is not bad was fine"
WORDS = list(dict.fromkeys(SENTENCE.split()))
PYTHON_BIN = str(Path(sys.executable).parent)
# What a kill must never change.
OUTS = ("data/tokenized", "data/loaders", "data/predictions", "models", "metrics", "plots", "report.html", "dvc.lock")


@dataclass
class Project:
    """A folder with a params.yaml: the repository's own, changed in `overrides` ({section: {key: value}})."""

    folder: Path
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write_params(self, **sections: Mapping[str, Any]) -> None:
        params = read_yaml(ROOT / "params.yaml")
        for changes in (self.overrides, sections):
            for section, values in changes.items():
                params[section].update(values)
        # JSON is YAML.
        sources = (params["model"]["source"], params["tokenize"]["tokenizer"])
        deps = [source for source in sources if source and local_folder(source)]
        stages = {name: {"cmd": f"exec python -m stages.{name}"} for name in ("tokenize", "build_loaders")}
        dvc = {"stages": {**stages, "tokenize": {**stages["tokenize"], "deps": deps}}}
        (self.folder / "dvc.yaml").write_text(json.dumps(dvc), encoding="utf-8")
        (self.folder / "params.yaml").write_text(json.dumps(params), encoding="utf-8")

    def write_task_params(self, task: str, **sections: Mapping[str, Any]) -> None:
        """`write_params` for `data.task`, with metrics that it has."""
        metric = {"classification": "accuracy", "multi_label": "f1_micro", "regression": "mse"}[task]
        merged: dict[str, dict[str, Any]] = {
            **{section: dict(values) for section, values in sections.items()},
            "data": {"task": task, **sections.get("data", {})},
            "evaluate": {"metrics": [metric], "metric_for_best_model": metric},
        }
        if merged["data"].get("feature_columns"):
            merged["data"]["text_columns"] = []
            merged["model"] = {"source": "factory:my_models:make"}
            merged["build_loaders"] = {"bucketing": "none"}
        self.write_params(**merged)

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return path


@cache
def compiled_stages() -> Path:
    """The stages, compiled: else each start in a checkout would do so again."""
    compileall.compile_dir(ROOT / "stages", quiet=1)
    return ROOT / "stages"


class Checkout:
    """A copy of the project in `folder`; `params` are {section: {key: value}} on top of small defaults."""

    def __init__(self, folder: Path, tiny_model: Path, params: dict[str, dict[str, Any]]) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        shutil.copytree(compiled_stages(), folder / "stages")
        shutil.copy(Path(__file__).parent / "user_code.py", folder / "stages/custom/own.py")
        for name in ("dvc.yaml", ".gitignore", ".dvcignore"):
            shutil.copy(ROOT / name, folder)
        shutil.copytree(tiny_model, folder / "tiny")
        self.set_params(params)
        text = (folder / "dvc.yaml").read_text()
        for module in ("tokenize", "launch"):
            head = f"exec python -m stages.{module}\n    deps:\n"
            assert head in text
            text = text.replace(head, f"{head}      - tiny\n")
        (folder / "dvc.yaml").write_text(text)
        for split, rows in (("train", 84), ("validation", 20), ("test", 20)):
            self.write_split(split, rows)
        self.env = {
            **os.environ,
            "PATH": os.pathsep.join([PYTHON_BIN, os.environ["PATH"]]),
            "DVC_SITE_CACHE_DIR": str(folder.parent / f"{folder.name}-site-cache"),
            "DVC_NO_ANALYTICS": "1",
            "OMP_NUM_THREADS": "1",
            "GIT_AUTHOR_NAME": "t",
            "GIT_AUTHOR_EMAIL": "t@t",
            "GIT_COMMITTER_NAME": "t",
            "GIT_COMMITTER_EMAIL": "t@t",
        }
        (folder / ".dvc").mkdir()  # as in a clone: nobody runs `dvc init`
        shutil.copy(ROOT / ".dvc/.gitignore", folder / ".dvc")
        (folder / ".dvc/config").write_text("[core]\n    analytics = false\n[cache]\n    type = copy\n")
        self.run("git", "init", "-q")
        self.commit("start")

    @classmethod
    def at(cls, folder: Path, env: dict[str, str]) -> Checkout:
        """What is in `folder` already."""
        checkout = object.__new__(cls)
        checkout.folder, checkout.env = folder, env
        return checkout

    def copy(self, folder: Path, *ignored: str) -> Checkout:
        """All files, but those of the names `ignored`, in another folder."""
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns(*ignored))
        return Checkout.at(folder, self.env)

    def set_params(self, changes: dict[str, dict[str, Any]]) -> None:
        """Write params.yaml: the repository's, small, with `changes` on top."""
        params = read_yaml(ROOT / "params.yaml")
        small: dict[str, dict[str, Any]] = {
            "model": {"source": "tiny"},
            "tokenize": {"max_length": 24},
            "build_loaders": {"batch_size": 8, "micro_batch_size": 4},
            "train": {"num_train_epochs": 2, "logging_steps": 3},
        }
        for source in (small, changes):
            for section, values in source.items():
                params[section].update(values)
        (self.folder / "params.yaml").write_text(json.dumps(params, indent=1))
        # A user does this by hand, told by tokenize.
        made_by = "features.json" if params["data"]["feature_columns"] else "tokenizer"
        dvc = self.folder / "dvc.yaml"
        dvc.write_text(
            re.sub(r"data/tokenized/(tokenizer|features.json)\n", f"data/tokenized/{made_by}\n", dvc.read_text())
        )

    def write_split(self, split: str, rows: int) -> None:
        """Pairs of random words and three numbers; the label, by task, is whether, how or how much they are equal."""
        generator = random.Random(f"{split}{rows}")
        task = json.loads((self.folder / "params.yaml").read_text())["data"]["task"]
        path = self.folder / f"data/sample/{split}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sentence1", "sentence2", "x0", "x1", "x2", "label"])
            for number in range(rows):
                words = generator.choices(WORDS, k=generator.randint(2, 7))
                equal = number % 5 < 3
                other = words[::-1] if equal else generator.choices(WORDS, k=4)
                label = {
                    "classification": "equivalent" if equal else "different",
                    "multi_label": ",".join(["equivalent"] * equal + ["long"] * (len(words) > 4)),
                    "regression": f"{len(set(words) & set(other)) / len(set(words)):.3f}",
                }[task]
                numbers = [f"{generator.gauss(equal, 1):.4f}", number % 7, -len(words)]
                writer.writerow([" ".join(words), " ".join(other), *numbers, label])

    def commit(self, message: str) -> None:
        self.run("git", "add", "-A")
        self.run("git", "commit", "-q", "-m", message)

    def start(self, *command: str, real: bool = False, **env: str) -> subprocess.Popen[str] | Forked:
        """Start a command in a session of its own, output to a pipe; `python -m …` and dvc from the fork server, unless
        a `real` interpreter is asked for."""
        arguments = None if real or READ_ONCE & env.keys() else arguments_of(command)
        if arguments is not None:
            module, *others = arguments
            return fork_server().start(self.folder, module, None, others, **(self.env | env))
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, code: int | None = 0, real: bool = False, **env: str) -> str:
        """Run a command to its end; its output. `code`: the exit code it must have (None: any)."""
        process = self.start(*command, real=real, **env)
        output, _ = process.communicate(timeout=300)
        assert code is None or process.returncode == code, f"{command} ended with {process.returncode}:\n{output}"
        return output

    def repro(self, *arguments: str, code: int | None = 0, real: bool = False, **env: str) -> str:
        return self.run(sys.executable, "-m", "stages", "repro", *arguments, code=code, real=real, **env)

    def digests(self, *paths: str) -> dict[str, str]:
        """sha256 of every file below `paths` (all outs and dvc.lock if none are given)."""
        found: dict[str, str] = {}
        for name in paths or OUTS:
            path = self.folder / name
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file() and file.name != ".gitignore":
                    found[str(file.relative_to(self.folder))] = hashlib.sha256(file.read_bytes()).hexdigest()
        return found

    def runs(self, stage: str = "train") -> list[Path]:
        """The folders of the runs of `stage`."""
        found = sorted((self.folder / "runs").glob("*/identity.json"))
        return [file.parent for file in found if json.loads(file.read_text())["stage"] == stage]

    def log(self) -> list[dict[str, Any]]:
        """The events of the only run."""
        (run,) = self.runs()
        return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines() if line.startswith("{")]


def line_of(call: Callable[[], object]) -> str:
    """The one line that `call` ends with."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def make_tiny_model(folder: Path) -> Path:
    """Write a BERT of two layers with random weights and dropout, 64 positions, and its fast WordPiece tokenizer."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [str(digit) for digit in range(10)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *(w for w in WORDS if w not in letters), "."]
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
