"""Runs are nobody's to lose: where they lie, who has one, which are listed, named, spared and removed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages.ground.errors import UserError
from stages.keeping import folder, lock
from stages.keeping.folder import RunFolder, find_source, list_runs, runs_root
from stages.keeping.identity import Identity
from stages.keeping.lock import Lock
from stages.keeping.pruning import keep_within_limit, prune, removable, runs_limit, runs_named
from stages.keeping.sealed import FORMAT, DamagedError, seal, verify
from stages.keeping.store import Key
from tests.support.project import ROOT


@pytest.fixture(autouse=True)
def _own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("DVC_ROOT", "HOLDFAST_RUNS", "HOLDFAST_RUNS_LIMIT"):
        monkeypatch.delenv(name, raising=False)


def make_run(
    number: int, *, steps: tuple[int, ...] = (), finished: bool = False, source: str | None = None, size: int = 1000
) -> RunFolder:
    """A run as train leaves it; a higher `number` was used later."""
    identity = Identity("train", {"train.seed": number, "train.init_from_run": source})
    run = RunFolder.of(identity)
    run.enter(identity)
    run.lock.release()
    for step in steps:
        write(run, run.checkpoints.key(step), size)
    if finished:
        write(run, run.result, 0)
    os.utime(run.lock.path, (number, number))
    return run


def write(run: RunFolder, key: Key, size: int) -> None:
    run.store.begin(key, size)
    run.store.put(key, lambda folder: (folder / "progress.json").write_text("x" * size))
    run.store.commit(key)


def age(run: RunFolder, number: object) -> None:
    """Make a run one of another format."""
    path = run.path / "identity.json"
    values = json.loads(path.read_text())
    values.pop("format")
    path.write_text(json.dumps(values if number is None else {**values, "format": number}))


def ids(runs: list[RunFolder]) -> list[str]:
    return [run.id for run in runs]


def contents(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*")}


def test_runs_lie_in_the_project_that_a_person_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs_root() == tmp_path / "runs"
    monkeypatch.setenv("HOLDFAST_RUNS", "")
    assert runs_root() == tmp_path / "runs"
    monkeypatch.setenv("HOLDFAST_RUNS", "elsewhere/runs")
    assert runs_root() == tmp_path / "elsewhere/runs"
    # DVC names the repository, which a project may be a folder of.
    monkeypatch.setenv("DVC_ROOT", str(tmp_path.parent))
    assert runs_root() == tmp_path / "elsewhere/runs"
    # In `dvc exp run --temp` the current folder is in a copy that DVC deletes.
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    copy = tmp_path / ".dvc/tmp/exps/standalone/tmp123"
    (copy / ".dvc").mkdir(parents=True)
    (copy / "ml").mkdir()
    monkeypatch.chdir(copy)
    assert runs_root() == tmp_path / "elsewhere/runs"
    monkeypatch.chdir(copy / "ml")
    assert runs_root() == tmp_path / "ml/elsewhere/runs"
    monkeypatch.setenv("HOLDFAST_RUNS", "/scratch/runs")
    assert runs_root() == Path("/scratch/runs")


def test_listing_writes_nothing(tmp_path: Path) -> None:
    make_run(1)
    make_run(2, steps=(3,), finished=True)
    before = contents(tmp_path)
    subprocess.run([sys.executable, "-m", "stages", "runs"], cwd=tmp_path, check=True, capture_output=True,
                   env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"})  # fmt: skip
    assert contents(tmp_path) == before
    shutil.rmtree("runs")
    assert list_runs() == []
    assert not Path("runs").exists()


def test_runs_are_listed_newest_first_with_the_name_of_their_newest_checkpoint() -> None:
    old, new = make_run(1, steps=(8,)), make_run(2, steps=(3, 12))
    assert ids(list_runs()) == [new.id, old.id]
    reference = new.newest_reference()
    assert reference is not None
    assert reference.startswith(f"{new.id}/step-00000012@")
    found, step = find_source(reference)
    assert (found.id, step) == (new.id, 12)


def test_what_cannot_be_read_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    private, ours = make_run(1, finished=True), make_run(2, finished=True)
    real = Path.stat

    def refuse(self: Path, **kwargs: bool) -> os.stat_result:
        if self.is_relative_to(private.path) and self != private.path:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, **kwargs)

    monkeypatch.setattr(Path, "stat", refuse)
    assert ids(list_runs()) == [ours.id]
    assert ids(removable()) == [ours.id]
    monkeypatch.setenv("HOLDFAST_RUNS_LIMIT", "0")
    keep_within_limit(ours, print)
    monkeypatch.undo()
    assert private.path.exists()


def test_finished_runs_are_kept_however_many_there_are() -> None:
    runs = [make_run(number, finished=True) for number in range(1, 8)]
    said: list[str] = []
    keep_within_limit(runs[-1], said.append)
    assert said == []
    assert len(list_runs()) == 7


def test_beyond_the_limit_the_finished_runs_used_longest_ago_go_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = make_run(1, steps=(5,), size=100_000)
    oldest, older, current = (make_run(n, steps=(5,), finished=True, size=100_000) for n in (2, 3, 4))
    monkeypatch.setenv("HOLDFAST_RUNS_LIMIT", "350000")
    said: list[str] = []
    keep_within_limit(current, said.append)
    assert ids(list_runs()) == [current.id, older.id, stopped.id]
    assert f"removed run {oldest.id}" in said[-1]
    monkeypatch.setenv("HOLDFAST_RUNS_LIMIT", "1")
    keep_within_limit(current, said.append)
    assert ids(list_runs()) == [current.id, stopped.id]


@pytest.mark.parametrize("value", ["10 GB", "-1", "1e9", "²"])
def test_limit_that_is_no_number_of_bytes_is_one_line(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_RUNS_LIMIT", value)
    with pytest.raises(UserError, match="it should be a number of bytes"):
        runs_limit()
    monkeypatch.setenv("HOLDFAST_RUNS_LIMIT", "")
    assert runs_limit() is None


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "stages", "runs", *arguments], capture_output=True, text=True,
                          check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip


def test_prune_removes_finished_runs_but_the_newest_and_others_only_by_name() -> None:
    stopped, old, new = make_run(1, steps=(2,)), make_run(2, finished=True), make_run(3, finished=True)
    result = command("--prune")
    assert f"removed run {old.id}" in result.stdout
    assert ids(list_runs()) == [new.id, stopped.id]
    assert f"removed run {stopped.id}" in command("--prune", stopped.id).stdout
    refused = command("--prune", "nothing")
    assert refused.returncode == 2
    assert f"there is no run 'nothing'; there are {new.id}" in refused.stderr
    assert ids(list_runs()) == [new.id]


def test_run_that_is_trained_is_not_removed(tmp_path: Path) -> None:
    run = make_run(1, finished=True)
    script = (
        "import sys, time; from pathlib import Path; from stages.keeping.lock import Lock\n"
        "lock = Lock(Path(sys.argv[1]), 'it'); lock.acquire(); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(run.lock.path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    assert run.lock.holder() == str(holder.pid)
    said: list[str] = []
    prune([run], said.append)
    assert run.path.exists()
    assert f"kept run {run.id}: run {run.id} is being worked on by process {holder.pid}" in said[0]
    holder.kill()
    holder.wait()
    assert run.lock.holder() is None
    prune([run], said.append)
    assert not run.path.exists()


@pytest.mark.parametrize(("number", "version"), [(None, "Holdfast 0.1"), (1, "Holdfast 0.1"), (99, "another Holdfast")])
def test_other_format_is_listed_as_such_never_read_and_never_removed_unasked(
    number: int | None, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, ours = make_run(1, steps=(4,), finished=True), make_run(2, finished=True)
    reference = other.newest_reference()
    assert reference is not None
    age(other, number)
    assert f"format {number or 1}: {version}" in command().stdout
    assert other.identity_values() is None
    assert ids(removable()) == [ours.id]
    monkeypatch.setenv("HOLDFAST_RUNS_LIMIT", "1")
    keep_within_limit(ours, print)
    command("--prune")
    assert other.path.exists()
    with pytest.raises(UserError, match=f"kept in format {number or 1}.*use {version} to go on with it"):
        find_source(reference)
    command("--prune", other.id)
    assert not other.path.exists()


def test_sealed_folder_of_another_format_does_not_verify(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    seal(tmp_path, {"name": "1"})
    verify(tmp_path, {"name": "1"})
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"format": {FORMAT}', '"format": 1'))
    with pytest.raises(DamagedError, match=f"format is 1, expected {FORMAT}"):
        verify(tmp_path, {"name": "1"})


def test_bare_run_is_refused_with_the_line_to_write() -> None:
    run = make_run(1, steps=(4, 9))
    with pytest.raises(UserError, match=rf"names no checkpoint; write train.init_from_run: {run.newest_reference()}$"):
        find_source(run.id)


def test_source_is_named_by_its_content() -> None:
    run = make_run(1, steps=(4, 9))
    right = run.reference(4)
    assert find_source(right)[1] == 4
    for wrong in (right[:-8] + "0" * 8, right.replace("step-00000004", "step-00000009")):
        with pytest.raises(UserError, match=f"no such checkpoint; it has {run.reference(9)}, {right}"):
            find_source(wrong)
    with pytest.raises(UserError, match=f"no such run; there are: {run.reference(9)}"):
        find_source("0" * 12 + right[12:])


def test_source_is_spared_until_the_run_that_starts_from_it_has_a_checkpoint_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, newest = make_run(1, steps=(4,), finished=True), make_run(3, finished=True)
    follower = make_run(2, source=source.reference(4))
    said: list[str] = []
    prune([source], said.append)
    monkeypatch.setenv("HOLDFAST_RUNS_LIMIT", "1")
    keep_within_limit(newest, said.append)
    assert source.path.exists()
    assert "another run starts from it" in said[0]
    write(follower, follower.checkpoints.key(5), 0)
    prune([source], said.append)
    assert not source.path.exists()


def test_source_goes_together_with_the_run_that_waits_for_it() -> None:
    source = make_run(1, steps=(4,), finished=True)
    follower = make_run(2, source=source.reference(4))
    prune([source, follower], print)
    assert list_runs() == []


def test_run_whose_identity_is_torn_is_listed_as_unreadable() -> None:
    run = make_run(1)
    (run.path / "identity.json").write_text("[1,")
    assert "unreadable" in command().stdout


def test_prune_keeps_the_newest_of_this_format() -> None:
    ours, other = make_run(1, finished=True), make_run(2, finished=True)
    age(other, 1)
    command("--prune")
    assert ours.path.exists()


def test_lock_on_a_file_that_was_removed_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    real = lock.fcntl.lockf
    removals = [path]

    def lockf(file: object, flags: int) -> None:
        real(file, flags)  # type: ignore[arg-type]
        if removals:
            removals.pop().unlink()  # whoever had it before

    monkeypatch.setattr(lock.fcntl, "lockf", lockf)
    held = Lock(path, "it")
    held.acquire()
    assert path.read_text().strip() == str(os.getpid())
    held.release()


def test_start_while_a_prune_removes_the_folder_makes_it_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(1, steps=(4,))
    real, removals = Lock.acquire, [run.path]

    def acquire(self: Lock) -> None:
        if removals:
            shutil.rmtree(removals.pop())
        real(self)

    monkeypatch.setattr(Lock, "acquire", acquire)
    identity = Identity("train", {"train.seed": 1, "train.init_from_run": None})
    again = RunFolder.of(identity)
    assert again.enter(identity)
    assert again.identity_values() == identity.values
    again.lock.release()


def test_prune_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    run = make_run(1, finished=True)
    run.path.rename(folder.runs_root() / f".{run.id}.removed.tmp")
    prune([], print)
    assert list(runs_root().iterdir()) == []
    with pytest.raises(UserError, match="there are none"):
        list(runs_named([run.id]))
