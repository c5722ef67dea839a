"""The entry point for people.

python -m stages repro [...]             mend what a kill left, then run `dvc repro [...]`
python -m stages finish                  end the run at its next evaluation, with the best so far (train.stop_step)
python -m stages runs                    list the runs in runs/: stage, how far, how it ended or who has it
python -m stages runs --prune [RUN ...]  remove these runs, or all finished ones but the newest

Exit codes:
  0   done
  75  stopped, killed, or something that passes (a full disk, a lock that is held): run the same command again
  2   yours to mend: a parameter, the data, dvc.yaml, your code, a loss that diverged
  1   a fault of ours, please report it; or --until-done gave up
"""

from __future__ import annotations

import argparse
import re
from datetime import datetime

from stages.ground.errors import one_line, quote
from stages.ground.running import run_command


def seconds(text: str) -> float:
    """`3h55m`, in seconds. Raises ArgumentTypeError."""
    match = re.fullmatch("(?:([0-9]+)d)?(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+)s)?", text)
    numbers = [int(number or 0) for number in match.groups()] if match else []
    if not any(numbers):
        raise argparse.ArgumentTypeError(f"{quote(text)} is no time; write it as 3h55m, 45m or 90s")
    return float(sum(number * unit for number, unit in zip(numbers, (86400, 3600, 60, 1), strict=True)))


def list_all() -> None:
    """List the runs, newest first."""
    from rich.console import Console
    from rich.table import Table

    from stages.keeping.folder import list_runs, version_of
    from stages.keeping.pruning import left_by_a_prune
    from stages.keeping.sealed import FORMAT

    table = Table("run", "stage", "state", "done", "processes")
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
            one_line(run.processes),
            run.newest_reference() if known else "",
            datetime.fromtimestamp(run.used).isoformat(" ", "seconds"),
            f"{run.bytes / 1e6:.0f} MB",
        )
    for rest in left_by_a_prune():
        why = "removed in part: runs --prune clears it"
        table.add_row(one_line(rest.id), rest.stage, why, "", "", "", "", f"{rest.bytes / 1e6:.0f} MB")
    # What is in a folder is shown as it is, never followed.
    Console(width=max(Console().width, 160), markup=False, emoji=False).print(table)


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
    parser_repro = commands.add_parser(
        "repro",
        help="run what has changed; other arguments go to dvc repro",
        description=(__doc__ or "")[(__doc__ or "").index("Exit codes") :],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser_repro.add_argument("--fresh", action="store_true", help="drop the matching runs' state first")
    parser_repro.add_argument(
        "--stop-after", type=seconds, metavar="TIME", help="stop by itself after 3h55m, say, and end with 75"
    )
    parser_repro.add_argument(
        "--until-done", action="store_true", help="start again after 75, unless told to stop, while starts get further"
    )
    commands.add_parser("finish", help="end the run at its next evaluation: write train.stop_step into params.yaml")
    parser_runs = commands.add_parser("runs", help="list the runs")
    parser_runs.add_argument(
        "--prune", nargs="*", metavar="RUN", help="remove these runs, or all finished ones but the newest"
    )
    known, rest = parser.parse_known_args()
    if known.command == "repro":
        from stages.repro.command import repro

        repro(rest, fresh=known.fresh, stop_after=known.stop_after, until_done=known.until_done)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    elif known.command == "finish":
        from stages.repro.finish import finish

        finish()
    elif known.prune is None:
        list_all()
    else:
        prune_runs(known.prune)


if __name__ == "__main__":
    run_command(main)
