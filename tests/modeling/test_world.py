"""A world of one process: all that several would agree on is this one's, without a word to anybody."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

from stages.ground.errors import UserError
from stages.modeling.world import World

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*_: object, **__: object) -> None:
        raise AssertionError("there is nobody to talk to")

    for name in ("init_process_group", "destroy_process_group", "all_reduce", "all_gather", "broadcast"):
        monkeypatch.setattr(dist, name, called)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_process_without_a_launcher_is_alone_and_main() -> None:
    world = World.from_environment()
    assert (world, world.is_main) == (World(0, 1, 0), True)


@pytest.mark.parametrize(("rank", "local_rank", "is_main"), [(0, 0, True), (5, 1, False), (4, 0, False)])
def test_launcher_says_who_a_process_is_and_one_of_all_machines_is_main(
    monkeypatch: pytest.MonkeyPatch, rank: int, local_rank: int, is_main: bool
) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", 8), ("LOCAL_RANK", local_rank)):
        monkeypatch.setenv(name, str(value))
    world = World.from_environment()
    assert (world, world.is_main) == (World(rank, 8, local_rank), is_main)


def test_one_process_agrees_with_itself() -> None:
    world, value = World(), torch.tensor([1.0, 2.0])
    world.join(CPU)
    assert world.gather_shares(value, [range(2)]).tolist() == [1.0, 2.0]
    assert world.broadcast_tree(told := {"a": [value]}) is told
    assert world.maximum(3, 0) == [3, 0]
    assert world.broadcast_object(told) is told
    assert world.gather_objects(told) == [told]
    world.broadcast(value)
    world.broadcast_buffers(nn.BatchNorm1d(2))
    world.leave()
    assert value.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("size", "error", "is_told"),
    [
        (2, lambda: RuntimeError("[gloo] Connection closed by peer\nmore"), True),
        (2, lambda: dist.DistError("timed out"), True),
        (2, lambda: RuntimeError("shapes do not match"), False),
        (1, lambda: RuntimeError("[gloo] Connection closed by peer"), False),
    ],
)
def test_only_the_end_of_another_process_is_one_line(size: int, error: Callable[[], Exception], is_told: bool) -> None:
    with pytest.raises(UserError if is_told else RuntimeError) as raised, World(0, size).together():
        raise error()
    assert ("run the same command again" in str(raised.value)) == is_told
    assert "\n" not in str(raised.value)
