"""Several processes side by side, which no launcher has to start, as that takes many times as long."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.support.fork_server import Forked, fork_server
from tests.support.project import Checkout


def launcher(processes: int) -> str:
    return f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node={processes}"


def start_in_folders(
    folders: Sequence[Path], module: str, point: str | None = None, arguments: Sequence[str] = (), **env: str
) -> list[Forked]:
    """A process in each of the folders; the main one ends at `point` of faults.py."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place["WORLD_SIZE"] = str(len(folders))
    return [
        fork_server().start(
            folder,
            module,
            None if rank else point,
            arguments,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            **place,
            **env,
        )
        for rank, folder in enumerate(folders)
    ]


def end_of(started: Sequence[Forked], *codes: int) -> list[str]:
    """See these to their end, which is that of `codes`; what each printed."""
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == list(codes), outputs
    return outputs


def start_side_by_side(checkouts: list[Checkout], point: str | None = None, **env: str) -> list[Forked]:
    """Train, with a process in each of the folders; the main one ends at `point` of faults.py."""
    return start_in_folders([checkout.folder for checkout in checkouts], "stages.train", point, **env)


def train_side_by_side(checkouts: list[Checkout], *codes: int, **env: str) -> list[str]:
    """Train to the end, which is that of `codes`; what each printed."""
    return end_of(start_side_by_side(checkouts, **env), *codes)


def train_in(processes: int, checkout: Checkout, code: int = 0, **env: str) -> str:
    """Train to the end in this many processes; what they printed."""
    return "".join(train_side_by_side([checkout] * processes, *[code] * processes, **env))
