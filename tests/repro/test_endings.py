"""How `repro` ends, whoever ends it: with a stage that does what a test says, under a real DVC."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stages.ground.words import Word
from stages.repro.supervisor import judge
from tests.support.fork_server import Forked
from tests.support.project import Checkout

STAGE = """
import os, signal, subprocess, sys, time
from pathlib import Path
from stages.ground.errors import Interrupted, TransientError, UserError
from stages.ground.running import run_stage
from stages.ground.signals import StopRequest, die_with_parent

def main():
    die_with_parent()
    exec(Path("do.py").read_text(), globals())

run_stage(main)
"""
DVC_YAML = """
stages:
  first:
    cmd: exec python -m stages.tokenize
    deps: [do.py, data/sample]
    outs: [a.txt]
"""
# Until it is told to stop; then it saves, which takes a while.
WORKS = """
if not Path("saved").exists():
    stop = StopRequest()
    stop.install()
    Path("ready").touch()
    while stop.signal is None:
        time.sleep(0.02)
    time.sleep(0.5)
    Path("saved").write_text(stop.signal.name)
    raise Interrupted(f"stopped by {stop.signal.name}; run the same command again to go on")
Path("a.txt").touch()
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Checkout:
    checkout = Checkout(tmp_path_factory.mktemp("endings") / "base", tiny_model, {})
    (checkout.folder / "params.yaml").unlink()
    (checkout.folder / "dvc.yaml").write_text(DVC_YAML)
    (checkout.folder / "stages/tokenize.py").write_text(STAGE)
    return checkout


@pytest.fixture
def checkout(base: Checkout, tmp_path: Path) -> Checkout:
    return base.copy(tmp_path / "repo")


def do(checkout: Checkout, text: str) -> Checkout:
    (checkout.folder / "do.py").write_text(text)
    return checkout


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        ("Path('a.txt').touch()", 0, ""),
        ("raise UserError('row 3 is wrong')", 2, "error: row 3 is wrong"),
        ("raise TransientError('a peer is gone')", 75, "repro: a peer is gone; run the same command again to go on"),
        ("raise MemoryError", 75, "repro: memory ran out (MemoryError); run the same command again to go on"),
        ("raise OSError(28, 'No space left on device', 'a.txt')", 75, "a.txt: the disk is full"),
        ("raise OSError(13, 'Permission denied', 'a.txt')", 2, "error: a.txt: Permission denied"),
        ("raise LookupError('of ours')", 1, "this is a fault of Holdfast (LookupError: of ours"),
        ("sys.exit(7)", 1, "repro: first ended with 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 75, "repro: first ended without a word: it was killed, or memory ran"),
        ("os.abort()", 75, "repro: first ended without a word"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 75, "repro: first ended without a word"),
        ("Path('a.txt').unlink(missing_ok=True)", 1, "repro: output 'a.txt' does not exist"),
    ],
)
def test_code_says_whether_to_run_again_or_to_mend(checkout: Checkout, text: str, code: int, line: str) -> None:
    output = do(checkout, text).repro(code=code)
    assert line in output
    assert ("Traceback" in output) == ("LookupError" in text)


def test_stage_that_cannot_begin_is_a_fault_and_not_tried_again(checkout: Checkout) -> None:
    (do(checkout, "").folder / "stages/tokenize.py").write_text("import nothing_of_that_name")
    assert "repro: failed to run: exec python -m stages.tokenize, exited with 1" in checkout.repro(code=1)


@pytest.mark.parametrize(
    ("dvc_yaml", "arguments", "code"),
    [
        ("stages: [", (), 2),
        ("<<<<<<< ours\nstages: {}\n=======\nstages: {}\n>>>>>>> theirs\n", (), 2),
        ("stages: {first: {cmd: 'true', oops: 1}}", (), 2),
        ("stages: {first: {cmd: 'echo ${nothing}'}}", (), 2),
        ("stages: {first: {cmd: 'true', outs: [a]}, second: {cmd: 'true', outs: [a]}}", (), 2),
        ("stages: {first: {cmd: 'true', outs: [a], deps: [b]}, second: {cmd: 'true', outs: [b], deps: [a]}}", (), 2),
        ("stages: {first: {cmd: 'true', deps: [nothing]}}", (), 2),
        ("stages: {first: {cmd: no-such-program}}", (), 2),
        ("stages: {first: {cmd: exit 3}}", (), 2),
        ("stages: {first: {cmd: kill -9 $$}}", (), 75),
        ("stages: {first: {cmd: exec python -Q -m stages.tokenize}}", (), 2),
        (DVC_YAML, ("-q",), 2),
        (DVC_YAML, ("--no-such-argument",), 2),
        (DVC_YAML, ("no-such-stage",), 2),
    ],
)
def test_what_a_person_wrote_is_theirs_to_mend_also_where_dvc_finds_it(
    checkout: Checkout, dvc_yaml: str, arguments: tuple[str, ...], code: int
) -> None:
    (do(checkout, "").folder / "dvc.yaml").write_text(dvc_yaml)
    assert "Traceback" not in checkout.repro(*arguments, code=code)


def test_dvc_that_fails_otherwise_is_a_fault(checkout: Checkout) -> None:
    do(checkout, "Path('a.txt').touch()")
    (checkout.folder / ".dvc/cache").write_text("no folder")
    assert last_line(checkout.repro(code=1)).startswith("repro: ")


def test_dvc_that_is_busy_is_to_be_tried_again(checkout: Checkout) -> None:
    from dvc.lock import make_lock

    do(checkout, "Path('a.txt').touch()")
    (checkout.folder / ".dvc/tmp").mkdir(exist_ok=True)
    with make_lock(str(checkout.folder / ".dvc/tmp/lock"), tmp_dir=str(checkout.folder / ".dvc/tmp")):
        assert "Unable to acquire lock" in checkout.repro(code=75)
    checkout.repro()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        # Process 1 of two has an error of its own; what the main one sees is that the other is gone.
        ([Word(1, "train", 75, "another process ended"), Word(2, "train", 2, "the loss fails")], 2),
        ([Word(1, "train", 75, "another process ended"), Word(2, "train", None)], 75),
        ([Word(1, "tokenize", 0), Word(2, "train", 1), Word(9, None, 75, "failed to run")], 1),
        ([Word(1, "tokenize", 0), Word(9, None, 2, "dvc.yaml is invalid")], 2),
        ([Word(1, "tokenize", 0)], 1),
        ([Word(1, "train", None), Word(9, None, 2, "failed to run")], 75),
    ],
)
def test_of_several_processes_the_one_that_knows_more_is_heard(words: list[Word], code: int) -> None:
    assert judge(255, words, 9, None).code == code
    assert judge(0, words, 9, None).code == 0


def start(checkout: Checkout, *arguments: str) -> subprocess.Popen[str] | Forked:
    """Start `repro`, and return once its stage works."""
    process = checkout.start(sys.executable, "-m", "stages", "repro", *arguments)
    begin = time.monotonic()
    while not (checkout.folder / "ready").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - begin < 60
        time.sleep(0.02)
    return process


def family(process: subprocess.Popen[str] | Forked) -> list[psutil.Process]:
    """`repro`, DVC and the stage."""
    repro = psutil.Process(process.pid)
    return [repro, *repro.children(recursive=True)]


def assert_none_is_left(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]


@pytest.mark.parametrize(
    ("target", "number"),
    [
        *(("repro", number) for number in SIGNALS),
        ("group", signal.SIGINT),
        ("group", signal.SIGTERM),
        ("dvc", signal.SIGTERM),
        ("dvc", signal.SIGKILL),
        ("stage", signal.SIGTERM),
        ("stage", signal.SIGUSR2),
    ],
)
def test_signal_to_any_process_lets_the_stage_save_and_ends_with_75(
    checkout: Checkout, target: str, number: signal.Signals
) -> None:
    process = start(do(checkout, WORKS))
    processes = family(process)
    assert len(processes) == 3
    if target == "group":
        os.killpg(process.pid, number)
    else:
        processes[("repro", "dvc", "stage").index(target)].send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 75, output
    # Of a DVC that dies the stage hears by SIGTERM.
    heard = signal.SIGTERM if target == "dvc" else number
    assert (checkout.folder / "saved").read_text() == heard.name
    assert output.count("run the same command again") == 1
    assert_none_is_left(processes)
    checkout.repro()


def test_killed_repro_leaves_nothing_behind_and_the_stage_saves(checkout: Checkout) -> None:
    process = start(do(checkout, WORKS))
    processes = family(process)
    process.kill()
    process.wait()
    assert_none_is_left(processes)
    assert (checkout.folder / "saved").exists()
    checkout.repro()


def test_only_a_second_ctrl_c_two_seconds_later_ends_at_once(checkout: Checkout) -> None:
    process = start(do(checkout, WORKS.replace("time.sleep(0.5)", "time.sleep(60)")))
    processes = family(process)
    for pause in (0.3, 2.0):
        process.send_signal(signal.SIGINT)
        time.sleep(pause)
        assert process.poll() is None
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 75
    assert time.monotonic() - begin < 3
    assert_none_is_left(processes)
    assert not (checkout.folder / "saved").exists()


def test_signal_between_two_stages_ends_it_before_the_next_does_anything(checkout: Checkout) -> None:
    do(checkout, "time.sleep(1); Path('reached').touch()")
    (checkout.folder / "dvc.yaml").write_text(
        "stages:\n"
        "  first: {cmd: touch ready a && sleep 2, outs: [a]}\n"
        "  second: {cmd: exec python -m stages.tokenize, deps: [a]}\n"
    )
    process = start(checkout)
    process.terminate()
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 75, output
    assert not (checkout.folder / "reached").exists()


def test_program_of_the_user_s_is_told_too(checkout: Checkout) -> None:
    (checkout.folder / "dvc.yaml").write_text("stages: {first: {cmd: touch ready && sleep 60 && true}}")
    process = start(checkout)
    process.terminate()
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 75, output


def test_nohup_keeps_hanging_up_from_ending_it(checkout: Checkout) -> None:
    do(checkout, "Path('ready').touch(); time.sleep(2); Path('a.txt').touch()")
    process = checkout.start("nohup", sys.executable, "-m", "stages", "repro")
    while not (checkout.folder / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(20) == 0


def test_process_that_a_stage_leaves_behind_is_ended(checkout: Checkout) -> None:
    do(checkout, "subprocess.Popen(['sleep', '1000'], start_new_session=True); Path('a.txt').touch()")
    process = start(do(checkout, (checkout.folder / "do.py").read_text() + "; Path('ready').touch(); time.sleep(1)"))
    processes = family(process)
    assert process.wait(20) == 0
    assert_none_is_left(processes)


def test_thread_that_never_ends_does_not_keep_a_stage_that_failed(checkout: Checkout) -> None:
    begin = time.monotonic()
    do(checkout, "import threading; threading.Thread(target=time.sleep, args=[1000]).start(); raise UserError('no')")
    assert "error: no" in checkout.repro(code=2)
    assert time.monotonic() - begin < 15


@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="needs unshare and root")
def test_process_1_of_a_container_hands_signals_on(checkout: Checkout) -> None:
    do(checkout, WORKS)
    inside = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child=KILL")
    process = checkout.start(*inside, sys.executable, "-m", "stages", "repro")
    begin = time.monotonic()
    while not (checkout.folder / "ready").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - begin < 60
        time.sleep(0.02)
    psutil.Process(process.pid).children()[0].terminate()
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 75, output
    assert (checkout.folder / "saved").read_text() == "SIGTERM"


def test_stop_after_saves_in_time(checkout: Checkout) -> None:
    begin = time.monotonic()
    output = do(checkout, WORKS).repro("--stop-after", "4s", code=75)
    assert 4 <= time.monotonic() - begin < 10
    assert (checkout.folder / "saved").exists()
    assert "stopped by SIGTERM; run the same command again" in output
    checkout.repro("--stop-after", "1h30m")


@pytest.mark.parametrize("time", ["3", "", "0m", "1h-5m", "1m1h"])
def test_time_that_is_none_is_one_line(checkout: Checkout, time: str) -> None:
    assert "is no time; write it as 3h55m, 45m or 90s" in checkout.repro("--stop-after", time, code=2)


# A start that is killed after an atom, until there are three.
ATOMS = """
atoms = Path("runs/0123456789ab/atoms")
atoms.mkdir(parents=True, exist_ok=True)
(atoms.parent / "identity.json").write_text('{"format": 3, "stage": "tokenize"}')
done = len(list(atoms.iterdir()))
(atoms / f"x.y.{done:08d}").mkdir()
if done < 4:
    os.kill(os.getpid(), signal.SIGKILL)
Path("a.txt").touch()
"""


def quick(checkout: Checkout) -> Checkout:
    path = checkout.folder / "stages/repro/command.py"
    path.write_text(path.read_text().replace("PAUSE_SECONDS = 30.0", "PAUSE_SECONDS = 0.1"))
    return checkout


def test_until_done_starts_again_while_starts_get_further(checkout: Checkout) -> None:
    output = do(quick(checkout), ATOMS).repro("--until-done")
    assert output.count("Running stage 'first'") == 5
    assert output.count("repro: first ended without a word: it was killed, or memory ran out; starting again") == 4


def test_until_done_gives_up_with_the_reason_after_three_starts_that_get_nowhere(checkout: Checkout) -> None:
    output = do(quick(checkout), "raise TransientError('the peer is gone')").repro("--until-done", code=1)
    assert output.count("Running stage 'first'") == 3
    assert last_line(output) == "repro: given up: 3 starts in a row got nowhere, the last for: the peer is gone"


def test_until_done_tries_what_is_to_be_mended_once(checkout: Checkout) -> None:
    output = do(checkout, "raise UserError('row 3 is wrong')").repro("--until-done", code=2)
    assert output.count("Running stage 'first'") == 1


def test_until_done_that_is_told_to_stop_does_not_start_again(checkout: Checkout) -> None:
    process = start(do(checkout, WORKS), "--until-done")
    process.terminate()
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 75
    assert output.count("Running stage 'first'") == 1
