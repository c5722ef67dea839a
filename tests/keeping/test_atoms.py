"""Atoms: when one is kept, by whom it is read, and when it goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.keeping.atoms import Atoms, Pace, fingerprint
from stages.keeping.store import DiskStore
from tests.support.damage import flip


def make(root: Path, scope: str = "train", environment: str = "here") -> Atoms:
    return Atoms(DiskStore(root), "tokenize", "0123456789ab", scope, environment)


def write(atoms: Atoms, *numbers: int) -> None:
    for number in numbers:
        atoms.write(number, 1, lambda folder, number=number: (folder / "part").write_text(str(number)))  # type: ignore[misc]


def test_work_of_a_second_is_kept_and_a_fortnight_is_some_thousand_atoms() -> None:
    now = 0.0
    pace, kept = Pace(clock=lambda: now), []
    while now < 14 * 24 * 3600:
        now += 1.0 if now < 3600 else 20.0
        if pace.is_due():
            pace.kept()
            kept.append(now)
    assert kept[:3] == [1.0, 2.0, 3.0]
    assert 1000 < len(kept) < 20_000


def test_many_starts_make_no_more_atoms_than_one() -> None:
    now = 100.0
    pace = Pace(done=4000, clock=lambda: now)
    now = 115.0
    assert not pace.is_due()
    now = 116.0
    assert pace.is_due()


def test_atoms_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    write(make(tmp_path), 10, 9, 100_000_000, 2)
    read = [(number, parts["part"].path.read_text()) for number, parts in make(tmp_path).read()]
    assert read == [(2, "2"), (9, "9"), (10, "10"), (100_000_000, "100000000")]


def test_atoms_of_another_scope_or_environment_are_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(make(tmp_path, environment="before"), 0, 1)
    write(make(tmp_path, "train.scores"), 0)
    write(make(tmp_path), 1)
    assert make(tmp_path).numbers() == [1]
    make(tmp_path).remove_others()
    assert capsys.readouterr().err.startswith("train: 2 pieces were computed in another environment")
    assert make(tmp_path, environment="before").numbers() == []
    assert make(tmp_path, "train.scores").numbers() == [0]
    make(tmp_path).remove()
    assert make(tmp_path).numbers() == []


def test_damaged_atom_is_named_removed_and_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(make(tmp_path), 0, 1, 2)
    flip(next(tmp_path.glob("*/atoms/*.00000001/part")))
    assert [number for number, _ in make(tmp_path).read()] == [0, 2]
    assert "a piece of train is damaged and is computed again: " in capsys.readouterr().err
    assert make(tmp_path).numbers() == [0, 2]


def test_damaged_atom_of_somebody_else_is_left_to_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(make(tmp_path), 0, 1)
    flip(next(tmp_path.glob("*/atoms/*.00000001/part")))
    assert [number for number, _ in make(tmp_path).read(ours=False)] == [0]
    assert capsys.readouterr().err == ""
    assert make(tmp_path).numbers() == [0, 1]


@pytest.mark.parametrize("change", [{"torch": "2.13.1"}, {"threads": 1}, {"world_size": 4}, {"environments": 2}])
def test_whatever_leads_to_other_bits_is_another_environment(change: dict[str, object]) -> None:
    here = {"torch": "2.13.0", "threads": 2, "world_size": 1, "environments": 1}
    assert fingerprint(here) != fingerprint(here | change)
