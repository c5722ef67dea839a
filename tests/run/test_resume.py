"""Going on: a damaged file costs itself, and what it costs is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.ground.errors import UserError
from stages.keeping.identity import Identity
from stages.keeping.sealed import MANIFEST
from stages.modeling.compute import Compute
from stages.run import candidates as candidates_module
from stages.run.candidates import Candidates
from stages.run.checkpoint import Checkpoints, Snapshot
from stages.run.resume import Resumer
from stages.run.state import TrainState
from tests.support.damage import DAMAGE, flip
from tests.support.runs import CPU, make_params, make_run, make_state, take_steps

TOTAL = 40


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates_module, "find_in_dvc_cache", lambda _: None)


def go_on(folder: Path, said: list[str], **train: Any) -> tuple[TrainState, bool]:
    run, params = make_run(folder), make_params(**train)
    candidates = Candidates(run.candidates, params)
    resumer = Resumer(run, Identity("train", {}), candidates, params, Compute(CPU), said.append)
    return resumer.resume(make_state, TOTAL)


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A run that was killed: checkpoints of steps 6 and 9, candidates of steps 5 and 8."""
    run, params, state = make_run(tmp_path), make_params(keep_candidates=3), make_state()
    candidates, checkpoints = Candidates(run.candidates, params), Checkpoints(run.checkpoints)
    for step in range(1, 10):
        take_steps(state, 1)
        if step in (5, 8):
            scores = {"loss": 1.0, "accuracy": step / 10}
            state.record("eval", scores)
            state.progress.candidates = candidates.add(state.progress.candidates, step, scores, state.model)
            state.progress.evaluated_step = step
        if step % 3 == 0:
            checkpoints.write(Snapshot.of(step, state.state_dict()))
    return tmp_path


def fresh(steps: int) -> dict[str, Any]:
    """The model after so many steps without a kill."""
    state = make_state()
    take_steps(state, steps) if steps else None
    return state.model.state_dict()


def file_of(folder: Path, kind: str, step: int, name: str) -> Path:
    return make_run(folder).path / f"{kind}/step-{step:08d}" / name


def test_newest_checkpoint_brings_everything_back(killed: Path) -> None:
    said: list[str] = []
    state, is_saved = go_on(killed, said)
    assert is_saved
    assert state.progress.step == 9
    assert [candidate.step for candidate in state.progress.candidates] == [8, 5]
    assert len(state.histories["train"].rows()) == 9
    assert [row["step"] for row in state.histories["eval"].rows()] == [5, 8]
    assert torch.equal(state.model.state_dict()["weight"], fresh(9)["weight"])
    assert said[-1] == "run 0123456789ab: going on after step 9 of 40"


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [MANIFEST, "history.json", "progress.json", "optimizer.safetensors"])
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(
    killed: Path, damage: Callable[[Path], None], name: str
) -> None:
    damage(file_of(killed, "checkpoints", 9, name))
    said: list[str] = []
    state, _ = go_on(killed, said)
    assert state.progress.step == 6
    assert torch.equal(state.model.state_dict()["weight"], fresh(6)["weight"])
    assert "checkpoint of step 9 is damaged and was set aside" in said[0]
    assert sorted(path.name for path in file_of(killed, "checkpoints", 9, "").parent.iterdir()) == [
        "damaged-step-00000009",
        "step-00000006",
    ]


def test_checkpoint_does_not_need_its_neighbours(killed: Path) -> None:
    shutil.rmtree(file_of(killed, "checkpoints", 6, ""))
    state, _ = go_on(killed, [])
    assert state.progress.step == 9
    assert not (make_run(killed).path / "history").exists()


def test_candidate_that_only_the_newest_checkpoint_names_costs_that_one(killed: Path) -> None:
    flip(file_of(killed, "candidates", 8, "model.safetensors"))
    said: list[str] = []
    state, _ = go_on(killed, said)
    assert state.progress.step == 6
    assert "the candidate of step 8 is damaged" in said[0]
    assert "training again from step 6 of the 9 that were done" in said[0]
    assert len(said) == 2


def test_candidate_that_all_checkpoints_name_costs_the_run_and_that_is_said(killed: Path) -> None:
    flip(file_of(killed, "candidates", 5, "model.safetensors"))
    said: list[str] = []
    state, is_saved = go_on(killed, said)
    assert (state.progress.step, is_saved) == (0, True)
    assert torch.equal(state.model.state_dict()["weight"], fresh(0)["weight"])
    assert "training again from step 0 of the 9 that were done" in said[0]
    assert make_run(killed).checkpoints.steps() == []


def test_checkpoint_that_verifies_but_cannot_be_loaded_leaves_nothing_of_itself(killed: Path) -> None:
    run = make_run(killed)
    state = make_state(seed=7)
    take_steps(state, 12)
    saved = state.state_dict()
    saved["optimizer"] = {"state": {}, "param_groups": [1]}
    Checkpoints(run.checkpoints).write(Snapshot.of(12, saved))
    said: list[str] = []
    resumed, _ = go_on(killed, said)
    assert "checkpoint of step 12 is damaged and was set aside: it cannot be loaded" in said[0]
    assert resumed.progress.step == 9
    assert torch.equal(resumed.model.state_dict()["weight"], fresh(9)["weight"])


class Forgetful:
    """A callback whose author made a mistake."""

    def state_dict(self) -> dict[str, Any]:
        return {"count": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise KeyError("counts")


def test_mistake_in_a_callback_is_told_and_costs_no_checkpoint(killed: Path) -> None:
    run, params = make_run(killed), make_params()
    state = make_state()
    state.callbacks = {"0 own:Forgetful": Forgetful()}
    Checkpoints(run.checkpoints).write(Snapshot.of(12, state.state_dict()))
    resumer = Resumer(run, Identity("train", {}), Candidates(run.candidates, params), params, Compute(CPU), print)
    with pytest.raises(UserError, match=r"Forgetful.load_state_dict: KeyError: 'counts'"):
        resumer.resume(lambda: replace(make_state(), callbacks={"0 own:Forgetful": Forgetful()}), TOTAL)
    assert run.checkpoints.steps() == [12, 9]


@pytest.mark.parametrize(
    "progress",
    [
        None,
        [],
        {"step": "9"},
        {"step": 9, "unknown": 1},
        {"candidates": [3]},
        {"candidates": [{"step": 1, "scores": {}, "files": {"../../x": {"size": 1, "sha256": "0" * 64}}}]},
        {"candidates": [{"step": 1, "scores": {}, "files": {"/etc/x": {"size": 1, "sha256": "0" * 64}}}]},
    ],
)
def test_progress_that_was_made_up_is_damage_and_no_error(killed: Path, progress: Any) -> None:
    state = make_state()
    Checkpoints(make_run(killed).checkpoints).write(Snapshot.of(12, {**state.state_dict(), "progress": progress}))
    said: list[str] = []
    assert go_on(killed, said)[0].progress.step == 9
    assert "checkpoint of step 12 is damaged and was set aside: the state is not what it should be" in said[0]


def test_without_a_checkpoint_it_begins_and_needs_none(tmp_path: Path) -> None:
    said: list[str] = []
    state, is_saved = go_on(tmp_path, said)
    assert (state.progress.step, is_saved) == (0, True)
    assert "40 steps on cpu" in said[0]
