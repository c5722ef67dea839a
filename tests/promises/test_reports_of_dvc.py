"""What reports of DVC and of who starts a stage told: each row is an input, and the line or value that is right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.ground.errors import UserError
from stages.repro import healing
from tests.support.project import ROOT

# ---- dvc.lock is judged by DVC's own schema

OUT = "    outs:\n    - path: a\n      hash: md5\n      md5: 0123456789abcdef0123456789abcdef\n      size: 1\n"
LOCK = f"schema: '2.0'\nstages:\n  train:\n    cmd: exec python\n{OUT}"
DATASETS = "schema: '2.0'\ndatasets:\n- name: a\n  type: dvc\n  url: b\n"


@pytest.mark.parametrize(
    ("content", "whole"),
    [
        (LOCK, True),
        (DATASETS, True),
        (f"{DATASETS}stages: {{}}\n", True),
        ("schema: '2.0'\nstages:\n  train:\n    cmd: exec python\n    outs:\n", False),
        ("schema: '2.0'\nstages:\n  train:\n    cmd: exec python\n    outs:\n    - hash: md5\n", False),
        ("schema: '2.0'\nstages:\n", False),
        ("schema: '2.0'\n", False),
        ("schema: '3.0'\nstages: {}\n", False),
        (LOCK + "more: 1\n", False),
        (LOCK.replace("size: 1", "size: " + "9" * 5000), False),
        (LOCK.replace("hash: md5", "hash: 2001-13-45"), False),
        ("", False),
    ],
)
def test_lock_file_is_whole_where_dvc_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, whole: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dvc.lock").write_text(content)
    assert healing._is_lock_file_whole() == whole


@pytest.mark.parametrize("content", ["[" * 100_000, "null", '{"write": {"a": {"pid": "x"}}}', None])
def test_rwlock_that_is_none_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None) -> None:
    monkeypatch.chdir(tmp_path)
    Path(".dvc/tmp").mkdir(parents=True)
    Path("dvc.lock").mkdir()
    if content is None:
        Path(".dvc/tmp/rwlock").mkdir()
    else:
        Path(".dvc/tmp/rwlock").write_text(content)
    first, second = healing.heal()
    assert first.startswith(".dvc/tmp/rwlock was torn by a kill") and second.startswith("dvc.lock was torn by a kill")


def test_every_line_end_that_dvc_would_refuse_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from ruamel.yaml import YAML

    monkeypatch.chdir(tmp_path)
    lines = LOCK.splitlines(keepends=True)
    for end in range(1, len(lines)):
        Path("dvc.lock").write_text("".join(lines[:end]))
        if healing._is_lock_file_whole():
            COMPILED_LOCKFILE_SCHEMA(YAML(typ="safe").load(Path("dvc.lock").read_text()))


def test_without_git_there_is_nothing_of_git_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    Path("dvc.lock").write_text("")
    (line,) = healing.heal()
    assert line.startswith("dvc.lock was torn by a kill")


def test_file_name_that_dvc_cannot_record_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stages/custom").mkdir(parents=True)
    Path("stages/custom/größe.txt").touch()
    healing.require_names()
    Path(os.fsdecode(b"stages/custom/\xff.txt")).touch()
    with pytest.raises(UserError, match=r"^stages/custom/\\xff.txt: its name is not UTF-8, so DVC cannot record it"):
        healing.require_names()


# ---- a shell between DVC and a stage

STAGE = "import time; from stages.ground.signals import die_with_parent; die_with_parent(); print('on', flush=True); {}"


def below_a_shell(then: str, pid: str) -> subprocess.Popen[str]:
    """A stage whose parent is a shell, whose parent is this process; `pid` is who it is told that started it."""
    script = f'{sys.executable} -c "{STAGE.format(then)}"; echo "ended with $?"'
    env = {**os.environ, "HOLDFAST_PARENT_PID": pid}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(["sh", "-c", script], cwd=ROOT, env=env, **pipes)


def test_stage_behind_a_shell_runs() -> None:
    output, _ = below_a_shell("pass", str(os.getpid())).communicate(timeout=30)
    assert output == "on\nended with 0\n"


def test_stage_whose_starter_is_gone_says_so_and_ends() -> None:
    output, _ = below_a_shell("pass", str(2**22 + 1)).communicate(timeout=30)
    assert output.splitlines()[0] == "process 4194305, which started this stage, has ended: this stage ends too"
    assert output.splitlines()[-1] == "ended with 143"


def test_stage_behind_a_shell_ends_with_the_process_that_started_it() -> None:
    between = (
        "import os, subprocess, sys; os.environ['HOLDFAST_PARENT_PID'] = str(os.getpid()); "
        "subprocess.run(['sh', '-c', sys.argv[1]])"
    )
    script = f'{sys.executable} -c "{STAGE.format("time.sleep(60)")}"; echo "ended with $?"'
    starter = subprocess.Popen([sys.executable, "-c", between, script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert starter.stdout
    assert starter.stdout.readline() == "on\n"
    starter.kill()
    starter.wait()
    assert starter.stdout.readline() == "ended with 143\n"
