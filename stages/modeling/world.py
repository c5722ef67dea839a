"""Several processes on one job, as torchrun starts them: who does what, and how they agree.

The plan is the same for any number of processes; each takes its share of a step's micro-batches. Process 0 ("main")
alone reads and writes the run's folder; the others are given its state when they join.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stages.ground.errors import TransientError, reason
from stages.modeling import codec
from stages.modeling.codec import Tree

MAIN = 0


@dataclass(frozen=True)
class World:
    """The processes of this job; `rank` is this one's number among `size`, `local_rank` that on this machine."""

    rank: int = MAIN
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> World:
        """As torchrun says; one process without it."""
        return cls(*(int(os.environ.get(name, default)) for name, default in
                     (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))  # fmt: skip

    @property
    def is_main(self) -> bool:
        return self.rank == MAIN

    def join(self, device: torch.device) -> None:
        """Wait until all processes are here. CPU tensors go through gloo, CUDA's through NCCL."""
        if self.size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")

    def leave(self) -> None:
        """Wait until all processes are done: torchrun ends the others as soon as one has failed."""
        if self.size > 1:
            self.maximum(0)
            dist.destroy_process_group()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What fails in here because another process died is one line; the last checkpoint counts."""
        try:
            yield
        except RuntimeError as error:
            if not self.is_loss(error):
                raise
            raise TransientError(
                f"another process of this job ended or cannot be reached ({reason(error, 200)}); "
                "run the same command again"
            ) from error

    def is_loss(self, error: BaseException) -> bool:
        """Whether an error says that another process is not there any more."""
        return self.size > 1 and ("gloo" in str(error).lower() or isinstance(error, dist.DistError))

    def maximum(self, *values: int) -> list[int]:
        """Each value's maximum over all processes."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return [int(value) for value in tensor]

    def broadcast_object(self, value: Any) -> Any:
        """Main's `value` (what JSON can hold), in every process. Nothing is unpickled."""
        return self.gather_objects(value)[MAIN] if self.size > 1 else value

    def gather_objects(self, value: Any) -> list[Any]:
        """Every process's `value` (what JSON can hold), in the order of their ranks, in every process."""
        if self.size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self.gather(torch.tensor([len(mine)]))
        longest = max(int(size) for size in sizes)
        texts = self.gather(torch.cat([mine, torch.zeros(longest - len(mine), dtype=torch.uint8)]))
        return [json.loads(text[: int(size)].numpy().tobytes()) for size, text in zip(sizes, texts, strict=True)]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every process's `tensor`, which is of one shape and type in all, in the order of their ranks."""
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        if self.size == 1:
            return [tensor]
        dist.all_gather(found, tensor)
        return found

    def gather_shares(self, values: Tensor, shares: Sequence[range]) -> Tensor:
        """Numbers of which each process has those of its share, in their order: `values` (this one's,) of all of them
        (everyone's,)."""
        if self.size == 1:
            return values
        padded = values.new_zeros(max(map(len, shares)))
        padded[: len(values)] = values
        return torch.cat([theirs[: len(share)] for theirs, share in zip(self.gather(padded), shares, strict=True)])

    def broadcast(self, tensor: Tensor, source: int = MAIN) -> None:
        """Give every process the `source`'s values of `tensor`, in place."""
        if self.size > 1 and tensor.numel():
            flat = tensor.contiguous().reshape(-1)
            # As bytes: the backend need not know the type.
            dist.broadcast(flat.view(torch.uint8), source)
            if not tensor.is_contiguous():
                tensor.copy_(flat.view(tensor.shape))

    def broadcast_tree(self, tree: Tree, source: int = MAIN) -> Tree:
        """The `source`'s tree, in every process, its tensors on the CPU; that of the others is not looked at."""
        if self.size == 1:
            return tree
        skeleton, tensors = codec.split(tree if self.rank == source else None, "state")
        kinds = {name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()}
        skeleton, kinds = self.gather_objects([skeleton, kinds])[source]
        for name, (dtype, shape) in kinds.items():
            if self.rank != source:
                tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            self.broadcast(tensors[name], source)
        return codec.join(skeleton, tensors)

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every process main's buffers (running statistics): main's are those that are saved."""
        for buffer in model.buffers():
            self.broadcast(buffer)
