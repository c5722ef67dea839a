"""Where and how numbers are computed: what every forward pass needs, together."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from stages.batches.collate import Batch
from stages.batches.randomness import seed_all
from stages.config.schema import TrainParams
from stages.modeling.device import pick_device, set_arithmetic
from stages.modeling.precision import DTYPES
from stages.modeling.world import World


@dataclass(frozen=True)
class Compute:
    """The device, what the forward pass is autocast to (`train.precision`), the seed of its random numbers
    (`train.seed`), and the processes that share the work."""

    device: torch.device
    precision: str = "fp32"
    seed: int = 0
    world: World = field(default_factory=World)

    @classmethod
    def start(cls, train: TrainParams, world: World) -> Compute:
        """As `train` says; the process's arithmetic is set from here on. Raises UserError: no such device here."""
        device = pick_device(train.device, world.local_rank if world.size > 1 else None)
        set_arithmetic(train.deterministic, train.tf32)
        return cls(device, train.precision, train.seed, world)

    def autocast(self) -> torch.autocast:
        """A context in which the forward pass runs in `precision`; in fp32 it changes nothing."""
        dtype = DTYPES.get(self.precision)
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def put(self, batch: Batch) -> Batch:
        """The batch on the device; its memory is copied asynchronously where it is pinned."""
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def seed_at(self, step: int, micro_batch: int) -> None:
        """Seed Python, NumPy and torch for one forward pass; see stages.batches.randomness."""
        seed_all(self.seed, step, micro_batch)
