"""Stage 4 of 5: score every candidate on the validation split. Writes data/predictions/validation/ and
metrics/candidates.json."""

from __future__ import annotations

import sys
from pathlib import Path

from stages.config.errors import UserError, run_stage
from stages.config.params import Params, load_params
from stages.config.pipeline import load_stage, require_code_deps
from stages.run.signals import die_with_parent

CANDIDATES = Path("models/candidates")
PREDICTIONS = Path("data/predictions/validation")
METRICS = Path("metrics/candidates.json")


def main() -> None:
    """Run the stage from params.yaml."""
    die_with_parent()
    params = load_params()
    require_code_deps(load_stage("evaluate"), params)

    from stages.storage import files

    scores: dict[str, dict[str, float]] = {}

    def fill(folder: Path) -> None:
        scores.update(evaluate_candidates(params, folder))

    files.write_folder(PREDICTIONS, fill)
    files.write_text(METRICS, files.dumps(scores))


def evaluate_candidates(params: Params, folder: Path) -> dict[str, dict[str, float]]:
    """Write `<candidate>.parquet` to `folder` for each candidate; their scores by name.

    Raises:
        UserError: there is no candidate.
    """
    from stages.inference.predictor import Predictor

    paths = sorted(path for path in CANDIDATES.glob("step-*") if path.is_dir())
    if not paths:
        raise UserError(f"{CANDIDATES}: no candidate there; run: dvc repro train")
    predictor = Predictor(params)
    scores = {}
    for path in paths:
        table, scores[path.name] = predictor.run(path, "validation")
        assert scores[path.name] is not None  # the validation split always has labels
        table.to_parquet(folder / f"{path.name}.parquet", index=False)
        shown = " ".join(f"{name} {value:.4f}" for name, value in scores[path.name].items())
        print(f"{path.name}: {shown}", file=sys.stderr, flush=True)
    return scores


if __name__ == "__main__":
    run_stage(main)
