"""The recipe for SLURM, in a SLURM of one node; left out where Debian's slurm-wlm and munge are not installed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.project import Checkout
from tests.support.schedulers import count_lines, write_fake_project
from tests.support.slurm import CannotStart, Slurm
from tests.support.train_stage import SAVES

SMALL = ("--cpus-per-task=1",)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        try:
            cluster.start()
        except CannotStart as error:
            pytest.skip(str(error))
        yield cluster
    finally:
        cluster.stop()


def write_project(folder: Path, **work: Any) -> Path:
    """A project with the environment that the script activates."""
    write_fake_project(folder, **work)
    activate(folder)
    return folder


def activate(folder: Path) -> None:
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n')


def await_(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def await_units(project: Path, units: int) -> None:
    progress = project / "runs/progress"
    await_(lambda: progress.exists() and int(progress.read_text()) >= units)


def starts(project: Path) -> int:
    return count_lines(project / "runs/starts")


def test_jobs_end_as_their_codes_say(slurm: Slurm, tiny_model: Path, tmp_path: Path) -> None:
    """All at once, as one of them waits for SLURM's clock, which ticks every 30 seconds, and one is the pipeline."""
    pipeline = Checkout(tmp_path / "pipeline", tiny_model, {"train": SAVES})
    activate(pipeline.folder)
    trained = slurm.submit(pipeline.folder, *SMALL)
    long = write_project(tmp_path / "long", units=1000, seconds=0.05)
    wrong = write_project(tmp_path / "wrong", code=2)
    stuck = write_project(tmp_path / "stuck", stuck=True, dies=True)
    cancelled = write_project(tmp_path / "cancelled", units=10000, seconds=0.05, save_seconds=2)
    limited = slurm.submit(long, *SMALL, "--time=1", "--signal=USR1@30")
    tried = slurm.submit(wrong, *SMALL)
    killed = slurm.submit(stuck, *SMALL)
    ended = slurm.submit(cancelled, *SMALL)

    # 2: one start.
    job = slurm.await_job(tried, JobState="FAILED")
    assert (job["ExitCode"], job["Restarts"], starts(wrong)) == ("2:0", "0", 1)

    # The user ends it: what was done is saved, and it stays ended.
    slurm.await_job(ended, JobState="RUNNING")
    await_units(cancelled, 1)
    slurm.run("scancel", ended)
    job = slurm.await_job(ended, JobState="CANCELLED")
    assert job["Restarts"] == "0"
    assert (cancelled / "runs/codes").read_text() == "75\n"

    # Killed in every start, and nothing done: 1, once three starts in a row were in vain.
    job = slurm.await_job(killed, JobState="FAILED")
    assert (job["ExitCode"], job["Restarts"], starts(stuck)) == ("1:0", "3", 4)

    # What --signal does, to all processes of the step: repro, DVC, the stage and its workers.
    await_(lambda: any(pipeline.folder.glob("runs/*/checkpoints/step-*")))
    slurm.run("scancel", "--signal=USR1", trained)

    # Before the limit: saved, into the queue again, and done in the end.
    slurm.await_job(limited, Restarts="1")
    (long / "work.json").write_text('{"units": 1, "seconds": 0, "minutes": 0}')
    job = slurm.await_job(limited, JobState="COMPLETED")
    assert (job["ExitCode"], job["Restarts"], starts(long)) == ("0:0", "1", 2)
    log = (long / f"holdfast-{limited}.log").read_text()
    for line in (f"start 1 of job {limited}", "repro ended with 75", f"start 2 of job {limited}", "repro ended with 0"):
        assert line in log
    assert slurm.job(ended)["JobState"] == "CANCELLED" and starts(cancelled) == 1

    job = slurm.await_job(trained, JobState="COMPLETED")
    assert (job["ExitCode"], job["Restarts"]) == ("0:0", "1")
    assert (pipeline.folder / "models/best/model.safetensors").exists()


def test_what_takes_its_node_gives_it_back(slurm: Slurm, tmp_path: Path) -> None:
    project = write_project(tmp_path / "project", units=200, seconds=0.05)
    whole_node = "--cpus-per-task=8"
    number = slurm.submit(project, whole_node)
    await_units(project, 1)

    # A job that matters more: SIGTERM, and the time to save that the partition grants.
    slurm.run("sbatch", "--partition=urgent", whole_node, "--output=/dev/null", "--wrap=true")
    slurm.await_job(number, Restarts="1", JobState="RUNNING")
    assert (project / "runs/codes").read_text() == "75\n"

    # A node that fails: no word from anybody.
    await_units(project, 1 + int((project / "runs/progress").read_text()))
    slurm.run("scontrol", "update", f"NodeName={slurm.host}", "State=DOWN", "Reason=test")
    slurm.await_job(number, JobState="PENDING")
    slurm.run("scontrol", "update", f"NodeName={slurm.host}", "State=RESUME")
    job = slurm.await_job(number, JobState="COMPLETED")
    assert (job["Restarts"], starts(project)) == ("2", 3)
