"""The entry point for people: `python -m stages repro [dvc's own arguments]`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def repro(arguments: list[str]) -> None:
    """Become `dvc repro`, with this Python first on PATH, as dvc.yaml says `python`."""
    bin_folder = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": os.pathsep.join([bin_folder, os.environ.get("PATH", "")]),
        # DVC's own order of sets decides nothing of ours, but a fixed one leaves nothing to wonder about.
        "PYTHONHASHSEED": "0",
    }
    os.execve(sys.executable, [sys.executable, "-m", "dvc", "repro", *arguments], environment)


def main() -> None:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(prog="python -m stages", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("repro", help="run what has changed (further arguments go to dvc repro)", add_help=False)
    known, rest = parser.parse_known_args()
    if known.command == "repro":
        repro(rest)


if __name__ == "__main__":
    main()
