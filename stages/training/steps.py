"""What a step is made of and comes to: its batches, fetched by processes beside the loop, and its gradient."""

from __future__ import annotations

import math
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import datasets
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stages.batches.collate import Batch, make_loader
from stages.batches.plan import BatchPlan, MicroBatch
from stages.batches.tokenized import Task
from stages.ground.errors import describe
from stages.ground.signals import ignore_stop_signals
from stages.modeling.compute import Compute
from stages.modeling.losses import Objective
from stages.run.state import Progress
from stages.scoring.scorer import Scorer, shown
from stages.training.endings import Ending, Outcome, Unfinished


@dataclass(frozen=True)
class Inputs:
    """What the loop works on and does not change. `tokenizer` is None where the inputs are features; `total_steps` are
    those that are trained, of the `planned_steps` that the learning rate's schedule is for (`train.stop_step`)."""

    task: Task
    train_split: datasets.Dataset
    tokenizer: PreTrainedTokenizerBase | None
    plan: BatchPlan
    total_steps: int
    planned_steps: int
    objective: Objective
    scorer: Scorer
    compute: Compute


@dataclass(frozen=True)
class Step:
    """One optimizer step: its `number`, from 1; how many `micro_batches` it has; `rows`, the positions in train of all
    its rows; and this process's micro-batches with their batches, on the CPU."""

    number: int
    micro_batches: int
    rows: list[int]
    mine: list[tuple[MicroBatch, Batch]]

    @property
    def where(self) -> str:
        """Its rows, for people."""
        return f"its rows of train are {shown(self.rows)}"


@dataclass(frozen=True)
class Gradient:
    """What a step's backward passes left: `loss`, the mean over its rows, the gradient's `norm` before clipping,
    whether it `overflowed` in fp16, whose scaler then skips the step and lowers its scale, and which buffers `changed`
    (see `stages.reduction.base`)."""

    loss: float
    norm: float
    overflowed: bool
    changed: list[bool]

    @classmethod
    def read(cls, measured: Tensor) -> Gradient:
        """Wait for what `accumulate` returned: the one wait for the device in a step."""
        loss, norm, overflowed, *changed = measured.tolist()
        return cls(loss, norm, bool(overflowed), list(map(bool, changed)))

    @property
    def is_usable(self) -> bool:
        return math.isfinite(self.loss) and (math.isfinite(self.norm) or self.overflowed)


def load_steps(
    inputs: Inputs, progress: Progress, share: Callable[[list[MicroBatch]], list[MicroBatch]], num_workers: int
) -> Iterator[Step]:
    """The steps from the next one to the last, with the batches of this process's `share` of each. Raises Unfinished:
    they cannot be made, or a process that collates them has died."""
    device = inputs.compute.device
    plan = [inputs.plan.steps(progress.step + 1, inputs.total_steps) for _ in range(2)]
    rows = (micro_batch.rows for step in plan[0] for micro_batch in share(step))
    loader = make_loader(inputs.train_split, rows, inputs.tokenizer, device, num_workers, ignore_stop_signals)
    batches: Iterator[Batch] | None = None
    workers: list[BaseProcess] = []
    for step in plan[1]:
        try:
            if batches is None:
                batches = iter(loader)  # a process may die as soon as it is there
                workers = list(multiprocessing.active_children())
                if num_workers:
                    # The loader's own handler raises wherever the loop is, half-way through a step too; `next` finds
                    # out as well.
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            mine = [(micro_batch, next(batches)) for micro_batch in share(step)]
        except Exception as error:
            # In which words a dead one is noticed depends on what it was doing.
            # One that died before it was listed is not among them.
            died = len(workers) < num_workers or wait([worker.sentinel for worker in workers], timeout=1)
            if not died:
                line = (
                    f"the batches of step {step[0].step} cannot be made: {describe(error)}; the state after step "
                    f"{progress.step} is saved"
                )
                raise Unfinished(Ending(Outcome.DIVERGED, line, alone=True)) from error
            for worker in workers:
                worker.kill()  # they ignore SIGTERM, and may wait for the dead one for ever
            line = (
                f"a process that collates batches (train.num_workers is {num_workers}) was killed, as happens where "
                f"memory runs out; the state after step {progress.step} is saved; run the same command again to go on, "
                "with fewer num_workers if it happens again"
            )
            raise Unfinished(Ending(Outcome.STOPPED, line, alone=True)) from error
        yield Step(step[0].step, len(step), [row for micro_batch in step for row in micro_batch.rows], mine)
