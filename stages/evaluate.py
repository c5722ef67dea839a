"""Stage 4 of 5: score every candidate on the validation split. Writes data/predictions/validation/ and
metrics/candidates.json."""

from __future__ import annotations

import sys
from pathlib import Path

from stages.config.pipeline import load_stage
from stages.config.schema import Params
from stages.ground.errors import UserError, run_stage
from stages.ground.places import CANDIDATES, METRICS, VALIDATION, step_name, steps_in
from stages.ground.signals import die_with_parent

RECORD = METRICS / "candidates.json"


def main() -> None:
    """Run the stage from params.yaml."""
    die_with_parent()
    stage = load_stage("evaluate")

    from stages.ground import disk
    from stages.keeping.code import find_code, require_code, require_imported

    code = find_code(stage)
    require_code(stage, code)

    def fill(folder: Path) -> dict[str, dict[str, float]]:
        scores = evaluate_candidates(stage.params, folder)
        require_imported(stage, code)
        return scores

    disk.write_text(RECORD, disk.dumps(disk.write_folder(VALIDATION, fill)))


def evaluate_candidates(params: Params, folder: Path) -> dict[str, dict[str, float]]:
    """Write `<candidate>.parquet` to `folder` for each candidate; their scores by name.

    Raises:
        UserError: there is no candidate.
    """
    from stages.scoring.predictor import Predictor

    names = [path.name for path in CANDIDATES.iterdir()] if CANDIDATES.is_dir() else []
    paths = [CANDIDATES / step_name(step) for step in reversed(steps_in(names))]
    if not paths:
        raise UserError(f"{CANDIDATES}: no candidate there; run: dvc repro train")
    predictor = Predictor(params)
    scores = {}
    for path in paths:
        table, scores[path.name] = predictor.run(path, "validation")
        table.to_parquet(folder / f"{path.name}.parquet", index=False)
        shown = " ".join(f"{name} {value:.4f}" for name, value in scores[path.name].items())
        print(f"{path.name}: {shown}", file=sys.stderr, flush=True)
    return scores


if __name__ == "__main__":
    run_stage(main)
