"""Stage 4 of 5: score every candidate on the validation split. Writes data/predictions/validation/ and
metrics/candidates.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stages.config.pipeline import load_stage
from stages.ground.errors import UserError, say
from stages.ground.places import CANDIDATES, METRICS, VALIDATION, step_name, steps_in
from stages.ground.running import run_stage
from stages.ground.signals import die_with_parent
from stages.ground.watchdog import watch

if TYPE_CHECKING:
    from stages.keeping.folder import RunFolder
    from stages.scoring.predictor import Predictor

RECORD = METRICS / "candidates.json"


def main() -> None:
    """Run the stage from params.yaml."""
    die_with_parent()
    stage = load_stage("evaluate")

    from stages.ground import disk
    from stages.keeping.code import find_code, require_code, require_imported
    from stages.keeping.environment import of_libraries
    from stages.keeping.work import work_of
    from stages.scoring.predictor import Predictor
    from stages.scoring.scores import METRIC_LIBRARIES

    code = find_code(stage)
    require_code(stage, code)
    predictor = Predictor(stage.params)
    with work_of(stage, predictor.environment | of_libraries(*METRIC_LIBRARIES)) as run:

        def fill(folder: Path) -> dict[str, dict[str, float]]:
            with watch(stage.params.train.hang_seconds, run.log):
                scores = evaluate_candidates(predictor, run, folder)
            require_imported(stage, code)
            return scores

        disk.write_text(RECORD, disk.dumps(disk.write_folder(VALIDATION, fill)))


def evaluate_candidates(predictor: Predictor, run: RunFolder, folder: Path) -> dict[str, dict[str, float]]:
    """Write `<candidate>.parquet` to `folder` for each candidate; their scores by name.

    Raises:
        UserError: there is no candidate.
    """
    from stages.scoring.kept import Kept

    names = [path.name for path in CANDIDATES.iterdir()] if CANDIDATES.is_dir() else []
    paths = [CANDIDATES / step_name(step) for step in reversed(steps_in(names))]
    if not paths:
        raise UserError(f"{CANDIDATES}: no candidate there; run: dvc repro train")
    scores = {}
    for path in paths:
        kept = Kept(run.atoms(path.name), predictor.made_in_training(path))
        table, scores[path.name] = predictor.run(path, "validation", kept)
        table.to_parquet(folder / f"{path.name}.parquet", index=False)
        shown = " ".join(f"{name} {value:.4f}" for name, value in scores[path.name].items())
        say(f"{path.name}: {shown}")
    return scores


if __name__ == "__main__":
    run_stage(main, collect_rarely=True)
