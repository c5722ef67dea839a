"""Stands in for `python -m stages repro` where a scheduler's rule is tested: its exit codes, without torch.

Its work is `work.json` in the current folder: `units` of it, each kept in runs/progress once it is done, `seconds` long
on the clock, and `minutes` long in what `--stop-after` and $LIMIT_MINUTES (when the machine is taken away) mean.
`code`: it ends with that at once. `stuck`: no unit is ever kept. `dies`: SIGKILL to itself after each unit. After
three starts in a row without a unit, killed ones too, the next ends with 1. Every start is a line in runs/starts, every
end with a code one in runs/codes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

STATE = Path(os.environ.get("HOLDFAST_RUNS", "runs"))
MINUTES = {"h": 60.0, "m": 1.0, "s": 1 / 60}
STARTS_WITHOUT_PROGRESS = 3


def main() -> int:
    work = json.loads(Path("work.json").read_text())
    STATE.mkdir(exist_ok=True)
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, lambda number, _: told.append(number))
    note("starts", " ".join(sys.argv[1:]))
    if "code" in work:
        return int(work["code"])
    if read("idle") >= STARTS_WITHOUT_PROGRESS:
        return 1
    write("idle", read("idle") + 1)
    stop_after = minutes(sys.argv[sys.argv.index("--stop-after") + 1]) if "--stop-after" in sys.argv else float("inf")
    limit = float(os.environ.get("LIMIT_MINUTES", "inf"))
    since = 0.0
    while read("progress") < work["units"]:
        if told:
            time.sleep(work.get("save_seconds", 0))
        if told or since + work["minutes"] > stop_after:
            return 75
        if since + work["minutes"] > limit:
            os.killpg(0, signal.SIGKILL)
        time.sleep(work["seconds"])
        since += work["minutes"]
        if not work.get("stuck"):
            write("progress", read("progress") + 1)
            write("idle", 0)
        if work.get("dies"):
            os.kill(os.getpid(), signal.SIGKILL)
    for name in ("dvc.lock", "report.html", "metrics/best.json", "models/best/model"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("done\n")
    return 0


def read(name: str) -> int:
    return int((STATE / name).read_text()) if (STATE / name).exists() else 0


def write(name: str, number: int) -> None:
    (STATE / f".{name}").write_text(str(number))
    (STATE / f".{name}").replace(STATE / name)


def note(name: str, line: str) -> None:
    with (STATE / name).open("a") as file:
        file.write(f"{line}\n")


def minutes(text: str) -> float:
    """`5h30m`, as `--stop-after` takes it."""
    total, number = 0.0, ""
    for letter in text:
        if letter in MINUTES:
            total, number = total + float(number) * MINUTES[letter], ""
        else:
            number += letter
    return total


if __name__ == "__main__":
    ending = main()
    note("codes", str(ending))
    sys.exit(ending)
