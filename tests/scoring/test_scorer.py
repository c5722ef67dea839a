"""Predictions of a split: the same whenever and however they are computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from stages.batches.tokenized import Task
from stages.config.read import read_yaml
from stages.config.schema import TrainParams
from stages.keeping import atoms
from stages.keeping.atoms import Atoms
from stages.keeping.store import DiskStore
from stages.modeling.compute import Compute
from stages.modeling.losses import Objective, make_objective
from stages.modeling.parallel import Parallel
from stages.modeling.world import World
from stages.scoring import scorer
from stages.scoring.kept import Kept
from stages.scoring.scorer import Predictions, Scorer, Stopped
from tests.support.project import ROOT
from tests.support.user_code import Sampling

CPU = torch.device("cpu")
TASK = Task("classification", ("a", "b"), (), ("x", "y", "z"), "label", ("features",))


def train_params(**changes: Any) -> TrainParams:
    return TrainParams.model_validate(read_yaml(ROOT / "params.yaml")["train"] | {"warmup_steps": 0} | changes)


def split(rows: int) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(0)
    features = {
        "features": datasets.List(datasets.Value("float32"), length=3),
        "labels": datasets.Value("int64"),
    }
    values = {"features": torch.randn(rows, 3, generator=generator).tolist(), "labels": [i % 2 for i in range(rows)]}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def predict(model: nn.Module, rows: datasets.Dataset, objective: Objective, size: int, seed: int = 0) -> Predictions:
    compute = Compute(CPU, seed=seed)
    return Scorer(rows, None, objective, size, compute)(lambda: Parallel(model))


def test_model_that_draws_in_eval_mode_draws_the_same_each_time() -> None:
    torch.manual_seed(0)
    model, rows = Sampling(), split(50)
    objective = make_objective(train_params(), TASK, rows, CPU)
    torch.manual_seed(1)
    first = predict(model, rows, objective, 16)
    again = predict(model, rows, objective, 16)
    other = predict(model, rows, objective, 16, seed=1)
    assert first.logits.tobytes() == again.logits.tobytes()
    assert first.logits.tobytes() != other.logits.tobytes()


def test_weighted_loss_does_not_depend_on_the_batch_size() -> None:
    torch.manual_seed(0)
    model, rows = nn.Sequential(nn.Linear(3, 2)), split(50)
    objective = make_objective(train_params(class_weights=[0.3, 0.7]), TASK, rows, CPU)
    losses = [predict(model, rows, objective, size).loss or 0.0 for size in (1, 7, 50)]
    assert max(losses) - min(losses) < 1e-7


class Rank(World):
    """One of several processes, which agrees with itself and hears of no other's batches."""

    def maximum(self, *values: int) -> list[int]:
        return list(values)

    def broadcast_object(self, value: Any) -> Any:
        return value

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor]

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> None: ...


class Counting(Sampling):
    """Counts its passes, in a buffer of its own too."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, features: torch.Tensor) -> Any:
        self.passes += 1
        self.seen += 1
        return {"logits": super().forward(features)["logits"] + self.seen}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 40])
def test_batches_are_those_of_one_process_and_every_process_has_equally_many_passes(size: int) -> None:
    torch.manual_seed(0)
    model, rows = Counting().eval(), split(50)
    objective = make_objective(train_params(), TASK, rows, CPU)
    alone = predict(model, rows, objective, 7)
    logits, passes = torch.zeros(50, 2), set()
    for rank in range(size):
        model.passes = 0
        compute = Compute(CPU, world=Rank(rank, size))
        found = Scorer(rows, None, objective, 7, compute)(lambda compute=compute: Parallel(model))  # type: ignore[misc]
        mine = torch.from_numpy(found.logits)
        assert not logits[mine.any(1)].any()  # another process's
        logits += mine if mine.shape[1] else 0
        passes.add(model.passes)
    assert passes == {-(-8 // size)}
    assert logits.numpy().tobytes() == alone.logits.tobytes()
    assert model.seen == 0


def make_kept(folder: Path, environment: str = "env") -> Kept:
    return Kept(Atoms(DiskStore(folder), "evaluate", "0" * 12, "validation", environment))


def killed_after(batches: int) -> Callable[[], bool]:
    """Asked before each batch; the process is gone before the one after so many."""
    left = iter([False] * batches)

    def asked() -> bool:
        for answer in left:
            return answer
        raise KeyboardInterrupt

    return asked


@pytest.fixture
def _an_atom_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atoms, "SECONDS", 0.0)


@pytest.mark.usefixtures("_an_atom_a_batch")
@pytest.mark.parametrize("model", [Counting(), Sampling()], ids=["buffer", "draws"])
def test_prediction_killed_again_and_again_computes_each_batch_once_or_twice(tmp_path: Path, model: nn.Module) -> None:
    rows, compute, passes = split(100), Compute(CPU), []
    scorer_of = Scorer(rows, None, make_objective(train_params(), TASK, rows, CPU), 7, compute)
    undisturbed = scorer_of(lambda: Parallel(model))
    model.register_forward_hook(lambda *_: passes.append(1))
    for _ in range(15):  # two batches a start, of which the second is lost
        with contextlib.suppress(KeyboardInterrupt):
            resumed = scorer_of(lambda: Parallel(model), killed_after(2), make_kept(tmp_path))
    assert resumed.logits.tobytes() == undisturbed.logits.tobytes()
    assert resumed.loss == undisturbed.loss
    assert len(passes) <= 2 * len(scorer_of.batches)
    scorer_of(lambda: pytest.fail("a model is loaded, with nothing to compute"), kept=make_kept(tmp_path))


@pytest.mark.usefixtures("_an_atom_a_batch")
@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "forged"])
def test_damaged_predictions_are_computed_again(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, compute, model = split(50), Compute(CPU), Sampling()
    scorer_of = Scorer(rows, None, make_objective(train_params(), TASK, rows, CPU), 7, compute)
    undisturbed = scorer_of(lambda: Parallel(model), kept=make_kept(tmp_path))
    (first, *_) = sorted(tmp_path.glob("*/atoms/*/batches.safetensors"))
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    if damage == "forged":
        forged = {"numbers": torch.tensor([99]), "logits": torch.zeros(7, 2), "losses": torch.zeros(7)}
        make_kept(tmp_path)._atoms.write(0, 0, lambda folder: save_file(forged, folder / "batches.safetensors"))
    elif damage == "gone":
        first.unlink()
    else:
        first.write_bytes(content if damage == "bit" else content[:-20])
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    again = scorer_of(lambda: Parallel(model), kept=make_kept(tmp_path))
    assert again.logits.tobytes() == undisturbed.logits.tobytes()
    assert len(passes) == 1
    assert ("is damaged and is computed again" in capsys.readouterr().err) == (damage != "forged")


@pytest.mark.usefixtures("_an_atom_a_batch")
def test_predictions_of_another_environment_are_computed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, compute, model = split(50), Compute(CPU), Sampling()
    scorer_of = Scorer(rows, None, make_objective(train_params(), TASK, rows, CPU), 7, compute)
    scorer_of(lambda: Parallel(model), kept=make_kept(tmp_path))
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    scorer_of(lambda: Parallel(model), kept=make_kept(tmp_path, "other"))
    assert len(passes) == len(scorer_of.batches)
    assert "8 pieces were computed in another environment" in capsys.readouterr().err


def test_batches_stay_within_a_window_in_the_order_of_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer, "WINDOW_ROWS", 20)
    monkeypatch.setattr(scorer, "lengths", lambda rows: np.arange(50) % 7)
    rows = split(50)
    batches = Scorer(rows, None, make_objective(train_params(), TASK, rows, CPU), 8, Compute(CPU)).batches
    assert [len(batch) for batch in batches] == [8, 8, 4, 8, 8, 4, 8, 2]
    assert sorted(row for batch in batches for row in batch) == list(range(50))
    assert {row // 20 for row in batches[2]} == {0} and {row // 20 for row in batches[3]} == {1}


def test_prediction_is_left_at_the_next_batch_and_the_model_trains_on() -> None:
    model, rows = Sampling().train(), split(50)
    compute, asked = Compute(CPU), iter([False, False, True])
    predict_rows = Scorer(rows, None, make_objective(train_params(), TASK, rows, CPU), 16, compute)
    with pytest.raises(Stopped):
        predict_rows(lambda: Parallel(model), lambda: next(asked))
    assert model.training
