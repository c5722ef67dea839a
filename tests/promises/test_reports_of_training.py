"""What reports of training told: each row is an input, and the line or value that is right for it."""

from __future__ import annotations

import csv
import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.batches.tokenized import Task
from stages.config.read import parse_params, read_yaml
from stages.config.schema import EvaluateParams
from stages.ground.errors import UserError
from stages.run.state import Progress
from stages.scoring.ranking import ranked
from stages.training.endings import Outcome, Unfinished
from stages.training.optim import make_schedule
from stages.training.session import require_threshold_of_use
from stages.training.steps import load_steps
from tests.support.project import ROOT, Checkout
from tests.support.reports import FEATURES, LATER, last_line, later, trained
from tests.support.runs import make_params
from tests.support.train_stage import TRAIN_OUTS, saved_steps, start_training, train
from tests.support.train_stage import run_stage as run_stage_of

# ---- only a later batch fails

PLAIN: dict[str, Any] = {"loss": None}
ROWS = r"its rows of train are \d+(, \d+){7}; the state before it is saved$"
PLACE = r"\(later.py, line \d+\)"


@pytest.mark.parametrize(
    ("changes", "saved", "line"),
    [
        (
            {"model": {"kwargs": {"where": "model"}}, "train": PLAIN},
            8,
            rf"^error: step 9 fails in the model or the loss: LookupError: no such word {PLACE}; {ROWS}",
        ),
        (
            {"model": {"kwargs": {"where": "exit"}}, "train": PLAIN},
            8,
            rf"^error: step 9 fails in the model or the loss: SystemExit: 0 {PLACE}; {ROWS}",
        ),
        ({}, 8, rf"^error: train.loss stages.custom.later:loss gives shape \(7,\) for 4 rows.*; {ROWS}"),
        (
            {"model": {"kwargs": {"where": "eval"}}, "train": PLAIN, "evaluate": {"eval_batch_size": 8}},
            11,
            rf"^error: the model or the loss fails in eval mode: RuntimeError: .* {PLACE}; its rows of validation are "
            r"\d+(, \d+){7}; at the evaluation of step 11, whose state is saved$",
        ),
        (
            {
                "train": {**PLAIN, "eval_strategy": "steps", "eval_steps": 8},
                "evaluate": {"metrics": ["accuracy", "stages.custom.later:metric"]},
            },
            16,
            r"^error: evaluate.metrics: 'stages.custom.later:metric' raised ZeroDivisionError: no rows of class 7 "
            rf"{PLACE}; at the evaluation of step 16, whose state is saved$",
        ),
    ],
)
def test_code_of_ones_own_that_fails_on_a_later_batch_is_one_line_and_costs_nothing(
    prepared: Callable[..., Checkout], changes: dict[str, Any], saved: int, line: str
) -> None:
    reference, failing = later(prepared, **changes), later(prepared, **changes)
    train(reference)
    found = last_line(train(failing, code=2, FAILS="1"))
    assert re.search(line, found), found
    assert saved_steps(failing)[-1] == saved
    assert f"going on after step {saved}" in train(failing)
    assert failing.digests(*TRAIN_OUTS) == reference.digests(*TRAIN_OUTS)


@pytest.mark.parametrize("event", ["on_pre_optimizer_step", "on_step_end"])
def test_callback_that_raises_on_a_later_batch_names_step_and_rows_and_its_event_is_not_lost(
    prepared: Callable[..., Checkout], event: str
) -> None:
    callbacks = [{"class": "stages.custom.later:Raises", "kwargs": {"event": event}}]
    checkout = later(prepared, train={**PLAIN, "callbacks": callbacks})
    rows = r"its rows of train are \d+(, \d+){7}; the last checkpoint counts$"
    line = rf"^error: Raises.{event} at step 7: LookupError: no such file {PLACE}; {rows}"
    for _ in range(2):
        found = last_line(train(checkout, code=2, FAILS="1"))
        assert re.search(line, found), found
        assert saved_steps(checkout)[-1] == 6
    assert "going on after step 6" in train(checkout)


def test_callback_that_exits_does_not_look_like_success(prepared: Callable[..., Checkout]) -> None:
    callbacks = [{"class": "stages.custom.later:Raises", "kwargs": {"event": "exit"}}]
    checkout = later(prepared, train={**PLAIN, "callbacks": callbacks})
    found = last_line(train(checkout, code=2, FAILS="1"))
    assert re.search(rf"^error: Raises.on_step_end at step 7: SystemExit: 0 {PLACE}; .*the last checkpoint", found), (
        found
    )


def test_state_of_a_callback_that_raises_is_one_line(prepared: Callable[..., Checkout]) -> None:
    callbacks = [{"class": "stages.custom.later:Raises", "kwargs": {"event": "state_dict"}}]
    checkout = later(prepared, train={**PLAIN, "callbacks": callbacks})
    assert "error: Raises.state_dict: LookupError: no such file" in last_line(train(checkout, code=2))


def test_optimizer_that_raises_on_a_later_step_is_one_line_and_the_last_checkpoint_counts(
    prepared: Callable[..., Checkout],
) -> None:
    checkout = later(prepared, train={**PLAIN, "optim": "stages.custom.later:GivesUp"})
    found = last_line(train(checkout, code=2, FAILS="1"))
    assert "error: train.optim stages.custom.later:GivesUp fails in step 7: LookupError: no such group" in found
    assert found.endswith("; the last checkpoint counts") and saved_steps(checkout)[-1] == 6
    assert "going on after step 6" in train(checkout)


def test_module_that_exits_as_it_is_imported_is_one_line(prepared: Callable[..., Checkout]) -> None:
    checkout = later(prepared)
    (checkout.folder / "stages/custom/later.py").write_text(f"{LATER}\nraise SystemExit(0)\n")
    assert "which cannot be imported: SystemExit: 0" in last_line(train(checkout, code=2))


def test_metric_that_exits_or_fits_no_number_is_one_line_that_names_the_split(
    prepared: Callable[..., Checkout],
) -> None:
    mine = {"metric_for_best_model": "mine", "greater_is_better": True}
    checkout = later(prepared, train=PLAIN, evaluate={"metrics": ["stages.custom.later:huge"], **mine})
    assert "gives 'mine', a number that no float holds" in last_line(train(checkout, code=2))
    checkout = later(prepared, train=PLAIN, evaluate={"metrics": ["stages.custom.later:exits"], **mine})
    train(checkout)
    run_stage_of(checkout, "evaluate")
    found = last_line(run_stage_of(checkout, "select_best", 2, FAILS="1"))
    assert re.search(rf"'stages.custom.later:exits' raised SystemExit: 0 {PLACE}; for the rows of test$", found), found


def test_mode_that_a_callback_leaves_the_model_in_plays_no_part(prepared: Callable[..., Checkout]) -> None:
    callbacks = [{"class": "stages.custom.later:LeavesEvalMode"}]
    reference, checkout = (later(prepared, train={**PLAIN, "callbacks": used}) for used in ([], callbacks))
    train(reference)
    train(checkout)
    assert checkout.digests("models/candidates") == reference.digests("models/candidates")


def test_what_is_new_of_a_model_is_said_once_a_run(prepared: Callable[..., Checkout], tiny_model: Path) -> None:
    callbacks = [{"class": "stages.custom.later:Raises", "kwargs": {"event": "on_step_end"}}]
    checkout = prepared({"train": {"callbacks": callbacks}})
    (checkout.folder / "stages/custom/later.py").write_text(LATER)
    trained(tiny_model, checkout.folder / "tiny")
    line = "its head has 3 outputs, and 2 are needed; the head is a new one"
    assert line in train(checkout, code=2, FAILS="1")
    assert "going on after step 6" in (output := train(checkout)) and line not in output


# ---- a process that collates batches dies


@pytest.mark.parametrize("seconds", [0.0, 0.7])
def test_killed_loader_process_ends_the_start_in_one_line_with_all_steps_saved(
    prepared: Callable[..., Checkout], seconds: float
) -> None:
    import psutil

    changes: dict[str, Any] = {"num_workers": 2, "max_steps": 3000, "save_strategy": "time", "save_steps": None}
    checkout = prepared({"train": changes})
    process = start_training(checkout)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) == 2
    time.sleep(seconds)
    workers[0].kill()
    begin = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - begin < 10
    line = last_line(output)
    assert process.returncode == 75, output
    step = saved_steps(checkout)[-1]
    assert line.startswith(
        "a process that collates batches (train.num_workers is 2) was killed, as happens where memory"
    )
    assert f"the state after step {step} is saved; run the same command again to go on" in line


@pytest.mark.parametrize("early", [True, False])
def test_loader_process_that_dies_before_it_is_listed_is_told_as_a_killed_one(
    monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    class Loader:
        def __init__(self, *_: Any) -> None: ...

        def __iter__(self) -> Any:
            if early:
                raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
            return self

        def __next__(self) -> None:
            raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly")

    monkeypatch.setattr("stages.training.steps.make_loader", Loader)
    step = [SimpleNamespace(step=1, micro_batch=0, rows=[0])]
    inputs: Any = SimpleNamespace(
        compute=SimpleNamespace(device=None),
        plan=SimpleNamespace(steps=lambda first, last: iter([step])),
        total_steps=1,
        train_split=None,
        tokenizer=None,
    )
    before = signal.getsignal(signal.SIGCHLD)
    try:
        with pytest.raises(Unfinished) as ended:
            next(load_steps(inputs, Progress(), list, 2))
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert ended.value.ending.outcome is Outcome.STOPPED
    assert ended.value.ending.line.startswith("a process that collates batches (train.num_workers is 2) was killed")


# ---- decisions that are told


def test_warm_up_that_is_longer_than_the_run_is_told(prepared: Callable[..., Checkout]) -> None:
    output = train(later(prepared, train={**PLAIN, "warmup_steps": 22}))
    assert "warning: train.warmup_steps is 22, of 22 steps in all, so the learning rate never reaches" in output
    assert "warmup_steps" not in train(later(prepared, train={**PLAIN, "warmup_steps": 21}))


def test_plan_of_fewer_steps_than_are_to_be_trained_is_refused(prepared: Callable[..., Checkout]) -> None:
    checkout = later(prepared, train=PLAIN)
    checkout.set_params({**FEATURES, "train": {**PLAIN, "num_train_epochs": 4}})
    assert last_line(train(checkout, code=2)).startswith(
        "error: the batch plan has 22 steps, and 44 are to be trained; run: dvc repro build_loaders"
    )


def test_fp16_that_overflows_in_every_step_is_told_when_it_begins_and_ends_the_run(
    prepared: Callable[..., Checkout],
) -> None:
    checkout = later(prepared, train={"loss": "stages.custom.later:huge_loss", "precision": "fp16"})
    output = train(checkout, code=2)
    assert output.count("fp16: the gradient of step 1 overflowed, so the step is skipped and the scale halved") == 1
    assert last_line(output).startswith(
        "error: fp16: the gradient of every step from 1 to 22 overflowed, down to a scale of 0.015625, so nothing was "
        "trained in them; the state is saved: write train.precision bf16 or fp32"
    )
    assert not (checkout.folder / "models").exists()
    assert "every step from 1 to 22" in last_line(train(checkout, code=2))


def test_fp16_whose_scale_has_fallen_to_its_floor_stops_the_run(prepared: Callable[..., Checkout]) -> None:
    checkout = later(
        prepared, train={"loss": "stages.custom.later:huge_loss", "precision": "fp16", "num_train_epochs": 4}
    )
    assert "every step from 1 to 30 overflowed, down to a scale of 6.10352e-05" in last_line(train(checkout, code=2))
    assert saved_steps(checkout)[-1] == 30


def test_model_without_a_validation_loss_is_never_published(prepared: Callable[..., Checkout]) -> None:
    checkout = later(prepared, train={"loss": "stages.custom.later:nan_loss"}, evaluate={"eval_batch_size": 16})
    output = train(checkout, code=2)
    rows = ", ".join(map(str, range(16)))
    assert f"warning: the validation loss of step 11 is nan, so it is no candidate; it is that of rows {rows}" in output
    assert last_line(output).startswith("error: no evaluation gave a validation loss that is a number")
    assert not (checkout.folder / "models").exists()
    assert "no evaluation gave a validation loss" in last_line(train(checkout, code=2))


def test_state_that_itself_holds_nan_says_so_and_since_when_at_every_start(prepared: Callable[..., Checkout]) -> None:
    changes = {"optim": "sgd", "learning_rate": 1e38, "max_grad_norm": None, "warmup_steps": 0}
    checkout = later(prepared, train={**PLAIN, **changes})
    for _ in range(2):
        line = last_line(train(checkout, code=2))
        assert "the state itself holds NaN, infinity or as good as that (layers." in line
        assert "since step 1 at the latest" in line
        assert "so that no row is to blame and another start does not help: begin anew with" in line


def test_metric_that_is_nan_at_every_evaluation_is_told_and_the_loss_decides(prepared: Callable[..., Checkout]) -> None:
    changes = {"early_stopping_patience": 1, "num_train_epochs": 4, "keep_candidates": 2}
    evaluate = {
        "metrics": ["stages.custom.later:nan_metric"],
        "metric_for_best_model": "mine",
        "greater_is_better": True,
    }
    checkout = later(prepared, train={**PLAIN, **changes}, evaluate=evaluate)
    output = train(checkout)
    assert "warning: mine of step 11 is nan (evaluate.metric_for_best_model): the validation loss decides" in output
    record = json.loads((checkout.folder / "metrics/train.json").read_text())
    losses = {int(row["step"]): float(row["loss"]) for row in checkout_rows(checkout)}
    assert record["best_step"] == min(losses, key=lambda step: losses[step])
    assert record["steps"] > 11


def checkout_rows(checkout: Checkout) -> list[dict[str, str]]:
    with (checkout.folder / "plots/eval.tsv").open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


NAN = float("nan")


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({1: (NAN, 0.9), 2: (NAN, 0.7), 3: (NAN, 0.8)}, [2, 3, 1]),
        ({1: (NAN, 0.1), 2: (-0.5, 0.9), 3: (0.6, 0.9)}, [3, 2, 1]),
        ({1: (NAN, NAN), 2: (NAN, 0.7), 3: (NAN, NAN)}, [2, 1, 3]),
    ],
)
def test_loss_ranks_what_the_metric_cannot(scores: dict[int, tuple[float, float]], best: list[int]) -> None:
    evaluate = make_params().evaluate
    table = {step: {"accuracy": metric, "loss": loss} for step, (metric, loss) in scores.items()}
    assert ranked(table, evaluate) == best


@pytest.mark.parametrize(
    ("kwargs", "evaluate", "followed"),
    [
        ({}, {}, "loss"),
        ({"mode": "min"}, {}, "loss"),
        ({"mode": "max"}, {}, "accuracy"),
        ({"mode": "max"}, {"metric_for_best_model": "loss"}, "refused"),
        ({}, {"metric_for_best_model": "loss"}, "loss"),
        ({}, {"metric_for_best_model": "errors", "greater_is_better": False}, "errors"),
        ({"mode": "max"}, {"metric_for_best_model": "errors", "greater_is_better": False}, "refused"),
    ],
)
@pytest.mark.parametrize("name", ["ReduceLROnPlateau", "torch.optim.lr_scheduler:ReduceLROnPlateau"])
def test_plateau_is_given_what_its_mode_is_made_for(
    name: str, kwargs: dict[str, Any], evaluate: dict[str, Any], followed: str
) -> None:
    plateau = {"lr_scheduler_type": name, "lr_scheduler_kwargs": {"patience": 0, **kwargs}, "warmup_steps": 0}
    train = make_params(**plateau).train
    wanted = EvaluateParams.model_validate(read_yaml(ROOT / "params.yaml")["evaluate"] | evaluate)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    if followed == "refused":
        with pytest.raises(UserError, match=r"mode is max, but evaluate.metric_for_best_model is .*; write mode: min"):
            make_schedule(optimizer, train, 10, wanted)
        return
    schedule = make_schedule(optimizer, train, 10, wanted)
    # It gets better first, and then worse; what is not followed does the opposite.
    better = {"loss": (1.0, 0.5, 0.9), "accuracy": (0.5, 0.9, 0.6), "errors": (1.0, 0.5, 0.9)}
    rates = []
    for turn in range(3):
        other = "accuracy" if followed == "loss" else "loss"
        schedule.after_evaluation({followed: better[followed][turn], other: 1.0})
        rates.append(optimizer.param_groups[0]["lr"])
    schedule.after_evaluation({"loss": NAN, followed: NAN})
    rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1.0, 1.0, 0.1, 0.1])


@pytest.mark.parametrize(
    ("task", "names", "threshold", "refused"),
    [
        ("classification", ("a", "b", "c"), 0.7, True),
        ("classification", ("a", "b", "c"), 0.5, False),
        ("classification", ("a", "b"), 0.7, False),
        ("multi_label", ("a", "b", "c"), 0.7, False),
    ],
)
def test_threshold_that_nothing_looks_at_is_refused(
    task: str, names: tuple[str, ...], threshold: float, refused: bool
) -> None:
    evaluate = make_params().evaluate.model_copy(update={"threshold": threshold})
    kind = Task(task, names, (), ("x",), "label", ("features",))
    values = read_yaml(ROOT / "params.yaml")
    metrics = {"multi_label": ["f1_micro"]}.get(task, ["accuracy"])
    values["data"] |= {"task": task, "label_names": list(names)}
    values["evaluate"] |= {"threshold": threshold, "metrics": metrics, "metric_for_best_model": metrics[0]}
    if not refused:
        require_threshold_of_use(evaluate, kind)
        parse_params(values)
        return
    with pytest.raises(UserError, match=r"evaluate.threshold is 0.7, but of 3 classes the likeliest is predicted"):
        require_threshold_of_use(evaluate, kind)
    with pytest.raises(UserError, match=r"evaluate.threshold is 0.7, but of the 3 classes in data.label_names"):
        parse_params(values)
