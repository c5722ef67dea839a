"""Stage 3 of 5: fine-tune. Writes models/candidates/, metrics/train.json, plots/train.tsv and plots/eval.tsv.

Kill it anywhere and run it again: it goes on from the run's newest checkpoint (`runs/<id>/`), to the same bits.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from stages.config.errors import UserError, run_stage
from stages.config.params import Params, load_params
from stages.config.pipeline import StageSpec, load_stage, require_code_dep
from stages.modeling.source import require_visible
from stages.run.signals import StopRequest, die_with_parent, ignore_stop_signals

if TYPE_CHECKING:
    import torch

    from stages.run.folder import RunFolder
    from stages.run.identity import Identity
    from stages.training.loop import Inputs
    from stages.training.state import TrainState

CANDIDATES = Path("models/candidates")
METRICS = Path("metrics/train.json")
PLOTS = Path("plots")


def say(line: str) -> None:
    """One line for people, on stderr as all progress is."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Run the stage from params.yaml. Exit code 0 only after publishing: DVC locks the stage as done then."""
    stop = StopRequest()
    stop.install()
    die_with_parent()
    params, stage = load_params(), load_stage("train")
    require_visible(stage, params.model.source)
    require_code_dep(stage, params.train.lr_scheduler_type, "train.lr_scheduler_type")

    import torch

    from stages.modeling.device import pick_device, set_determinism
    from stages.run import folder as run_folder

    identity = current_identity(params, stage)
    run = run_folder.RunFolder.of(identity)
    is_new = run.create(identity)
    run.acquire()
    stop.on_request = run.announce_stop
    if stop.signal:
        run.announce_stop()
    if is_new:
        explain_new_run(run, identity)
    device = pick_device(params.train.device)
    set_determinism(params.train.deterministic)
    torch.manual_seed(params.train.seed)
    inputs, state = prepare(params, run, device)

    stopped_by = resume_and_train(params, identity, run, inputs, state, stop)
    if stopped_by is not None:
        run.log("stopped", step=state.progress.step, signal=stopped_by)
        ignore_stop_signals()  # a repeat would end the interpreter on its way out, with another exit code
        say(f"stopped by {stopped_by} after step {state.progress.step}, saved; run the same command again to go on")
        sys.exit(1)
    changed = current_identity(load_params(), load_stage("train")).difference(identity.values)
    if changed:
        raise UserError(
            f"nothing is published: {'; '.join(changed[:3])} changed while run {run.id} trained; "
            "run again to train with the change, or undo it and run again to publish this result"
        )
    publish(params, run, state, inputs)
    run.finish()
    run.log("finished", step=state.progress.step)
    run_folder.remove_old_finished(run)


def current_identity(params: Params, stage: StageSpec) -> Identity:
    """The identity of this run, from dvc.yaml, params.yaml and the files as they are at this moment."""
    from stages.modeling.source import resolve_model
    from stages.run.identity import identify

    return identify(stage, resolve_model(params.model.source, params.model.revision))


def explain_new_run(run: RunFolder, identity: Identity) -> None:
    """Say why a run starts from the beginning although there are others."""
    from stages.run.folder import list_runs

    others = [other for other in list_runs() if other.id != run.id and other.identity_values() is not None]
    if others:
        newest = others[0]
        lines = identity.difference(newest.identity_values() or {})
        more = f" (and {len(lines) - 5} more)" if len(lines) > 5 else ""
        say(
            f"new run {run.id}; it differs from run {newest.id} in {', '.join(lines[:5])}{more}; "
            f"to continue that one on purpose, set train.init_from_run: {newest.id}"
        )


def prepare(params: Params, run: RunFolder, device: torch.device) -> tuple[Inputs, TrainState]:
    """Load what the tokenize and build_loaders stages left, and build the model and all that trains it."""
    from stages.data.store import TOKENIZED, load_split, load_task, load_tokenizer
    from stages.modeling.build import build_model
    from stages.modeling.source import resolve_model
    from stages.plan.batch_plan import BatchPlan
    from stages.training.history import History
    from stages.training.loop import Inputs
    from stages.training.losses import make_objective
    from stages.training.optim import freeze, make_optimizer, make_schedule
    from stages.training.precision import make_scaler
    from stages.training.state import EarlyStopping, TrainState

    train, evaluate = params.train, params.evaluate
    task, train_split, plan = load_task(), load_split(TOKENIZED, "train"), BatchPlan()
    total_steps = train.max_steps or train.num_train_epochs * plan.steps_per_epoch
    inputs = Inputs(
        task=task,
        train_split=train_split,
        validation_split=load_split(TOKENIZED, "validation"),
        tokenizer=load_tokenizer(),
        plan=plan,
        total_steps=total_steps,
        objective=make_objective(train, task, train_split, device),
        device=device,
    )
    folder = resolve_model(params.model.source, params.model.revision)
    model = build_model(params.model, folder, task, train.seed)
    model.to(device)  # type: ignore[arg-type]
    freeze(model, train.freeze)
    optimizer = make_optimizer(model, train, device)
    state = TrainState(
        model=model,
        optimizer=optimizer,
        schedule=make_schedule(optimizer, train, total_steps),
        scaler=make_scaler(device, train.precision),
        stopper=EarlyStopping(evaluate.higher_wins, train.early_stopping_patience, train.early_stopping_threshold),
        train_history=History(run.history / "train.tsv", ["step", "epoch", "loss", "learning_rate", "grad_norm"]),
        eval_history=History(run.history / "eval.tsv", ["step", "epoch", "loss", *evaluate.metrics]),
    )
    return inputs, state


def resume_and_train(
    params: Params, identity: Identity, run: RunFolder, inputs: Inputs, state: TrainState, stop: StopRequest
) -> str | None:
    """Go on from the newest good checkpoint, or begin; train; leave the final state saved.

    Returns:
        The signal that stopped it, or None if the run is complete.
    """
    from stages.run.checkpoint import CheckpointStore
    from stages.run.saver import Saver
    from stages.training.candidates import Candidates
    from stages.training.loop import NonFiniteLoss, train
    from stages.training.resume import Resumer
    from stages.training.saving import SaveSchedule

    evaluate = params.evaluate
    store = CheckpointStore(run.checkpoints, run.id)
    candidates = Candidates(
        run.candidates, params.train.keep_candidates, evaluate.metric_for_best_model, evaluate.higher_wins
    )
    resumer = Resumer(state, run, identity, store, candidates, inputs.total_steps, inputs.device, say)
    needs_no_save = resumer.resume(params.train.init_from_run)
    candidates.remove_unused(state.progress.candidates, store)

    def sync_histories() -> None:
        state.train_history.sync()
        state.eval_history.sync()

    saver = Saver(store, before_commit=sync_histories)
    schedule = SaveSchedule(params.train, saver, state.progress if needs_no_save else None)
    failure: NonFiniteLoss | None = None
    try:
        train(state, inputs, params.train, evaluate, candidates, saver, schedule, stop)
    except NonFiniteLoss as error:
        failure = error  # raised before it touched anything, so the state is whole
    finally:
        saver.wait()
    if schedule.changed(state.progress):
        saver.save(state.progress.step, state.state_dict)
        saver.wait()
    if failure is not None:
        raise failure
    candidates.remove_unused(state.progress.candidates, store)
    complete = state.stopper.reason or (
        state.progress.step == inputs.total_steps and state.progress.evaluated_step == inputs.total_steps
    )
    return None if complete or stop.signal is None else stop.signal.name


def publish(params: Params, run: RunFolder, state: TrainState, inputs: Inputs) -> None:
    """Write the stage's outs from the finished run. Metrics and plots come last, each whole or not at all."""
    from stages.storage import files
    from stages.training.candidates import Candidates

    evaluate, progress = params.evaluate, state.progress
    Candidates(
        run.candidates, params.train.keep_candidates, evaluate.metric_for_best_model, evaluate.higher_wins
    ).copy_to(CANDIDATES, progress.candidates)
    PLOTS.mkdir(exist_ok=True)
    for history in (state.train_history, state.eval_history):
        shutil.copyfile(history.path, PLOTS / history.path.name)
    files.write_text(
        METRICS,
        files.dumps(
            {
                "steps": progress.step,
                "epochs": round(progress.step / inputs.plan.steps_per_epoch, 6),
                "stopped_early": state.stopper.reason is not None,
                "best_step": progress.candidates[0]["step"],
                "train_loss": progress.total_loss / progress.step,
                "environments": progress.environments,
            }
        ),
    )
    say(f"run {run.id}: published {len(progress.candidates)} candidates, best at step {progress.candidates[0]['step']}")


if __name__ == "__main__":
    run_stage(main)
