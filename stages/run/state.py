"""Everything a run has to remember: the one place that says what a checkpoint holds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol, TypeVar

import pydantic
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import TypedDict

from stages.ground.errors import UserCodeError, reason, user_code
from stages.keeping.sealed import DamagedError, FileRecord
from stages.modeling.codec import Tree
from stages.modeling.parallel import Parallel
from stages.modeling.world import World
from stages.run.history import History

T = TypeVar("T")


class Stateful(Protocol):
    """What a checkpoint can hold: it says what it must not forget, and goes back to that."""

    def state_dict(self) -> dict[str, Tree]: ...

    def load_state_dict(self, state: dict[str, Tree]) -> None: ...


class Schedule(Protocol):
    """When the learning rate changes (see stages.training.optim)."""

    @property
    def scheduler(self) -> Stateful: ...

    def after_step(self, ends_epoch: bool, skipped: bool) -> None: ...

    def after_evaluation(self, scores: Mapping[str, float]) -> None: ...


class Parts:
    """Several parts as one, which may be the user's code. A part that the saved state does not know (that of another
    run, `train.init_from_run`) is left as it is."""

    def __init__(self, parts: Mapping[str, Stateful]) -> None:
        self._parts = parts

    def state_dict(self) -> dict[str, Tree]:
        state = {}
        for name, part in self._parts.items():
            with user_code(f"{type(part).__name__}.state_dict"):
                state[name] = part.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Tree]) -> None:
        for name in self._parts.keys() & state.keys():
            with user_code(f"{type(self._parts[name]).__name__}.load_state_dict"):
                self._parts[name].load_state_dict(state[name])


# Of a file directly in a folder, and of none elsewhere.
PlainName = Annotated[str, pydantic.StringConstraints(pattern=r"^[^./\x00][^/\x00]*$")]


@dataclass(frozen=True)
class Candidate:
    """A kept model: the step it is of, its scores by name, and the files that it consists of."""

    step: int
    scores: dict[str, float]
    files: dict[PlainName, FileRecord]


@pydantic.with_config(pydantic.ConfigDict(extra="forbid"))
@dataclass
class Progress:
    """Where the run is, in plain numbers. Steps are optimizer steps that are done."""

    step: int = 0
    rows: int = 0
    # An evaluation is due at a step; until it counts, a resumed run does it again.
    evaluated_step: int = 0
    # Sums of step losses: since the last row of plots/train.tsv, and since the start.
    window_loss: float = 0.0
    window_steps: int = 0
    # Steps in a row, up to this one, whose gradient overflowed in fp16, so that nothing was trained in them.
    overflows: int = 0
    total_loss: float = 0.0
    # Why the run is complete before its last step; None otherwise.
    stop_reason: str | None = None
    # Kept models, best first.
    candidates: list[Candidate] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    environments: int = 1

    def state_dict(self) -> dict[str, Tree]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Tree]) -> None:
        self.__dict__.update(vars(parse_progress(state)))

    def count(self, loss: float, rows: int) -> None:
        """Take in a step's mean loss and its number of rows."""
        self.rows += rows
        self.window_loss += loss
        self.window_steps += 1
        self.total_loss += loss

    def is_complete(self, total_steps: int) -> bool:
        """Whether the run is at its end, evaluation included: its last step, or where a callback stopped it."""
        return self.evaluated_step == self.step and (self.stop_reason is not None or self.step == total_steps)

    @property
    def mean_loss(self) -> float:
        """Of the steps since the last row of plots/train.tsv."""
        return self.window_loss / self.window_steps


@dataclass
class TrainState:
    """The parts of a run that change while it trains. `histories` are plots/train.tsv ("train") and eval.tsv ("eval")
    as they grow."""

    parallel: Parallel
    optimizer: Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    callbacks: Mapping[str, Stateful]
    histories: dict[str, History]
    steps_per_epoch: int
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self._layout = _layout(self.model)

    def require_layout(self) -> None:
        """Raise UserCodeError if the model's state is laid out in another way than when it was built, so that what is
        saved of it could not be loaded again."""
        now = _layout(self.model)
        for name in sorted(now.keys() | self._layout.keys()):
            before, found = self._layout.get(name, "not there"), now.get(name, "not there")
            if before != found:
                raise UserCodeError(
                    f"model.source: forward changed {name}, which was {before} when the model was built and is {found} "
                    f"at step {self.progress.step}, so that no checkpoint of it can be loaded; make it where the model "
                    "is built, in the shape and type that it keeps"
                )

    @property
    def model(self) -> nn.Module:
        """The model itself, to look at and to change; it is called through `parallel`."""
        return self.parallel.model

    @property
    def epoch(self) -> float:
        """Epochs done, as the tables in plots/ give them."""
        return round(self.progress.step / self.steps_per_epoch, 6)

    @property
    def ends_epoch(self) -> bool:
        """Whether the step done last is its epoch's last."""
        return self.progress.step % self.steps_per_epoch == 0

    def stop(self, reason: str) -> None:
        """End the run at the next step boundary, as complete; the first reason counts."""
        self.progress.stop_reason = self.progress.stop_reason or reason

    def record(self, name: str, values: dict[str, float]) -> None:
        """Add a row to a history."""
        self.histories[name].append(step=self.progress.step, epoch=self.epoch, **values)

    def close_window(self, learning_rate: float, grad_norm: float) -> dict[str, float]:
        """Write a row of plots/train.tsv and begin the next; its values but step and epoch."""
        row = {"loss": self.progress.mean_loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
        self.record("train", row)
        self.progress.window_loss, self.progress.window_steps = 0.0, 0
        return row

    def parts(self) -> dict[str, Stateful]:
        """What a checkpoint holds, by name: the one table of contents. Random states are no part of it: whatever draws
        is seeded by (seed, step, micro-batch) just before."""
        return {
            "model": self.parallel,
            "optimizer": self.optimizer,
            "scheduler": self.schedule.scheduler,
            "scaler": self.scaler,
            "callbacks": Parts(self.callbacks),
            "progress": self.progress,
            "history": Parts(self.histories),
        }

    def state_dict(self) -> dict[str, Tree]:
        """Every part's. Tensors are the live ones: copy before the next step."""
        return {name: part.state_dict() for name, part in self.parts().items()}

    def load_state_dict(self, state: dict[str, Tree]) -> None:
        """Go back to where `state` was taken."""
        for name, part in self.parts().items():
            part.load_state_dict(state[name])


def _layout(model: nn.Module) -> dict[str, str]:
    """Type and shape of every tensor in the model's state."""
    state = model.state_dict()
    return {name: f"{value.dtype} {tuple(value.shape)}" for name, value in state.items() if isinstance(value, Tensor)}


def broadcast_state(world: World, state: TrainState) -> None:
    """Give every process the main one's state."""
    tree = world.broadcast_tree(state.state_dict() if world.is_main else None)
    if not world.is_main:
        state.load_state_dict(tree)


def saved_progress(state: dict[str, Tree]) -> Progress:
    """The progress in a state that was read back.

    Raises:
        DamagedError: it, or a history beside it, is not what `state_dict` gives.
    """
    try:
        _parse(_HISTORIES, state["history"])
        return parse_progress(state["progress"])
    except KeyError as error:
        raise DamagedError(f"the state has no part {error}") from None


def parse_progress(tree: Tree) -> Progress:
    """What `Progress.state_dict` gave. Raises DamagedError if it is nothing of that kind."""
    return _parse(_PROGRESS, tree)


class _HistoryState(TypedDict):
    columns: list[str]
    segments: Annotated[list[str], pydantic.Field(min_length=1)]


_PROGRESS = pydantic.TypeAdapter(Progress)
_HISTORIES = pydantic.TypeAdapter(dict[str, _HistoryState])


def _parse(kind: pydantic.TypeAdapter[T], tree: Tree) -> T:
    """`tree` as what it should be. Raises DamagedError if it is not."""
    try:
        # As JSON, where lists and dicts are all there is, nothing is converted.
        return kind.validate_json(json.dumps(tree), strict=True)
    except (pydantic.ValidationError, TypeError, ValueError, RecursionError) as error:
        raise DamagedError(f"the state is not what it should be: {reason(error, 200)}") from None
