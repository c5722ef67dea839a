"""The entry point for people.

python -m stages repro [--fresh] [...]   mend what a kill left, then become `dvc repro [...]`
python -m stages runs [--prune]          list the runs in runs/, or remove those that are not needed
"""

from __future__ import annotations

import argparse
import os
import sys
from datetime import datetime
from pathlib import Path

from stages.config.errors import UserError, run_stage
from stages.run.signals import PARENT_PID


def repro(arguments: list[str], fresh: bool) -> None:
    """Become `dvc repro`, with this Python first on PATH, as dvc.yaml says `python`."""
    from stages.repository.healing import heal

    for line in heal():
        print(f"mended: {line}", file=sys.stderr, flush=True)
    if fresh:
        drop_matching_run()
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONHASHSEED": "0",
        PARENT_PID: str(os.getpid()),
    }
    os.execve(sys.executable, [sys.executable, "-m", "dvc", "repro", *arguments], environment)


def drop_matching_run() -> None:
    """Remove the state of the run that the files and parameters as they are now would continue."""
    from stages.config.params import load_params
    from stages.config.pipeline import load_stage
    from stages.modeling.source import resolve_model
    from stages.run.folder import RunFolder
    from stages.run.identity import identify
    from stages.storage import files

    model = load_params().model
    try:
        run = RunFolder.of(identify(load_stage("train"), resolve_model(model.source, model.revision)))
    except UserError as error:
        print(f"--fresh: no run to drop ({error})", file=sys.stderr, flush=True)
        return
    if run.path.exists():
        run.acquire()
        files.remove(run.path)
        print(f"--fresh: dropped run {run.id}", file=sys.stderr, flush=True)


def runs(prune: bool) -> None:
    """List the runs, newest first; with `prune`, keep the newest one only."""
    from rich.console import Console
    from rich.table import Table

    from stages.run.checkpoint import CheckpointStore
    from stages.run.folder import list_runs
    from stages.storage import files

    found = list_runs()
    if prune:
        for run in found[1:]:
            try:
                run.acquire()
                files.remove(run.path)
                print(f"removed {run.id}")
            except (UserError, OSError) as error:
                print(f"kept {run.id}: {error}")
        return
    table = Table("run", "state", "step", "last started", "size")
    for run in found:
        steps = CheckpointStore(run.checkpoints, run.id).steps()
        size = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
        table.add_row(
            run.id,
            "finished" if run.finished else "running" if run.held_by() else "stopped",
            str(steps[0] if steps else 0),
            datetime.fromtimestamp(run.used).isoformat(" ", "seconds"),
            f"{size / 1e6:.0f} MB",
        )
    Console().print(table)


def main() -> None:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m stages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    parser_repro = commands.add_parser("repro", help="run what has changed; other arguments go to dvc repro")
    parser_repro.add_argument("--fresh", action="store_true", help="drop the matching run's state first")
    parser_runs = commands.add_parser("runs", help="list the runs")
    parser_runs.add_argument("--prune", action="store_true", help="remove all runs but the newest")
    known, rest = parser.parse_known_args()
    if known.command == "repro":
        repro(rest, known.fresh)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    else:
        runs(known.prune)


if __name__ == "__main__":
    run_stage(main)
