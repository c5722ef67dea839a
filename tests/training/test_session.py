"""Processes that meet: those that would not train the same run, or not to the same bits, are named."""

from __future__ import annotations

from typing import Any

import pytest

from stages.training.session import OtherIdentity, require_same

Everyone = list[tuple[str, dict[str, Any], dict[str, Any], bool]]


def two(reduction: str = "exact", **of_the_second: Any) -> Everyone:
    identity, around = {"train.reduction": reduction, "train.seed": 0}, {"device": "cuda (NVIDIA H100)"}
    other = {key: of_the_second.get(key.rpartition(".")[2], value) for key, value in (identity | around).items()}
    return [
        ("one", identity, around, False),
        ("two", {key: other[key] for key in identity}, {key: other[key] for key in around}, False),
    ]


def test_processes_alike_meet() -> None:
    require_same(two())


def test_process_on_another_kind_of_device_is_refused_where_bits_count_and_not_otherwise() -> None:
    with pytest.raises(OtherIdentity) as refused:
        require_same(two(device="cuda (NVIDIA A100)"))
    assert str(refused.value) == (
        "process 1 on two would train with other bits than process 0 on one (its value -> that of process 0): "
        "device: cuda (NVIDIA A100) -> cuda (NVIDIA H100); give all processes the same, or write train.reduction: fast"
    )
    require_same(two("fast", device="cuda (NVIDIA A100)"))


def test_process_of_another_run_is_refused_with_what_differs() -> None:
    with pytest.raises(OtherIdentity, match=r"process 1 on two would train another run .*: train.seed: 7 -> 0; "):
        require_same(two(seed=7))
