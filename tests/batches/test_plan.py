"""The batch plan: a pure function that loses no row, repeats none, and can be entered anywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.batches import plan as batch_plan
from stages.batches.permutation import Permutation
from stages.batches.plan import BatchPlan, PlanShape, write_epoch
from stages.ground.errors import UserError

SIZES = st.tuples(st.integers(1, 400), st.integers(1, 6), st.integers(1, 6))


def write(folder: Path, shape: PlanShape, epochs: int, seed: int, lengths: np.ndarray, bucketing: bool) -> BatchPlan:
    for old in folder.glob("*.arrow"):
        old.unlink()
    for epoch in range(epochs):
        write_epoch(folder, shape, epoch, seed, lengths, bucketing)
    return BatchPlan(folder)


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection_that_can_be_read_in_parts(n: int, key: int) -> None:
    permutation = Permutation(n, key)
    whole = permutation(0, n)
    assert sorted(whole) == list(range(n))
    middle = n // 2
    assert np.array_equal(np.concatenate([permutation(0, middle), permutation(middle, n)]), whole)


def test_permutation_has_no_favourite_places() -> None:
    n, keys = 20, 4000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), Permutation(n, key)(0, n)] += 1
    expected = keys / n
    # chi-squared of n*n cells has mean n*n and deviation about sqrt(2) * n
    assert ((counts - expected) ** 2 / expected).sum() < n * n + 6 * 2**0.5 * n


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, drop_last=st.booleans(), bucketing=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_every_row_is_in_each_epoch_once(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: tuple[int, int, int],
    drop_last: bool,
    bucketing: bool,
    seed: int,
) -> None:
    rows, micro, factor = sizes
    shape = PlanShape(rows, micro * factor, micro, drop_last)
    if not shape.steps_per_epoch:
        return
    lengths = np.random.default_rng(seed).integers(1, 50, rows)
    plan = write(tmp_path_factory.mktemp("plan"), shape, 2, seed, lengths, bucketing)
    steps = list(plan.steps(1, 2 * shape.steps_per_epoch))
    assert [step[0].step for step in steps] == list(range(1, 2 * shape.steps_per_epoch + 1))
    for epoch in range(2):
        of_epoch = [m for step in steps for m in step if m.epoch == epoch]
        seen = [row for m in of_epoch for row in m.rows]
        assert len(seen) == len(set(seen)) == shape.rows_per_epoch
        if not drop_last:
            assert sorted(seen) == list(range(rows))
    for step in steps:
        assert [m.micro_batch for m in step] == list(range(len(step)))
        assert all(0 < len(m.rows) <= micro for m in step)
    full = [step for step in steps if step[0].step % shape.steps_per_epoch]
    assert all(sum(len(m.rows) for m in step) == micro * factor for step in full)


@settings(max_examples=20, deadline=None)
@given(sizes=SIZES, start=st.integers(1, 50))
def test_plan_entered_at_any_step_goes_on_the_same(
    tmp_path_factory: pytest.TempPathFactory, sizes: tuple[int, int, int], start: int
) -> None:
    rows, micro, factor = sizes
    shape = PlanShape(rows, micro * factor, micro, False)
    plan = write(tmp_path_factory.mktemp("plan"), shape, 3, 5, np.ones(rows, int), False)
    last = 3 * shape.steps_per_epoch
    start = min(start, last)
    assert list(plan.steps(start, last)) == list(plan.steps(1, last))[start - 1 :]


def test_micro_batch_size_changes_no_step(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 99, 101)
    plans = []
    for micro in (1, 2, 4, 8):
        folder = tmp_path / str(micro)
        folder.mkdir()
        plan = write(folder, PlanShape(101, 8, micro, False), 1, 3, lengths, True)
        plans.append([[row for m in step for row in m.rows] for step in plan.steps(1, 13)])
    assert plans[0] == plans[1] == plans[2] == plans[3]


def test_windows_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = np.random.default_rng(0).integers(1, 99, 5003)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    shape = PlanShape(5003, 4, 2, False)
    one = write(tmp_path / "a", shape, 1, 9, lengths, True)
    monkeypatch.setattr(batch_plan, "WINDOW_ROWS", 400)
    many = write(tmp_path / "b", shape, 1, 9, lengths, True)
    assert list(one.steps(1, 1251)) == list(many.steps(1, 1251))


def test_same_seed_same_bytes_and_other_seed_or_epoch_another_order(tmp_path: Path) -> None:
    shape, lengths = PlanShape(500, 8, 4, False), np.ones(500, int)
    contents = []
    for number, seed in enumerate((1, 1, 2)):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(folder, shape, 2, seed, lengths, False)
        contents.append([path.read_bytes() for path in sorted(folder.iterdir())])
    assert contents[0] == contents[1]
    assert contents[0][0] != contents[2][0]
    assert contents[0][0] != contents[0][1]


def test_bucketing_by_length_pads_less(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 120, 4000)
    shape = PlanShape(4000, 16, 16, False)
    efficiency = []
    for bucketing in (False, True):
        tokens, padded = write_epoch(tmp_path, shape, 0, 0, lengths, bucketing)
        efficiency.append(tokens / padded)
    assert efficiency[0] < 0.6
    assert efficiency[1] > 0.95


def test_what_was_in_a_step_is_a_pandas_question(tmp_path: Path) -> None:
    plan = write(tmp_path, PlanShape(100, 8, 4, False), 2, 0, np.ones(100, int), False)
    table = pd.concat([pd.read_feather(path) for path in sorted(tmp_path.glob("epoch-*.arrow"))])
    rows = table.query("step == 15")["rows"].explode().tolist()
    assert rows == [row for m in next(plan.steps(15, 15)) for row in m.rows]


def test_max_steps_overrides_the_number_of_epochs() -> None:
    shape = PlanShape(100, 8, 8, False)
    assert shape.steps_per_epoch == 13
    assert shape.epochs(3, None) == 3
    assert shape.epochs(3, 14) == 2


def test_missing_plan_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dvc repro build_loaders"):
        BatchPlan(tmp_path)
