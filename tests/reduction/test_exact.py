"""A step's gradient, loss, buffers and extra state: the same bits, whatever the model and however many processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stages.batches.plan import MicroBatch
from stages.ground.errors import UserError
from stages.modeling.buffers import Buffers
from stages.modeling.parallel import Parallel
from stages.modeling.world import World
from stages.reduction.exact import Exact
from stages.reduction.exchange import Exchange
from stages.reduction.left import Left
from tests.support.processes import end_of, start_in_folders
from tests.support.project import ROOT
from tests.support.summing import MODELS


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository, in a folder beside which a run may write."""
    folder = tmp_path_factory.mktemp("here") / "repo"
    folder.symlink_to(ROOT)
    return folder


def summed(here: Path, processes: int, device: str = "cpu") -> dict[str, str]:
    """The digests that `processes` come to, which are those of each of them."""
    started = start_in_folders([here] * processes, "tests.support.summing", arguments=[device])
    outputs = end_of(started, *[0] * processes)
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    assert all(theirs == found[0] for theirs in found)
    return found[0]


@pytest.fixture(scope="module")
def alone(here: Path) -> dict[str, str]:
    return summed(here, 1)


@pytest.mark.parametrize("processes", [2, 3, 4, 8])
def test_any_number_of_processes_comes_to_the_same_bits_for_every_kind_of_model(
    here: Path, alone: dict[str, str], processes: int
) -> None:
    assert summed(here, processes) == alone
    assert alone.keys() == MODELS.keys()


@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="NCCL and streams want two GPUs: here nothing shows what they do"
)
def test_any_number_of_gpus_comes_to_the_same_bits_for_every_kind_of_model(here: Path) -> None:
    alone = summed(here, 1, "cuda")
    for processes in range(2, torch.cuda.device_count() + 1):
        assert summed(here, processes, "cuda") == alone


def one_step(model: nn.Module, rows: list[torch.Tensor]) -> None:
    """A step of a micro-batch a tensor, in this process alone."""
    parallel = Parallel(model)
    reduction = Exact(parallel, World())
    reduction.start()
    reduction.begin(len(rows), list(model.parameters()), Buffers(model))
    for micro_batch in reduction.share([MicroBatch(0, 1, number, []) for number in range(len(rows))]):
        with reduction.micro_batch(micro_batch.micro_batch):
            parallel.forward({"features": rows[micro_batch.micro_batch]}).sum().backward()
    reduction.settle(list(map(bool, reduction.finish().tolist())))


def test_gradient_is_the_sum_along_the_tree_and_not_in_order() -> None:
    model = nn.Linear(1, 1, bias=False)
    # In order: (((1 + 2^-24) + 2^-24) + 2^-24) is 1; along the tree the last two come to 2^-23, which counts.
    one_step(model, [torch.full((1, 1), value) for value in (1.0, 2.0**-24, 2.0**-24, 2.0**-24)])
    assert model.weight.grad is not None
    assert model.weight.grad.item() == 1 + 2.0**-23


def test_running_statistics_are_the_mean_of_what_micro_batches_leave_and_counters_count_steps() -> None:
    model = nn.BatchNorm1d(2, momentum=0.5)
    rows = [torch.full((4, 2), value) for value in (2.0, 4.0, 12.0)]
    one_step(model, rows)
    # Each leaves 0.5 * 0 + 0.5 * its mean.
    assert model.running_mean is not None
    assert model.running_mean.tolist() == [3.0, 3.0]
    assert model.num_batches_tracked is not None
    assert model.num_batches_tracked.item() == 1


def test_mean_of_large_numbers_in_half_precision_is_finite() -> None:
    model = MODELS["statistics"]()
    one_step(model, [torch.rand(4, 5) for _ in range(3)])
    assert isinstance(model.short, torch.Tensor)
    assert model.short.dtype == torch.float16
    assert 50000 < model.short.min() <= model.short.max() < 60000


def test_one_micro_batch_in_one_process_is_left_as_it_is() -> None:
    model = nn.BatchNorm1d(2)
    expected = nn.BatchNorm1d(2)
    rows = torch.rand(4, 2)
    expected(rows).sum().backward()
    one_step(model, [rows])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.buffers(), expected.buffers(), strict=True))
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


class Counters(nn.Module):
    """Two of them, and a table that grows."""

    first: torch.Tensor
    second: torch.Tensor
    table: torch.Tensor

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        for name in ("first", "second"):
            self.register_buffer(name, torch.zeros(1, dtype=torch.int64))
        self.register_buffer("table", torch.zeros(1), persistent=persistent)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        self.table = torch.cat([self.table, self.table])
        return self.layer(features)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_buffer_that_changes_its_shape_is_refused_where_a_checkpoint_holds_it_and_else_put_back(
    micro_batches: int,
) -> None:
    model = Counters(persistent=False)
    one_step(model, [torch.rand(3, 2)] * micro_batches)
    assert model.table.shape == (1,)
    with pytest.raises(
        UserError, match=r"forward changed the buffer table of Counters, which was torch.float32 \(1,\)"
    ):
        one_step(Counters(persistent=True), [torch.rand(3, 2)] * micro_batches)


class Ending(World):
    """Another process is there for one broadcast, and ends before the next."""

    told: ClassVar[list[torch.Tensor]] = []

    def maximum(self, *values: int) -> list[int]:
        return list(values)

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> None:
        if self.told:
            raise RuntimeError("[gloo] Connection closed by peer")
        self.told.append(tensor.fill_(7))


def test_process_that_ends_while_a_step_is_settled_leaves_the_others_the_buffers_before_it() -> None:
    model = Counters(persistent=False)
    buffers = Buffers(model)
    left = Left(buffers, 2, [[(0, 0)], [(0, 1)]], Ending(0, 2))
    with pytest.raises(RuntimeError):
        left.settle([True, True, False])
    buffers.put_back()
    assert [int(model.first), int(model.second)] == [0, 0]


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.weight * features


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_zeros_that_an_optimizer_left_are_no_part_of_a_gradient(micro_batches: int) -> None:
    model = Scale()
    model.weight.grad = torch.zeros(1, 1)
    one_step(model, [torch.full((1, 1), -0.0)] * micro_batches)
    assert model.weight.grad is not None
    assert str(model.weight.grad.item()) == "-0.0"


def test_parameter_that_no_micro_batch_used_has_no_gradient() -> None:
    model = MODELS["unused"]()
    one_step(model, [torch.full((1, 5), value) for value in (0.1, 0.9, 0.2)])
    given = {name: parameter.grad is not None for name, parameter in model.named_parameters()}
    assert given == {"always": True, "sometimes": True, "zero": True, "never": False}


class Reentrant(nn.Module):
    """A layer within a checkpointed part, and once more outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        inner: torch.Tensor = checkpoint(self.layer, self.layer(features), use_reentrant=True)
        return inner


def test_gradient_that_comes_after_it_was_sent_is_refused_and_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Exchange, "send", lambda *_: None)
    model = Reentrant()
    parallel = Parallel(model)
    reduction = Exact(parallel, World(0, 2))
    reduction.begin(2, list(model.parameters()), Buffers(model))
    with pytest.raises(UserError, match="use_reentrant=False"), reduction.micro_batch(0):
        parallel.forward({"features": torch.rand(3, 2)}).sum().backward()
