"""What a process says of its end is read by another, at any time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stages.ground.words import FOLDER, Word, leave_word, read_words


def test_word_that_is_withdrawn_while_it_is_looked_for_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv("DVC_STAGE", "train")
    leave_word(75, "stopped")
    (tmp_path / "7.json").symlink_to("gone")  # in the folder's list, and not there any more
    assert read_words(tmp_path) == [Word(os.getpid(), "train", 75, "stopped")]
