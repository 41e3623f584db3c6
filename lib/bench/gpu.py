"""Training speed on a GPU, against a conventional script and the measured matrix peak; a topic of
`make bench` that has no rows where there is no GPU.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from typing import Any

import torch

from lib.bench.conventional import Conventional
from lib.bench.timing import Row, ratios, row, synchronize, timed_steps
from lib.config import Run
from lib.engines.eager import TorchEngine
from lib.models import forward_flops, model_spec
from lib.train import TrainingLoop

GPU_NETWORKS = ("lenet300-100", "alexnet-s", "vgg16-d", "wrn-16-8")
SIDE_BY_SIDE = (1, 2, 4, 8)
WAIT_SECONDS = 300.0


def gpu(repeats: int, networks: Sequence[str] = ()) -> Iterator[Row]:
    """Everything below, on the first GPU; nothing without one."""
    if torch.cuda.is_available():
        device = torch.device("cuda")
        yield from one_run(repeats, networks or GPU_NETWORKS, device)
        yield from side_by_side(repeats, networks or GPU_NETWORKS[:2], device)


def one_run(
    repeats: int,
    networks: Sequence[str],
    device: torch.device,
    *,
    matrix: int = 8192,
    steps: int = 100,
    conventional_steps: int = 30,
) -> Iterator[Row]:
    """Sparse momentum at 5 % of the weights in bfloat16: seconds of an epoch, share of the measured
    bfloat16 matrix peak (forward and both gradients, counted densely), ratio to the conventional
    script in float32 and to the same steps without CUDA graphs, share of the mask update.
    """
    peaks = [_peak(device, matrix) for _ in range(repeats)]
    yield row("bf16 matrix peak", f"{matrix} x {matrix}", [p / 1e12 for p in peaks], "TFLOP/s")
    for model in networks:
        loop = _loop(model, device)
        batch, per_epoch = loop.run.batch_size, loop.schedule.steps_per_epoch
        conventional = Conventional(model, loop.run.density, batch, device)
        order = loop.order().split(batch)
        timed_steps(loop, order, 20)
        engine = loop.engine
        assert isinstance(engine, TorchEngine)
        graphed = engine.graphed
        times: dict[str, list[float]] = {"script": [], "ours": [], "singly": [], "update": []}
        for _ in range(repeats):
            times["script"].append(conventional.steps(conventional_steps) / conventional_steps)
            times["ours"].append(timed_steps(loop, order, steps))
            start = time.perf_counter()
            loop.update_masks()
            synchronize(device)
            times["update"].append(time.perf_counter() - start)
            engine.graphed = None
            times["singly"].append(timed_steps(loop, order, steps))
            engine.graphed = graphed
        ours = times["ours"]
        yield row("ours, an epoch", model, [t * per_epoch for t in ours], "s")
        work = 3 * sum(forward_flops(model).values()) * batch
        shares = [100 * work / t / p for t, p in zip(ours, peaks, strict=True)]
        yield row("share of the bf16 matrix peak", model, shares, "%")
        yield row("ours over conventional fp32 script", model, ratios(times["script"], ours), "x")
        if graphed is not None:
            yield row("CUDA graph over single kernels", model, ratios(times["singly"], ours), "x")
        updates = [100 * u / (t * per_epoch) for u, t in zip(times["update"], ours, strict=True)]
        yield row("mask update, share of an epoch", model, updates, "%")


def side_by_side(
    repeats: int,
    networks: Sequence[str],
    device: torch.device,
    *,
    numbers: Sequence[int] = SIDE_BY_SIDE,
    steps: int = 300,
) -> Iterator[Row]:
    """Mini-batches per second of several processes together, over those of one."""
    context = get_context("spawn")
    for model in networks:
        rates: dict[int, list[float]] = {}
        for number in numbers:
            found, together = context.Queue(), context.Barrier(number)
            args = (model, str(device), steps, repeats, together, found)
            processes = [
                context.Process(target=_steps_of_a_process, args=args) for _ in range(number)
            ]
            for process in processes:
                process.start()
            for _ in range(repeats):
                seconds = [found.get(timeout=WAIT_SECONDS) for _ in range(number)]
                rates.setdefault(number, []).append(sum(1 / s for s in seconds))
            for process in processes:
                process.join()
        for number in numbers[1:]:
            gains = ratios(rates[number], rates[numbers[0]])
            yield row(f"{number} runs side by side over {numbers[0]}", model, gains, "x")


def _peak(device: torch.device, size: int) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        synchronize(device)
        best = max(best, 10 * 2 * size**3 / (time.perf_counter() - start))
    return best


def _loop(model: str, device: torch.device) -> TrainingLoop:
    run = Run(model=model, precision="bf16")
    if model_spec(model).input_shape[0] == 3:
        run = dataclasses.replace(run, dataset="cifar10", batch_size=128, epochs=250)
    return TrainingLoop(run, device=device)


def _steps_of_a_process(
    model: str, device: str, steps: int, repeats: int, together: Barrier, found: Any
) -> None:
    loop = _loop(model, torch.device(device))
    order = loop.order().split(loop.run.batch_size)
    timed_steps(loop, order, 20)
    for _ in range(repeats):
        together.wait(WAIT_SECONDS)
        found.put(timed_steps(loop, order, steps))
