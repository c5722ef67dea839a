"""Loggers: killed anywhere and run again, each shows every row of the histories once.

`python tests/watching/test_loggers.py LOGGER FOLDER` is a driver: it forks a stand-in for the trainer, kills it with
SIGKILL and starts it again until it is through.
"""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stages.ground.disk import write_text
from stages.ground.errors import UserError
from stages.run.history import History
from stages.watching.loggers import LOGGERS, make_loggers
from tests.support.project import ROOT

STEPS = 24
COLUMNS = {
    "train": ["step", "epoch", "loss", "learning_rate", "grad_norm"],
    "eval": ["step", "epoch", "loss", "accuracy", "f1"],
}
PARAMS: dict[str, Any] = {"train": {"learning_rate": 5e-5, "max_steps": None, "callbacks": []}}
EXIT = 7
# Before which write of this start the trainer ends itself, or how many seconds after its logger's start it is ended.
KILLS: list[int | float] = [0, 0.0, 7, 0.02, 12, 0.3, 17]

Shown = dict[str, list[tuple[int, float]]]
"""Of every name the steps and values, in the order in which the backend keeps them."""


def train(name: str, folder: Path, kill_at: int | None = None, begun: Callable[[], object] = lambda: None) -> None:
    """Log every second step, evaluate every fourth, save every fifth."""
    histories = {kind: History(columns) for kind, columns in COLUMNS.items()}
    saved: dict[str, Any] = {"step": 0, "evaluated": 0, "histories": {}}
    checkpoint = folder / "checkpoint.json"
    if checkpoint.exists():
        saved = json.loads(checkpoint.read_text())
    for kind, history in histories.items():
        if kind in saved["histories"]:
            history.load_state_dict(saved["histories"][kind])
    state: Any = SimpleNamespace(histories=histories, progress=SimpleNamespace(step=saved["step"]))
    state.epoch = saved["step"] / 10
    evaluated = saved["evaluated"]

    begun()
    [logger] = make_loggers([name], folder, "run-1", PARAMS)
    if kill_at is not None:
        kill_before(logger, kill_at)
    logger.on_train_begin(state)
    while True:
        step = state.progress.step
        if step % 4 == 0 and step > evaluated:
            scores = {"loss": 1 / step, "accuracy": step / 7, "f1": math.nan if step == 8 else 1e-9 * step}
            histories["eval"].append(step=step, epoch=state.epoch, **scores)
            logger.on_evaluate(state, scores)
            evaluated = step
        if step % 5 == 0:
            tables = {kind: history.state_dict() for kind, history in histories.items()}
            write_text(checkpoint, json.dumps({"step": step, "evaluated": evaluated, "histories": tables}))
        if step == STEPS:
            break
        time.sleep(0.01)
        state.progress.step = step = step + 1
        state.epoch = step / 10
        if step % 2 == 0:
            row = {
                "loss": 2 / step,
                "learning_rate": step / 3e5,
                "grad_norm": math.inf if step == 6 else math.pi * step,
            }
            histories["train"].append(step=step, epoch=state.epoch, **row)
            logger.on_log(state, row)
    logger.on_train_end(state)
    for kind, history in histories.items():
        write_text(folder / "history" / f"{kind}.tsv", history.text())


def kill_before(logger: Any, count: int) -> None:
    """End this process, for good, before write number `count`."""
    write, left = logger.write, [count]

    def counted(*values: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*values)

    logger.write = counted


def drive(name: str, folder: Path) -> None:
    """Kill and start again; a forked process has the imports behind it, and so is killed in its logger's work."""
    importlib.import_module(LOGGERS[name].module)
    for kill in [*KILLS, None]:
        receiving, sending = os.pipe()
        child = os.fork()
        if not child:
            train(name, folder, kill if isinstance(kill, int) else None, lambda: os.write(sending, b"!"))  # noqa: B023
            sys.exit(EXIT)
        os.read(receiving, 1)
        if isinstance(kill, float):
            time.sleep(kill)
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == (EXIT if kill is None else -signal.SIGKILL), f"{kill}: ended with {status}"
        for tag, points in read(name, folder).items():
            assert len({step for step, _ in points}) == len(points), f"{tag} has a step twice after {kill}: {points}"


def read(name: str, folder: Path) -> Shown:
    shown: Shown = defaultdict(list)
    {"tensorboard": read_tensorboard, "wandb": read_wandb, "dvclive": read_dvclive}[name](folder / name, shown)
    return dict(shown)


def read_tensorboard(folder: Path, shown: Shown, purge: bool = False) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not list(folder.glob("events*")):
        return
    # Without purging it shows every record there is.
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=purge).Reload()
    for tag in events.Tags()["scalars"]:
        shown[tag] = [(event.step, event.value) for event in events.Scalars(tag)]


def read_wandb(folder: Path, shown: Shown) -> None:
    """All offline runs of the folder: `wandb sync` would send each."""
    record_type: Any = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    for path in folder.glob("offline-run-*/*.wandb"):
        for content in log_records(path.read_bytes()):
            record = record_type.FromString(content)
            if record.WhichOneof("record_type") == "history":
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                for tag, value in row.items():
                    if not tag.startswith("_") and tag != "train/global_step":
                        shown[tag].append((row["train/global_step"], float(value)))


def log_records(content: bytes) -> list[bytes]:
    """Records of a LevelDB log: blocks of 32 KiB; a record is checksum, length, whether it goes on, and its bytes."""
    records, part, at = [], b"", 7
    while at + 7 <= len(content):
        length, kind = struct.unpack_from("<HB", content, at + 4)
        if 2**15 - at % 2**15 < 7 or not kind:
            at += 2**15 - at % 2**15
            continue
        part += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(part)
            part = b""
    return records


def read_dvclive(folder: Path, shown: Shown) -> None:
    for path in (folder / "plots" / "metrics").glob("*/*.tsv"):
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        name = f"{path.parent.name}/{path.stem}"
        shown[name] = [(int(row["step"]), float(row[path.stem])) for row in rows if row[path.stem]]


def in_histories(folder: Path) -> Shown:
    shown: Shown = {}
    for kind, columns in COLUMNS.items():
        with (folder / "history" / f"{kind}.tsv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        for column in columns[1:]:
            shown[f"{kind}/{column}"] = [(int(row["step"]), float(row[column])) for row in rows]
    del shown["eval/epoch"]
    return shown


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "DVC"))}
    # W&B holds rows back for 15 seconds, and a kill would find an empty file.
    wandb = {"WANDB_MODE": "offline", "WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "0.01"}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **wandb, **variables}


def run(mode: str, name: str, folder: Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, __file__, mode, name, str(folder)],
        env=environment(**variables), cwd=cwd, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.parametrize("name", LOGGERS)
def test_killed_again_and_again_it_shows_every_row_once(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    folder, cwd = tmp_path / "runs" / "run-1", tmp_path / "cwd"
    cwd.mkdir()

    done = run("drive", name, folder, cwd)

    # The driver has looked at the exit codes. No backend says a word, or writes into the current folder.
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    expected = in_histories(folder)
    assert len(expected["train/loss"]) == STEPS / 2 and len(expected["eval/f1"]) == STEPS / 4
    if name == "tensorboard":
        numpy = pytest.importorskip("numpy")
        expected = {tag: [(step, float(numpy.float32(value))) for step, value in points]
                    for tag, points in expected.items()}  # fmt: skip
        purged: Shown = {}
        read_tensorboard(folder / name, purged, purge=True)
        assert repr(sorted(purged.items())) == repr(sorted(expected.items()))
    # As text, so that NaN is like NaN.
    assert repr(sorted(read(name, folder).items())) == repr(sorted(expected.items()))
    assert not list(cwd.iterdir())


def test_wandb_without_a_key_is_one_line_and_no_question(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    home = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "HOME": str(tmp_path), "NETRC": "none"}

    done = run("train", "wandb", tmp_path / "runs" / "run-1", tmp_path, **home)

    assert done.returncode == EXIT
    assert done.stderr.startswith("warning: wandb fails") and done.stderr.count("\n") == 1
    assert "WANDB_MODE=offline" in done.stderr


def test_wandb_server_is_not_given_again_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    given: list[tuple[int, int, float]] = []

    class Run:
        starting_step = 12  # 24 steps make 12 rows of losses and 6 of scores

        def log(self, values: dict[str, float], step: int, commit: bool) -> None:
            given.append((step, int(values["train/global_step"]), values.get("eval/loss", 0.0)))

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: None

    asked: dict[str, Any] = {}
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setattr(wandb, "setup", lambda *_: SimpleNamespace(settings=SimpleNamespace(mode="online")))
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "init", lambda **given: asked.update(given) or Run())

    for _ in range(2):  # the second time most of it comes from the histories
        train("wandb", tmp_path)

    assert (asked["id"], asked["resume"], asked["config"]) == ("run-1", "allow", PARAMS)
    missing = [(12, 18, 0.0), (13, 20, 0.0), (14, 20, 1 / 20), (15, 22, 0.0), (16, 24, 0.0), (17, 24, 1 / 24)]
    assert given == missing * 2


def test_dvclive_leaves_repository_and_studio_alone(tmp_path: Path) -> None:
    pytest.importorskip("dvclive")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.excludesFile="]
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").touch()
    for command in (["init", "-q"], ["add", ".dvc"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=tmp_path, text=True).strip()
    before = set(tmp_path.rglob("*"))
    experiment = {"DVC_ROOT": str(tmp_path), "DVC_EXP_BASELINE_REV": head, "DVC_EXP_NAME": "first"}
    studio = {"DVC_STUDIO_TOKEN": "t", "DVC_STUDIO_URL": "http://127.0.0.1:9", "DVC_STUDIO_REPO_URL": "git@host:a/b"}

    done = run("train", "dvclive", tmp_path / "runs" / "run-1", tmp_path, **experiment, **studio)

    assert (done.returncode, done.stderr) == (EXIT, "")
    assert {path for path in tmp_path.rglob("*") if "runs" not in path.parts} == before
    assert subprocess.check_output(["git", "status", "--porcelain"], cwd=tmp_path, text=True) == "?? runs/\n"


@pytest.mark.parametrize("name", LOGGERS)
def test_missing_package_is_said_at_the_start(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == name] + [name]:
        monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(UserError, match=rf"train\.loggers: {name} .* pip install {name}$"):
        make_loggers([name], tmp_path, "run-1", PARAMS)


@pytest.mark.parametrize("name", ["tensorboard", "dvclive"])
def test_failing_backend_is_one_line_and_training_goes_on(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(name)
    (tmp_path / name).write_text("a file where the folder should be")

    train(name, tmp_path)

    said = capfd.readouterr().err
    assert said.startswith(f"warning: {name} fails") and said.count("\n") == 1
    assert len(in_histories(tmp_path)["train/loss"]) == STEPS / 2


if __name__ == "__main__":
    {"drive": drive, "train": train}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
    sys.exit(0 if sys.argv[1] == "drive" else EXIT)
