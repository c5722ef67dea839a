"""tokenize and build_loaders, killed as real processes, go on where they were, with the bytes of a run that was not."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.support.fork_server import Forked, fork_server
from tests.support.project import Checkout

OUTS = ("data/tokenized", "metrics/data.json")
PLANS = ("data/loaders", "metrics/loaders.json")
IS_LAST = 'def _is_last(self, number): return "-test-" in self.atoms.scope and number == self.cut.shards - 1'


def edit(checkout: Checkout, name: str, old: str, new: str) -> None:
    path = checkout.folder / name
    text = path.read_text()
    assert old in text, (name, old)
    path.write_text(text.replace(old, new, 1))


@pytest.fixture(scope="module")
def small(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout whose train split is some 20 shards, each of whose epochs is an atom; both stages have run."""
    checkout = Checkout(tmp_path_factory.mktemp("small") / "checkout", tiny_model, {"train": {"num_train_epochs": 8}})
    edit(checkout, "stages/data/shards.py", "SHARD_BYTES = 1_500_000", "SHARD_BYTES = 120")
    edit(checkout, "stages/data/shards.py", "BATCH_ROWS = 1_000", "BATCH_ROWS = 3")
    edit(checkout, "stages/keeping/atoms.py", "SECONDS = 1.0", "SECONDS = 0.0")
    for stage in ("tokenize", "build_loaders"):
        process = fork_server().start(checkout.folder, f"stages.{stage}")
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    assert len(atoms(checkout, "encode-train")) > 15 and len(atoms(checkout, "plan")) == 8
    return checkout


def atoms(checkout: Checkout, scope: str) -> dict[str, int]:
    """The atoms of a scope that are whole, and when each was made: what is made again was made later. Pieces of a shard
    go with it."""
    return {
        path.parent.name: path.stat().st_mtime_ns
        for path in checkout.folder.glob(f"runs/*/atoms/{scope}*/manifest.json")
        if not path.parent.name.startswith(".") and "-of-" not in path.parent.name
    }


def copy(checkout: Checkout, folder: Path, *kept: str) -> Checkout:
    """The checkout as it was before both stages, but for the outs `kept`."""
    ignored = {"runs", "metrics", "tokenized", "loaders"} - set(kept)
    return checkout.copy(folder, *ignored)


def run(checkout: Checkout, stage: str, point: str | None = None, code: int = 0) -> str:
    process = fork_server().start(checkout.folder, f"stages.{stage}", point)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    return output


@pytest.mark.parametrize(
    "point",
    [
        r"on:/\.read-train-[^/]*\.tmp",  # about to keep the file that was read
        r"on:/\.read-validation-[^/]*\.tmp",
        r"on:/\.encode-train-[^/]*00000000\.tmp",
        r"on:/\.encode-train-[^/]*00000009\.tmp",
        r"past:/\.encode-train-[^/]*00000009\.tmp/manifest",
        r"on:/\.encode-test-[^/]*00000001\.tmp",
        r"on:data/\.tokenized\.tmp/raw/validation/data",  # about to publish
        r"on:metrics/\.data\.json\.tmp",
        r"on:/result/\.final\.tmp",
    ],
)
def test_killed_tokenize_makes_no_shard_again(small: Checkout, tmp_path: Path, point: str) -> None:
    checkout = copy(small, tmp_path / "killed")
    checkout.set_params({"train": {"num_train_epochs": 8}, "tokenize": {"max_length": 24, "num_proc": 1}})
    run(checkout, "tokenize", point, code=-signal.SIGKILL)
    before = atoms(checkout, "encode-") | atoms(checkout, "read-")
    run(checkout, "tokenize")
    assert checkout.digests(*OUTS) == small.digests(*OUTS)
    after = atoms(checkout, "encode-") | atoms(checkout, "read-")
    assert before.items() <= after.items()
    assert after.keys() == {*atoms(small, "encode-"), *atoms(small, "read-")} or "encode" in point


def slow(small: Checkout, tmp_path: Path, processes: int) -> Checkout:
    """One whose shards take $SLOW seconds each."""
    checkout = copy(small, tmp_path / "killed")
    wait = "time.sleep(float(os.environ.get('SLOW', 0)))"
    edit(checkout, "stages/data/shards.py", "encoded = encoded.select", f"{wait}; encoded = encoded.select")
    edit(checkout, "stages/data/shards.py", "import sys\n", "import sys\nimport time\n")
    checkout.set_params({"train": {"num_train_epochs": 8}, "tokenize": {"max_length": 24, "num_proc": processes}})
    return checkout


def start_slowly(checkout: Checkout) -> Forked:
    return fork_server().start(checkout.folder, "stages.tokenize", SLOW="0.2")


def wait_for(checkout: Checkout, process: Forked, count: int) -> None:
    begin = time.monotonic()
    while len(atoms(checkout, "encode-")) < count:
        assert process.poll() is None and time.monotonic() - begin < 60
        time.sleep(0.02)


@pytest.mark.parametrize("processes", [1, 2])
def test_tokenize_that_is_killed_again_and_again_ends(small: Checkout, tmp_path: Path, processes: int) -> None:
    checkout = slow(small, tmp_path, processes)
    for starts in range(1, 30):
        before = atoms(checkout, "encode-")
        if starts > 4:
            run(checkout, "tokenize")
            break
        process = start_slowly(checkout)
        wait_for(checkout, process, len(before) + 2)
        children = psutil.Process(process.pid).children()
        assert len(children) == (processes if processes > 1 else 0)
        process.kill()
        process.wait(10)
        assert not psutil.wait_procs(children, timeout=5)[1], "a process outlived the one that it worked for"
        assert before.items() < atoms(checkout, "encode-").items()
    assert checkout.digests(*OUTS) == small.digests(*OUTS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("group", [True, False])
def test_signal_ends_all_processes_at_once(
    small: Checkout, tmp_path: Path, number: signal.Signals, group: bool
) -> None:
    checkout = slow(small, tmp_path, 2)
    process = start_slowly(checkout)
    wait_for(checkout, process, 2)
    children = psutil.Process(process.pid).children()
    process.send_signal(number, group)
    assert process.wait(10) != 0
    assert not psutil.wait_procs(children, timeout=5)[1]
    before = atoms(checkout, "encode-")
    run(checkout, "tokenize")
    assert before.items() < atoms(checkout, "encode-").items()
    assert checkout.digests(*OUTS) == small.digests(*OUTS)


def test_killed_worker_ends_tokenize_in_one_line_within_seconds(small: Checkout, tmp_path: Path) -> None:
    checkout = slow(small, tmp_path, 2)
    process = start_slowly(checkout)
    wait_for(checkout, process, 3)
    first, second = psutil.Process(process.pid).children()
    begin = time.monotonic()
    first.kill()
    output, _ = process.communicate(timeout=30)
    assert time.monotonic() - begin < 5
    assert process.returncode == 75 and not second.is_running()
    (line,) = re.findall("^error: .*", output, re.MULTILINE)
    assert line.startswith("error: a process that encodes rows (tokenize.num_proc, 2 of them) was killed, as happens")
    assert output.endswith(f"{line}\n") and "Traceback" not in output
    before = atoms(checkout, "encode-")
    run(checkout, "tokenize")
    assert before.items() < atoms(checkout, "encode-").items()
    assert checkout.digests(*OUTS) == small.digests(*OUTS)


def test_killed_worker_that_waits_for_work_leaves_none_that_waits_for_it(small: Checkout, tmp_path: Path) -> None:
    # It has the lock of the queue, which nobody gives back.
    checkout = copy(small, tmp_path / "killed")
    edit(checkout, "stages/data/shards.py", "raw(raw_rows(", "time.sleep(4 * self._is_last(number)) or raw(raw_rows(")
    edit(checkout, "stages/data/shards.py", "    def _fill(", f"    {IS_LAST}\n\n    def _fill(")
    edit(checkout, "stages/data/shards.py", "import sys\n", "import sys\nimport time\n")
    checkout.set_params({"train": {"num_train_epochs": 8}, "tokenize": {"max_length": 24, "num_proc": 2}})
    process = fork_server().start(checkout.folder, "stages.tokenize")
    wait_for(checkout, process, len(atoms(small, "encode-")) - 1)
    workers = psutil.Process(process.pid).children()
    waiting = workers
    while len(waiting) != 1:
        assert process.poll() is None
        waiting = [worker for worker in workers if not any(".tmp/raw" in file.path for file in worker.open_files())]
    waiting[0].kill()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and "was killed, as happens" in output
    run(checkout, "tokenize")
    assert checkout.digests(*OUTS) == small.digests(*OUTS)


def test_second_start_waits_for_no_orphan_and_says_who_is_at_it(small: Checkout, tmp_path: Path) -> None:
    checkout = slow(small, tmp_path, 2)
    process = start_slowly(checkout)
    wait_for(checkout, process, 1)
    output = run(checkout, "tokenize", code=75)
    assert f"stage tokenize of this workspace is being worked on by process {process.pid}" in output
    process.kill()
    process.wait(10)
    run(checkout, "tokenize")
    assert checkout.digests(*OUTS) == small.digests(*OUTS)


# ---- build_loaders


@pytest.mark.parametrize(
    "point",
    [
        r"on:/\.plan\.[^/]*00000000\.tmp",
        r"on:/\.plan\.[^/]*00000003\.tmp",
        r"past:/\.plan\.[^/]*00000005\.tmp/manifest",
        r"on:data/\.loaders\.tmp/\.preview",
        r"on:metrics/\.loaders",
    ],
)
def test_killed_build_loaders_makes_no_epoch_again(small: Checkout, tmp_path: Path, point: str) -> None:
    checkout = copy(small, tmp_path / "killed", "tokenized")
    run(checkout, "build_loaders", point, code=-signal.SIGKILL)
    before = atoms(checkout, "plan")
    number = re.search("0000000([0-9])", point)
    assert len(before) == (int(number[1]) if number else 8)
    run(checkout, "build_loaders")
    assert checkout.digests(*PLANS) == small.digests(*PLANS)
    assert before.items() <= atoms(checkout, "plan").items()


def test_damaged_epochs_are_made_again_with_a_line_and_no_others(small: Checkout, tmp_path: Path) -> None:
    checkout = copy(small, tmp_path / "killed", "tokenized")
    run(checkout, "build_loaders", r"on:/\.plan\.[^/]*00000007\.tmp", code=-signal.SIGKILL)
    before = atoms(checkout, "plan")
    (file,) = checkout.folder.glob("runs/*/atoms/plan.*.00000002/epoch-0002.arrow")
    content = bytearray(file.read_bytes())
    content[200] ^= 1
    file.write_bytes(content)
    assert "is damaged and is computed again" in run(checkout, "build_loaders")
    assert checkout.digests(*PLANS) == small.digests(*PLANS)
    after = atoms(checkout, "plan")
    assert {name[-1] for name in after if before.get(name) != after[name]} == {"2", "7"}


def test_half_a_plan_needs_room_for_the_other_half_alone(small: Checkout, tmp_path: Path) -> None:
    half, none = copy(small, tmp_path / "half", "tokenized"), copy(small, tmp_path / "none", "tokenized")
    run(half, "build_loaders", r"on:/\.plan\.[^/]*00000005\.tmp", code=-signal.SIGKILL)
    (tmp_path / "sitecustomize.py").write_text(
        "import os, types\n"
        "disk = types.SimpleNamespace(f_bavail=2**40, f_frsize=1, f_favail=4, f_files=10**9)\n"
        "os.statvfs = lambda _: disk\n"
    )
    refused = none.run("python", "-m", "stages.build_loaders", code=2, PYTHONPATH=str(tmp_path))
    assert "asks for 8 epochs" in refused and "free and 4 files" in refused
    half.run("python", "-m", "stages.build_loaders", PYTHONPATH=str(tmp_path))
    assert half.digests(*PLANS) == small.digests(*PLANS)


def test_quick_epochs_are_one_atom_and_that_is_the_plan(small: Checkout, tmp_path: Path) -> None:
    checkout = copy(small, tmp_path / "quick", "tokenized")
    edit(checkout, "stages/keeping/atoms.py", "SECONDS = 0.0", "SECONDS = 60.0")
    run(checkout, "build_loaders")
    assert len(atoms(checkout, "plan")) == 1
    assert checkout.digests(*PLANS) == small.digests(*PLANS)
    plan = {path.stat().st_ino for path in checkout.folder.glob("data/loaders/*.arrow")}
    assert plan == {path.stat().st_ino for path in checkout.folder.glob("runs/*/atoms/plan.*/*.arrow")}
