"""How train is started: with its launcher, and by itself over as many GPUs as there is work for."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from stages import launch
from stages.config.read import parse_params, read_yaml
from stages.config.schema import Params
from tests.support.project import ROOT


def params(**changes: Any) -> Params:
    values = read_yaml(ROOT / "params.yaml")
    values["build_loaders"] |= {"batch_size": 16, "micro_batch_size": changes.pop("micro_batch_size", 4)}
    values["train"] |= changes
    return parse_params(values)


@pytest.mark.parametrize(
    ("gpus", "micro_batch_size", "processes"), [(0, 4, 1), (1, 4, 1), (2, 4, 2), (4, 4, 4), (8, 4, 4), (8, 16, 1)]
)
def test_auto_starts_a_process_for_each_gpu_that_has_a_micro_batch(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gpus: int,
    micro_batch_size: int,
    processes: int,
) -> None:
    monkeypatch.setattr(launch, "count_gpus", lambda: gpus)
    command = launch._auto(params(micro_batch_size=micro_batch_size))
    if processes == 1:
        assert command == [sys.executable]
    else:
        assert command[1:] == ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    assert ("GPUs are visible" in capsys.readouterr().err) == (gpus > processes)


def test_auto_leaves_gpus_alone_where_another_device_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "count_gpus", lambda: 4)
    assert launch._auto(params(device="cpu")) == [sys.executable]
    assert launch._auto(params(device="cuda:1")) == [sys.executable]
