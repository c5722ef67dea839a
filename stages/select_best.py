"""Stage 5 of 5: choose the best candidate and show it. Writes models/best/, data/predictions/test/,
metrics/best.json, plots/ and report.html. Only the chosen model ever sees the test split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.config.pipeline import load_stage
from stages.config.rules import shown
from stages.config.schema import FACTORY, EvaluateParams, Params
from stages.ground.errors import UserError, say
from stages.ground.places import BEST, CANDIDATES, METRICS, PLOTS, REPORT, TEST, VALIDATION, step_name, step_of
from stages.ground.running import run_stage
from stages.ground.signals import die_with_parent
from stages.ground.watchdog import watch
from stages.scoring.ranking import ranked

if TYPE_CHECKING:
    import pandas as pd

    from stages.batches.tokenized import Task

# What DVC shows in a table: as many columns fit.
SHOWN_SCORES = 12


def main() -> None:
    """Run the stage from params.yaml."""
    die_with_parent()
    stage = load_stage("select_best")
    params = stage.params
    candidates = json.loads((METRICS / "candidates.json").read_text(encoding="utf-8"))
    names = rank(candidates, params.evaluate, params.select_best.tie_break)

    from stages.batches.tokenized import TOKENIZED, has_split
    from stages.keeping.code import find_code, require_code, require_imported
    from stages.keeping.environment import of_libraries
    from stages.keeping.work import work_of
    from stages.scoring.kept import Kept
    from stages.scoring.predictor import Predictor
    from stages.scoring.scores import METRIC_LIBRARIES

    code = find_code(stage)
    require_code(stage, code)
    predictor = Predictor(params)
    with work_of(stage, predictor.environment | of_libraries(*METRIC_LIBRARIES)) as run:
        test: pd.DataFrame | None = None
        scores: dict[str, float] = {}
        if has_split(TOKENIZED, "test"):
            with watch(params.train.hang_seconds, run.log):
                test, scores = predictor.run(CANDIDATES / names[0], "test", Kept(run.atoms("test")))
        require_imported(stage, code)
        publish(names, candidates, test, scores, params)


def publish(
    names: list[str],
    candidates: dict[str, dict[str, float]],
    test: pd.DataFrame | None,
    scores: dict[str, float],
    params: Params,
) -> None:
    """Write the stage's outs: the model that comes first in `names`, its predictions on `test` and their `scores`, and
    what shows them."""
    import pandas as pd

    from stages.batches.tokenized import load_task
    from stages.ground import disk

    evals = pd.read_csv(PLOTS / "eval.tsv", sep="\t")
    best = describe(names, candidates, scores, evals, params)
    task = load_task()
    validation = pd.read_parquet(VALIDATION / f"{names[0]}.parquet")

    disk.write_folder(BEST, lambda folder: write_model(folder, best, task, params))
    disk.write_folder(TEST, lambda folder: write_test(folder, test))
    write_plots(validation, test, task)
    disk.write_text(REPORT, make_report(best, candidates, evals, validation, test, task, params))
    disk.write_text(METRICS / "best.json", disk.dumps(best))
    train_loss = json.loads((METRICS / "train.json").read_text(encoding="utf-8"))["train_loss"]
    disk.write_text(METRICS / "scores.json", json.dumps(headline(best, train_loss), indent=2) + "\n")
    say(f"{names[0]}: {best['reason']}")


def rank(candidates: dict[str, dict[str, float]], evaluate: EvaluateParams, tie_break: str) -> list[str]:
    """Names of the candidates, best first; of equals the earliest or latest; NaN last, by loss.

    Raises:
        UserError: there is none, or none has the metric.
    """
    metric = evaluate.metric_for_best_model
    if not candidates or any(metric not in scores for scores in candidates.values()):
        raise UserError(f"metrics/candidates.json: no candidate with {metric}; run: dvc repro evaluate")
    by_step = {step_of(name): scores for name, scores in candidates.items()}
    return [step_name(step) for step in ranked(by_step, evaluate, tie_break)]


def describe(
    ranked: list[str],
    candidates: dict[str, dict[str, float]],
    test: dict[str, float],
    evals: pd.DataFrame,
    params: Params,
) -> dict[str, Any]:
    """metrics/best.json: what was chosen, its scores, and why."""
    metric = params.evaluate.metric_for_best_model
    chosen, others = ranked[0], ranked[1:]
    value, step = candidates[chosen][metric], step_of(chosen)
    runner_up, reason = None, f"the only candidate ({metric} {value:.4f})"
    if others:
        runner_up = {"step": step_of(others[0]), "value": candidates[others[0]][metric]}
        superlative = "highest" if params.evaluate.higher_wins else "lowest"
        reason = f"{superlative} validation {metric} of {len(ranked)} candidates: {value:.4f}"
        if value != value:
            reason = f"no candidate has a number for {metric}; the lowest validation loss wins"
        elif runner_up["value"] == value:
            reason += f", tied with step {runner_up['step']}; the {params.select_best.tie_break} wins"
        else:
            reason += f", ahead of step {runner_up['step']} with {runner_up['value']:.4f}"
    return {
        "step": step,
        "epoch": float(evals.loc[evals["step"] == step, "epoch"].iloc[0]),
        "metric": metric,
        "validation": candidates[chosen],
        "test": test or None,
        "runner_up": runner_up,
        "reason": reason,
    }


def headline(best: dict[str, Any], train_loss: float) -> dict[str, dict[str, float]]:
    """metrics/scores.json, the numbers that DVC compares: the scores of the split that judges, the metric that
    decides first; what chose the candidate; and the loss in training. Never more than fit into a table."""
    validation, test = best["validation"], best["test"]
    names = sorted(test or validation, key=lambda name: (name == "loss", name != best["metric"]))
    found = {"test": {name: test[name] for name in names}} if test else {}
    chosen_by = dict.fromkeys([best["metric"], "loss"]) if test else names
    found["validation"] = {name: validation[name] for name in chosen_by}
    found["train"] = {"loss": train_loss}
    # What there are too many of are metrics of one's own, or all that there are.
    surplus = max(sum(map(len, found.values())) - SHOWN_SCORES, 0)
    judged = found["test" if test else "validation"]
    for name in names[::-1][1 : surplus + 1]:
        del judged[name]
    return found


def write_model(folder: Path, best: dict[str, Any], task: Task, params: Params) -> None:
    """The model and its card: an ordinary Hugging Face folder, or of a factory model what its card's lines load."""
    import shutil

    from stages.batches.tokenized import TOKENIZED
    from stages.ground import disk
    from stages.modeling.head import head_of
    from stages.modeling.losses import loss_name
    from stages.report.model_card import model_card

    shutil.copytree(CANDIDATES / step_name(best["step"]), folder, copy_function=disk.copy, dirs_exist_ok=True)
    if task.text_columns:
        shutil.copytree(TOKENIZED / "tokenizer", folder, copy_function=disk.copy, dirs_exist_ok=True)
    else:
        disk.copy(TOKENIZED / "features.json", folder / "features.json")
    if params.model.source.startswith(FACTORY):
        disk.copy(TOKENIZED / "task.json", folder / "task.json")
    head = head_of(task, loss_name(params.train, task))
    card = model_card(best=best, task=task, head=head, params=shown(params))
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_test(folder: Path, test: pd.DataFrame | None) -> None:
    """The test predictions; an empty folder without a test split, as an out has to exist."""
    if test is not None:
        test.to_parquet(folder / "predictions.parquet", index=False)


def write_plots(validation: pd.DataFrame, test: pd.DataFrame | None, task: Task) -> None:
    """DVC's plots of the test split, or of the validation split where there are no test labels."""
    from stages.ground import disk
    from stages.report.plots import confusion_rows, precision_recall_rows

    split = test if test is not None and test["label"].notna().all() else validation
    disk.write_text(PLOTS / "confusion_matrix.csv", confusion_rows(split, task).to_csv(index=False))
    disk.write_text(PLOTS / "precision_recall.csv", precision_recall_rows(split, task).to_csv(index=False))


def make_report(
    best: dict[str, Any],
    candidates: dict[str, dict[str, float]],
    evals: pd.DataFrame,
    validation: pd.DataFrame,
    test: pd.DataFrame | None,
    task: Task,
    params: Params,
) -> str:
    """report.html, from this stage's deps alone."""
    import pandas as pd

    from stages.report.html import render_report

    return render_report(
        best=best,
        candidates=candidates,
        train=pd.read_csv(PLOTS / "train.tsv", sep="\t"),
        evals=evals,
        data=json.loads((METRICS / "data.json").read_text(encoding="utf-8")),
        params=shown(params),
        task=task,
        validation=validation,
        test=test,
    )


if __name__ == "__main__":
    run_stage(main, collect_rarely=True)
