"""Checkpoints: what goes in comes out, only if it is intact, and never by unpickling."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from stages.keeping.sealed import MANIFEST, DamagedError, seal
from stages.run.checkpoint import Checkpoints, Snapshot
from tests.support.damage import DAMAGE
from tests.support.runs import make_run, write_checkpoints
from tests.support.trees import TREES, same


def folder_of(checkpoints: Checkpoints, step: int) -> Path:
    return checkpoints.shelf.store.path(checkpoints.shelf.key(step), MANIFEST).parent


@settings(max_examples=50, deadline=None)
@given(tree=TREES)
def test_any_state_survives_the_round_trip_through_disk(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    checkpoints = Checkpoints(make_run(tmp_path_factory.mktemp("runs")).checkpoints)
    checkpoints.write(Snapshot.of(3, {"part": tree, "number": 1}))
    state = checkpoints.read(3)
    assert state.keys() == {"part", "number"}
    assert state["number"] == 1
    assert same(state["part"], tree)


def test_snapshot_does_not_follow_the_live_state() -> None:
    weight = torch.zeros(4)
    snapshot = Snapshot.of(1, {"model": {"weight": weight}})
    weight += 1
    assert snapshot.tensors["model"]["model.weight"].tolist() == [0, 0, 0, 0]


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = write_checkpoints(make_run(tmp_path), 1, 2, 3, 4)
    assert checkpoints.shelf.steps() == [4, 3]


def test_checkpoint_of_an_earlier_step_than_those_there_is_kept(tmp_path: Path) -> None:
    checkpoints = write_checkpoints(make_run(tmp_path), 8, 9, 3)
    assert 3 in checkpoints.shelf.steps()


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [MANIFEST, "progress.json", "model.safetensors", "model.json"])
def test_damaged_checkpoint_is_never_loaded(tmp_path: Path, damage: Callable[[Path], None], name: str) -> None:
    checkpoints = write_checkpoints(make_run(tmp_path), 5, 9)
    damage(folder_of(checkpoints, 9) / name)
    with pytest.raises(DamagedError, match="step-00000009"):
        checkpoints.read(9)
    assert checkpoints.read(5)["progress"] == {"step": 5}


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.target, "ran"))


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"a":' * 20_000, b"\xff", b"", b'{"__tensor__": "no"}', b'{"__dict__": 3}', b'{"__tuple__": 3}'],
)
def test_part_that_was_made_up_and_sealed_counts_as_damaged(tmp_path: Path, content: bytes) -> None:
    checkpoints = write_checkpoints(make_run(tmp_path), 9)
    folder = folder_of(checkpoints, 9)
    (folder / "progress.json").write_bytes(content)
    reseal(folder, checkpoints)
    with pytest.raises(DamagedError, match="unreadable"):
        checkpoints.read(9)


def test_planted_pickle_never_runs(tmp_path: Path) -> None:
    bomb = pickle.dumps(_Bomb(tmp_path / "ran"))
    for name in (MANIFEST, "progress.json", "model.safetensors"):
        checkpoints = write_checkpoints(make_run(tmp_path / name), 9)
        folder = folder_of(checkpoints, 9)
        (folder / name).write_bytes(bomb)
        if name != MANIFEST:
            reseal(folder, checkpoints)  # even where the manifest vouches for it
        with pytest.raises(DamagedError):
            checkpoints.read(9)
    assert not (tmp_path / "ran").exists()
    pickle.loads(bomb)
    assert (tmp_path / "ran").exists()


def reseal(folder: Path, checkpoints: Checkpoints) -> None:
    (folder / MANIFEST).unlink()
    key = checkpoints.shelf.key(9)
    seal(folder, {"stage": key.stage, "identity": key.identity, "kind": key.kind, "name": key.name})
