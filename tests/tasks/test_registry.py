"""A kind of task is one module: complete, light, and enough to run the whole pipeline on a new one."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from stages.tasks.base import Kind
from stages.tasks.registry import KINDS
from tests.support.project import ROOT, Checkout

COUNTS = '''
"""A row has a count."""

from stages.tasks.regression import Regression


class Counts(Regression):
    name = "counts"
    title = "count"
    losses = ("poisson_nll",)
    metrics = ("mse", "pearsonr")
    lower_is_better = ("mse",)

    def loss(self, name, weights, smoothing, kwargs):
        from torch.nn import functional

        return lambda logits, labels: functional.poisson_nll_loss(logits[:, 0], labels, reduction="none", **kwargs)

    def decide(self, logits, cut):
        import numpy as np

        return np.exp(logits[:, 0])
'''


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_says_all_there_is_to_say(name: str) -> None:
    kind = KINDS[name]
    for key in Kind.__annotations__:
        assert hasattr(kind, key), key
    assert type(kind).__module__ == f"stages.tasks.{name}"
    assert (ROOT / f"stages/metrics/{name}.py").is_file()
    assert kind.losses and set(kind.two_class_losses) <= set(kind.losses)
    assert kind.metrics and set(kind.lower_is_better) <= set(kind.metrics)
    assert getattr(transformers, kind.auto_model)._model_mapping
    assert kind.has_classes or not kind.several


def test_the_kinds_load_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "datasets", "pyarrow", "numpy", "scipy"}
    script = f"import sys, stages.tasks.registry; sys.exit(' '.join({heavy} & set(sys.modules)) or None)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == 0


def test_nobody_else_asks_for_the_name_of_a_task() -> None:
    found = []
    for path in sorted((ROOT / "stages").rglob("*.py")):
        if path.parent != ROOT / "stages/tasks":
            found += [
                f"{path.relative_to(ROOT)}:{node.lineno}: {node.value}"
                for node in ast.walk(ast.parse(path.read_bytes()))
                if isinstance(node, ast.Constant) and node.value in KINDS
            ]
    for path in sorted((ROOT / "stages").rglob("*.jinja")):
        found += [f"{path.name}: {name}" for name in KINDS if f'"{name}"' in path.read_text(encoding="utf-8")]
    assert found == []


def test_a_new_task_is_its_module_its_metrics_and_a_line(tmp_path: Path, tiny_model: Path) -> None:
    checkout = Checkout(tmp_path / "repo", tiny_model, {"data": {"task": "regression"}})
    stages = checkout.folder / "stages"
    (stages / "tasks/counts.py").write_text(COUNTS)
    registry = stages / "tasks/registry.py"
    registry.write_text(
        registry.read_text()
        .replace("\nKINDS", "from stages.tasks.counts import Counts\n\nKINDS")
        .replace("Regression())", "Regression(), Counts())")
    )
    metrics = (stages / "metrics/regression.py").read_text()
    (stages / "metrics/counts.py").write_text(metrics.replace("class Regression", "class Counts"))
    checkout.set_params(
        {
            "data": {"task": "counts"},
            "train": {"num_train_epochs": 1},
            "evaluate": {"metrics": ["mse", "pearsonr"], "metric_for_best_model": "mse"},
        }
    )
    checkout.repro()
    assert "# Text count model" in (checkout.folder / "models/best/README.md").read_text()
    assert "<h2>Predictions and labels</h2>" in (checkout.folder / "report.html").read_text()
    assert set(json.loads((checkout.folder / "metrics/best.json").read_text())["test"]) == {"loss", "mse", "pearsonr"}
