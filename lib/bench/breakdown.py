"""Where the time of a training step goes: a topic of `python -m lib bench`."""

from __future__ import annotations

import copy
import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from lib.bench.sparse import (
    NETWORKS,
    STEP_WEIGHTS,
    STEPS_PER_EPOCH,
    after_updates,
    training_step,
    with_window,
)
from lib.bench.timing import Row, all_threads, in_turn, row
from lib.config import Run
from lib.engines import calibrate
from lib.engines.network import SparseNetwork, sparse_network
from lib.engines.optimizer import SparseSGD
from lib.kernels import keep_freed_memory
from lib.results.clock import (
    CALIBRATION,
    CONVERSIONS,
    DENSE_LAYERS,
    ELEMENTWISE,
    KERNELS,
    OPTIMIZER,
    PARTS,
    REST,
    WINDOW_EXTRA,
    setting_of,
)
from lib.train import flushed_denormals
from lib.training.schedule import dense_window

_EVALUATED = "autograd::engine::evaluate_function: "
# Name of an event of the profiler -> part; the first that is contained in it counts.
_BY_NAME = (
    ("ToBlocked", CONVERSIONS),
    ("FromBlocked", CONVERSIONS),
    ("_Conv2d", KERNELS),
    ("_Gather", KERNELS),
    ("onvolution", DENSE_LAYERS),
    ("aten::conv2d", DENSE_LAYERS),
    ("aten::linear", DENSE_LAYERS),
    ("AddmmBackward", DENSE_LAYERS),
    ("TBackward", DENSE_LAYERS),
    ("ToCopyBackward", DENSE_LAYERS),
    (STEP_WEIGHTS, OPTIMIZER),
    ("aten::_foreach_mul_", OPTIMIZER),
    ("AccumulateGrad", OPTIMIZER),
    ("og_softmax", REST),
    ("LogSoftmax", REST),
    ("cross_entropy", REST),
    ("nll_loss", REST),
    ("NllLoss", REST),
)


def part_of(event: str) -> str:
    """The part of a step that an event on the profiler's outermost level belongs to."""
    name = event.removeprefix(_EVALUATED)
    for text, part in _BY_NAME:
        if text in name:
            return part
    return ELEMENTWISE


def profiled(step: Callable[[], None]) -> dict[str, float]:
    """Seconds of one step by part, all but the dense window's; they sum to its time on the clock.

    Only outermost events count, so that nothing is counted twice; what no event covers is Python.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of its own start and end
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
    found = dict.fromkeys(PARTS[:-1], 0.0)
    events = profile.events()
    assert events is not None
    for event in events:
        if event.cpu_parent is None:
            found[part_of(event.name)] += event.cpu_time_total / 1e6
    found[REST] += seconds - sum(found.values())
    return found


def breakdown(repeats: int, networks: Sequence[str] = tuple(NETWORKS)) -> Iterator[Row]:
    """Seconds of a training step by part at 5 % of the weights, dense and sparse in turn, after the
    profiler; the sparse step is the one outside the dense window, whose extra is added with its
    share of the steps. And the seconds of the calibration, once per machine and shape of layers.
    """
    all_threads()
    keep_freed_memory()
    share = min(1.0, dense_window(Run().momentum) / STEPS_PER_EPOCH)
    for model in networks:
        batch = NETWORKS[model]
        setting = setting_of(model, 0.05, batch)
        loop = after_updates(model, 0.05)
        images, labels = loop.batch(torch.arange(batch))
        sparse = sparse_network(loop.model, loop.masking.masks)
        dense = {}
        for layout in (torch.contiguous_format, torch.channels_last):
            network = copy.deepcopy(loop.model).to(memory_format=layout)
            batch_of = images.contiguous(memory_format=layout)
            dense[str(layout)] = training_step(network, batch_of, labels, False)
        sgd = SparseSGD(sparse, loop.optimizer, loop.masking)
        step = training_step(sparse, images, labels, False, sgd)
        outside = functools.partial(with_window, sparse, False, step)
        inside = functools.partial(with_window, sparse, True, step)
        with flushed_denormals():
            before = in_turn({**dense, "inside": inside, "outside": outside}, 1)
            faster = dense[min(dense, key=lambda name: before[name][0])]
            found: dict[str, list[dict[str, float]]] = {"dense": [], "sparse": []}
            for _ in range(repeats):
                found["dense"].append(profiled(faster))
                within, without = profiled(inside), profiled(outside)
                extra = share * (sum(within.values()) - sum(without.values()))
                found["sparse"].append({**without, WINDOW_EXTRA: extra})
        for side, every in found.items():
            for part in PARTS:
                values = [parts.get(part, 0.0) for parts in every]
                yield row(f"{side}: {part}", setting, values, "s")
        chosen = [choice for (_, training), choice in sparse.choices.items() if training]
        counted = [float(sum(not choice.sparse for choice in chosen))]
        yield row("layers computed dense, number", setting, counted, f"of {len(chosen)}")
        yield row(CALIBRATION, setting, [_calibration(sparse, outside)], "s")


def _calibration(network: SparseNetwork, step: Callable[[], None]) -> float:
    """Seconds that a step takes longer where no layer's times are known yet."""
    former = os.environ.get("SPARSE_CACHE")
    known, calibrate._memory = calibrate._memory, functools.cache(dict)
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["SPARSE_CACHE"] = folder
            seconds = []
            for _ in range(2):
                network._decided.clear()
                start = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - start)
    finally:
        calibrate._memory = known
        network._decided.clear()
        if former is None:
            del os.environ["SPARSE_CACHE"]
        else:
            os.environ["SPARSE_CACHE"] = former
    return seconds[0] - seconds[1]
