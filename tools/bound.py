"""How many starts a stage needs that is killed every few seconds, against what it may need.

`python tools/bound.py` makes small projects whose validation, evaluate and test prediction are slowed down to a minute,
and whose tokenize has 200,000 rows; kills each with SIGKILL every few seconds after its start, and starts it again.
Killed every T seconds, a stage may need ceil(work / (T - start - atom)) + 2 starts. `start` is what a start takes in
which nothing is left to do: imports, reading what was done, and publication. `launch` is train in two processes, whose
validation takes half as long.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.project import OUTS, WORDS, Checkout, make_tiny_model

ATOM = 1.0
SLOW_LOSS: dict[str, dict[str, Any]] = {
    "train": {"loss": "stages.custom.own:slow_to_evaluate", "class_weights": None, "num_train_epochs": 1},
    "evaluate": {"eval_batch_size": 1},
}


@dataclass(frozen=True)
class Case:
    """A stage whose work was measured: `start` and `work` in seconds, undisturbed."""

    stage: str
    start: float
    work: float

    def allowed(self, every: float) -> int:
        """The most starts, where a kill comes `every` seconds after each."""
        return math.ceil(self.work / (every - self.start - ATOM)) + 2


def run(checkout: Checkout, stage: str, env: dict[str, str], seconds: float | None = None) -> tuple[bool, float]:
    """Start `stage`, and after `seconds` kill it with all its processes; whether it ended by itself, and how long it
    ran."""
    begin = time.monotonic()
    process = checkout.start(sys.executable, "-m", f"stages.{stage}", real=True, **env)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return False, time.monotonic() - begin
    if process.returncode:
        raise RuntimeError(output)
    return True, time.monotonic() - begin


def measure(checkout: Checkout, stage: str, env: dict[str, str]) -> Case:
    """Run `stage` undisturbed, and once more with nothing left to do."""
    _, whole = run(checkout, stage, env)
    _, start = run(checkout, stage, env)
    return Case(stage, start, max(whole - start, 0.0))


def starts(checkout: Checkout, stage: str, env: dict[str, str], every: float, most: int) -> int:
    """How many starts `stage` needs that is killed `every` seconds after each. Raises RuntimeError at `most`."""
    for count in range(1, most + 1):
        if run(checkout, stage, env, every)[0]:
            return count
    raise RuntimeError(f"{stage} has not ended after {most} starts")


def compare(case: Case, undisturbed: Checkout, killed: Checkout, env: dict[str, str], beyond: float) -> str:
    """Kill `case.stage` so often that each start has `beyond` seconds of work; a line of the table."""
    every = case.start + beyond
    allowed = case.allowed(every)
    needed = starts(killed, case.stage, env, every, 3 * allowed)
    outs = [name for name in OUTS if name != "dvc.lock"]
    equal = killed.digests(*outs) == undisturbed.digests(*outs)
    return (
        f"{case.stage:12} work {case.work:6.1f} s  start {case.start:5.1f} s  T {every:5.1f} s  "
        f"starts {needed:3} of {allowed:3} allowed  {'equal' if equal else 'OTHER BYTES'}"
    )


def write_rows(path: Path, rows: int) -> None:
    """Pairs of random words, and a label."""
    generator = random.Random(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence1", "sentence2", "label"])
        for number in range(rows):
            first, second = (" ".join(generator.choices(WORDS, k=8)) for _ in range(2))
            writer.writerow([first, second, ("equivalent", "different")[number % 2]])


def main() -> None:
    """Measure all stages and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of work in each prediction")
    parser.add_argument("--rows", type=int, default=200_000, help="of tokenize")
    parser.add_argument("--beyond", type=float, default=4.0, help="seconds from a start's readiness to its kill")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bound-") as place:
        root = Path(place)
        base = Checkout(root / "base", make_tiny_model(root / "model"), SLOW_LOSS)
        slow = {"SECONDS": str(arguments.seconds / 20)}  # a validation has 20 rows, and so has the test split
        for stage in ("tokenize", "build_loaders", "launch", "train", "evaluate", "select_best"):
            env = slow if stage in ("launch", "train", "evaluate", "select_best") else {}
            undisturbed, killed = (base.copy(root / f"{name}-{stage}", ".git") for name in ("undisturbed", "killed"))
            if stage == "launch":  # train in two processes
                launcher = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node=2"
                for checkout in (undisturbed, killed):
                    checkout.set_params({**SLOW_LOSS, "train": {**SLOW_LOSS["train"], "launcher": launcher}})
            if stage == "tokenize":
                for checkout in (undisturbed, killed):
                    write_rows(checkout.folder / "data/sample/train.csv", arguments.rows)
            if stage == "evaluate":  # what train left is another's
                for checkout in (undisturbed, killed):
                    for atoms in checkout.folder.glob("runs/*/atoms/*"):
                        atoms.rename(checkout.folder / atoms.name)
            case = measure(undisturbed, stage, env)
            print(compare(case, undisturbed, killed, env, arguments.beyond), flush=True)
            if stage != "launch":
                run(base, stage, {})


if __name__ == "__main__":
    main()
