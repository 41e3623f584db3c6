"""What is measured on a network while and after it is trained: its features, its speed-ups.

A measure is called before training and returns a function that is called on the finished network
and gives its rows (MEASURE_COLUMNS in lib/results/store.py).  Experiments name those they need.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lib.engine import TorchEngine
from lib.start import stream

if TYPE_CHECKING:
    from lib.train import Measure, TrainingLoop

Rows = list[dict[str, Any]]
Line = tuple[str, str, int, float]  # layer, quantity, position, value

# The bins of the paper's histograms: 49 between 0.09 and 0.51.
BIN_EDGES = np.linspace(0.09, 0.51, 50)
LOW_TAIL = 0.05  # share of a layer's contributions that comes from channels left out
_BATCH = 500

SEGMENTS = 10  # of the training; the estimates are means within each, and sums over them
SAMPLES_PER_SEGMENT = 20  # mini-batches looked at; the official code looks at all
ESTIMATES = ("dense_s", "channel_sparse_s", "full_sparse_s")


def _rows(loop: TrainingLoop, measure: str, lines: Iterable[Line]) -> Rows:
    names = ("run_id", "measure", "layer", "quantity", "position", "value")
    return [dict(zip(names, (loop.run.run_id, measure, *line), strict=True)) for line in lines]


# ---------------------------------------------------------------------------------------- features


def observe_features(loop: TrainingLoop) -> Callable[[], Rows]:
    """How specialised channels are (official code e19ff16, `plot_class_feature_histograms`):
    nothing during training; rows of the finished network.

    One layer per ReLU with an output [N, C, H, W], in the order of the forward pass, named by its
    module; the 24 of WRN-28-2 in the paper are those of the blocks, without the last one.  Per
    layer: `channels`, `kept` (after the low tail went), `sum` and `sum_of_squares` of
    `class_specialisation` over the kept channels, `histogram` (position: bin of BIN_EDGES; empty
    bins are left out) and `above` (kept channels beyond the last edge, which the paper's figures
    don't show).
    """

    def rows() -> Rows:
        loop.augment_stream = stream(loop.run, "measure", device=loop.device)  # the run has ended
        indices = torch.arange(len(loop.data.train_y), device=loop.device).split(_BATCH)
        batches, classes = map(loop.batch, indices), int(loop.data.train_y.max()) + 1
        lines: list[Line] = []
        for layer, total in class_contributions(loop.model, batches, classes).items():
            values = class_specialisation(total.cpu().numpy())
            numbers = {"channels": len(total), "kept": len(values), "sum": values.sum()}
            numbers["sum_of_squares"] = (values**2).sum()
            numbers["above"] = (values > BIN_EDGES[-1]).sum()
            counts, _ = np.histogram(values, BIN_EDGES)
            lines += [(layer, name, 0, float(value)) for name, value in numbers.items()]
            lines += [(layer, "histogram", i, float(n)) for i, n in enumerate(counts) if n]
        return _rows(loop, "features", lines)

    return rows


@torch.no_grad()
def class_contributions(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int
) -> dict[str, Tensor]:
    """Per ReLU layer with feature maps: float64 [channels, classes], the sum of |feature map| over
    the images of the class and over space.

    `batches` yields images [N, ...] and labels [N] on the model's device.  The model is run in
    evaluation mode and left in it.
    """
    found: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.dim() == 4:
            maps = output.abs().sum(dim=(2, 3), dtype=torch.float64)  # [N, C]
            total = found.setdefault(name, maps.new_zeros(num_classes, maps.shape[1]))
            total.index_add_(0, labels, maps)

    handles = [
        module.register_forward_hook(functools.partial(note, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.ReLU)
    ]
    model.eval()
    for images, labels in batches:  # noqa: B007  `note` reads the labels
        model(images)
    for handle in handles:
        handle.remove()
    return {name: total.T for name, total in found.items()}


def class_specialisation(contribution: np.ndarray) -> np.ndarray:
    """The share of each kept channel's largest class, in the channels' order: 1 / classes for a
    perfectly general channel, 1 for one that answers to a single class.

    `contribution` [channels, classes], not negative.  The channels with the smallest totals are
    left out as long as they make up at most LOW_TAIL of the layer's total together; so are dead
    ones.  An empty array for a layer without any activation.
    """
    totals = contribution.sum(1)
    if totals.sum() == 0:
        return np.empty(0)
    order = np.argsort(totals, kind="stable")
    tail = order[np.cumsum(totals[order]) <= LOW_TAIL * totals.sum()]
    kept = np.setdiff1d(np.flatnonzero(totals), tail)
    return contribution[kept].max(1) / totals[kept]


# --------------------------------------------------------------------------------------- speed-ups


def observe_speedups(loop: TrainingLoop) -> Callable[[], Rows]:
    """What sparse weights could save by the paper's two estimates (official code e19ff16,
    `SparseSpeedupBench`): every convolution's forward pass, in a copy of the network, is timed at
    some mini-batches while `loop` trains.

    The estimates are idealised: no overhead of sparsity, and zeros that ReLU or dropout make are
    credited, so that even a dense network gets a speed-up.  Two things of the official code are
    not repeated: layers of equal width share one average there, and validation batches are mixed
    in; here every convolution, shortcuts included, has rows of its own.

    Per convolution and segment of the training (position): the means over mini-batches of
    ESTIMATES in seconds.  At the end, per convolution: `weight_density` and
    `empty_input_channels` (a share).
    """
    if loop.run.precision == "bf16":  # its kernels keep the weights to themselves
        loop.engine = TorchEngine(loop.task)
    length = math.ceil(loop.schedule.total_steps / SEGMENTS)
    stride = max(1, length // SAMPLES_PER_SEGMENT)
    convolutions = {n: m for n, m in loop.model.named_modules() if isinstance(m, nn.Conv2d)}
    batch, devices = loop.task.batch, [loop.device] if loop.device.type == "cuda" else []

    def observed(index: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = batch(index)
        if loop.state.step % stride == 0:
            with torch.no_grad(), torch.random.fork_rng(devices):
                look(images)
        return images, labels

    def look(images: Tensor) -> None:
        """On a copy, so that measuring changes neither the run nor what computes it."""
        probe = copy.deepcopy(loop.model).to(memory_format=torch.channels_last)
        for name in convolutions:
            module: Any = probe.get_submodule(name)
            module.forward = functools.partial(timed, name, module.forward, module.weight)
        with torch.autocast(loop.device.type, torch.bfloat16, loop.run.precision == "bf16"):
            probe(images)

    def timed(name: str, forward: Callable[..., Tensor], weight: Tensor, x: Tensor) -> Tensor:
        start, y = _clock(x.device), forward(x)
        seconds = _clock(x.device) - start
        key = f"{loop.state.step // length} {name}"
        sums = loop.state.observed.setdefault(key, [0.0] * (1 + len(ESTIMATES)))
        more = (1.0, seconds, *estimates(seconds, weight, x))
        sums[:] = (a + b for a, b in zip(sums, more, strict=True))
        return y

    loop.task.batch = observed

    def rows() -> Rows:
        lines: list[Line] = []
        for key, (count, *sums) in loop.state.observed.items():
            segment, name = key.split(" ", 1)
            means = zip(ESTIMATES, sums, strict=True)
            lines += [(name, quantity, int(segment), total / count) for quantity, total in means]
        for name, module in convolutions.items():
            lines.append((name, "weight_density", 0, _density(module.weight)))
            lines.append((name, "empty_input_channels", 0, _empty_inputs(module.weight)))
        return _rows(loop, "speedups", lines)

    return rows


def estimates(seconds: float, weight: Tensor, x: Tensor) -> tuple[float, float]:
    """The paper's two estimates of one convolution, in seconds, from those of its dense forward
    pass.

    "Channel sparse" (the paper's dense convolutions) multiplies by the share of the weight's input
    channels that aren't empty and by that of the (sample, input channel) maps that aren't zero;
    "full sparse" by the density of the input and of the weight.  `weight` [outputs, inputs, k, k],
    `x` [samples, inputs, height, width].
    """
    empty_maps = 1 - float(x.flatten(2).any(2).float().mean())
    channel = seconds * (1 - _empty_inputs(weight)) * (1 - empty_maps)
    return channel, seconds * _density(x) * _density(weight)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _density(values: Tensor) -> float:
    return int(values.count_nonzero()) / values.numel()


def _empty_inputs(weight: Tensor) -> float:
    """Share of the input channels whose weights are all zero."""
    return 1 - float(weight.flatten(2).any(2).any(0).float().mean())


MEASURES: dict[str, Measure] = {"features": observe_features, "speedups": observe_speedups}
