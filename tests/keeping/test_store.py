"""An entry is there whole or not at all, whatever ends its writer, and whatever was done to its files."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.keeping.sealed import MANIFEST, DamagedError, SaveError
from stages.keeping.store import DiskStore, Key, Shelf
from tests.support.damage import DAMAGE, flip

KEY = Key("train", "run", "checkpoints", "step-00000009")


def write(store: DiskStore, key: Key = KEY, text: str = "old") -> None:
    store.begin(key, len(text))
    store.put(key, lambda folder: (folder / "a").write_text(text))
    store.put(key, lambda folder: (folder / "b").write_text("b"))
    store.commit(key)


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    made = DiskStore(tmp_path)
    write(made)
    return made


def folder_of(tmp_path: Path) -> Path:
    return tmp_path / "run/checkpoints/step-00000009"


def names(store: DiskStore) -> list[str]:
    return store.names(KEY.stage, KEY.identity, KEY.kind)


def test_what_was_put_is_read_with_its_record(store: DiskStore) -> None:
    parts = store.read(KEY)
    assert {name: part.path.read_text() for name, part in parts.items()} == {"a": "old", "b": "b"}
    assert {name: part.record.size for name, part in parts.items()} == {"a": 3, "b": 1}


def test_entry_that_was_not_committed_is_not_there(store: DiskStore) -> None:
    other = Key("train", "run", "checkpoints", "step-00000012")
    store.begin(other, 1)
    store.put(other, lambda folder: (folder / "a").write_text("x"))
    assert names(store) == [KEY.name]
    with pytest.raises(DamagedError, match="missing"):
        store.read(other)
    store.recover(KEY.stage, KEY.identity, KEY.kind)
    assert len(list(folder_of(Path(store._root)).parent.iterdir())) == 1


@pytest.mark.parametrize("crash_at", range(1, 12))
def test_crash_while_an_entry_is_replaced_leaves_the_old_one_or_the_new_one(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch, crash_at: int
) -> None:
    calls: list[object] = []

    def crash(real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            if len(calls) >= crash_at:
                raise KeyboardInterrupt  # what is on disk now is what a kill leaves
            return real(*args, **kwargs)

        return counted

    for name in ("rename", "fsync"):
        monkeypatch.setattr(os, name, crash(getattr(os, name)))
    monkeypatch.setattr(shutil, "rmtree", crash(shutil.rmtree))
    try:
        write(store, text="new")
    except KeyboardInterrupt:
        assert calls
    monkeypatch.undo()
    again = DiskStore(store._root)
    again.recover(KEY.stage, KEY.identity, KEY.kind)
    assert again.read(KEY)["a"].path.read_text() in ("old", "new")
    assert names(again) == [KEY.name]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["a", MANIFEST])
def test_damaged_file_is_noticed_and_named(
    tmp_path: Path, store: DiskStore, damage: Callable[[Path], None], name: str
) -> None:
    damage(folder_of(tmp_path) / name)
    with pytest.raises(DamagedError, match=name if damage is not flip or name != MANIFEST else "."):
        store.read(KEY)


def forge(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(change(manifest) or manifest))

    return rewrite


def raw(content: bytes) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        (folder / MANIFEST).write_bytes(content)

    return rewrite


def beside(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"x")


def beside_in_a_folder(folder: Path) -> None:
    (folder / "x").mkdir()
    (folder / "x/y").write_text("")


def link(folder: Path) -> None:
    (folder / "a").rename(folder.parent / "a")
    (folder / "a").symlink_to("../a")


def folder_as_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).mkdir()


RECORD = {"size": 1, "sha256": "0" * 64}
FORGED: dict[str, Callable[[Path], None]] = {
    "deep nesting": raw(b"[" * 100_000),
    "deep value": raw(b'{"format":3,"about":{},"files":' + b'{"x":' * 5000 + b"1" + b"}" * 5000 + b"}"),
    "a list": raw(b"[]"),
    "no JSON": raw(b"\x80\x04\x95"),
    "a huge number": raw(b'{"format": ' + b"9" * 5000 + b"}"),
    "no files": forge(lambda m: {**m, "files": {}}),
    "files as a list": forge(lambda m: {**m, "files": ["a", "b"]}),
    "a size as text": forge(lambda m: m["files"]["a"].update(size="3")),
    "a negative size": forge(lambda m: m["files"]["a"].update(size=-3)),
    "a hash that is none": forge(lambda m: m["files"]["a"].update(sha256="x")),
    "a very long name": forge(lambda m: m["files"].update({"x" * 100_000: RECORD})),
    "a name with a zero": forge(lambda m: m["files"].update({"x\0": RECORD})),
    "a name outside": forge(lambda m: m["files"].update({"../../../secret": RECORD})),
    "another key": forge(lambda m: {**m, "more": 1}),
    "another step": forge(lambda m: m["about"].update(name="step-00000001")),
    "another run": forge(lambda m: m["about"].update(identity="other")),
    "another stage": forge(lambda m: m["about"].update(stage="tokenize")),
    "another format": forge(lambda m: m.update(format=1)),
    "a file beside": beside,
    "a folder's file beside": beside_in_a_folder,
    "a link": link,
    "a pipe": lambda folder: os.mkfifo(folder / "pipe"),
    "a folder as manifest": folder_as_manifest,
}


@pytest.mark.parametrize("name", FORGED)
def test_whatever_was_made_up_counts_as_damaged(tmp_path: Path, store: DiskStore, name: str) -> None:
    (tmp_path / "secret").write_text("x")
    FORGED[name](folder_of(tmp_path))
    with pytest.raises(DamagedError) as raised:
        store.read(KEY)
    assert len(str(raised.value)) < 1000


def test_invalid_entry_is_neither_used_nor_lost_however_often(tmp_path: Path, store: DiskStore) -> None:
    for text in ("1", "2"):
        write(store, text=text)
        store.invalidate(KEY)
        assert names(store) == []
    kept = sorted(path.name for path in folder_of(tmp_path).parent.iterdir())
    assert kept == ["damaged-step-00000009", "damaged-step-00000009-1"]


def test_full_disk_is_one_line_with_the_bytes_and_leaves_nothing_half_made(tmp_path: Path, store: DiskStore) -> None:
    def full(folder: Path) -> None:
        (folder / "a").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    store.begin(KEY, 1200)
    with pytest.raises(SaveError, match=r"step-00000009 .* the disk is full; it needs 1200 bytes"):
        store.put(KEY, full)
    assert store.read(KEY)["a"].path.read_text() == "old"
    assert [path.name for path in folder_of(tmp_path).parent.iterdir()] == [KEY.name]


def test_steps_are_ordered_by_number_and_other_names_passed_over(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    shelf = Shelf(store, "train", "run", "checkpoints")
    for step in (9, 100_000_000, 99_999_999):
        write(store, shelf.key(step))
    write(store, Key("train", "run", "checkpoints", "notes"))
    assert shelf.steps() == [100_000_000, 99_999_999, 9]
    shelf.remove_but({9, 7})
    assert shelf.steps() == [9]
    assert sorted(names(store)) == ["notes", "step-00000009"]


def test_looking_writes_nothing(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "runs")
    assert store.names("train", "run", "checkpoints") == []
    with pytest.raises(DamagedError):
        store.read(KEY)
    assert not (tmp_path / "runs").exists()
