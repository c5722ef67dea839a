"""train.device: what is picked, and one line for what is not there."""

from __future__ import annotations

import pytest
import torch

from stages.ground.errors import UserError
from stages.modeling.device import pick_device


@pytest.mark.parametrize(
    ("cuda", "name", "local_rank", "expected"),
    [
        (0, "auto", None, "cpu"),
        (0, "auto", 1, "cpu"),
        (0, "cuda", None, "does not have"),
        (0, "tpu", None, "write auto, cpu, cuda"),
        (2, "cpu", 1, "cpu"),
        (2, "cuda:1", 0, "several processes"),
        (2, "auto", 2, "2 visible GPUs"),
        (2, "auto", 1, "cuda:1"),
        (2, "cuda:1", None, "cuda:1"),
        (2, "cuda:2", None, "does not have"),
    ],
)
def test_device_is_picked_or_refused(
    monkeypatch: pytest.MonkeyPatch, cuda: int, name: str, local_rank: int | None, expected: str
) -> None:
    made_current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    if " " in expected:
        with pytest.raises(UserError, match=expected):
            pick_device(name, local_rank)
    else:
        assert str(pick_device(name, local_rank)) == expected
        assert [str(device) for device in made_current] == [expected] * expected.startswith("cuda")


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "gpu"])
def test_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"train\.device"):
        pick_device(name)
