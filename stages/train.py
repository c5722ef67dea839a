"""Stage 3 of 5: fine-tune. Writes models/candidates/, metrics/train.json, plots/train.tsv and plots/eval.tsv.

Kill it anywhere and run it again: it goes on from the run's newest checkpoint (`runs/<id>/`), to the same bits.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from stages.config.pipeline import load_stage, require_folders
from stages.config.schema import Params
from stages.ground.errors import Interrupted, TransientError, UserError, say
from stages.ground.places import CANDIDATES, METRICS
from stages.ground.running import run_stage
from stages.ground.signals import StopRequest, die_with_parent, ignore_stop_signals
from stages.ground.watchdog import watch
from stages.keeping.identity import Identity, identify
from stages.keeping.sealed import DamagedError

if TYPE_CHECKING:
    from stages.keeping.folder import RunFolder
    from stages.modeling.compute import Compute
    from stages.modeling.world import World
    from stages.run.candidates import Candidates
    from stages.run.result import Result
    from stages.training.guard import ImportGuard

RECORD = METRICS / "train.json"
NO_CANDIDATE = (
    "no evaluation gave a validation loss that is a number, so there is no model to publish; the state is saved: "
    "look at the rows of validation that were named, or try a lower train.learning_rate"
)


def main() -> None:
    """Run the stage from params.yaml. Exit code 0 only after publishing: DVC locks the stage as done then."""
    die_with_parent()
    # DDP complains of a setting that stages.reduction.fast chooses on purpose, once a process and start.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if os.environ.get("RANK", "0") == "0":
        lead()
    else:
        follow()


def lead() -> None:
    """The only process, or the main one of several: it alone reads and writes the run's folder, and speaks."""
    stop = StopRequest()
    stop.install()
    stage = load_stage("train")
    params = stage.params
    require_folders(stage)

    from stages.keeping.code import find_code, require_code, require_imported
    from stages.keeping.folder import RunFolder, find_source
    from stages.keeping.pruning import keep_within_limit, runs_limit
    from stages.keeping.work import lock_outs, sweep
    from stages.modeling.compute import Compute
    from stages.modeling.world import World
    from stages.run.candidates import Candidates
    from stages.training.guard import ImportGuard
    from stages.training.session import meet

    world = World.from_environment()
    require_work_for(world, params)
    outs = lock_outs("train")
    sweep()
    runs_limit()  # a bad one is told now, and not after days
    identity = identify(stage)
    require_code(stage, identity.code)
    for later in map(load_stage, ("evaluate", "select_best")):  # they run the same models, losses and metrics
        require_code(later, find_code(later))
    run = RunFolder.of(identity)
    if params.train.init_from_run and not params.train.stop_step and not run.checkpoints.steps():
        find_source(params.train.init_from_run)
    is_new = run.enter(identity)

    def announce_stop() -> None:
        outs.announce_stop()
        run.lock.announce_stop()

    stop.on_request = announce_stop
    if stop.signal:
        announce_stop()
    if is_new:
        explain_new_run(run, identity)
    compute = Compute.start(params.train, world)
    candidates, guard = Candidates(run.candidates, params), ImportGuard(stage, identity.code)
    result = finished_result(run, candidates)
    with world.together():
        if result is not None:
            meet(compute, identity, stop, is_complete=True)
        else:
            result = train_to_the_end(params, run, identity, candidates, compute, guard, stop)
        world.leave()
    require_imported(stage, identity.code)
    changed = identify(load_stage("train")).difference(identity.values)
    if changed:
        raise UserError(
            f"nothing is published: {'; '.join(changed[:3])} changed while run {run.id} trained; "
            "run again to train with the change, or undo it and run again to publish this result"
        )
    try:
        result.publish(candidates, CANDIDATES, RECORD)
    except DamagedError as error:
        raise TransientError(f"nothing is published: {error}; run the same command again, which mends it") from None
    run.checkpoints.remove_but(set(run.checkpoints.steps()[:1]))  # what train.init_from_run can start from
    best, step = result.record["best_step"], result.record["steps"]
    say(f"run {run.id}: published {len(result.candidates)} candidates, best at step {best}")
    run.log("finished", step=step)
    keep_within_limit(run, say)


def finished_result(run: RunFolder, candidates: Candidates) -> Result | None:
    """What the run comes to, if it is finished and all that publishing needs is whole; else it trains."""
    from stages.run.result import Result

    run.recover()
    if not run.finished:
        return None
    try:
        result = Result.read(run)
    except DamagedError as error:
        run.store.invalidate(run.result)
        say(f"the result of run {run.id} is damaged and was set aside: {error}")
        return None
    try:
        for candidate in result.candidates:
            candidates.ensure(candidate, say)
    except DamagedError:
        run.store.remove(run.result)  # what that costs is said where it is looked for
        return None
    run.log("start", step=result.record["steps"])
    say(f"run {run.id} is complete since step {result.record['steps']}: publishing it, nothing to train")
    return result


def train_to_the_end(
    params: Params,
    run: RunFolder,
    identity: Identity,
    candidates: Candidates,
    compute: Compute,
    guard: ImportGuard,
    stop: StopRequest,
) -> Result:
    """Go on with the run where it is, or begin it, and see it complete. Where it is not, the process ends here."""
    from stages.run.recorder import Recorder
    from stages.run.result import Result
    from stages.run.resume import Resumer
    from stages.run.state import broadcast_state
    from stages.training.callbacks import CallbackList
    from stages.training.endings import Ending, Outcome
    from stages.training.loop import Session, train
    from stages.training.session import build_state, load_inputs, make_reduction, meet
    from stages.watching.loggers import make_loggers
    from stages.watching.preflight import preflight
    from stages.watching.progress_bar import ProgressBar

    inputs = load_inputs(params, compute)
    loggers = make_loggers(params.train.loggers, run.path, run.id, params.model_dump(by_alias=True))
    resumer = Resumer(run, identity, candidates, params, compute, say)
    # What of the model is new was said when the run began.
    build = partial(build_state, params, inputs, *([] if run.checkpoints.steps() else [say]))
    state, is_saved = resumer.resume(build, inputs.total_steps)
    candidates.remove_unused(state.progress.candidates, resumer.checkpoints)
    if state.progress.step == 0:
        preflight(state, inputs, params, say)
    guard.check()

    meet(compute, identity, stop, is_complete=False)
    broadcast_state(compute.world, state)
    compute.world.broadcast_object(is_saved)
    recorder = Recorder(state, is_saved, run, candidates, params.train)
    reduction = make_reduction(params.train, state.parallel, compute)
    callbacks = CallbackList(state, [guard, ProgressBar(inputs.total_steps), *loggers])
    with watch(params.train.hang_seconds, run.log):
        ending = train(Session(params, inputs, state, reduction, recorder, callbacks, stop))
    if ending.outcome is Outcome.COMPLETE and not state.progress.candidates:
        ending = Ending(Outcome.DIVERGED, NO_CANDIDATE)  # which this process alone can know
    if ending.outcome is Outcome.COMPLETE:
        result = Result.of(state)
        result.write(run)
        return result
    if not ending.alone:
        compute.world.leave()
    if ending.outcome is Outcome.STOPPED:
        run.log("stopped", step=state.progress.step, signal=stop.signal.name if stop.signal else None)
        ignore_stop_signals()  # a repeat would end the interpreter on its way out, with another exit code
        raise Interrupted(ending.line)
    run.log("failed", step=state.progress.step, reason=ending.line)
    raise UserError(ending.line)


def follow() -> NoReturn:
    """One of the other processes: it is given the state, trains its share, and writes nothing."""
    stage = load_stage("train")

    import torch

    from stages.keeping.folder import RunFolder
    from stages.modeling.compute import Compute
    from stages.modeling.world import World
    from stages.run.recorder import SilentRecorder
    from stages.run.state import broadcast_state
    from stages.training.callbacks import CallbackList
    from stages.training.endings import Outcome
    from stages.training.loop import Session, train
    from stages.training.session import OtherIdentity, build_state, load_inputs, make_reduction, meet

    params, world, stop = stage.params, World.from_environment(), StopRequest()
    compute = Compute.start(params.train, world)
    identity, outcome = identify(stage), Outcome.COMPLETE
    try:
        with world.together():
            is_complete = meet(compute, identity, stop, is_complete=False)
            if not is_complete:
                inputs = load_inputs(params, compute)
                state = build_state(params, inputs)
                broadcast_state(world, state)
                is_saved = world.broadcast_object(None)
                torch.set_num_threads(state.progress.environment["threads"])
                recorder = SilentRecorder(state, is_saved)
                reduction = make_reduction(params.train, state.parallel, compute)
                with watch(params.train.hang_seconds, partial(RunFolder.of(identity).log, rank=world.rank)):
                    ending = train(Session(params, inputs, state, reduction, recorder, CallbackList(state), stop))
                outcome = ending.outcome
                if ending.alone:
                    say(f"process {world.rank}: {ending.line}")
                    sys.exit(outcome)
            world.leave()
    except OtherIdentity:
        sys.exit(Outcome.DIVERGED)  # the main process says so
    ignore_stop_signals()
    sys.exit(outcome)


def require_work_for(world: World, params: Params) -> None:
    """Refuse more processes than a step has micro-batches."""
    loaders, size = params.build_loaders, world.size
    if loaders.micro_batches_per_step < size:
        raise UserError(
            f"a step has {loaders.micro_batches_per_step} micro-batches (build_loaders.batch_size {loaders.batch_size} "
            f"/ micro_batch_size {loaders.micro_batch_size}), fewer than the {size} processes of train.launcher; "
            f"write a micro_batch_size of at most {max(loaders.batch_size // size, 1)}, or start fewer processes "
            "(train.launcher: python starts one)"
        )


def explain_new_run(run: RunFolder, identity: Identity) -> None:
    """Say why a run starts from the beginning although there are others."""
    from stages.keeping.folder import trained

    others = ((other, other.identity_values()) for other in trained() if other.id != run.id)
    newest, values = next(((other, values) for other, values in others if values is not None), (None, None))
    if newest is not None and values is not None:
        lines = identity.difference(values)
        more = f" (and {len(lines) - 5} more)" if len(lines) > 5 else ""
        reference = newest.newest_reference()
        is_taken_over = [line.partition(":")[0] for line in lines] == ["train.stop_step"]
        hint = f"; to continue that one on purpose, set train.init_from_run: {reference}"
        how = hint if reference and not is_taken_over else ""
        say(f"new run {run.id}; it differs from run {newest.id} in {', '.join(lines[:5])}{more}{how}")


if __name__ == "__main__":
    run_stage(main)
