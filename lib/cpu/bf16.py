"""Trains a network in bfloat16 over its non-zero weights, every layer through lib/cpu/bf16.cpp.

Activations and their gradients stay in one layout, `Lines`: no conversion between layers. Weights,
momentum and sums are fp32. A sparse layer keeps its weights and momentum as [nnz].
"""

from __future__ import annotations

import ctypes
import functools
from collections import namedtuple
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib.cpu.library import KernelsUnavailable, build, cpu_id, passed

Shape = tuple[int, int, int]
LINE = 64  # bytes: 32 samples of one pixel
AHEAD = 6  # entries that bf16.cpp prefetches beyond the last
# Up to these densities masked convolutions and linear layers are computed over their non-zeros,
# where dense products go through AMX (for which a linear layer's weights take long to pack) and
# where not. A rule and no measurement: the same on every machine of a kind.
SPARSE_UP_TO = {True: (0.08, 0.3), False: (0.4, 0.4)}
L1 = 32 * 1024


@functools.cache
def _library() -> ctypes.CDLL:
    """The kernels; KernelsUnavailable where there are none."""
    if "avx512_bf16" not in cpu_id():
        raise KernelsUnavailable("this processor has no AVX-512 with bfloat16")
    here = Path(__file__).resolve().parent
    try:
        return ctypes.CDLL(str(build(sources=(here / "bf16.hpp", here / "bf16.cpp"))))
    except OSError as error:
        raise KernelsUnavailable(str(error)) from error


def available() -> bool:
    """Whether the kernels work here (compiling them on the first call)."""
    try:
        return _library() is not None
    except KernelsUnavailable:
        return False


def tiles() -> ctypes.c_bool:
    """The kernels' switch for dense products by AMX: on from the start where the system has it."""
    return ctypes.c_bool.in_dll(_library(), "bf16_tiles")


def call(name: str, *arguments: Any) -> None:
    """One kernel, with torch's number of threads; see `passed`."""
    getattr(_library(), f"bf16_{name}")(*map(passed, (*arguments, torch.get_num_threads())))


class Lines:
    """A tensor [N, C, H, W] as [N/32][C][H + 2 halo][W + 2 halo][32] in bfloat16, border zero.

    `data`: that of other Lines without a border, to see them in another shape.
    """

    def __init__(
        self, blocks: int, shape: Shape, halo: int = 0, data: Tensor | None = None
    ) -> None:
        self.shape, self.halo, self.blocks = shape, halo, blocks
        channels, height, width = shape
        self.row = (width + 2 * halo) * LINE
        self.plane = (height + 2 * halo) * self.row
        self.block = channels * self.plane
        # AMX reads 16 planes at once, so up to 15 after the last: of zeros.
        size = (blocks * self.block + 15 * self.plane) // 2
        self.data = torch.zeros(size, dtype=torch.bfloat16) if data is None else data
        self._as_parameter_ = passed((self.data.data_ptr(), *shape, halo))  # View of bf16.hpp

    def inner(self, border: int = 0) -> int:
        """Bytes from the start to the first pixel, or to that of a border of so many pixels."""
        return (self.halo - border) * (self.row + LINE)

    def load(self, values: Tensor) -> Lines:
        """Fill with fp32 values [N, C, H, W]."""
        call("load", values.float().contiguous(), self, len(values))
        return self

    def plain(self, samples: int) -> Tensor:
        """The first samples as fp32 [N, C, H, W]."""
        values = torch.empty(samples, *self.shape)
        call("store", self, values, samples)
        return values


_memory: dict[str, Tensor] = {}


def _scratch(name: str, size: int) -> Tensor:
    """So many bytes that the next call overwrites."""
    if name not in _memory or _memory[name].numel() < size:
        _memory[name] = torch.zeros(size, dtype=torch.uint8)
    return _memory[name]


def _padded(depth: int) -> int:
    return -(-depth // 32) * 32


# Pixels of one pass, in bytes from two base addresses: Grid of bf16.cpp.
_Grid = namedtuple(
    "_Grid", "blocks rows cols outputs x x_row x_col x_block y y_row y_col y_block y_plane"
)


def _grid(
    blocks: int, pixels: Sequence[int], x: Lines, x_at: int, x_step: int,
    y: Lines, y_at: int, y_step: int,
) -> _Grid:  # fmt: skip
    """Pixels (rows, columns) from `at` on, each so many steps from the one before."""
    rows, cols = pixels
    return _Grid(
        blocks, rows, cols, y.shape[0], x_at, x_step * x.row, x_step * LINE, x.block,
        y_at, y_step * y.row, y_step * LINE, y.block, y.plane,
    )  # fmt: skip


def _offsets(source: Lines, side: int) -> np.ndarray:
    """Bytes from a pixel to each channel's pixels in a window of side x side, [C * side * side]."""
    channel, tap = np.arange(source.shape[0])[:, None, None], np.arange(side)
    return (channel * source.plane + tap[:, None] * source.row + tap * LINE).ravel()


class _Packed:
    """Lines of `source` side by side, as a dense layer multiplies them with a window of side x side
    at each of so many pixels (rows, columns), the first one in the border.

    A pixel has `depth` lines: its channels, and `taps` are the bytes to all pixels of the window;
    or with `few` channels all lines of the window, and there is one tap.
    """

    def __init__(
        self, kind: str, source: Lines, border: int, side: int, blocks: int,
        pixels: Sequence[int], stride: int, few: bool,
    ) -> None:  # fmt: skip
        offsets = _offsets(source, side if few else 1)
        self.depth = len(offsets)
        step, self.jump = (stride, 1) if few else (1, stride)
        rows, cols = pixels if few else ((n - 1) * stride + side for n in pixels)
        self.cols, self.pixel = cols, _padded(self.depth) * LINE
        reach = range(1 if few else side)
        self.taps = [self.tap(down, right) for down in reach for right in reach]
        self.block = rows * cols * self.pixel
        self.lines = _scratch(kind, blocks * self.block)
        grid = _grid(blocks, (rows, cols), source, source.inner(border), step, source, 0, 0)
        call(f"pack_{kind}", grid, source.data, offsets, self.depth, self.lines)

    def tap(self, down: int, right: int) -> int:
        """Bytes to the pixel so many rows and columns further."""
        return (down * self.cols + right) * self.pixel

    def read(self, grid: _Grid) -> _Grid:
        """The grid, reading these lines."""
        row, col = self.tap(self.jump, 0), self.tap(0, self.jump)
        return grid._replace(x=0, x_row=row, x_col=col, x_block=self.block)


class Op:
    """One operation of a network; as it is here, its images.

    Attributes:
        inputs, readers: the operations whose results it reads, and that read its own.
        size: (channels, height, width) of its result `out`.
        halo, border: pixels of zeros that it needs around its inputs, and around its gradient.
        in_place: whether the result may take the memory of an input that nobody else reads.
        normalised: whether only batch norms read it, which take off what a bias adds.
    """

    inputs: Sequence[Op] = ()
    readers: list[Op]
    size: Shape
    out: Lines
    halo = border = 0
    in_place = normalised = False

    @property
    def x(self) -> Lines:
        """The (first) result that it reads."""
        return self.inputs[0].out

    def shape(self) -> Shape:
        """`size`, from those of the inputs."""
        return self.inputs[0].size

    def forward(self, samples: int, training: bool) -> None:
        """Compute `out`."""
        raise NotImplementedError

    def backward(self, g: Lines, dx: Lines, samples: int) -> None:
        """Compute the gradient of the (first) input from that of the result."""
        raise NotImplementedError


class Layer(Op):
    """Convolution of stride 1 or 2, or linear layer; `name` is that of the module.

    Attributes:
        sparse: whether it is computed over its non-zeros: `values` [nnz], at `index` in the weight.
        dense_gradients: whether all weights have a gradient then, in `whole` (fp32, as the weight)
            as in a dense layer; or only the non-zeros, in `gradient` [nnz].
    """

    def __init__(self, name: str, module: nn.Conv2d | nn.Linear, stride: int, padding: int) -> None:
        self.name, self.weight, self.bias = name, module.weight, module.bias
        self.stride, self.padding, self.halo = stride, padding, padding
        self.outputs, self.channels, *kernel = self.weight.shape
        self.kernel = kernel[0] if kernel else 1
        self.sparse, self.dense_gradients = False, True
        self.gradient: Tensor | None = None
        self.whole = torch.empty_like(self.weight.data)

    def shape(self) -> Shape:
        """See `Op.shape`; what the gradient needs as a border follows."""
        s, k, p = self.stride, self.kernel, self.padding
        _, *image = self.inputs[0].size
        height, width = ((n + 2 * p - k) // s + 1 for n in image)
        if min(height, width) < 1:
            raise ValueError(f"a kernel of {k} doesn't fit an input of {image}")
        after = ((n - 1 + p) // s - (m - 1) for n, m in zip(image, (height, width), strict=True))
        self.border = max(0, (k - 1 - p + s - 1) // s, *after)
        return self.outputs, height, width

    def follow(self, mask: Tensor | None) -> None:
        """Be sparse with a mask, bool as the weight, and values from the weight; dense without."""
        few, self.weight.grad = SPARSE_UP_TO[tiles().value][self.kernel == 1], None
        self.sparse = mask is not None and int(mask.sum()) <= few * mask.numel()
        if mask is not None and self.sparse:
            self.index = mask.reshape(-1).nonzero()[:, 0]
            self.values = self.weight.data.view(-1)[self.index]
            self._places: dict[Any, Any] = {}  # of the non-zeros, by pass and geometry

    def forward(self, samples: int, training: bool) -> None:
        """See `Op.forward`."""
        x, y, k = self.x, self.out, range(self.kernel)
        grid = self._grid(y, samples)
        if self.sparse:
            self._sparse("forward", grid, [(a, b, a, b) for a in k for b in k], x, y, self.bias)
        else:
            packed = self._packed("pairs", grid)
            taps, depth = packed.taps, self.channels * self.kernel**2
            self._dense(packed, grid, taps, y, (depth, len(taps)), range(len(taps)), self.bias)

    def _grid(self, y: Lines, samples: int) -> _Grid:
        """Of the forward pass, from the layer's input to its result or gradient."""
        blocks, start = -(-samples // 32), self.x.inner(self.padding)
        return _grid(blocks, y.shape[1:], self.x, start, self.stride, y, y.inner(), 1)

    def _packed(self, kind: str, grid: _Grid) -> _Packed:
        pixels, few = (grid.rows, grid.cols), self.channels < 32
        return _Packed(
            kind, self.x, self.padding, self.kernel, grid.blocks, pixels, self.stride, few
        )

    def _dense(
        self, packed: _Packed, grid: _Grid, at: Sequence[int], out: Lines,
        step: tuple[int, int], taps: Sequence[int], bias: Tensor | None,
    ) -> None:  # fmt: skip
        """A pass over taps `at` in the packed lines, `taps` in the weight; there an output and a
        channel are so many steps from the one before.
        """
        (row, channel), depth, n = step, packed.depth, len(taps)
        weights = _scratch("weights", _padded(grid.outputs) * n * _padded(depth) * 2)
        call("pack_weights", self.weight, grid.outputs, row, depth, channel, taps, n, weights)
        call("dense", packed.read(grid), packed.lines, out.data, weights, at, n, depth, bias)

    def _sparse(
        self, number: Any, grid: _Grid, taps: list, source: Lines, out: Lines, bias: Tensor | None
    ) -> None:
        """A pass over the non-zeros of taps (ky, kx, rows, columns from the output's pixel)."""
        key = (number, source.plane, source.row)
        if key not in self._places:
            o, c, ky, kx = self._coordinates()
            to, of = (o, c) if number == "forward" else (c, o)
            shift = np.full((self.kernel, self.kernel), np.nan)
            for y, x, down, right in taps:
                shift[y, x] = down * source.row + right * LINE
            here = np.flatnonzero(~np.isnan(shift[ky, kx]))
            order = here[np.argsort(to[here], kind="stable")].astype(np.int32)
            entries = np.zeros((len(order) + AHEAD, 2), np.int32)
            entries[: len(order), 0] = of[order] * source.plane + shift[ky[order], kx[order]]
            start = np.searchsorted(to[order], np.arange(grid.outputs + 1)).astype(np.int32)
            self._places[key] = entries, start, order
        call("sparse", grid, source.data, out.data, *self._places[key], self.values, bias)

    def _coordinates(self) -> tuple[np.ndarray, ...]:
        shape = (self.outputs, self.channels, self.kernel, self.kernel)
        return np.unravel_index(self.index.numpy(), shape)

    def backward(self, g: Lines, dx: Lines, samples: int) -> None:
        """See `Op.backward`; `g` has a border of at least `border`."""
        grid = self._grid(g, samples)
        self.gradient = None
        if self.sparse and not self.dense_gradients:
            self.gradient = self._values_gradient(g, grid)
        else:
            self._whole_gradient(g, grid)
        if not self.sparse:
            self.weight.grad = self.whole
        if self.bias is not None:
            self.bias.grad = torch.zeros_like(self.bias)
            if not self.normalised:
                call("channel_sums", g, self.bias.grad, samples)
        if self.inputs[0].inputs:  # nobody asks for the gradient of the images
            self._input_gradient(g, dx, grid.blocks)

    def _phases(self, g: Lines, dx: Lines, blocks: int) -> Iterable[tuple[_Grid, list]]:
        """The input's gradient, stride x stride passes: each with its taps (ky, kx, dy, dx)."""
        s, (_, height, width) = self.stride, dx.shape
        for py in range(min(s, height)):
            for px in range(min(s, width)):
                taps = [
                    (ky, kx, (py + self.padding - ky) // s, (px + self.padding - kx) // s)
                    for ky in range(self.kernel)
                    for kx in range(self.kernel)
                    if (py + self.padding - ky) % s == 0 and (px + self.padding - kx) % s == 0
                ]
                pixels, start = (-(-(height - py) // s), -(-(width - px) // s)), dx.inner()
                start += py * dx.row + px * LINE
                yield _grid(blocks, pixels, g, g.inner(), 1, dx, start, s), taps

    def _input_gradient(self, g: Lines, dx: Lines, blocks: int) -> None:
        border, k = self.border, self.kernel
        if not self.sparse:
            packed = _Packed("pairs", g, border, 2 * border + 1, blocks, g.shape[1:], 1, False)
        for number, (grid, taps) in enumerate(self._phases(g, dx, blocks)):
            if self.sparse:
                self._sparse(number, grid, taps, g, dx, None)
                continue
            at = [packed.tap(down + border, right + border) for *_, down, right in taps]
            step, taps = (k * k, self.channels * k * k), [y * k + x for y, x, *_ in taps]
            self._dense(packed, grid, at, dx, step, taps, None)

    def _values_gradient(self, g: Lines, grid: _Grid) -> Tensor:
        """Of the non-zeros [nnz], in the order of `values`."""
        x = self.x
        key = ("weight", x.plane, x.row, g.shape)
        if key not in self._places:
            self._places[key] = self._runs(x, g.shape[1])
        strip, offsets, runs, order = self._places[key]
        sums = np.empty(len(order) + 16, np.float32)
        call("sparse_weight", grid, x.data, g.data, offsets, runs, len(runs), sums, strip)
        gradient = torch.empty_like(self.values)
        gradient.numpy()[order] = sums[: len(order)]
        return gradient

    def _runs(self, x: Lines, height: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """Entries sorted by a few input channels, then output; runs of one output, those of equal
        length after another.
        """
        o, c, ky, kx = self._coordinates()
        density = max(len(o), 1) / self.weight.numel()
        few = min(self.channels, max(1, round(8 / (density * self.kernel**2))))
        rows = (L1 // (few * x.row) - self.kernel) // self.stride + 1
        group = c // few * self.outputs + o
        size = np.bincount(group)[group]
        order = np.lexsort((kx, ky, c, group, size, c // few)).astype(np.int32)
        first = np.flatnonzero(np.diff(group[order], prepend=-1))
        runs = np.stack([o[order][first], first, np.diff(first, append=len(o))], 1)
        offsets = (c * x.plane + ky * x.row + kx * LINE)[order]
        strip = max(1, min(rows, height))
        return strip, offsets.astype(np.int32), runs.astype(np.int32), order

    def _whole_gradient(self, g: Lines, grid: _Grid) -> None:
        """Of all weights, into `whole`."""
        if tiles().value:
            packed = self._packed("samples", grid)
            taps, depth = packed.taps, packed.depth
            sums = _scratch("sums", _padded(self.outputs) * len(taps) * _padded(depth) * 4)
            call(
                "dense_weight_tiles", packed.read(grid), packed.lines, g.data, taps, len(taps),
                depth, sums, self.whole,
            )  # fmt: skip
        else:
            offsets = _offsets(self.x, self.kernel)
            strip = max(1, min(g.shape[1], L1 // (8 * self.x.row)))
            call(
                "dense_weight", grid, self.x.data, g.data, offsets, len(offsets), self.whole, strip
            )


class Norm(Op):
    """Batch norm, with the ReLU that follows."""

    relu = False

    def __init__(self, module: _BatchNorm) -> None:
        self.module: Any = module
        self.mean, self.variance = torch.empty(2, module.num_features)

    def _given(self) -> tuple[Any, ...]:
        """What both kernels read: statistics, the affine map, whether there is a ReLU."""
        m = self.module
        affine = (m.weight.data, m.bias.data) if m.affine else (None, None)
        return self.mean, self.variance, *affine, float(m.eps), self.relu

    def forward(self, samples: int, training: bool) -> None:
        """See `Op.forward`; moves the running statistics."""
        m, (_, height, width) = self.module, self.out.shape
        count, running = samples * height * width, (m.running_mean, m.running_var)
        training = training or running[0] is None
        if not training:
            self.mean.copy_(running[0])
            self.variance.copy_(running[1])
        elif count < 2:
            raise ValueError(f"batch norm needs more than one value per channel, got {count}")
        call("norm", self.x, self.out, *self._given(), training, samples)
        if training and running[0] is not None:
            m.num_batches_tracked += 1
            share = m.momentum if m.momentum is not None else 1.0 / int(m.num_batches_tracked)
            running[0].lerp_(self.mean, share)
            running[1].lerp_(self.variance * (count / (count - 1)), share)

    def backward(self, g: Lines, dx: Lines, samples: int) -> None:
        """See `Op.backward`; weight and bias have their gradients."""
        grads = torch.empty(2, self.module.num_features)
        call("norm_backward", self.x, g, dx, *self._given(), *grads, samples)
        if self.module.affine:
            self.module.weight.grad, self.module.bias.grad = grads
