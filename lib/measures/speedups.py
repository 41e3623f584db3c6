"""What sparse weights could save: the paper's two estimates, and what is really measured.

The estimates (official code e19ff16, `SparseSpeedupBench`) take the time t of the dense forward
pass of every convolution during training:

- "channel sparse" (the paper's dense convolutions): t * (1 - share of the weight's input channels
  that are empty) * (1 - share of the (sample, input channel) maps that are zero);
- "full sparse" (the paper's sparse convolutions): t * density of the input * density of the weight.

They are idealised: the forward pass of convolutions only, no overhead of sparsity, and zeros that
ReLU or dropout make are credited, so that even a dense network gets a speed-up. Two things of the
official code are not repeated: layers of equal width share one average there, and validation
batches are mixed in; here every convolution, shortcuts included, is a row of its own, and rows can
be left out.

The measurement: the same network with its empty channels taken out (`remove_empty_channels`) on
the clock against the dense one.
"""

from __future__ import annotations

import copy
import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.engines.eager import TorchEngine
from lib.models import MLP, Bottleneck, ConvClassifier, LeNet5, PreActBlock

if TYPE_CHECKING:
    from lib.train import TrainingLoop

SEGMENTS = 10  # of the training; the estimates are means within each, and sums over them
SAMPLES_PER_SEGMENT = 20  # mini-batches looked at; the official code looks at all
ESTIMATES = ("dense_s", "channel_sparse_s", "full_sparse_s")
NETWORK = "network"  # the layer of rows about the whole network
_BATCH = 32  # images of the forward passes on the clock
_FEWEST, _MOST, _SECONDS = 5, 51, 1.0  # of them per network; about so many seconds altogether

# --------------------------------------------------------------------------------------------------
# The measure: estimates during training, the clock afterwards
# --------------------------------------------------------------------------------------------------


def observe_speedups(loop: TrainingLoop) -> Callable[[], list[dict[str, Any]]]:
    """The measure "speedups": convolutions are timed while `loop` trains; rows at the end.

    Per convolution and segment of the training (position): the means over mini-batches of
    ESTIMATES in seconds. At the end, per convolution: `weight_density` and
    `empty_input_channels` (a share). Of the whole network (layer NETWORK): `dense_forward_s` and
    `removed_forward_s`, the median seconds of a forward pass over _BATCH test images in
    evaluation mode before and after the empty channels were taken out; the number of
    `channels`, `removed_channels`, `weights`, `removed_weights` (positions that are gone), and
    `max_difference` of the two outputs, relative to the largest logit.
    """
    # Each layer as its module in each step, whose time is what the paper estimates from.
    loop.use(functools.partial(TorchEngine, graphs=False))
    length = max(1, -(-loop.schedule.total_steps // SEGMENTS))
    stride = max(1, length // SAMPLES_PER_SEGMENT)

    def active() -> bool:
        return loop.model.training and loop.state.step % stride == 0

    def note(name: str, seconds: tuple[float, ...]) -> None:
        segment = loop.state.step // length
        sums = loop.state.observed.setdefault(f"{segment} {name}", [0.0] * (len(seconds) + 1))
        for i, value in enumerate((1.0, *seconds)):
            sums[i] += value

    remove_hooks = _time_convolutions(loop.model, active, note)

    def rows() -> list[dict[str, Any]]:
        remove_hooks()
        lines: list[tuple[str, str, int, float]] = []
        for key, (count, *sums) in loop.state.observed.items():
            segment, name = key.split(" ", 1)
            for quantity, total in zip(ESTIMATES, sums, strict=True):
                lines.append((name, quantity, int(segment), total / count))
        for name, module in loop.model.named_modules():
            if isinstance(module, nn.Conv2d):
                weight = module.weight.detach()
                lines.append((name, "weight_density", 0, _density(weight)))
                lines.append((name, "empty_input_channels", 0, _empty_inputs(weight)))
        lines += [(NETWORK, quantity, 0, value) for quantity, value in _on_the_clock(loop)]
        names = ("layer", "quantity", "position", "value")
        common = {"run_id": loop.run.run_id, "measure": "speedups"}
        return [common | dict(zip(names, line, strict=True)) for line in lines]

    return rows


def _time_convolutions(
    model: nn.Module, active: Callable[[], bool], note: Callable[[str, tuple[float, ...]], None]
) -> Callable[[], None]:
    """Hook every convolution: note(name, seconds as in ESTIMATES) whenever active()."""
    started: dict[str, float] = {}
    handles = []

    def clock(device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def hooks(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(module: nn.Module, inputs: tuple[Tensor]) -> None:
            if active():
                started[name] = clock(inputs[0].device)

        def after(module: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
            if name in started:
                seconds = clock(output.device) - started.pop(name)
                weight, x = module.weight.detach(), inputs[0].detach()
                note(name, (seconds, *estimates(seconds, weight, x)))

        return before, after

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            before, after = hooks(name)
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def estimates(seconds: float, weight: Tensor, x: Tensor) -> tuple[float, float]:
    """("channel sparse", "full sparse") seconds of one convolution; see the head of this file.

    `weight` [outputs, inputs, k, k], `x` [samples, inputs, height, width].
    """
    empty_maps = 1 - float(x.flatten(2).any(2).float().mean())
    channel = seconds * (1 - _empty_inputs(weight)) * (1 - empty_maps)
    return channel, seconds * _density(x) * _density(weight)


def _density(values: Tensor) -> float:
    return int(values.count_nonzero()) / values.numel()


def _empty_inputs(weight: Tensor) -> float:
    """Share of the input channels whose weights are all zero."""
    return 1 - float(_connected(weight, weight.shape[1]).any(0).float().mean())


def _on_the_clock(loop: TrainingLoop) -> list[tuple[str, float]]:
    # One memory layout for both, or the clock would measure the layouts.
    dense = copy.deepcopy(loop.model).eval().to(memory_format=torch.contiguous_format)
    images = loop.data.test_x[:_BATCH].contiguous()
    small, gone = remove_empty_channels(dense, images[:1])
    with torch.no_grad():
        expected, got = dense(images), small(images)
    difference = float((expected - got).abs().max() / expected.abs().max().clamp_min(1e-30))
    seconds = time_in_turns([dense, small], images)
    return [
        ("dense_forward_s", seconds[0]),
        ("removed_forward_s", seconds[1]),
        ("channels", gone.channels),
        ("removed_channels", gone.removed_channels),
        ("weights", gone.weights),
        ("removed_weights", gone.removed_weights),
        ("max_difference", difference),
    ]


@torch.no_grad()
def time_in_turns(models: list[nn.Module], images: Tensor) -> list[float]:
    """Median seconds of a forward pass of each model over `images`, run in turns.

    In turns, so that whatever else slows the machine meets all of them; on the CPU with one thread.
    """
    threads = torch.get_num_threads()
    times: list[list[float]] = [[] for _ in models]
    torch.set_num_threads(1)
    try:
        begun = time.perf_counter()
        for repetition in range(-2, _MOST):  # the first two warm up
            if repetition >= _FEWEST and time.perf_counter() - begun > _SECONDS:
                break
            for model, seconds in zip(models, times, strict=True):
                started = time.perf_counter()
                model(images)
                if images.is_cuda:
                    torch.cuda.synchronize(images.device)
                if repetition >= 0:
                    seconds.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
    return [median(seconds) for seconds in times]


# --------------------------------------------------------------------------------------------------
# Taking empty channels out
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Removed:
    """Hidden channels and units that could be taken out, those that were; weights likewise."""

    channels: int
    removed_channels: int
    weights: int
    removed_weights: int


class ConvPlusMap(nn.Module):
    """A convolution plus a fixed map [1, outputs, height, width]: what removed channels with a
    constant output contributed. At the padded borders that is no constant, so a bias won't do.
    """

    def __init__(self, conv: nn.Conv2d, constant: Tensor) -> None:
        super().__init__()
        self.conv = conv
        self.register_buffer("constant", constant)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W']."""
        return self.conv(x) + self.constant


def chains(model: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    """The runs of modules, in the order of the forward pass, whose hidden channels belong to them
    alone: the whole network, or in residual networks each block's branch. The channels of the
    residual stream are shared by all blocks of a stage and stay.

    Raises TypeError for a network that isn't one of lib/models.py.
    """
    named = dict(model.named_modules())

    def listed(*names: str) -> list[tuple[str, nn.Module]]:
        return [(name, named[name]) for name in names if name in named]

    if isinstance(model, ConvClassifier):
        inner = [n for n in named if n.startswith(("features.", "classifier."))]
        return [listed(*inner)]
    if isinstance(model, LeNet5):
        return [listed("conv1", "pool1", "relu1", "conv2", "pool2", "relu2", "fc3", "relu3", "fc4")]
    if isinstance(model, MLP):
        return [listed(*(name for name in named if name))]
    found = []
    for name, module in named.items():
        if isinstance(module, PreActBlock):
            found.append(
                [f"{name}.{part}" for part in ("conv1", "bn2", "relu2", "dropout", "conv2")]
            )
        elif isinstance(module, Bottleneck):
            parts = ("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3")
            found.append([f"{name}.{part}" for part in parts])
    if not found:
        raise TypeError(f"no rule for the channels of {type(model).__name__}: add one to chains()")
    return [listed(*names) for names in found]


@torch.no_grad()
def remove_empty_channels(model: nn.Module, example: Tensor) -> tuple[nn.Module, Removed]:
    """A smaller network with the same output in evaluation mode, and what went.

    A hidden channel goes when all its incoming weights are zero (its output is then a constant,
    which is folded into the next layer) or when nothing reads it. `example` [1, ...] is an input;
    its size fixes that of the folded maps. The model given isn't changed.
    """
    small = copy.deepcopy(model).eval()
    sizes = _input_sizes(small, example)
    channels = removed = 0
    for chain in chains(small):
        layers = [i for i, (_, m) in enumerate(chain) if isinstance(m, nn.Conv2d | nn.Linear)]
        modules = [chain[i][1] for i in layers]
        between = [chain[a + 1 : b] for a, b in itertools.pairwise(layers)]
        keep, value = _what_stays(modules, [[m for _, m in part] for part in between])
        for part, kept in zip(between, keep, strict=True):
            for name, module in part:
                if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                    _replace(small, name, _narrow_norm(module, kept))
        for k, i in enumerate(layers):
            name = chain[i][0]
            inputs = (keep[k - 1], value[k - 1]) if k else None
            outputs = keep[k] if k < len(keep) else None
            _replace(small, name, _narrow_layer(modules[k], inputs, outputs, sizes.get(name)))
        channels += sum(kept.numel() for kept in keep)
        removed += sum(int((~kept).sum()) for kept in keep)
    weights = _weights(model)
    return small, Removed(channels, removed, weights, weights - _weights(small))


def _what_stays(
    layers: list[nn.Module], between: list[list[nn.Module]]
) -> tuple[list[Tensor], list[Tensor]]:
    """For each hidden link of a chain: bool [channels] of those kept, and float [channels], the
    value the next layer sees of a channel that goes (0 where nothing reads it).
    """
    constants: list[Tensor] = []
    values: list[Tensor] = []
    for k, part in enumerate(between):
        reads = _reads(layers[k], values[-1].numel() if values else None)
        if values:  # a channel that is always zero says nothing
            reads = reads & ~(constants[-1] & (values[-1] == 0))
        constants.append(~reads.any(1))
        values.append(_through(part, _bias(layers[k])))
    keep: list[Tensor] = [torch.empty(0)] * len(between)
    for k in reversed(range(len(between))):
        reads = _reads(layers[k + 1], values[k].numel())
        if k + 1 < len(between):
            reads = reads[keep[k + 1]]
        read = reads.any(0)
        kept = read & ~constants[k]
        if not kept.any():  # a layer of width 0 can't be built
            kept = torch.arange(kept.numel(), device=kept.device) == 0
        values[k] = torch.where(constants[k] & read & ~kept, values[k], 0.0)
        keep[k] = kept
    return keep, values


def _connected(weight: Tensor, inputs: int) -> Tensor:
    """Bool [outputs, input channels]: is any weight between the two not zero?"""
    return weight.reshape(weight.shape[0], inputs, -1).any(2)


def _reads(layer: nn.Module, channels: int | None) -> Tensor:
    """`_connected` of a layer; behind a flattening, several columns belong to one channel."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return _connected(weight, channels or weight.shape[1])


def _bias(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    return weight.new_zeros(weight.shape[0]) if bias is None else bias.detach()


def _through(part: list[nn.Module], value: Tensor) -> Tensor:
    """Constant channels [channels] through what stands between two layers, in evaluation mode."""
    for module in part:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            mean, variance = module.running_mean, module.running_var
            value = F.batch_norm(
                value[None], mean, variance, module.weight, module.bias, eps=module.eps
            )[0]
        elif isinstance(module, nn.ReLU):
            value = value.relu()
        elif not isinstance(module, nn.MaxPool2d | nn.Dropout):  # these keep constants
            raise TypeError(f"no rule for a constant through {type(module).__name__}")
    return value


def _narrow_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d, keep: Tensor) -> nn.Module:
    narrow = type(norm)(int(keep.sum()), eps=norm.eps, momentum=norm.momentum)
    narrow = narrow.to(keep.device, norm.weight.dtype)
    for name, tensor in norm.state_dict().items():
        narrow.state_dict()[name].copy_(tensor[keep] if tensor.dim() else tensor)
    return narrow.eval()


def _narrow_layer(
    layer: nn.Module,
    inputs: tuple[Tensor, Tensor] | None,
    outputs: Tensor | None,
    size: tuple[int, ...] | None,
) -> nn.Module:
    """A convolution or linear layer with the kept outputs and inputs; constants folded in."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    bias = _bias(layer)
    if outputs is not None:
        weight, bias = weight[outputs], bias[outputs]
    constant: Tensor | None = None
    has_bias = layer.bias is not None
    if inputs is not None:
        keep, value = inputs
        factor = weight.shape[1] // keep.numel()
        columns, filled = keep.repeat_interleave(factor), value.repeat_interleave(factor)
        if value.any() and isinstance(layer, nn.Linear):
            bias, has_bias = bias + weight @ filled, True
        elif value.any() and isinstance(layer, nn.Conv2d) and size is not None:
            maps = filled.view(1, -1, 1, 1).expand(1, -1, *size[2:])
            constant = F.conv2d(maps, weight, None, layer.stride, layer.padding, layer.dilation)
        weight = weight[:, columns]
    narrow: nn.Conv2d | nn.Linear
    if isinstance(layer, nn.Conv2d):
        narrow = nn.Conv2d(
            weight.shape[1],
            weight.shape[0],
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            bias=has_bias,
            device=weight.device,
            dtype=weight.dtype,
        )
    else:
        narrow = nn.Linear(weight.shape[1], weight.shape[0], bias=has_bias).to(weight)
    narrow.weight.copy_(weight)
    if narrow.bias is not None:
        narrow.bias.copy_(bias)
    if constant is not None and isinstance(narrow, nn.Conv2d):
        return ConvPlusMap(narrow, constant)
    return narrow


def _input_sizes(model: nn.Module, example: Tensor) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the input of every convolution."""
    sizes: dict[str, tuple[int, ...]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: sizes.__setitem__(name, tuple(inputs[0].shape))
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    model(example)
    for handle in handles:
        handle.remove()
    return sizes


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)
