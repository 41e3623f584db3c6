"""What every topic of the benchmark shares: variants timed in turn, and their rows."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from lib.train import TrainingLoop

Row = dict[str, Any]


def forward_backward(
    network: nn.Module, images: torch.Tensor, labels: torch.Tensor, low: bool
) -> Callable[[], None]:
    """Forward and backward of one mini-batch, in bf16 where `low`."""

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = F.cross_entropy(network(images), labels)
        for parameter in network.parameters():
            parameter.grad = None
        loss.backward()

    return step


def in_turn(
    variants: dict[str, Callable[[], Any]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every variant by the clock, A B C A B C ..., after one warm-up of each."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for function in variants.values():
        function()
    for _ in range(repeats):
        for name, function in variants.items():
            start = clock()
            function()
            times[name].append(clock() - start)
    return times


def timed_steps(loop: TrainingLoop, order: Sequence[torch.Tensor], count: int) -> float:
    """Seconds per mini-batch of the real training loop; `order` begins anew when it ends."""
    synchronize(loop.device)
    start = time.perf_counter()
    for k in range(count):
        loop.step(order[k % len(order)])
    synchronize(loop.device)
    return (time.perf_counter() - start) / count


def all_threads() -> None:
    """Let torch use each core that this process may use."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; a CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def row(what: str, setting: str, values: Sequence[float], unit: str) -> Row:
    """Median, lowest and highest of the repeats."""
    return {
        "what": what,
        "setting": setting,
        "value": statistics.median(values),
        "unit": unit,
        "low": min(values),
        "high": max(values),
        "n": len(values),
    }


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """Slow over fast, repeat by repeat: what slows one repeat down slows both sides."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def setting_of(model: str, density: float, batch: int) -> str:
    """The setting of a whole network; `density` from 0 to 1."""
    return f"{model}, {100 * density:g} %, batch {batch}"
