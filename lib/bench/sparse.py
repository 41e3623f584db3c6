"""What sparse training gains on the clock: topics of `python -m lib bench` (lib/bench/speed.py).

Every topic yields rows; those of whole networks have the setting "<model>, <weights> %, batch <n>".
"""

from __future__ import annotations

import copy
import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lib import train
from lib.bench import kernels as layers
from lib.bench.timing import Row, forward_backward, in_turn, ratios, row
from lib.config import Run
from lib.data import Dataset
from lib.engines import calibrate
from lib.engines.network import SparseNetwork, dense_window, sparse_network
from lib.engines.optimizer import SparseSGD
from lib.kernels import keep_freed_memory
from lib.results.clock import (
    ALL_LAYERS,
    CALIBRATION,
    CONVERSIONS,
    DENSE_LAYERS,
    ELEMENTWISE,
    FLOPS,
    KERNELS,
    OPTIMIZER,
    PARTS,
    RATIOS,
    REST,
    SECONDS,
    SPARSE_LAYERS,
    WINDOW_EXTRA,
    setting_of,
)
from lib.train import TrainingLoop

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
NETWORKS = {"alexnet-s": 128, "vgg16-d": 128, "wrn-16-8": 128}  # with the batch size
WINDOWS = (44, 88, 153)  # mini-batches: 0.9^K is 1e-2, 1e-4, 1e-7
STEPS_PER_EPOCH = 352  # CIFAR-10, batches of 128
# The masks that are timed: updates, mini-batches between them, images of each.
UPDATES, MINI_BATCHES, MASK_BATCH = 3, 8, 32


def sparse_layers(repeats: int) -> Iterator[Row]:
    """VGG16-D's convolutions, forward and backward, uniform random masks, batch 128, all threads:
    torch's dense fp32 over the sparse kernels.
    """
    _all_threads()
    for density in DENSITIES:
        rows = layers.bench_layers(densities=(density,), seconds=0.0, rounds=repeats)
        setting = f"vgg16-d, {100 * density:g} %"
        total = layers.total_ratio(rows)
        yield row(ALL_LAYERS, setting, [total], "x")
        for line in rows:
            yield row(line.layer, setting, [line.ratio], "x")


# --------------------------------------------------------------------------------------------------
# Whole steps
# --------------------------------------------------------------------------------------------------


def sparse_steps(
    repeats: int,
    networks: Sequence[str] = tuple(NETWORKS),
    densities: Sequence[float] = DENSITIES,
) -> Iterator[Row]:
    """Whole training steps and inference, masks moved by sparse momentum itself on CIFAR-10, all
    threads: dense over sparse, where each layer runs the faster way.

    In the last K steps before an update the weight gradients are dense (`dense_window`); an epoch
    has 352 steps, so K of 352 cost that and the others the fast step.
    """
    _all_threads()
    keep_freed_memory()
    for model in networks:
        for density in densities:
            yield from _steps_of(model, density, NETWORKS[model], repeats, time.perf_counter)


def one_thread(
    repeats: int,
    networks: Sequence[str] = tuple(NETWORKS),
    densities: Sequence[float] = DENSITIES,
) -> Iterator[Row]:
    """The same as `sparse_steps` in seconds of the processor with one thread, as the runner trains
    (one run per core): other processes hardly change it, and on an idle core it is the clock's.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    for model in networks:
        for density in densities:
            yield from _steps_of(model, density, NETWORKS[model], repeats, time.process_time)


def _steps_of(
    model: str, density: float, batch: int, repeats: int, clock: Callable[[], float]
) -> Iterator[Row]:
    loop = after_updates(model, density)
    images, labels = loop._batch(torch.arange(batch))
    share = min(1.0, dense_window(loop.run.momentum) / STEPS_PER_EPOCH)
    variants: dict[str, Callable[[], None]] = {}
    for name, layout, low in (
        ("contiguous", torch.contiguous_format, False),
        ("channels last", torch.channels_last, False),
        ("bf16", torch.channels_last, True),
    ):
        network = copy.deepcopy(loop.model).to(memory_format=layout)
        batch_of = images.contiguous(memory_format=layout)
        variants[name] = training_step(network, batch_of, labels, low)
        variants[f"{name}, inference"] = inference(network, batch_of, low)
    sparse = sparse_network(loop.model, loop.masking.masks)
    sgd = SparseSGD(sparse, loop.optimizer, loop.masking)
    for name, window in (("outside", False), ("inside", True)):
        step = training_step(sparse, images, labels, False, sgd)
        variants[name] = functools.partial(_with_window, sparse, window, step)
    variants["sparse, inference"] = inference(sparse, images)
    with train.flushed_denormals():
        times = in_turn(variants, repeats, clock)
    dense = list(map(min, times["contiguous"], times["channels last"]))
    passes = list(map(min, times["contiguous, inference"], times["channels last, inference"]))
    bf16 = times["bf16"]
    whole = [
        share * a + (1 - share) * b for a, b in zip(times["inside"], times["outside"], strict=True)
    ]
    setting = setting_of(model, density, batch)
    flops = loop._flops_rel(loop.masking.active())
    chosen = [choice.sparse for (_, training), choice in sparse.choices.items() if training]
    yield row(FLOPS, setting, [100 * flops], "%")
    yield row(SPARSE_LAYERS, setting, [float(sum(chosen))], f"of {len(chosen)}")
    for what, slow, fast in (
        (RATIOS["training"], dense, whole),
        (RATIOS["outside"], dense, times["outside"]),
        (RATIOS["inside"], dense, times["inside"]),
        (RATIOS["inference"], passes, times["sparse, inference"]),
        (RATIOS["bf16_over_sparse"], bf16, whole),
        (
            RATIOS["bf16_inference_over_sparse"],
            times["bf16, inference"],
            times["sparse, inference"],
        ),
        (RATIOS["bf16"], dense, bf16),
        (RATIOS["bf16_inference"], passes, times["bf16, inference"]),
    ):
        yield row(what, setting, ratios(slow, fast), "x")
    for what, seconds in (
        (SECONDS["dense_s"], dense),
        (SECONDS["bf16_s"], bf16),
        (SECONDS["sparse_s"], whole),
        (SECONDS["outside_s"], times["outside"]),
        (SECONDS["inside_s"], times["inside"]),
        (SECONDS["dense_inference_s"], passes),
        (SECONDS["bf16_inference_s"], times["bf16, inference"]),
        (SECONDS["sparse_inference_s"], times["sparse, inference"]),
    ):
        yield row(what, setting, seconds, "s")


def after_updates(
    model: str,
    density: float,
    updates: int = UPDATES,
    mini_batches: int = MINI_BATCHES,
    batch: int = MASK_BATCH,
) -> TrainingLoop:
    """A network whose masks sparse momentum has moved `updates` times on CIFAR-10, ready for the
    sparse kernels.

    It was trained by torch, so that every step has the gradients of all inactive weights, as the
    steps before an update have in a long run.
    """
    run = Run(
        dataset="cifar10",
        model=model,
        density=density,
        batch_size=batch,
        update_every_steps=mini_batches,
        kernels="torch",
    )
    loop = TrainingLoop(run)
    order = loop._order().split(batch)
    with train.flushed_denormals():
        for index in order[: updates * mini_batches]:
            loop.step(index)
    # The kernels' memory format, in which a training loop that uses them has everything.
    loop.format = torch.contiguous_format
    loop.model.to(memory_format=loop.format)
    for state in loop.optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].contiguous()
    loop.masking.masks = {name: mask.contiguous() for name, mask in loop.masking.masks.items()}
    return loop


def training_step(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    low: bool,
    sparse_sgd: SparseSGD | None = None,
) -> Callable[[], None]:
    """Forward, backward, and the step of the optimizer: that of sparse layers, masks included, or
    torch's.
    """
    step_weights = (
        sparse_sgd.step
        if sparse_sgd is not None
        else torch.optim.SGD(
            list(network.parameters()),
            lr=1e-3,
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
            fused=True,
        ).step
    )
    once = forward_backward(network, images, labels, low)

    def step() -> None:
        network.train()
        once()
        with torch.profiler.record_function(STEP_WEIGHTS):
            step_weights()

    return step


def _with_window(network: SparseNetwork, window: bool, step: Callable[[], None]) -> None:
    network.dense_gradients = window
    step()


def inference(network: nn.Module, images: Tensor, low: bool = False) -> Callable[[], None]:
    """A forward pass in evaluation mode."""

    def infer() -> None:
        network.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            network(images)

    return infer


# --------------------------------------------------------------------------------------------------
# Where the time goes
# --------------------------------------------------------------------------------------------------

STEP_WEIGHTS = "step of the weights"  # an event of our own: sparse steps have none of torch's
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
    _all_threads()
    keep_freed_memory()
    share = min(1.0, dense_window(Run().momentum) / STEPS_PER_EPOCH)
    for model in networks:
        batch = NETWORKS[model]
        setting = setting_of(model, 0.05, batch)
        loop = after_updates(model, 0.05)
        images, labels = loop._batch(torch.arange(batch))
        sparse = sparse_network(loop.model, loop.masking.masks)
        dense = {}
        for layout in (torch.contiguous_format, torch.channels_last):
            network = copy.deepcopy(loop.model).to(memory_format=layout)
            batch_of = images.contiguous(memory_format=layout)
            dense[str(layout)] = training_step(network, batch_of, labels, False)
        sgd = SparseSGD(sparse, loop.optimizer, loop.masking)
        step = training_step(sparse, images, labels, False, sgd)
        outside = functools.partial(_with_window, sparse, False, step)
        inside = functools.partial(_with_window, sparse, True, step)
        with train.flushed_denormals():
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


# --------------------------------------------------------------------------------------------------
# The dense window
# --------------------------------------------------------------------------------------------------


class WindowedMomentum:
    """The momentum of inactive weights that saw only the last K mini-batches before an update.

    SGD's buffer with momentum a and gradients g_t is m_T = sum over t of a^(T - t) g_t (weight
    decay adds a * weight to the gradient, which is zero for an inactive weight). Cut off after K
    steps it misses a^K m_(T - K). Active weights keep theirs: the masks differ only in what grows.
    """

    def __init__(self, loop: TrainingLoop, window: int) -> None:
        self.loop, self.window = loop, window
        self.gathered: dict[str, Tensor] = {}

    def after_step(self, left: float) -> None:
        """After the mini-batch `left` - 1 before the update; reads its dense gradients."""
        if left > self.window:
            return
        if left == self.window:
            self.gathered.clear()
        for name, parameter in self.loop.masking.parameters.items():
            assert parameter.grad is not None
            if name in self.gathered:
                self.gathered[name].mul_(self.loop.run.momentum).add_(parameter.grad)
            else:
                self.gathered[name] = parameter.grad.clone()

    def buffers(self) -> dict[str, Tensor]:
        """What the optimizer would hold: all of the momentum of active weights, and the windowed
        one of inactive weights.
        """
        masking = self.loop.masking
        return {
            name: torch.where(masking.masks[name], _buffer(self.loop, name), self.gathered[name])
            for name in masking.parameters
        }


def _buffer(loop: TrainingLoop, name: str) -> Tensor:
    return loop.optimizer.state[loop.masking.parameters[name]]["momentum_buffer"]


@torch.no_grad()
def updated_masks(
    loop: TrainingLoop, buffers: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], int]:
    """The masks that an update now would give, with these momentum buffers in place of the
    optimizer's, and how many positions it would grow; the run itself stays as it is.
    """
    masking = loop.masking
    saved = masking.state_dict()
    weights = {name: p.detach().clone() for name, p in masking.parameters.items()}
    own = {name: _buffer(loop, name) for name in masking.parameters}
    try:
        for name, parameter in masking.parameters.items():
            if buffers is not None:
                loop.optimizer.state[parameter]["momentum_buffer"] = buffers[name]
        grown = sum(line.grown for line in masking.update())
        return {name: mask.clone() for name, mask in masking.masks.items()}, grown
    finally:
        masking.load_state_dict(saved)
        for name, parameter in masking.parameters.items():
            loop.optimizer.state[parameter]["momentum_buffer"] = own[name]
            parameter.copy_(weights[name])


def window_differences(
    run: Run,
    updates: int,
    windows: Sequence[int] = WINDOWS,
    dataset: Dataset | None = None,
) -> Iterator[tuple[int, int, dict[int, int], TrainingLoop]]:
    """Train by full tracking; at each update, by the masks of each window K beside: (update from 1,
    grown positions, K -> grown positions that differ, the loop).

    All masks come from the same weights and the same gradients: two separate runs would drift
    apart by rounding at the kinks of ReLU, whatever the window.

    Raises:
        ValueError: an epoch has no more mini-batches than the longest window.
    """
    loop = TrainingLoop(replace(run, kernels="torch", epochs=updates + 1), dataset)
    if loop.steps_per_epoch <= max(windows):
        raise ValueError(
            f"an epoch has {loop.steps_per_epoch} mini-batches, but must have more than the "
            f"window of {max(windows)}: take more images or smaller batches"
        )
    every = [WindowedMomentum(loop, window) for window in windows]
    with loop._dropout_stream(), train.flushed_denormals():
        for update in range(1, updates + 1):
            loop.model.train()
            loss = 0.0
            for index in loop._order().split(run.batch_size):
                left = loop._until_update()
                loss += float(loop.step(index)) * len(index)
                for one in every:
                    one.after_step(left)
            masks, grown = updated_masks(loop)
            differing = {}
            for one in every:
                others, _ = updated_masks(loop, one.buffers())
                differing[one.window] = sum(
                    int((mask & ~others[name]).sum()) for name, mask in masks.items()
                )
            loop._end_epoch(loss)
            if not all(torch.equal(loop.masking.masks[name], masks[name]) for name in masks):
                raise RuntimeError("the update did not give the masks that were compared")
            yield update, grown, differing, loop


WINDOW_RUNS = {
    "lenet300-100": Run(),
    "alexnet-s": Run(dataset="cifar10", model="alexnet-s", batch_size=64, train_samples=14_300),
}


def window(repeats: int, networks: Sequence[str] = tuple(WINDOW_RUNS)) -> Iterator[Row]:
    """The dense window against full tracking in the same trajectory, five updates: grown positions
    that differ, forward FLOPs of the masks, and the training FLOPs of both. Counts, not times.

    LeNet-300-100: all of MNIST; AlexNet-s: 14,300 images of CIFAR-10, 224 mini-batches of 64.
    """
    del repeats  # the same bits each time
    _all_threads()
    keep_freed_memory()
    for model in networks:
        run = WINDOW_RUNS[model]
        setting = setting_of(model, run.density, run.batch_size)
        active: dict[str, int] = {}
        for update, grown, differing, loop in window_differences(run, 5):
            at = f"update {update}"
            yield row(f"grown positions, {at}", setting, [float(grown)], "")
            for k, count in differing.items():
                yield row(f"differing positions, K = {k}, {at}", setting, [float(count)], "")
            active = loop.masking.active()
            flops = 100 * loop._flops_rel(active)
            yield row(f"forward FLOPs of the masks, {at}", setting, [flops], "%")
        data, steps = loop.data, loop.steps_per_epoch
        yield row("mini-batches between updates", setting, [float(steps)], "")
        full = 100 * loop._train_flops_rel(active)
        yield row("training FLOPs, full tracking", setting, [full], "% of dense")
        for k in WINDOWS:
            other = TrainingLoop(replace(run, dense_window_steps=k), data)
            flops = 100 * other._train_flops_rel(active)
            yield row(f"training FLOPs, K = {k}", setting, [flops], "% of dense")


def _all_threads() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
