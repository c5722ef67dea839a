"""What a run comes to: sealed when it is done, and all that publishing needs beside the models it names."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pydantic

from stages.ground import disk
from stages.ground.places import PLOTS
from stages.keeping.folder import RunFolder
from stages.keeping.sealed import DamagedError
from stages.run.candidates import Candidates
from stages.run.state import Candidate, TrainState

RECORD, CANDIDATES = "train.json", "candidates.json"
_CANDIDATES = pydantic.TypeAdapter(list[Candidate])
_RECORD = pydantic.TypeAdapter(dict[str, bool | int | float])


@dataclass(frozen=True)
class Result:
    """`record`: metrics/train.json; `candidates`, best first; `tables`: the files of plots/ by name."""

    record: dict[str, Any]
    candidates: list[Candidate]
    tables: dict[str, str]

    @classmethod
    def of(cls, state: TrainState) -> Result:
        """That of a run which is complete."""
        progress = state.progress
        record = {
            "steps": progress.step,
            "epochs": state.epoch,
            "stopped_early": progress.stop_reason is not None,
            "best_step": progress.candidates[0].step,
            "train_loss": progress.total_loss / progress.step,
            "environments": progress.environments,
        }
        return cls(
            record, progress.candidates, {f"{name}.tsv": table.text() for name, table in state.histories.items()}
        )

    def write(self, run: RunFolder) -> None:
        """Seal it: the run is finished from here on. Raises SaveError."""

        def fill(folder: Path) -> None:
            (folder / RECORD).write_text(disk.dumps(self.record), encoding="utf-8")
            (folder / CANDIDATES).write_text(disk.dumps([asdict(each) for each in self.candidates]), encoding="utf-8")
            for name, text in self.tables.items():
                (folder / name).write_text(text, encoding="utf-8")

        run.store.begin(run.result, sum(map(len, self.tables.values())))
        run.store.put(run.result, fill)
        run.store.commit(run.result)

    @classmethod
    def read(cls, run: RunFolder) -> Result:
        """That of a finished run. Raises DamagedError."""
        files = {name: part.path for name, part in run.store.read(run.result).items()}
        try:
            candidates = _CANDIDATES.validate_json(files.pop(CANDIDATES).read_bytes(), strict=True)
            record = _RECORD.validate_json(files.pop(RECORD).read_bytes(), strict=True)
            record["steps"], record["best_step"]
            tables = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        except (OSError, ValueError, KeyError, RecursionError) as error:
            raise DamagedError(f"the result is unreadable ({type(error).__name__})") from None
        return cls(record, candidates, tables)

    def publish(self, candidates: Candidates, models: Path, record: Path) -> None:
        """Write the stage's outs. Metrics and plots come last, each whole or not at all.

        Raises:
            DamagedError: a candidate is not what it was.
        """
        candidates.copy_to(models, self.candidates)
        PLOTS.mkdir(exist_ok=True)
        for name, text in self.tables.items():
            disk.write_text(PLOTS / name, text)
        disk.write_text(record, disk.dumps(self.record))
