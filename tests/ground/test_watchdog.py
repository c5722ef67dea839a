"""A process in which nothing happens ends, with what it was at written down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.project import ROOT

SCRIPT = """
import json, sys, time
from pathlib import Path
from stages.ground import watchdog

def waits_for_ever():
    while True:
        time.sleep(0.1)

def log(event, **values):
    Path(sys.argv[1]).write_text(json.dumps({"event": event, **values}))

with watchdog.watch(1.0, log):
    print("ready", flush=True)
    for _ in range(int(sys.argv[2])):
        time.sleep(0.3)
        watchdog.sign_of_life()
    if sys.argv[3] == "hangs":
        waits_for_ever()
print("done")
"""


def run(place: Path, signs: int, then: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(place), str(signs), then],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("signs", [0, 6])
def test_process_that_hangs_ends_with_75_and_its_stacks_in_the_log(tmp_path: Path, signs: int) -> None:
    process = run(tmp_path / "log", signs, "hangs")
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 75
    assert "no step, atom or save for" in errors and "run the same command again" in errors
    logged = json.loads((tmp_path / "log").read_text())
    assert logged["event"] == "hang"
    assert "waits_for_ever" in logged["stacks"]["MainThread"]


def test_process_that_hangs_where_nobody_reads_what_it_says_ends_too(tmp_path: Path) -> None:
    script = SCRIPT.replace("        time.sleep(0.1)", "        sys.stderr.write('x' * 10000)")
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "log"), "0", "hangs"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.wait(30) == 75


def test_process_that_is_slow_but_works_goes_on(tmp_path: Path) -> None:
    process = run(tmp_path / "log", 8, "ends")
    assert process.communicate(timeout=20)[0] == "done\n"
    assert process.returncode == 0


def test_time_in_which_the_process_is_stopped_does_not_count(tmp_path: Path) -> None:
    process = run(tmp_path / "log", 4, "ends")
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(3)
    os.kill(process.pid, signal.SIGCONT)
    assert process.communicate(timeout=20)[0] == "done\n"
