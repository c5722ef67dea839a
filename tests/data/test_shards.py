"""Shards: which rows are in which, what is made again after a stop, and that no process and no stop decides a byte."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages import tokenize as stage
from stages.batches import tokenized as store
from stages.data import shards
from stages.data.shards import Cut, SplitShards
from stages.ground import disk
from stages.ground.running import run_command
from stages.keeping import atoms, environment
from tests.support.project import WORDS, Project

ROWS = 90
Done = list[tuple[str, int]]


class Stopped(BaseException):
    """Ends a start as a signal does."""


def text_of(row: int) -> str:
    return " ".join(WORDS[(row * 7 + n) % len(WORDS)] for n in range(2 + row % 5))


def write_rows(project: Project, **changed: str) -> None:
    """90 rows in train, 20 in test, those of train in `changed` ({"row_3": text}) with another text."""
    for split, rows in (("train", ROWS), ("test", 20)):
        texts = [changed.get(f"row_{row}", text_of(row)) if split == "train" else text_of(row) for row in range(rows)]
        lines = [f"{text},{'ab'[row % 2]}" for row, text in enumerate(texts)]
        project.write(f"data/in/{split}.csv", "\n".join(["text,label", *lines]) + "\n")


def project_in(folder: Path, model: Path) -> Project:
    project = Project(
        folder,
        {
            "data": {"path": "data/in", "text_columns": ["text"], "label_column": "label"},
            "model": {"source": str(model)},
            "tokenize": {"max_length": 16, "num_proc": 1},
        },
    )
    write_rows(project)
    project.write_params()
    return project


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some 20 shards of the rows."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 80)
    monkeypatch.setattr(shards, "BATCH_ROWS", 4)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


def outs() -> dict[str, str]:
    files = [path for path in (*Path("data/tokenized").rglob("*"), Path("metrics/data.json")) if path.is_file()]
    return {path.as_posix(): disk.sha256_file(path) for path in files}


def start(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> Done:
    """Run the stage, and stop it once it has made so many shards; which ones it made."""
    done: Done = []
    write = SplitShards.write

    def counted(self: SplitShards, number: int) -> None:
        if len(done) == stop_after:
            raise Stopped
        write(self, number)
        done.append((self.atoms.scope.split("-")[1], number))

    with monkeypatch.context() as patched:
        patched.setattr(SplitShards, "write", counted)
        try:
            run_command(stage.main)
        except Stopped:
            assert not Path("data/tokenized").exists()
    return done


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The outs of a start that nothing disturbs, in one process."""
    project = project_in(tmp_path_factory.mktemp("undisturbed"), tiny_model)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(project.folder)
        make_small(patched)
        assert len(start(patched)) > 20
        return outs()


@pytest.fixture
def ready(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project of these rows, which is the current folder."""
    monkeypatch.chdir(tmp_path)
    return project_in(tmp_path, tiny_model)


# ---- which rows are in which


@given(st.lists(st.integers(0, 5_000), min_size=1, max_size=400), st.integers(1, 50), st.integers(1, 10_000))
def test_cut_covers_all_rows_in_whole_batches_and_shards_have_their_size(
    sizes: list[int], batch_rows: int, shard_bytes: int
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shards, "BATCH_ROWS", batch_rows)
        patched.setattr(shards, "SHARD_BYTES", shard_bytes)
        cut = Cut.of(np.array(sizes, np.int64))
    batches = [batch for shard in range(cut.shards) for batch in cut.batches(shard)]
    assert [row for first, end in batches for row in range(first, end)] == list(range(len(sizes)))
    assert all(end - first == cut.batch_rows <= batch_rows for first, end in batches[:-1])
    for shard in range(cut.shards):
        *others, (last, _) = cut.batches(shard)
        assert sum(sizes[others[0][0] : last] if others else []) < 2 * shard_bytes, (
            "more than a shard, and its last batch"
        )


def test_however_much_text_there_is_shards_are_some_thousand() -> None:
    cut = Cut.of(np.full(3_000_000, 20, np.int64))
    assert 1_000 < cut.shards <= 2_001
    assert cut.batch_rows == 4


def test_rows_that_are_long_are_few_in_a_batch() -> None:
    assert Cut.of(np.full(1_000, 40, np.int64)).batch_rows == 2
    assert Cut.of(np.full(1_000, 10**9, np.int64)).batch_rows == 1


def test_shards_are_what_datasets_reads(ready: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    start(monkeypatch)
    loaded, raw = datasets.load_from_disk("data/tokenized"), datasets.load_from_disk("data/tokenized/raw")
    assert set(loaded) == {"train", "validation", "test"}
    texts = [text_of(row) for row in range(ROWS)]
    assert sorted([*raw["train"]["text"], *raw["validation"]["text"]]) == sorted(texts)
    assert raw["train"]["row"] == list(range(raw["train"].num_rows))
    tokenizer = store.load_tokenizer()
    assert tokenizer is not None
    for split in loaded:
        assert split == "validation" or len(list(Path(f"data/tokenized/{split}").glob("*.arrow"))) > 2
        decoded = [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in loaded[split]]
        assert decoded == raw[split]["text"]


# ---- stopped, and started again


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stops=st.lists(st.integers(0, 12), max_size=4))
def test_however_often_it_is_stopped_no_shard_is_made_twice_and_the_bytes_are_the_same(
    ready: Project, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch, stops: list[int]
) -> None:
    for folder in ("runs", "data/tokenized", "metrics"):
        disk.remove(ready.folder / folder)
    done: Done = []
    while not Path("metrics/data.json").exists():
        done += start(monkeypatch, stops.pop() if stops else None)
    assert len(set(done)) == len(done) == len(list(Path("runs").glob("*/atoms/encode-*")))
    assert outs() == undisturbed


def test_files_and_the_cut_are_read_once(ready: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.data import labels, sources

    start(monkeypatch, stop_after=1)
    for module, name in ((sources, "_load_file"), (labels, "_part")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("it is kept"))
    start(monkeypatch)


def test_shards_of_another_environment_are_made_again_with_a_line(
    ready: Project, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = start(monkeypatch, stop_after=5)
    version = environment.version
    monkeypatch.setattr(environment, "version", lambda name: "9.9" if name == "tokenizers" else version(name))
    capsys.readouterr()
    after = start(monkeypatch)
    assert set(before) < set(after)
    lines = capsys.readouterr().err
    assert "the environment changed (tokenizers: " in lines and "-> 9.9); what was done in the one before" in lines
    assert outs() == undisturbed


@pytest.mark.parametrize("part", ["inputs.arrow", "raw.arrow", "counts.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_damaged_shard_is_made_again_with_a_line(
    ready: Project,
    undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    part: str,
    damage: str,
) -> None:
    start(monkeypatch, stop_after=5)
    (file,) = Path("runs").glob(f"*/atoms/encode-train-*.00000002/{part}")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if damage == "flipped" else content[:-1])
    capsys.readouterr()
    assert start(monkeypatch)[-1] == ("train", 2)
    assert "is damaged and is computed again" in capsys.readouterr().err
    assert outs() == undisturbed


@pytest.mark.parametrize("lost", [None, 1])
def test_shard_of_slow_rows_goes_on_in_its_middle_and_its_bytes_do_not_depend_on_where(
    ready: Project, monkeypatch: pytest.MonkeyPatch, lost: int | None
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 10**6)
    start(monkeypatch)
    whole = outs()
    for made in ("data/tokenized", "runs"):
        shutil.rmtree(made)
    monkeypatch.setattr(shards, "PIECE_ROWS", 2)  # two a batch
    monkeypatch.setattr(atoms, "SECONDS", 0.0)
    encoded: list[int] = []
    encode = SplitShards._encode

    def counted(self: SplitShards, first: int, end: int) -> pa.Table:
        if self.atoms.scope.startswith("encode-train"):
            if len(encoded) % 11 == 10:
                encoded.append(-1)
                raise Stopped
            encoded.append(first)
        return encode(self, first, end)

    monkeypatch.setattr(SplitShards, "_encode", counted)
    starts = 0
    while not Path("data/tokenized").exists():
        with contextlib.suppress(Stopped):
            run_command(stage.main)
        starts += 1
        if lost is not None and starts == 1:
            (piece,) = Path("runs").glob(f"*/atoms/encode-train-*-of-0.*.{2 * lost:08d}/piece.arrow")
            piece.write_bytes(b"")
    rows = [first for first in encoded if first >= 0]
    # Each once, but where a piece is lost: it, and those after it.
    assert sorted(set(rows)) == list(range(0, 81, 2))  # a tenth is cut off for validation
    assert len(rows) == len(set(rows)) + (9 if lost else 0)
    assert outs() == whole
    assert not list(Path("runs").glob("*/atoms/encode-*-of-*"))


def test_damaged_file_that_was_read_is_read_again(
    ready: Project, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start(monkeypatch, stop_after=0)
    (file,) = Path("runs").glob("*/atoms/read-train-*/00000.arrow")
    file.write_bytes(file.read_bytes()[:-100])
    start(monkeypatch)
    assert "is damaged and is computed again" in capsys.readouterr().err
    assert outs() == undisturbed


def test_published_shards_are_the_files_that_were_kept(ready: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    start(monkeypatch)
    kept = {path.stat().st_ino for path in Path("runs").glob("*/atoms/encode-*/*.arrow")}
    assert {path.stat().st_ino for path in Path("data/tokenized").rglob("*.arrow")} == kept


def test_shards_are_copied_where_the_disk_has_no_links(
    ready: Project, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    start(monkeypatch)
    assert outs() == undisturbed


# ---- several processes


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_gives_the_same_bytes(
    ready: Project, undisturbed: dict[str, str], processes: int
) -> None:
    ready.write_params(tokenize={"num_proc": processes})
    run_command(stage.main)
    assert outs() == undisturbed


def test_several_processes_go_on_where_one_was_stopped(
    ready: Project, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start(monkeypatch, stop_after=9)
    (atoms,) = Path("runs").glob("*/atoms")
    before = {path.name: (path / "inputs.arrow").stat().st_ino for path in atoms.glob("encode-*")}
    ready.write_params(tokenize={"num_proc": 2})
    run_command(stage.main)
    assert outs() == undisturbed
    assert (
        before.items() < {path.name: (path / "inputs.arrow").stat().st_ino for path in atoms.glob("encode-*")}.items()
    )


def test_first_row_that_is_wrong_is_named_by_several_processes(
    ready: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(ready, row_40="a [SEP] b", row_60="a [SEP] b", row_75="a [MASK] b")
    ready.write("data/in/val.csv", "text,label\nthe [SEP],a\nthe cat,b\n")
    ready.write_params(tokenize={"num_proc": 3})
    fill = SplitShards._fill

    def slowly(self: SplitShards, number: int, folder: Path) -> None:
        if self.cut.bounds[number] <= 40 < self.cut.bounds[number + 1]:
            time.sleep(0.5)  # so that the others come first
        fill(self, number, folder)

    monkeypatch.setattr(SplitShards, "_fill", slowly)
    with pytest.raises(SystemExit) as ending:
        run_command(stage.main)
    assert ending.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: data/in/train.csv: row 41, column 'text' holds '[SEP]'")
    assert not Path("data/tokenized").exists() and not list(Path("data").glob(".*"))


def test_killed_process_ends_the_start_in_one_line_and_what_was_done_is_kept(
    ready: Project, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ready.write_params(tokenize={"num_proc": 2})
    fill = SplitShards._fill

    def die(self: SplitShards, number: int, folder: Path) -> None:
        if number == 6:
            os.kill(os.getpid(), 9)
        time.sleep(0.02)
        fill(self, number, folder)

    with monkeypatch.context() as patched:
        patched.setattr(SplitShards, "_fill", die)
        begin = time.monotonic()
        with pytest.raises(SystemExit) as ending:
            run_command(stage.main)
    assert time.monotonic() - begin < 20
    assert ending.value.code == 75
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "a process that encodes rows (tokenize.num_proc, 2 of them) was killed" in line
    assert not [child for child in psutil.Process().children() if "pytest" in " ".join(child.cmdline())]
    assert len(list(Path("runs").glob("*/atoms/encode-*"))) >= 5
    ready.write_params()
    done = start(monkeypatch)
    assert ("train", 0) not in done and ("train", 6) in done
    assert outs() == undisturbed


@pytest.mark.parametrize(
    ("num_proc", "jobs", "expected"), [("auto", 3, 1), ("auto", 100, 8), (1, 100, 1), (5, 100, 5), (5, 2, 2), (5, 0, 0)]
)
def test_automatic_number_of_processes_is_that_of_cpus_where_there_is_work_for_them(
    monkeypatch: pytest.MonkeyPatch, num_proc: int, jobs: int, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert shards.processes_for(num_proc, jobs) == expected


def test_fingerprint_follows_from_the_rows_of_the_split_alone(ready: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprints() -> dict[str, str]:
        start(monkeypatch)
        return {
            split: json.loads(Path(f"data/tokenized/{split}/state.json").read_text())["_fingerprint"]
            for split in ("train", "raw/train", "test")
        }

    before = fingerprints()
    ready.write("data/in/test.csv", "text,label\nthe dog,a\n")
    after = fingerprints()
    assert {name for name in before if before[name] != after[name]} == {"test"}
