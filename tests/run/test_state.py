"""State on disk: what goes in comes out, only if it is intact, and never by unpickling."""

from __future__ import annotations

import errno
import itertools
import math
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.ground import disk
from stages.ground.errors import UserError
from stages.keeping.sealed import DamagedError, SaveError, seal
from stages.run import checkpoint, codec
from stages.run.checkpoint import CheckpointStore, Snapshot
from stages.run.history import History
from stages.run.saver import Saver, TimeSchedule

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
TENSORS = st.builds(
    lambda shape, dtype: (torch.rand(shape) * 9).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(DTYPES),
)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), TENSORS)
KEYS = st.one_of(st.text(), st.integers(0, 9))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


@settings(max_examples=150, deadline=None)
@given(tree=TREES)
def test_any_state_survives_the_round_trip_through_disk(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    store = CheckpointStore(tmp_path_factory.mktemp("run"), "id")
    store.write(Snapshot.of(3, {"part": tree, "number": 1}))
    assert same(store.read(3), {"part": tree, "number": 1})


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object(), {(1, 2): 3}, {"a": [{"b": 1j}]}])
def test_state_that_would_need_pickle_is_refused_by_name(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^callbacks"):
        codec.split({"x": value}, "callbacks")


def test_snapshot_does_not_follow_the_live_state() -> None:
    weight = torch.zeros(4)
    snapshot = Snapshot.of(1, {"model": {"weight": weight}})
    weight += 1
    assert snapshot.tensors["model"]["model.weight"].tolist() == [0, 0, 0, 0]


def test_tied_weights_are_stored_once() -> None:
    weight = torch.ones(5)
    skeleton, tensors = codec.split({"a": weight, "b": weight, "part": weight[:2]}, "model")
    assert sorted(tensors) == ["model.a", "model.part"]
    assert codec.join(skeleton, tensors)["b"].tolist() == [1] * 5


def make_store(folder: Path, steps: tuple[int, ...] = (5, 9)) -> CheckpointStore:
    store = CheckpointStore(folder / "checkpoints", "id")
    for step in steps:
        store.write(Snapshot.of(step, {"model": {"w": torch.full((300,), float(step))}, "progress": {"step": step}}))
    return store


def newest_step(store: CheckpointStore, reasons: list[str]) -> int | None:
    state = store.newest(lambda state: None, lambda step, reason: reasons.append(reason))
    return None if state is None else state["progress"]["step"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE: list[Callable[[Path], None]] = [cut, flip, empty, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors"])
def test_corrupt_newest_checkpoint_falls_back_to_previous(
    tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    store = make_store(tmp_path)
    damage(store.path(9) / name)
    reasons: list[str] = []
    assert newest_step(store, reasons) == 5
    assert len(reasons) == 1
    assert "step-00000009" in reasons[0]
    assert name in reasons[0] or damage is flip
    assert sorted(path.name for path in store.folder.iterdir()) == ["damaged-step-00000009", "step-00000005"]


def test_run_with_only_damaged_checkpoints_starts_again_and_keeps_them(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    for step in (5, 9):
        flip(store.path(step) / "state.json")
    reasons: list[str] = []
    assert newest_step(store, reasons) is None
    assert len(reasons) == 2
    assert len(list(store.folder.glob("damaged-*"))) == 2


def test_checkpoint_of_another_identity_is_never_loaded(tmp_path: Path) -> None:
    make_store(tmp_path)
    reasons: list[str] = []
    assert newest_step(CheckpointStore(tmp_path / "checkpoints", "other"), reasons) is None
    assert "identity is 'id', expected 'other'" in reasons[0]


def test_renamed_checkpoint_is_not_taken_for_another_step(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    os.rename(store.path(5), store.path(11))
    reasons: list[str] = []
    assert newest_step(store, reasons) == 9
    assert "step is 5, expected 11" in reasons[0]


def test_half_written_checkpoint_is_cleared_and_ignored(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    shutil.copytree(store.path(9), store.folder / ".step-00000012.tmp")
    assert newest_step(store, []) == 9
    assert not (store.folder / ".step-00000012.tmp").exists()


def test_crash_while_a_checkpoint_is_replaced_loses_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path, (9,))
    real, calls = os.rename, []

    def crash_at_second(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt  # what is on disk now is what a kill leaves
        real(source, target)

    monkeypatch.setattr(os, "rename", crash_at_second)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        store.write(Snapshot.of(9, {"model": {}, "progress": {"step": 9}}))
    monkeypatch.undo()
    assert store.steps() == []
    assert newest_step(CheckpointStore(store.folder, "id"), []) == 9


def test_two_checkpoints_are_kept(tmp_path: Path) -> None:
    store = make_store(tmp_path, (1, 2, 3, 4))
    assert store.steps() == [4, 3]


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.target, "ran"))


def test_planted_pickle_never_runs(tmp_path: Path) -> None:
    bomb = pickle.dumps(_Bomb(tmp_path / "ran"))
    for name in ("manifest.json", "state.json", "model.safetensors"):
        store = make_store(tmp_path / name)
        (store.path(9) / name).write_bytes(bomb)
        if name != "manifest.json":
            # even where the manifest vouches for it
            seal(store.path(9), identity="id", step=9)
        assert newest_step(store, []) == 5
    assert not (tmp_path / "ran").exists()
    pickle.loads(bomb)
    assert (tmp_path / "ran").exists()


def test_failed_write_names_the_bytes_and_keeps_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(SaveError, match=r"disk is full; it needs 1200 bytes"):
        store.write(Snapshot.of(12, {"model": {"w": torch.zeros(300)}}))
    assert newest_step(store, []) == 9
    assert not list(store.folder.glob(".*"))


def test_failed_save_is_raised_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path)
    monkeypatch.setattr(disk, "write_folder", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    saver = Saver(store, before_commit=lambda: None)
    saver.save(12, lambda: {"model": {}})
    with pytest.raises(SaveError, match="step-00000012"):
        saver.wait()
    saver.check()  # told once


def assert_set(gate: threading.Event) -> None:
    assert gate.wait(10)


def test_one_copy_is_in_flight(tmp_path: Path) -> None:
    gate = threading.Event()
    saver = Saver(make_store(tmp_path), before_commit=lambda: assert_set(gate))
    copies: list[int] = []
    saver.save(12, lambda: copies.append(12) or {})  # type: ignore[func-returns-value]
    second = threading.Thread(target=saver.save, args=(13, lambda: copies.append(13) or {}))  # type: ignore[func-returns-value]
    second.start()
    second.join(0.3)
    assert copies == [12]
    gate.set()
    second.join(10)
    saver.wait()
    assert copies == [12, 13]


def test_saves_begin_at_once_and_back_off_to_the_interval() -> None:
    now = 0.0
    schedule = TimeSchedule(60, clock=lambda: now)
    times = []
    while now < 300:
        if schedule.due():
            times.append(now)
            schedule.saved(cost_seconds=0.05)
        now += 0.5
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert times[0] == 0
    assert gaps == sorted(gaps)
    assert gaps[0] == 1
    assert gaps[-1] == 60


def test_expensive_saves_are_spread_out() -> None:
    now = 0.0
    schedule = TimeSchedule(600, clock=lambda: now)
    schedule.saved(cost_seconds=12.0)
    now = 119.0
    assert not schedule.due()
    now = 120.0
    assert schedule.due()


def test_history_is_cut_back_to_what_the_checkpoint_saw(tmp_path: Path) -> None:
    history = History(tmp_path / "h.tsv", ["step", "loss"])
    history.begin()
    history.append(step=1, loss=0.1)
    seen, content = history.state_dict(), history.path.read_bytes()
    history.append(step=2, loss=1e-17)
    again = History(tmp_path / "h.tsv", ["step", "loss"])
    again.check(seen)
    again.load_state_dict(seen)
    assert again.path.read_bytes() == content
    again.append(step=2, loss=1e-17)
    assert again.path.read_text() == "step\tloss\n1\t0.1\n2\t1e-17\n"
    assert again.state_dict() == history.state_dict()


def test_row_with_other_columns_than_the_table_is_refused_after_a_resume_too(tmp_path: Path) -> None:
    history = History(tmp_path / "h.tsv")
    history.begin()
    history.append(step=1, accuracy=0.5)
    resumed = History(tmp_path / "h.tsv")
    resumed.load_state_dict(history.state_dict())
    with pytest.raises(UserError, match="the columns were step, accuracy, and now are step, f1"):
        resumed.append(step=2, f1=0.5)
    assert history.path.read_text() == "step\taccuracy\n1\t0.5\n"


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_history_is_noticed(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    history = History(tmp_path / "h.tsv", ["step", "loss"])
    history.begin()
    history.append(step=1, loss=0.1)
    damage(history.path)
    with pytest.raises(DamagedError, match=r"h\.tsv"):
        history.check(history.state_dict())
