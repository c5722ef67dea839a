"""What public reports and an attack found of any nn.Module, and of losses.

An input a row, and the line or the value that is right.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stages.batches.tokenized import Task
from stages.config.read import read_yaml
from stages.config.schema import ModelParams, TrainParams
from stages.modeling import codec
from stages.modeling.buffers import Buffers
from stages.modeling.build import build_model, load_model, save_model
from stages.modeling.forward import Forward
from stages.modeling.losses import make_objective
from stages.watching import preflight
from tests.support.project import ROOT, line_of
from tests.support.reports import HEAD
from tests.support.runs import CPU, make_state, take_steps

# Any nn.Module.


class Odd(nn.Module):
    """With one of the things that modules may have; `outputs` logits of `columns` numbers."""

    expanded: torch.Tensor
    conjugate: torch.Tensor

    def __init__(self, what: str, columns: int = 3, outputs: int = 2) -> None:
        super().__init__()
        self.what, self.extra = what, {"plain": {"a": [1, (2.5, None)]}, "tensor": {"t": torch.ones(2)}}.get(what)
        self.layer = nn.LazyLinear(outputs) if what == "lazy" else nn.Linear(columns, outputs)
        if what == "expanded":
            self.register_buffer("expanded", torch.zeros(1).expand(columns))
            self.scale = nn.Parameter(torch.ones(1).expand(columns))
        if what.startswith("complex"):
            self.phase = nn.Parameter(torch.ones(columns, dtype=getattr(torch, what)))
            self.register_buffer("conjugate", (1j * torch.ones(columns, dtype=getattr(torch, what))).conj())
        if what == "set":
            self.extra = {"words": {1, 2}}

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.what == "expanded":
            self.expanded += 1
            features = features * self.scale + self.expanded
        if self.what.startswith("complex"):
            features = (features * self.phase * self.conjugate).abs().float()
        return self.layer(features)

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("what", ["expanded", "complex64", "complex128", "plain", "tensor"])
def test_module_is_the_same_after_training_saving_and_a_checkpoint(what: str, tmp_path: Path) -> None:
    source = f"{Odd.__module__}:Odd"
    params = ModelParams(source=f"factory:{source}", revision=None, kwargs={"what": what})
    model: Any = build_model(params, None, HEAD, 0)
    buffers = Buffers(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    buffers.put_back()
    optimizer.step()
    model(torch.ones(2, 3))
    if what == "plain":
        model.extra["a"].append((3, "b"))
    if what == "tensor":
        model.extra["t"] += 1
    save_model(model, tmp_path, params)
    loaded: Any = load_model(tmp_path, CPU, params.source, params.kwargs)
    skeleton, tensors = codec.split(model.state_dict(), "model")
    save_file(tensors, tmp_path / "checkpoint")
    resumed: Any = build_model(params, None, HEAD, 1)
    resumed.load_state_dict(codec.join(json.loads(json.dumps(skeleton)), load_file(tmp_path / "checkpoint")))
    with torch.no_grad():
        expected = model(torch.ones(2, 3))
    for other in (loaded, resumed):
        assert torch.equal(other(torch.ones(2, 3)), expected)
        assert str(other.extra) == str(model.extra)


def test_look_at_a_model_leaves_its_extra_state_as_it_was() -> None:
    model: Any = Odd("tensor")
    buffers = Buffers(model)
    model.extra["t"] += 1
    buffers.put_back()
    assert model.extra["t"].tolist() == [1, 1]


class Named(nn.Module):
    """Has a layer by the name that extra states are kept under."""

    def __init__(self) -> None:
        super().__init__()
        self.extra_state = nn.Linear(3, 2)


def test_layer_called_extra_state_is_a_layer(tmp_path: Path) -> None:
    params = ModelParams(source=f"factory:{Named.__module__}:Named", revision=None, kwargs={})
    model = build_model(params, None, HEAD, 0)
    save_model(model, tmp_path, params)
    loaded = load_model(tmp_path, CPU, params.source, {})
    assert torch.equal(loaded.state_dict()["extra_state.weight"], model.state_dict()["extra_state.weight"])


def test_complex_parameters_are_trained() -> None:
    from stages.training.optim import make_optimizer

    model = Odd("complex64")
    optimizer = make_optimizer(model, TrainParams.model_validate(read_yaml(ROOT / "params.yaml")["train"]), CPU)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.phase, torch.ones(3, dtype=torch.complex64))


def test_extra_state_that_is_no_plain_data_is_refused(tmp_path: Path) -> None:
    params = ModelParams(source=f"factory:{Odd.__module__}:Odd", revision=None, kwargs={"what": "set"})
    model = build_model(params, None, HEAD, 0)
    line = line_of(lambda: save_model(model, tmp_path, params))
    assert (
        "_extra_state.words: a state holds dicts, lists" in line and "found set, so no checkpoint can hold it" in line
    )


def test_lazy_layer_is_named(tmp_path: Path) -> None:
    params = ModelParams(source=f"factory:{Odd.__module__}:Odd", revision=None, kwargs={"what": "lazy"})
    assert "layer.weight has no shape before the model was called" in line_of(
        lambda: build_model(params, None, HEAD, 0)
    )


@pytest.mark.parametrize("source", ["builtins:print", "collections:OrderedDict", "math:pi", "os:system"])
def test_what_makes_no_module_is_not_called(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    params = ModelParams(source=f"factory:{source}", revision=None, kwargs={})
    assert "is no function or class that gives a nn.Module" in line_of(lambda: build_model(params, None, HEAD, 0))


class Plain(nn.Module):
    """With one of the ways in which people write modules."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.layer = what, nn.Linear(3, 2)
        self.seen: torch.Tensor | None = None
        self.own = torch.Generator().manual_seed(0)
        if what == "sparse":
            self.register_buffer("table", torch.eye(3).to_sparse())
        if what == "meta":
            self.register_buffer("table", torch.ones(3, device="meta"))

    def forward(self, features: torch.Tensor, /) -> torch.Tensor:
        if self.what == "remembers":
            self.seen = features
        if self.what == "draws":
            features = features + torch.randn(features.shape, generator=self.own)
        return self.layer(features)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        return None if self.what == "returns nothing" else self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        super().to(*args, **kwargs)
        return None if self.what == "returns nothing" else self

    def get_extra_state(self) -> Any:
        if self.what == "raises":
            raise LookupError("no words")

    def set_extra_state(self, state: Any) -> None: ...


def plain(what: str) -> ModelParams:
    return ModelParams(source=f"factory:{Plain.__module__}:Plain", revision=None, kwargs={"what": what})


def test_module_whose_train_and_to_return_nothing_is_loaded(tmp_path: Path) -> None:
    params = plain("returns nothing")
    save_model(build_model(params, None, HEAD, 0), tmp_path, params)
    assert not load_model(tmp_path, CPU, params.source, params.kwargs).training


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("raises", "its state cannot be kept, as where a buffer is sparse or nested: LookupError: no words"),
        ("sparse", "its state cannot be kept, as where a buffer is sparse or nested: RuntimeError"),
        ("meta", "table is on the meta device, so it has no values"),
    ],
)
def test_buffer_that_cannot_be_kept_is_one_line(what: str, expected: str) -> None:
    assert expected in line_of(lambda: build_model(plain(what), None, HEAD, 0))


def traced() -> nn.Module:
    return torch.jit.trace(nn.Linear(3, 2), torch.zeros(1, 3))


@pytest.mark.parametrize("make", [lambda: Plain(""), traced])
def test_module_that_names_no_column_is_given_the_first_by_position(make: Callable[[], nn.Module]) -> None:
    assert Forward(make())({"features": torch.ones(4, 3)}).shape == (4, 2)


@pytest.mark.parametrize(("what", "changed"), [("", []), ("remembers", ["seen"]), ("draws", ["own"])])
def test_what_a_model_keeps_in_no_checkpoint_is_named(what: str, changed: list[str]) -> None:
    class Own(Plain):
        get_extra_state = nn.Module.get_extra_state

    model = Own(what)
    own = preflight._watch_own_state(model)
    model(torch.ones(2, 3))
    assert own() == changed


def test_tensor_that_changes_its_shape_ends_the_run_before_a_checkpoint_holds_it() -> None:
    state = make_state()
    take_steps(state, 1)
    state.require_layout()
    state.model.register_buffer("late", torch.ones(1))
    line = line_of(state.require_layout)
    assert (
        "forward changed late, which was not there when the model was built and is torch.float32 (1,) at step 1" in line
    )


def test_sparse_gradient_is_refused_before_training() -> None:
    model = nn.Embedding(3, 2, sparse=True)
    model(torch.tensor([1])).sum().backward()
    assert "weight gets a sparse gradient" in line_of(lambda: preflight._doubt_gradients(model, print))


class Counts(nn.Module):
    """A loss that holds something, and changes it if `how` says so."""

    average: torch.Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls, self.seen = how, 0, [1]
        self.register_buffer("average", torch.zeros(()))

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.how == "buffer in place":
            self.average.mul_(0.9).add_(logits.detach().mean())
        if self.how == "buffer anew":
            self.average = self.average * 0.9
        if self.how == "number":
            self.calls += 1
        if self.how == "list":
            self.seen.append(1)
        if self.how == "new attribute":
            self.first = float(logits.sum())
        return nn.functional.cross_entropy(logits, labels) + self.average


class CallsCounted:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return nn.functional.cross_entropy(logits, labels) / self.calls


@pytest.mark.parametrize(
    ("name", "kwargs", "changes"),
    [
        ("Counts", {"how": "nothing"}, None),
        ("Counts", {"how": "buffer in place"}, "average"),
        ("Counts", {"how": "buffer anew"}, "average"),
        ("Counts", {"how": "number"}, "calls"),
        ("Counts", {"how": "list"}, "seen"),
        ("Counts", {"how": "new attribute"}, "first"),
        ("CallsCounted", {}, "calls"),
    ],
)
def test_loss_with_a_state_that_no_checkpoint_holds_is_refused(
    name: str, kwargs: dict[str, Any], changes: str | None
) -> None:
    values = read_yaml(ROOT / "params.yaml")["train"] | {"loss": f"{__name__}:{name}", "loss_kwargs": kwargs}
    split = datasets.Dataset.from_dict({"labels": [0, 1]})
    task = Task("classification", ("a", "b"), ("text",), (), "label", ("input_ids",))
    objective = make_objective(TrainParams.model_validate(values), task, split, CPU)
    batch = torch.zeros(2, 2), torch.tensor([0, 1])
    if changes is None:
        assert torch.equal(objective.rows(*batch), objective.rows(*batch))
    else:
        assert f"changes its own {changes} when it is called" in line_of(lambda: objective.rows(*batch))
