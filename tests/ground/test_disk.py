"""Files that appear by link or copy: no later write to one is seen in another that may be written to."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from stages.ground import disk


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(10_000))
    return path


def test_copy_is_a_file_of_its_own(whole: Path, tmp_path: Path) -> None:
    content = whole.read_bytes()
    disk.copy(whole, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    (tmp_path / "copy").write_bytes(b"written by somebody")
    assert whole.read_bytes() == content


def test_copy_shares_blocks_where_the_disk_can(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(fcntl, "ioctl", lambda made, request, source: asked.append((request, os.fstat(source).st_ino)))
    monkeypatch.setattr(disk.shutil, "copyfile", lambda *_: pytest.fail("its bytes are written once more"))
    disk.copy(whole, tmp_path / "copy")
    assert asked == [(disk.FICLONE, whole.stat().st_ino)]


def test_link_is_the_same_file_and_a_copy_where_the_disk_has_none(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.link(whole, tmp_path / "link")
    assert (tmp_path / "link").samefile(whole)

    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    disk.link(whole, tmp_path / "copy")
    assert not (tmp_path / "copy").samefile(whole)
    assert (tmp_path / "copy").read_bytes() == whole.read_bytes()
