"""A table that grows goes back to where a checkpoint saw it, and reads as the file it becomes."""

from __future__ import annotations

import json

import pytest

from stages.ground.errors import UserError
from stages.run.history import SEGMENT_ROWS, History


def saved(history: History) -> History:
    """As it comes back from a checkpoint."""
    again = History()
    again.load_state_dict(json.loads(json.dumps(history.state_dict())))
    return again


def test_history_goes_on_as_it_would_have_after_any_row() -> None:
    whole = History(["step", "loss"])
    for step in range(2 * SEGMENT_ROWS + 3):
        if step in (0, 1, SEGMENT_ROWS - 1, SEGMENT_ROWS, 2 * SEGMENT_ROWS):
            resumed = saved(whole)
            resumed.append(step=step, loss=1 / (step + 3))
            expected = saved(whole)
            expected.append(step=step, loss=1 / (step + 3))
            assert resumed.text() == expected.text()
            assert resumed.state_dict() == expected.state_dict()
        whole.append(step=step, loss=1 / (step + 3))
    assert saved(whole).text() == whole.text()
    assert len(whole.text().splitlines()) == 2 * SEGMENT_ROWS + 4
    assert [row["step"] for row in saved(whole).rows()] == list(range(2 * SEGMENT_ROWS + 3))


def test_state_does_not_follow_the_rows_that_come_after_it() -> None:
    history = History(["step"])
    history.append(step=1)
    state = history.state_dict()
    history.append(step=2)
    again = History()
    again.load_state_dict(state)
    assert again.text() == "step\n1\n"


def test_numbers_read_back_as_the_same_numbers() -> None:
    history = History()
    history.append(step=1, loss=1e-17, accuracy=float("inf"))
    assert history.text() == "step\tloss\taccuracy\n1\t1e-17\tinf\n"
    assert history.rows() == [{"step": 1, "loss": 1e-17, "accuracy": float("inf")}]


def test_row_with_other_columns_than_the_table_is_refused_after_a_resume_too() -> None:
    history = History()
    history.append(step=1, accuracy=0.5)
    resumed = saved(history)
    with pytest.raises(UserError, match="the columns of the history were step, accuracy, and now are step, f1"):
        resumed.append(step=2, f1=0.5)
    assert resumed.text() == "step\taccuracy\n1\t0.5\n"
