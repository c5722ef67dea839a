"""Steps of odd models in as many processes as the environment says: `python -m tests.support.summing cpu` prints, by
model, a digest of every gradient, loss, buffer and extra state on the way."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stages.batches.plan import MicroBatch
from stages.modeling.buffers import Buffers
from stages.modeling.device import pick_device, set_arithmetic
from stages.modeling.parallel import Parallel
from stages.modeling.world import World
from stages.reduction import exact

# Micro-batches by step: subtrees that fit no share, and steps in which most of eight processes are idle.
STEPS = (8, 3, 1, 5, 7, 2, 4, 6)


class Unused(nn.Module):
    """One parameter is used in no micro-batch, and two in some, one of them with gradients that are 0.0 or -0.0."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.zero, self.never = (nn.Parameter(torch.randn(5)) for _ in range(4))

    def forward(self, features: Tensor) -> Tensor:
        used = self.always * features
        if float(features[0, 0]) < 0.5:
            return used
        return torch.cat([used[:1] + self.zero * 0.0, used[1:]]) + self.sometimes * features


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, features: Tensor) -> Tensor:
        return self.second(self.first(features).relu())


class Statistics(nn.Module):
    """Buffers of every kind, and an extra state."""

    mask: Tensor
    seen: Tensor
    last: Tensor
    short: Tensor
    lowest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5, momentum=None)
        self.register_buffer("mask", torch.full((3,), -torch.inf))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("last", torch.zeros((), dtype=torch.int64))
        self.register_buffer("short", torch.full((2,), 60000.0, dtype=torch.float16))
        self.register_buffer("lowest", torch.tensor(torch.inf))
        self.calls: dict[str, Any] = {"number": 0, "sum": torch.zeros(1)}

    def forward(self, features: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen += features.double().sum() / 3
            self.last = (features.sum() * 1000).long()
            self.short *= 1 - features.mean().half() / 100
            self.lowest = torch.minimum(self.lowest, features.min())
            self.calls = {"number": self.calls["number"] + 1, "sum": self.calls["sum"] + features.sum().cpu()}
        return self.norm(self.layer(features))

    def get_extra_state(self) -> dict[str, Any]:
        return self.calls

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.calls = state


class Replacing(nn.Module):
    """Puts other tensors in the place of its buffers: a parameter's, each other's, larger ones, and ones that were not
    there. What is not persistent is of no account after a micro-batch."""

    weight_before: Tensor
    one: Tensor
    other: Tensor
    table: Tensor
    late: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.register_buffer("weight_before", torch.zeros(5, 5))
        self.register_buffer("one", torch.zeros(3))
        self.register_buffer("other", torch.ones(3))
        self.register_buffer("table", torch.zeros(1), persistent=False)
        self.register_buffer("late", None, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        self.weight_before = self.layer.weight.detach()
        self.one, self.other = self.other, self.one
        self.one += features.sum()
        self.table = torch.cat([self.table, features[0, :1]]) if float(features[0, 0]) < 0.5 else self.table.add_(1)
        self.late = features.mean() if self.late is None else self.late + features.mean()
        return self.layer(features) * (1 + self.table.sum() + self.late + self.one.sum() / 100)


class Branches(nn.Module):
    """Computes half of it on a stream of its own, where the device has some."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, features: Tensor) -> Tensor:
        if not features.is_cuda:
            return self.first(features) * self.second(features)
        aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            second = self.second(features)
        here.wait_stream(aside)
        second.record_stream(here)
        return self.first(features) * second


class Types(nn.Module):
    """Parameters of several types, one laid out by columns, one with gaps, one that is empty, and gradients of -0.0."""

    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Parameter(torch.randn(5, dtype=torch.bfloat16))
        self.long = nn.Parameter(torch.randn(5, dtype=torch.float64))
        self.pairs = nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.columns = nn.Parameter(torch.randn(7, 5).t())
        self.gaps = nn.Parameter(torch.randn(7, 10).t()[::2])
        self.nothing = nn.Parameter(torch.zeros(0))
        self.zero = nn.Parameter(torch.zeros(5))

    def forward(self, features: Tensor) -> Tensor:
        found = features * self.short.float() + (features.double() * self.long).float() + self.zero * -0.0
        return found + (features * self.pairs).abs() + (features @ (self.columns * self.gaps)).sum(dim=1, keepdim=True)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 7, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dropout, self.head = nn.Dropout(0.3), nn.Linear(7, 5)

    def forward(self, features: Tensor) -> Tensor:
        images = features.repeat(1, 15)[:, :75].reshape(-1, 3, 5, 5).contiguous(memory_format=torch.channels_last)
        return self.head(self.dropout(self.convolution(images).mean(dim=(2, 3))))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(nn.Linear(5, 13), nn.GELU(), nn.Linear(13, 7), nn.Linear(7, 5)),
    "unused": Unused,
    "tied": Tied,
    "statistics": Statistics,
    "replacing": Replacing,
    "branches": Branches,
    "types": Types,
    "images": Images,
}


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def steps(name: str, world: World, device: torch.device) -> str:
    """A digest of eight steps of this model; in the first and the fourth its second parameter is not trained."""
    torch.manual_seed(0)
    model = MODELS[name]().to(device)
    parallel = Parallel(model)
    reduction, digest = exact.Exact(parallel, world), hashlib.sha256()
    reduction.start()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    held: list[Tensor | None] = []
    for step, count in enumerate(STEPS):
        list(model.parameters())[1].requires_grad_(step not in (0, 3))
        model.train()
        buffers = Buffers(model)
        reduction.begin(count, [p for p in model.parameters() if p.requires_grad], buffers)
        losses = [torch.zeros(0, device=device)]
        for micro_batch in reduction.share([MicroBatch(0, step, number, []) for number in range(count)]):
            torch.manual_seed(100 * step + micro_batch.micro_batch)
            with reduction.micro_batch(micro_batch.micro_batch):
                loss = parallel.forward({"features": torch.rand(4, 5).to(device)}).square().mean() / count
                loss.backward()
            losses.append(loss.detach().reshape(1))
        changed = reduction.finish()
        reduction.settle(list(map(bool, changed.tolist())))
        gradients = [parameter.grad for parameter in model.parameters()]
        for tensor in (*held, *gradients, *model.buffers(), reduction.gather(torch.cat(losses))):
            digest.update(b"none" if tensor is None else as_bytes(tensor))
        digest.update(repr(model.state_dict().get("_extra_state")).encode())
        digest.update(repr([None if gradient is None else gradient.stride() for gradient in gradients]).encode())
        optimizer.step()
        optimizer.zero_grad()
        held = gradients  # as an optimizer of one's own may, to compare
    reduction.stop()
    return digest.hexdigest()


def main() -> None:
    torch.set_num_threads(1)
    set_arithmetic(deterministic=True, tf32=False)
    exact.BUCKET_BYTES = 100  # so that there are several
    world = World.from_environment()
    device = pick_device(sys.argv[1], world.local_rank if world.size > 1 else None)
    world.join(device)
    print(json.dumps({name: steps(name, world, device) for name in MODELS}))
    world.leave()


if __name__ == "__main__":
    main()
