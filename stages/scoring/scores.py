"""Scores of predictions, by name: of the `evaluate` modules in stages/metrics, or of the user's own code."""

from __future__ import annotations

import sys
import tempfile
import warnings
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from stages.batches.tokenized import Task
from stages.config.imports import import_object
from stages.config.schema import EvaluateParams, is_custom
from stages.ground.errors import RAISED, UserError, describe, quote
from stages.modeling.head import Logits, decide, probabilities

# What computes scores.
METRIC_LIBRARIES = ("evaluate", "numpy", "scikit-learn", "scipy")
MODULES = Path(__file__).parents[1] / "metrics"
# Columns that the history has beside the metrics.
RESERVED = ("step", "epoch", "loss")


def score(task: Task, params: EvaluateParams, logits: Logits, labels: NDArray[Any]) -> dict[str, float]:
    """Every metric of `params.metrics`, in that order; one of the user's own may give several.

    `labels` are int64 (rows,), in multi_label float32 (rows, labels) of 0 and 1, in regression float32 (rows,).

    Raises:
        UserError: a metric cannot be imported, raises, or gives something else than numbers with names of their own;
            or none is `params.metric_for_best_model`.
    """
    found: dict[str, float] = {}
    for entry in params.metrics:
        try:
            result = _compute(entry, task, params, logits, labels)
        except UserError:
            raise
        except RAISED as error:
            raise UserError(f"evaluate.metrics: {quote(entry)} raised {describe(error)}") from error
        if not isinstance(result, dict):
            raise UserError(
                f"evaluate.metrics: {quote(entry)} returned {quote(result)}; it should be a dict of name: number"
            )
        for name, value in result.items():
            found[_new_name(entry, name, found)] = _number(entry, name, value)
    if params.metric_for_best_model not in ("loss", *found):
        raise UserError(
            f"evaluate.metric_for_best_model is {quote(params.metric_for_best_model)}, which evaluate.metrics do not "
            f"give; there are {', '.join(['loss', *found])}"
        )
    return found


def _compute(entry: str, task: Task, params: EvaluateParams, logits: Logits, labels: NDArray[Any]) -> Any:
    if ":" in entry:
        from transformers import EvalPrediction

        # Copies, as such a function may well work in place.
        return import_object(entry, "evaluate.metrics")(
            EvalPrediction(predictions=logits.copy(), label_ids=labels.copy())
        )
    decisions = decide(task.task, logits, params.threshold)
    inputs: dict[str, Any] = {"predictions": decisions, "references": labels}
    if is_custom(entry):
        return _load(_script(entry)).compute(**inputs)
    if task.kind.has_classes:
        inputs["probabilities"] = probabilities(task.task, logits)
    with warnings.catch_warnings():
        # Where a score is not defined, its value says so: 0 or NaN.
        warnings.simplefilter("ignore")
        return _load(MODULES / f"{task.task}.py", entry).compute(**inputs)


def _script(entry: str) -> Path:
    path = Path(entry).absolute()
    script = path / f"{path.name}.py" if path.is_dir() else path
    # Without a file, `evaluate` would ask the Hub for a metric of that name.
    if not script.is_file():
        raise UserError(f"evaluate.metrics names {quote(entry)}, but {script} is not there")
    return script


@cache
def _load(script: Path, config_name: str | None = None) -> Any:
    """What `evaluate.load(script, config_name)` gives, but always of the file as it is now.

    `evaluate.load` imports a copy from a cache in the home folder, which is never written again: half a copy, left by
    a kill, would stay, and an edit behind a `#` (that of a string, say) would not be seen.
    """
    # It takes seconds to import, and a run may be killed before its first evaluation.
    from evaluate.loading import evaluation_module_factory, import_main_class, init_dynamic_modules

    with tempfile.TemporaryDirectory() as folder:
        try:
            # Named after the folder to be imported once only, but not as it, which could be imported itself.
            package = f"metric_{Path(folder).name}"
            path = init_dynamic_modules(package, folder)
            copy = evaluation_module_factory(str(script), dynamic_modules_path=path)
            metric = import_main_class(copy.module_path)
        finally:
            sys.path.remove(folder)
            # A copy that is about to vanish is nobody's to import again; the file itself is part of the run's code.
            for name in [name for name in sys.modules if name.partition(".")[0] == package]:
                del sys.modules[name]
    if metric is None:
        raise UserError(f"evaluate.metrics: {script} defines no evaluate.Metric")
    # A seed of its own, so that what it draws depends on nothing that was drawn before.
    loaded = metric(config_name=config_name, keep_in_memory=True, seed=0, hash=copy.hash)
    loaded.download_and_prepare()
    return loaded


def _new_name(entry: str, name: object, found: dict[str, float]) -> str:
    # Control characters would end up in the header of a TSV file.
    if not isinstance(name, str) or not name or not name.isprintable():
        raise UserError(f"evaluate.metrics: {quote(entry)} gives {quote(name)}; a name should be printable text")
    if name in RESERVED or name in found:
        why = "reserved" if name in RESERVED else "there already"
        raise UserError(f"evaluate.metrics: {quote(entry)} gives {quote(name)}, which is {why}; give it another name")
    return name


def _number(entry: str, name: str, value: Any) -> float:
    # NumPy's and torch's numbers are arrays of no dimension.
    number = value.item() if getattr(value, "ndim", None) == 0 else value
    if not isinstance(number, Real):
        raise UserError(f"evaluate.metrics: {quote(entry)} gives {quote(name)}: {quote(value)}; it should be a number")
    try:
        return float(number)
    except OverflowError:
        raise UserError(f"evaluate.metrics: {quote(entry)} gives {quote(name)}, a number that no float holds") from None
