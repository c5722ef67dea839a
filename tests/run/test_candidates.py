"""The best models so far: which are kept, and what becomes of one that is damaged."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.keeping.sealed import MANIFEST, DamagedError, FileRecord
from stages.run import candidates as module
from stages.run import dvc_cache
from stages.run.candidates import Candidates
from stages.run.state import Candidate
from tests.support.damage import DAMAGE, flip
from tests.support.runs import make_model, make_params, make_run

MODEL = "model.safetensors"
DVC = [sys.executable, "-m", "dvc"]


def keep(folder: Path, **scores: float) -> tuple[Candidates, list[Candidate]]:
    """Candidates of steps 1, 2, …, with these scores, at most two kept."""
    candidates = Candidates(make_run(folder).candidates, make_params(keep_candidates=2))
    kept: list[Candidate] = []
    for step, accuracy in enumerate(scores.values(), 1):
        kept = candidates.add(kept, step, {"loss": 1.0, "accuracy": accuracy}, make_model())
    return candidates, kept


def folder_of(folder: Path, step: int) -> Path:
    return make_run(folder).path / f"candidates/step-{step:08d}"


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ((0.1, 0.3, 0.2), [2, 3]),
        ((0.5, 0.5, 0.5), [1, 2]),  # of equals the earlier
        ((float("nan"), 0.1, float("nan")), [2, 1]),
    ],
)
def test_best_by_the_metric_are_kept_best_first(tmp_path: Path, scores: tuple[float, ...], kept: list[int]) -> None:
    _, found = keep(tmp_path, **{str(number): score for number, score in enumerate(scores)})
    assert [candidate.step for candidate in found] == kept


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [MODEL, "model.json", MANIFEST])
def test_damaged_candidate_is_restored_by_its_hash_from_the_cache_of_dvc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], name: str
) -> None:
    candidates, kept = keep(tmp_path, a=0.1)
    cached = shutil.copytree(folder_of(tmp_path, 1), tmp_path / "cache")

    def find(wanted: FileRecord) -> Path | None:
        return next((p for p in cached.iterdir() if p.stat().st_size == wanted.size and wanted in kept[0].files.values()
                     and kept[0].files.get(p.name) == wanted), None)  # fmt: skip

    monkeypatch.setattr(module, "find_in_dvc_cache", find)
    before = candidates.files(kept[0])[MODEL].read_bytes()
    damage(folder_of(tmp_path, 1) / name)
    with pytest.raises(DamagedError):
        candidates.files(kept[0])
    said: list[str] = []
    candidates.ensure(kept[0], said.append)
    assert candidates.files(kept[0])[MODEL].read_bytes() == before
    assert "the candidate of step 1 was damaged and is restored, at no cost" in said[0]


def test_candidate_whose_manifest_alone_is_lost_needs_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates, kept = keep(tmp_path, a=0.1)
    monkeypatch.setattr(module, "find_in_dvc_cache", lambda _: None)
    (folder_of(tmp_path, 1) / MANIFEST).unlink()
    candidates.ensure(kept[0], lambda _: None)
    candidates.files(kept[0])
    flip(folder_of(tmp_path, 1) / MODEL)
    with pytest.raises(DamagedError, match=MODEL):
        candidates.ensure(kept[0], lambda _: None)


def test_model_beside_those_that_were_written_is_never_published(tmp_path: Path) -> None:
    candidates, kept = keep(tmp_path, a=0.1)
    (folder_of(tmp_path, 1) / "model.py").write_text("raise SystemExit")
    with pytest.raises(DamagedError, match=r"model\.py.*not in its manifest"):
        candidates.copy_to(tmp_path / "models", kept)
    assert not (tmp_path / "models").exists()


def test_another_model_sealed_in_the_place_of_a_candidate_is_refused(tmp_path: Path) -> None:
    candidates, kept = keep(tmp_path, a=0.1)
    other, _ = keep(tmp_path / "other", a=0.9)
    shutil.rmtree(folder_of(tmp_path, 1))
    shutil.copytree(folder_of(tmp_path / "other", 1), folder_of(tmp_path, 1))
    with pytest.raises(DamagedError, match="are those of another model"):
        candidates.files(kept[0])
    assert other.shelf.steps() == [1]


def test_published_folder_holds_the_models_and_nothing_of_the_store(tmp_path: Path) -> None:
    candidates, kept = keep(tmp_path, a=0.1, b=0.2)
    candidates.copy_to(tmp_path / "models", kept)
    found = sorted(str(p.relative_to(tmp_path / "models")) for p in (tmp_path / "models").rglob("*") if p.is_file())
    assert found == [f"step-0000000{n}/{name}" for n in (1, 2) for name in ("model.json", MODEL)]


def test_files_are_found_in_the_cache_by_content_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    monkeypatch.chdir(tmp_path)
    for command in (["git", "init", "-q"], [*DVC, "init", "-q"]):
        subprocess.run(command, check=True)
    _, kept = keep(tmp_path / "runs", a=0.1)
    (tmp_path / "data").mkdir()
    shutil.copy(folder_of(tmp_path / "runs", 1) / MODEL, tmp_path / "data/x.bin")
    subprocess.run([*DVC, "add", "-q", "data"], check=True)
    found = dvc_cache.find_in_dvc_cache(kept[0].files[MODEL])
    assert found is not None
    assert found.read_bytes() == (tmp_path / "data/x.bin").read_bytes()
    assert dvc_cache.find_in_dvc_cache(FileRecord(kept[0].files[MODEL].size, "0" * 64)) is None
    monkeypatch.chdir(tmp_path.parent)
    assert dvc_cache.find_in_dvc_cache(kept[0].files[MODEL]) is None


def test_record_of_a_candidate_is_plain_data(tmp_path: Path) -> None:
    from dataclasses import asdict

    _, kept = keep(tmp_path, a=0.1)
    assert json.loads(json.dumps(asdict(kept[0])))["files"].keys() == {"model.json", MODEL}
