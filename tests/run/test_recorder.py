"""What is written while it trains: no state twice, none lost at the end, and only what is still needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stages.ground.errors import UserError
from stages.run.candidates import Candidates
from stages.run.checkpoint import Checkpoints
from stages.run.recorder import Recorder, SilentRecorder
from stages.run.state import TrainState
from stages.scoring.kept import Scored
from tests.support.runs import make_params, make_run, make_state, take_steps

STEPS = {"save_strategy": "steps", "save_steps": 3}


def make_recorder(folder: Path, state: TrainState, is_saved: bool = True, **train: Any) -> tuple[Recorder, Checkpoints]:
    run, params = make_run(folder), make_params(**{**STEPS, **train})
    checkpoints = Checkpoints(run.checkpoints)
    return Recorder(state, is_saved, run, Candidates(run.candidates, params), params.train), checkpoints


def test_saves_every_save_steps_and_asking_changes_nothing(tmp_path: Path) -> None:
    state = make_state()
    recorder, checkpoints = make_recorder(tmp_path, state)
    saved = []
    for step in range(1, 8):
        take_steps(state, 1)
        assert recorder.is_due() == recorder.is_due() == (step % 3 == 0)
        if recorder.is_due():
            recorder.save()
            saved.append(step)
            assert not recorder.is_due()
    recorder.finish()
    assert saved == [3, 6]
    assert checkpoints.shelf.steps() == [7, 6]


def test_state_that_is_on_disk_already_is_not_written_again(tmp_path: Path) -> None:
    recorder, checkpoints = make_recorder(tmp_path, make_state(), is_saved=True)
    recorder.finish()
    assert checkpoints.shelf.steps() == []


def test_state_that_was_taken_over_is_written_at_the_end_even_without_a_step(tmp_path: Path) -> None:
    recorder, checkpoints = make_recorder(tmp_path, make_state(), is_saved=False)
    recorder.finish()
    assert checkpoints.shelf.steps() == [0]


def test_evaluation_alone_makes_a_state_worth_saving(tmp_path: Path) -> None:
    state = make_state()
    recorder, checkpoints = make_recorder(tmp_path, state, save_steps=100)
    take_steps(state, 5)
    recorder.save()
    state.progress.evaluated_step = 5
    recorder.finish()
    assert checkpoints.read(5)["progress"]["evaluated_step"] == 5


def test_epoch_strategy_saves_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    state = make_state()
    recorder, _ = make_recorder(tmp_path, state, save_strategy="epoch", save_steps=None)
    due = []
    for _ in range(20):
        take_steps(state, 1)
        if recorder.is_due():
            due.append(state.progress.step)
    assert due == [10, 20]


def test_time_strategy_saves_the_first_step_after_a_start(tmp_path: Path) -> None:
    state = make_state()
    recorder, _ = make_recorder(tmp_path, state, save_strategy="time", save_steps=None, save_seconds=600)
    assert not recorder.is_due()
    take_steps(state, 1)
    assert recorder.is_due()
    recorder.save()
    take_steps(state, 1)
    assert not recorder.is_due()
    recorder.finish()


def test_candidates_that_a_checkpoint_names_are_kept_until_it_goes(tmp_path: Path) -> None:
    state = make_state()
    recorder, _ = make_recorder(tmp_path, state, keep_candidates=1)
    models = make_run(tmp_path).candidates
    for step, accuracy in ((1, 0.1), (2, 0.2), (3, 0.3)):
        take_steps(state, 1)
        recorder.keep_candidate({"loss": 1.0, "accuracy": accuracy})
        if step == 2:
            recorder.save()
            recorder._saver.wait()
    assert models.steps() == [3, 2]
    recorder.finish()
    assert models.steps() == [3, 2]
    take_steps(state, 1)
    recorder.save()
    recorder.finish()
    assert models.steps() == [3]


def test_predictions_are_kept_until_their_evaluation_is_on_disk_and_those_of_candidates_longer(tmp_path: Path) -> None:
    state = make_state()
    recorder, _ = make_recorder(tmp_path, state, keep_candidates=1)
    run = make_run(tmp_path)

    def evaluate(accuracy: float) -> None:
        take_steps(state, 1)
        kept = recorder.kept_predictions()
        assert kept is not None
        kept.write([Scored(0, torch.zeros(2, 2), None)])
        recorder.keep_candidate({"loss": 1.0, "accuracy": accuracy})
        state.progress.evaluated_step = state.progress.step

    evaluate(0.9)
    evaluate(0.5)
    assert run.steps_in_atoms() == [2, 1]
    recorder.finish()
    assert run.steps_in_atoms() == [1]
    evaluate(0.6)
    assert run.steps_in_atoms() == [3, 1]


def test_predictions_are_not_kept_where_a_step_that_is_trained_again_may_differ(tmp_path: Path) -> None:
    recorder, _ = make_recorder(tmp_path, make_state(), deterministic=False)
    assert recorder.kept_predictions() is None


def test_silent_recorder_takes_part_in_every_save_and_writes_nothing(tmp_path: Path) -> None:
    state, taken = make_state(), []
    state.parallel.state_dict = lambda: taken.append(state.progress.step) or {}  # type: ignore[func-returns-value, method-assign]
    recorder = SilentRecorder(state, is_saved=True)
    take_steps(state, 2)
    assert not recorder.is_due()
    recorder.save()
    recorder.keep_candidate({"accuracy": 1.0})
    recorder.finish()
    take_steps(state, 1)
    recorder.finish()
    assert taken == [2, 3]
    assert list(tmp_path.iterdir()) == []


class Raises:
    """A callback whose author made a mistake."""

    def state_dict(self) -> dict[str, Any]:
        raise KeyError("count")

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def test_mistake_in_the_state_of_a_callback_is_one_line(tmp_path: Path) -> None:
    state = make_state()
    state.callbacks = {"0 own:Raises": Raises()}
    recorder, _ = make_recorder(tmp_path, state)
    take_steps(state, 3)
    with pytest.raises(UserError, match=r"Raises.state_dict: KeyError: 'count'"):
        recorder.save()


def test_failed_save_stops_the_next_boundary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.keeping.sealed import SaveError

    state = make_state()
    recorder, _ = make_recorder(tmp_path, state)
    monkeypatch.setattr(Checkpoints, "write", lambda *_: (_ for _ in ()).throw(SaveError("the disk is full")))
    take_steps(state, 3)
    recorder.save()
    recorder._saver._thread.join()  # type: ignore[union-attr]
    with pytest.raises(SaveError, match="the disk is full"):
        recorder.is_due()
