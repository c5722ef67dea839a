"""A storm of kills over real `dvc repro` runs, compared with a run that was left alone.

`python tools/storm.py --kills 100 --seed 0` clones the repository it is run in, twice, with private caches and run
folders: one clone runs undisturbed; the other is killed at random times, in whole or in part, and simply run again.
When it completes before the kills are used up, it is compared and begins again from a fresh clone.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

OUTS = ("data/tokenized", "data/loaders", "data/predictions", "models", "metrics", "plots", "report.html", "dvc.lock")
# Who is killed, and how: (weight, name, signal). `group` is everything, as when a machine goes.
VICTIMS = (
    (6, "group", signal.SIGKILL),
    (2, "dvc", signal.SIGKILL),
    (1, "stage", signal.SIGKILL),
    (1, "repro", signal.SIGKILL),
    (1, "repro", signal.SIGTERM),
    (1, "dvc", signal.SIGTERM),
    (1, "group", signal.SIGTERM),
    (1, "group", signal.SIGINT),
)
STAGES = ("tokenize", "build_loaders", "train", "evaluate", "select_best")
FAILED_STARTS_IN_A_ROW = 5


@dataclass
class Report:
    """What a storm did."""

    kills: dict[str, int] = field(default_factory=dict)
    in_stage: dict[str, int] = field(default_factory=dict)
    failed_starts: list[str] = field(default_factory=list)
    manual_repairs: int = 0
    completed: int = 0
    equal: int = 0
    resumed: int = 0
    seconds: float = 0.0
    lost: list[float] = field(default_factory=list)

    @property
    def total_kills(self) -> int:
        return sum(self.kills.values())


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of the outs and of dvc.lock, by path."""
    found: dict[str, str] = {}
    for name in OUTS:
        path = folder / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and file.name != ".gitignore":
                found[str(file.relative_to(folder))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def start(folder: Path, env: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """`python -m stages repro` in a session of its own."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "stages", "repro"],
            cwd=folder,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def children(pid: int) -> list[int]:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(pid).children()]
    return []


def strike(process: subprocess.Popen[bytes], victim: str, number: signal.Signals) -> None:
    """Signal one victim of a run, and see the run to its end."""
    with contextlib.suppress(ProcessLookupError):
        if victim == "group":
            os.killpg(process.pid, number)
        else:
            pids = [process.pid]
            for _ in range(("repro", "dvc", "stage").index(victim)):
                pids = [child for pid in pids for child in children(pid)]
            for pid in pids:
                os.kill(pid, number)
    # A stage whose DVC was killed is told by that, and may still be saving: left to it.
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end_orphans(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def stage_in(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("Running stage")]
    return lines[-1].split("'")[1] if lines else "none"


def wait_for_stage(process: subprocess.Popen[bytes], log: Path, stage: str) -> None:
    """Return when `stage` or a later one runs, or the process has ended."""
    while process.poll() is None and (stage_in(log) not in STAGES or STAGES.index(stage_in(log)) < STAGES.index(stage)):
        time.sleep(0.05)


def wait_for_train(process: subprocess.Popen[bytes], log: Path, folder: Path) -> None:
    """Return when train goes on and has something to go on from, or the process has ended."""
    while process.poll() is None and not (
        re.search(r"^run \w+: .* steps? ", log.read_text(errors="replace"), re.M)
        and any(folder.glob("runs/*/checkpoints/step-*"))
    ):
        time.sleep(0.05)


def measure(process: subprocess.Popen[bytes], log: Path) -> dict[str, float]:
    """See a run to its end; the seconds of each stage."""
    begins: dict[str, float] = {}
    while process.poll() is None:
        begins.setdefault(stage_in(log), time.monotonic())
        time.sleep(0.05)
    begins["end"] = time.monotonic()
    times = list(begins.items())[1:]  # before the first stage is DVC
    return {stage: end - begin for (stage, begin), (_, end) in itertools.pairwise(times)}


def last_kept(folder: Path) -> float:
    """When a stage last kept something of its work, in seconds since the epoch; 0 if none did."""
    times = [0.0]
    for pattern in ("runs/*/checkpoints/step-*", "runs/*/atoms/*", "dvc.lock"):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                times.append(path.stat().st_mtime)
    return max(times)


def starts_with_steps(folder: Path) -> int:
    """How often train went on from a step after the first."""
    count = 0
    for path in folder.glob("runs/*/log.jsonl"):  # of other stages no step is logged
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                count += event.get("event") == "start" and event.get("step", 0) > 0
    return count


def weather(
    folder: Path,
    env: dict[str, str],
    expected: dict[str, str],
    report: Report,
    kills: int,
    generator: random.Random,
    seconds: dict[str, float],
    longest: float,
) -> None:
    """Kill runs in `folder` at random times until one completes; then compare.

    A kill comes in a stage that is drawn by its share of all `seconds`, up to `longest` seconds after its start, or in
    the first one that runs if that stage is done. After `kills` kills in all, the next run is left alone.
    """
    failed_in_a_row, last = 0, None
    while True:
        log = folder.parent / "storm.log"
        process, begin = start(folder, env, log), time.time()
        if report.total_kills < kills:
            (stage,) = generator.choices(list(seconds), list(seconds.values()))
            delay = generator.uniform(0.2, min(longest, seconds[stage]))
            wait_for_stage(process, log, stage)
            if stage == "train" and generator.random() < 0.5:  # however slow the machine is, it gets somewhere
                wait_for_train(process, log, folder)
                delay /= 5
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=delay)
        else:
            process.wait()
        if process.poll() is None:
            report.lost.append(time.time() - max(begin, last_kept(folder)))
            load = os.getloadavg()[0]
            _, victim, number = generator.choices(VICTIMS, [weight for weight, *_ in VICTIMS])[0]
            strike(process, victim, number)
            name = f"{number.name} to {victim}"
            report.kills[name] = report.kills.get(name, 0) + 1
            stage = stage_in(log)
            report.in_stage[stage] = report.in_stage.get(stage, 0) + 1
            print(
                f"kill {report.total_kills}: {name} in {stage}, {report.lost[-1]:.1f} s lost, load {load:.1f}",
                flush=True,
            )
            failed_in_a_row, last = 0, process
        elif process.returncode == 0:
            break
        else:
            line = log.read_text(errors="replace").strip().splitlines()[-1:]
            report.failed_starts.append(line[0] if line else "no output")
            failed_in_a_row += 1
            if failed_in_a_row >= FAILED_STARTS_IN_A_ROW:
                report.manual_repairs += 1
                raise SystemExit(f"it does not start again by itself:\n{log.read_text(errors='replace')}")
            time.sleep(1)
    if last is not None:
        end_orphans(last)
    report.completed += 1
    report.resumed += starts_with_steps(folder)
    report.equal += digests(folder) == expected


def clone(target: Path) -> Path:
    subprocess.run(["git", "clone", "--quiet", ".", str(target)], check=True)
    # What is committed of an earlier run would make the comparison empty.
    for name in OUTS:
        path = target / name
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)
    return target


def main() -> None:
    """Run a storm over the pipeline as it is committed, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=25.0, help="seconds until the latest kill of a start")
    arguments = parser.parse_args()
    generator, report = random.Random(arguments.seed), Report()
    with tempfile.TemporaryDirectory(prefix="storm-") as place:
        root = Path(place)
        env = {**os.environ, "DVC_SITE_CACHE_DIR": str(root / "site"), "DVC_NO_ANALYTICS": "1"}
        env.pop("HOLDFAST_RUNS", None)
        reference = clone(root / "reference")
        begin = time.monotonic()
        process = start(reference, env, root / "reference.log")
        seconds = measure(process, root / "reference.log")
        if process.returncode:
            raise SystemExit((root / "reference.log").read_text())
        undisturbed = time.monotonic() - begin
        expected = digests(reference)
        shown = ", ".join(f"{stage} {value:.0f}" for stage, value in seconds.items())
        print(f"reference: {undisturbed:.0f} s ({shown}), dvc.lock {expected['dvc.lock'][:16]}", flush=True)
        begin = time.monotonic()
        while report.total_kills < arguments.kills:
            folder = clone(root / "killed")
            weather(folder, env, expected, report, arguments.kills, generator, seconds, arguments.longest)
            print(f"{report.total_kills} kills, {report.completed} completed, {report.equal} equal", flush=True)
            shutil.rmtree(folder)
        report.seconds = time.monotonic() - begin
    lost = report.seconds - report.completed * undisturbed
    print(f"kills survived: {report.total_kills} (seed {arguments.seed}): {report.kills}")
    print(f"killed in stage: {report.in_stage}")
    print(f"manual repairs: {report.manual_repairs}; starts refused and simply repeated: {report.failed_starts}")
    print(
        f"runs completed: {report.completed}, equal in every byte: {report.equal}; train went on {report.resumed} times"
    )
    kept = sorted(report.lost)
    p50, p99 = kept[len(kept) // 2], kept[min(len(kept) - 1, int(len(kept) * 0.99))]
    print(f"from the last thing kept, or the start, to the kill: p50 {p50:.1f} s, p99 {p99:.1f} s")
    print(f"time lost: {lost:.0f} s in all, {lost / report.total_kills:.1f} s a kill")
    sys.exit(report.equal != report.completed)


if __name__ == "__main__":
    main()
