"""The entry point for people.

python -m stages repro [--fresh] [...]   mend what a kill left, then become `dvc repro [...]`
python -m stages runs                    list the runs in runs/: stage, how far, how it ended or who has it
python -m stages runs --prune [RUN ...]  remove these runs, or all finished ones but the newest
"""

from __future__ import annotations

import argparse
import os
import sys
from datetime import datetime
from pathlib import Path

from stages.ground.errors import UserError, one_line, run_stage, say
from stages.ground.signals import PARENT_PID


def repro(arguments: list[str], fresh: bool) -> None:
    """Become `dvc repro`, with this Python first on PATH, as dvc.yaml says `python`."""
    from stages.config.pipeline import require_rows
    from stages.config.read import PARAMS_FILE, load_params
    from stages.healing import heal, require_names

    require_names()
    for line in heal():
        say(f"mended: {line}")
    if Path(PARAMS_FILE).is_file():
        require_rows(Path(load_params().data.path))  # DVC reads it before any stage can refuse it
    if fresh:
        drop_matching_runs()
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONHASHSEED": "0",
        PARENT_PID: str(os.getpid()),
    }
    os.execve(sys.executable, [sys.executable, "-m", "dvc", "repro", *arguments], environment)


def drop_matching_runs() -> None:
    """Remove the state of the runs, one a stage, that the files and parameters as they are now would continue."""
    from stages.config.pipeline import load_stage, read_stages
    from stages.keeping.folder import RunFolder
    from stages.keeping.identity import identify

    for name in read_stages():
        try:
            run = RunFolder.of(identify(load_stage(name)))
        except UserError as error:
            say(f"--fresh: no run of {name} to drop ({error})")
            continue
        if run.path.exists():
            run.remove()
            say(f"--fresh: dropped run {run.id} of {name}")


def list_all() -> None:
    """List the runs, newest first."""
    from rich.console import Console
    from rich.table import Table

    from stages.keeping.folder import list_runs, version_of
    from stages.keeping.pruning import left_by_a_prune
    from stages.keeping.sealed import FORMAT

    table = Table("run", "stage", "state", "done")
    table.add_column("newest checkpoint", no_wrap=True, min_width=35)  # to be copied
    for name in ("last started", "size"):
        table.add_column(name, no_wrap=True)
    for run in list_runs():
        known = run.format == FORMAT
        unread = "unreadable" if run.format is None else f"format {run.format}: {version_of(run.format)}"
        table.add_row(
            one_line(run.id),
            one_line(run.stage),
            one_line(run.state if known else unread),
            run.done if known else "",
            run.newest_reference() if known else "",
            datetime.fromtimestamp(run.used).isoformat(" ", "seconds"),
            f"{run.bytes / 1e6:.0f} MB",
        )
    for rest in left_by_a_prune():
        why = "removed in part: runs --prune clears it"
        table.add_row(one_line(rest.id), rest.stage, why, "", "", "", f"{rest.bytes / 1e6:.0f} MB")
    # What is in a folder is shown as it is, never followed.
    Console(width=max(Console().width, 140), markup=False, emoji=False).print(table)


def prune_runs(ids: list[str]) -> None:
    """Remove the runs of these `ids`, or if there are none all finished ones but the newest."""
    from stages.keeping.pruning import prune, removable, runs_named

    runs = list(runs_named(ids)) if ids else removable()[:-1]

    def tell(line: str) -> None:
        print(one_line(line), flush=True)

    for run in runs:
        state = "finished" if run.finished else "not finished"
        tell(f"to be removed: run {run.id}, {state}, {run.bytes / 1e6:.0f} MB")
    prune(runs, tell, unfinished=bool(ids))


def main() -> None:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m stages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    parser_repro = commands.add_parser("repro", help="run what has changed; other arguments go to dvc repro")
    parser_repro.add_argument("--fresh", action="store_true", help="drop the matching runs' state first")
    parser_runs = commands.add_parser("runs", help="list the runs")
    parser_runs.add_argument(
        "--prune", nargs="*", metavar="RUN", help="remove these runs, or all finished ones but the newest"
    )
    known, rest = parser.parse_known_args()
    if known.command == "repro":
        repro(rest, known.fresh)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    elif known.prune is None:
        list_all()
    else:
        prune_runs(known.prune)


if __name__ == "__main__":
    run_stage(main)
