"""Times a sparse layer against torch's dense one, alternating in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lib.kernels import ops
from lib.kernels.blocked import to_blocked
from lib.kernels.library import keep_freed_memory, require


class Layer(NamedTuple):
    """A convolution (a linear layer has kernel 1 and side 1) on square inputs."""

    name: str
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    padding: int
    side: int  # of the input, pixels
    first: bool = False  # needs no input gradient
    repeats: int = 1  # how often a network has it


@dataclass(frozen=True)
class LayerTimes:
    """Times of one layer at one density, milliseconds per mini-batch; each the best of several.

    dense_backward_ms holds both gradients, as torch computes them in one call.
    """

    layer: Layer
    density: float  # realised, 0..1
    channels_last: bool  # memory format in which the dense layer was faster
    forward_ms: float
    backward_input_ms: float  # 0 for a first layer
    backward_weight_ms: float
    dense_forward_ms: float
    dense_backward_ms: float

    @property
    def sparse_ms(self) -> float:
        """Forward plus backward of the sparse layer."""
        return self.forward_ms + self.backward_input_ms + self.backward_weight_ms

    @property
    def dense_ms(self) -> float:
        """Forward plus backward of the dense layer."""
        return self.dense_forward_ms + self.dense_backward_ms

    @property
    def ratio(self) -> float:
        """How many times faster the sparse layer is, forward plus backward."""
        return self.dense_ms / self.sparse_ms


def best_times(
    jobs: Sequence[Callable[[], object]], seconds: float, *, least: int = 3
) -> list[float]:
    """Best time of each job, seconds; the jobs take turns, `least` rounds or more.

    Turns, and the best rather than the mean, keep other processes' load out of the ratio. One
    thread is timed by the processor's seconds, which a loaded machine does not stretch; several by
    the clock, as they wait for each other.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for job in jobs:
        job()  # memory and caches
    best = [float("inf")] * len(jobs)
    start, rounds = clock(), 0
    while rounds < least or clock() - start < seconds:
        for k, job in enumerate(jobs):
            begin = clock()
            job()
            best[k] = min(best[k], clock() - begin)
        rounds += 1
    return best


def dense_jobs(
    layer: Layer, x: Tensor, weight: Tensor, grad: Tensor
) -> tuple[Callable[[], Tensor], Callable[[], object]]:
    """Torch's convolution, forward and backward, on tensors of any memory format."""
    stride, padding = [layer.stride] * 2, [layer.padding] * 2
    wanted = [not layer.first, True, False]

    def forward() -> Tensor:
        return torch.conv2d(x, weight, None, stride, padding)

    def backward() -> object:
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, wanted
        )

    return forward, backward


def sparse_jobs(
    layer: Layer, x: Tensor, pattern: ops.Pattern, grad: Tensor, samples: int
) -> tuple[Callable[[], Tensor], Callable[[], object], Callable[[], object]]:
    """Forward, input gradient and weight gradient of the sparse layer on blocked tensors."""
    values = torch.randn(pattern.nnz)

    def layer_of(x: Tensor, values: Tensor) -> Tensor:
        return ops.conv2d(
            x, values, None, pattern, stride=layer.stride, padding=layer.padding, samples=samples
        )

    def backward_of(leaf: Tensor, y: Tensor) -> Callable[[], object]:
        return lambda: torch.autograd.grad(y, leaf, grad, retain_graph=True)

    # One graph per gradient: a Function computes those of all inputs that require one.
    x_leaf, values_leaf = x.detach().requires_grad_(), values.clone().requires_grad_()
    return (
        lambda: layer_of(x, values),
        backward_of(x_leaf, layer_of(x_leaf, values)),
        backward_of(values_leaf, layer_of(x, values_leaf)),
    )


def time_layer(
    layer: Layer, densities: Iterable[float], *, batch: int, seconds: float, rounds: int
) -> list[LayerTimes]:
    """Times the layer at every density with uniform random masks.

    The dense layer runs in contiguous and in channels-last memory format, and the faster of the
    two counts; both sides reuse freed memory (keep_freed_memory). `seconds` is the time per
    density, `rounds` the least number of turns.

    Raises:
        KernelsUnavailable: the kernels cannot be built here.
    """
    require()
    keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    shape = (layer.out_channels, layer.in_channels, layer.kernel, layer.kernel)
    x = torch.randn(batch, layer.in_channels, layer.side, layer.side)
    weight = torch.randn(shape)
    grad = torch.randn_like(torch.conv2d(x, weight, None, layer.stride, layer.padding))
    dense = [
        job
        for layout in (torch.contiguous_format, torch.channels_last)
        for job in dense_jobs(
            layer, *(t.contiguous(memory_format=layout) for t in (x, weight, grad))
        )
    ]
    blocked, blocked_grad = to_blocked(x), to_blocked(grad)
    found = []
    for density in densities:
        pattern = ops.Pattern(torch.rand(shape, generator=generator) < density)
        sparse = list(sparse_jobs(layer, blocked, pattern, blocked_grad, batch))
        if layer.first:
            del sparse[1]
        times = [1e3 * t for t in best_times([*dense, *sparse], seconds, least=rounds)]
        plain, last, own = times[:2], times[2:4], times[4:]
        channels_last = sum(last) < sum(plain)
        if layer.first:
            own.insert(1, 0.0)
        faster = last if channels_last else plain
        found.append(LayerTimes(layer, pattern.density, channels_last, *own, *faster))
    return found
