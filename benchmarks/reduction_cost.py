"""What the same bits for any number of processes cost: `train.reduction: exact` beside DDP and Accelerate.

python -m pip install accelerate
PYTHONPATH=. python benchmarks/reduction_cost.py --processes 2 --micro-batches 2

Every process steps one BERT (6 layers of 384, 22.7 million parameters) through each way in turn, in blocks of --steps,
alternating which is first; per pair of blocks the seconds of each are divided by those of the first, which is `fast`
(DDP; in one process plain accumulation). Prints their median and range, the bytes that this machine's loopback sent per
step (those of all processes and, if it is not idle, of others too). Reads no data and needs no network.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch import multiprocessing as mp

from stages.batches.plan import MicroBatch
from stages.modeling.buffers import Buffers
from stages.modeling.compute import Compute
from stages.modeling.parallel import Parallel
from stages.modeling.world import World
from stages.reduction.base import Reduction
from stages.reduction.exact import Exact
from stages.reduction.fast import Fast

DEVICE = torch.device("cpu")


def make_model() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536)
    return BertForSequenceClassification(config)


def batch(number: int, rows: int, tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 30000, (rows, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def ours(kind: str, model: nn.Module, world: World, arguments: argparse.Namespace) -> Callable[[], None]:
    """A step as the loop makes it."""
    parallel = Parallel(model)
    reduction: Reduction = Exact(parallel, world) if kind == "exact" else Fast(parallel, Compute(DEVICE, world=world))
    reduction.start()
    optimizer = torch.optim.AdamW(model.parameters())
    count = arguments.micro_batches

    def step() -> None:
        reduction.begin(count, list(model.parameters()), Buffers(model))
        losses = [torch.zeros(0)]
        for micro_batch in reduction.share([MicroBatch(0, 1, number, []) for number in range(count)]):
            with reduction.micro_batch(micro_batch.micro_batch):
                inputs = batch(micro_batch.micro_batch, arguments.rows, arguments.tokens)
                loss = parallel.forward(inputs).square().sum() / (count * arguments.rows)
                loss.backward()
            losses.append(loss.detach().reshape(1))
        changed = reduction.finish()
        reduction.gather(torch.cat(losses))
        reduction.settle(list(map(bool, changed.tolist())))
        optimizer.step()
        optimizer.zero_grad()

    return step


def accelerated(model: nn.Module, world: World, arguments: argparse.Namespace) -> Callable[[], None]:
    from accelerate import Accelerator

    count = arguments.micro_batches // world.size
    assert count * world.size == arguments.micro_batches, "Accelerate wants as many micro-batches in every process"
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=count)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))

    def step() -> None:
        for number in range(world.rank * count, (world.rank + 1) * count):
            with accelerator.accumulate(wrapped):
                logits = wrapped(**batch(number, arguments.rows, arguments.tokens)).logits
                accelerator.backward(logits.square().sum() / arguments.rows)
                optimizer.step()
                optimizer.zero_grad()

    return step


def run(rank: int, port: int, arguments: argparse.Namespace, results: Any) -> None:
    world = World(rank, arguments.processes, rank)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(arguments.processes)
    torch.set_num_threads(arguments.threads)
    world.join(DEVICE)
    ways = {kind: ours(kind, make_model(), world, arguments) for kind in ("fast", "exact")}
    with contextlib.suppress(ImportError):
        ways["accelerate"] = accelerated(make_model(), world, arguments)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    sent: dict[str, float] = {}
    for pair in range(arguments.pairs + 1):
        for name in list(ways)[:: 1 if pair % 2 else -1]:
            world.maximum(0)
            before, begin = psutil.net_io_counters(pernic=True)["lo"].bytes_sent, time.perf_counter()
            for _ in range(arguments.steps):
                ways[name]()
            world.maximum(0)
            seconds[name].append(time.perf_counter() - begin)
            sent[name] = (psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before) / arguments.steps
    if world.is_main:
        results.put((seconds, sent))
    world.leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8, help="of a micro-batch")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2, help="of a block")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results: Any = mp.get_context("spawn").SimpleQueue()
    mp.spawn(run, (port, arguments, results), arguments.processes)
    seconds, sent = results.get()
    parameters = sum(p.nbytes for p in make_model().parameters())
    print(f"{arguments.processes} processes, {arguments.micro_batches} micro-batches of {arguments.rows} rows a step")
    for name, values in seconds.items():
        times = values[1:]  # the first is a warm-up
        ratios = [mine / theirs for mine, theirs in zip(times, seconds["fast"][1:], strict=True)]
        print(
            f"{name:>10}: {statistics.median(times) / arguments.steps:.3f} s a step, "
            f"{statistics.median(ratios):.3f} of fast ({min(ratios):.3f} to {max(ratios):.3f}), "
            f"{sent[name] / parameters:.2f} times the gradient sent in all"
        )


if __name__ == "__main__":
    main()
