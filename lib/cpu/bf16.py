"""Trains a network in bfloat16 over its non-zero weights, every layer through lib/cpu/bf16.cpp.

Activations and their gradients stay in one layout, `Lines`: no conversion between layers. Weights,
momentum and sums are fp32. A sparse layer keeps its weights and momentum as [nnz].
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.cpu.library import KernelsUnavailable, build, cpu_id

LINE = 64  # bytes: 32 samples of one pixel
AHEAD = 6  # entries that bf16.cpp prefetches beyond the last
# Up to these densities masked convolutions and linear layers are computed over their non-zeros,
# where dense products go through AMX (for which a linear layer's weights take long to pack) and
# where not. A rule and no measurement: the same on every machine of a kind.
SPARSE_UP_TO = {True: (0.08, 0.3), False: (0.4, 0.4)}
L1 = 32 * 1024


@functools.cache
def _library() -> ctypes.CDLL | KernelsUnavailable:
    """The kernels, or why there are none."""
    here = Path(__file__).resolve().parent
    try:
        if "avx512_bf16" not in cpu_id():
            raise KernelsUnavailable("this processor has no AVX-512 with bfloat16")
        return ctypes.CDLL(str(build(sources=(here / "bf16.hpp", here / "bf16.cpp"))))
    except (KernelsUnavailable, OSError) as error:
        return KernelsUnavailable(str(error))


def available() -> bool:
    """Whether the kernels work here (compiling them on the first call)."""
    return not isinstance(_library(), KernelsUnavailable)


def _require() -> ctypes.CDLL:
    library = _library()
    if isinstance(library, KernelsUnavailable):
        raise library
    return library


def tiles() -> ctypes.c_bool:
    """The kernels' switch for dense products by AMX: on from the start where the system has it."""
    return ctypes.c_bool.in_dll(_require(), "bf16_tiles")


def sparse_up_to(kernel: int) -> float:
    """The density up to which a layer of this kernel is computed over its non-zeros here."""
    return SPARSE_UP_TO[tiles().value][kernel == 1]


def call(name: str, *arguments: Any) -> None:
    """One kernel, with torch's number of threads. Whole numbers become int64_t, others double;
    tensors and arrays go by their address, lists and tuples as arrays of int64_t.
    """
    given = [*arguments, torch.get_num_threads()]
    getattr(_require(), f"bf16_{name}")(*map(_passed, given))


def _passed(value: Any) -> Any:
    if isinstance(value, Lines):
        value = (value.data.data_ptr(), *value.shape, value.halo)  # View of bf16.hpp
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, np.ndarray):
        return value.ctypes
    if isinstance(value, Sequence):
        return (ctypes.c_int64 * len(value))(*value)
    if value is None or isinstance(value, float):
        return value if value is None else ctypes.c_double(value)
    return ctypes.c_int64(value)


class Lines:
    """A tensor [N, C, H, W] as [N/32][C][H + 2 halo][W + 2 halo][32] in bfloat16, border zero.

    `data`: that of other Lines without a border, to see them in another shape.
    """

    def __init__(
        self, blocks: int, shape: Sequence[int], halo: int = 0, data: Tensor | None = None
    ) -> None:
        self.shape, self.halo, self.blocks = tuple(shape), halo, blocks
        channels, height, width = self.shape
        self.row = (width + 2 * halo) * LINE
        self.plane = (height + 2 * halo) * self.row
        self.block = channels * self.plane
        # AMX reads 16 planes at once, so up to 15 after the last: of zeros.
        size = (blocks * self.block + 15 * self.plane) // 2
        self.data = torch.zeros(size, dtype=torch.bfloat16) if data is None else data

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


class Grid(NamedTuple):
    """Pixels of one pass, in bytes from two base addresses: Grid of bf16.cpp."""

    blocks: int
    rows: int
    cols: int
    outputs: int
    x: int
    x_row: int
    x_col: int
    x_block: int
    y: int
    y_row: int
    y_col: int
    y_block: int
    y_plane: int


def _grid(
    blocks: int, pixels: Sequence[int], x: Lines, x_at: int, x_step: int,
    y: Lines, y_at: int, y_step: int,
) -> Grid:  # fmt: skip
    """Pixels (rows, columns) from `at` on, each so many steps from the one before."""
    rows, cols = pixels
    return Grid(
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

    def read(self, grid: Grid) -> Grid:
        """The grid, reading these lines."""
        row, col = self.tap(self.jump, 0), self.tap(0, self.jump)
        return grid._replace(x=0, x_row=row, x_col=col, x_block=self.block)


class Weighted:
    """A convolution or linear layer between two Lines, forward and backward.

    Args:
        weight: [O, C, k, k], fp32, contiguous; inactive ones are zero.
        stride: 1 or 2.
        x, y: input and output; x.halo is at least the padding.
        g: the gradient of y; its border at least `border`.

    Attributes:
        sparse: whether it is computed over its non-zeros: `values` [nnz], at `index` in the weight.
    """

    def __init__(self, weight: Tensor, stride: int, padding: int) -> None:
        self.weight, self.stride, self.padding = weight, stride, padding
        self.outputs, self.inputs, self.kernel = weight.shape[:3]
        self.few, self.sparse = self.inputs < 32, False

    def output(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """The output's (channels, height, width) for that of the input."""
        side = [(n + 2 * self.padding - self.kernel) // self.stride + 1 for n in shape[1:]]
        if min(side) < 1:
            raise ValueError(f"a kernel of {self.kernel} doesn't fit an input of {shape[1:]}")
        return self.outputs, side[0], side[1]

    def border(self, shape: Sequence[int]) -> int:
        """Pixels of zeros around the output's gradient, for an input (channels, height, width)."""
        s, k, p = self.stride, self.kernel, self.padding
        out = self.output(shape)
        after = [((n - 1 + p) // s) - (m - 1) for n, m in zip(shape[1:], out[1:], strict=True)]
        return max(0, (k - 1 - p + s - 1) // s, *after)

    def follow(self, mask: Tensor | None) -> None:
        """Be sparse with a mask, bool as the weight, and values from the weight; dense without."""
        self.sparse = mask is not None
        if mask is not None:
            self.index = mask.reshape(-1).nonzero()[:, 0]
            self.values = self.weight.reshape(-1)[self.index]
            self._places: dict[Any, Any] = {}  # of the non-zeros, by pass and geometry

    def forward(self, x: Lines, y: Lines, bias: Tensor | None, blocks: int) -> None:
        """The convolution of x."""
        grid, k = self._forward_grid(x, y, blocks), range(self.kernel)
        if self.sparse:
            self._sparse("forward", grid, [(a, b, a, b) for a in k for b in k], x, y, bias)
        else:
            packed = self._packed("pairs", x, y, blocks)
            taps, depth = packed.taps, self.inputs * self.kernel**2
            self._dense(packed, grid, taps, y, (depth, len(taps)), range(len(taps)), bias)

    def _forward_grid(self, x: Lines, y: Lines, blocks: int) -> Grid:
        start = x.inner(self.padding)
        return _grid(blocks, y.shape[1:], x, start, self.stride, y, y.inner(), 1)

    def _packed(self, kind: str, x: Lines, y: Lines, blocks: int) -> _Packed:
        return _Packed(
            kind, x, self.padding, self.kernel, blocks, y.shape[1:], self.stride, self.few
        )

    def _dense(
        self, packed: _Packed, grid: Grid, at: Sequence[int], out: Lines,
        step: tuple[int, int], taps: Sequence[int], bias: Tensor | None,
    ) -> None:  # fmt: skip
        """A pass over taps `at` in the packed lines, `taps` in the weight; there an output and a
        channel are so many steps from the one before.
        """
        row, channel = step
        size = _padded(grid.outputs) * len(taps) * _padded(packed.depth) * 2
        weights, depth = _scratch("weights", size), packed.depth
        call(
            "pack_weights", self.weight, grid.outputs, row, depth, channel, taps, len(taps), weights
        )
        call("dense", packed.read(grid), packed.lines, out.data, weights, at, len(at), depth, bias)

    def _sparse(
        self, number: Any, grid: Grid, taps: list, source: Lines, out: Lines, bias: Tensor | None
    ) -> None:
        """A pass over the non-zeros of taps (ky, kx, rows, columns from the output's pixel)."""
        key = (number, source.plane, source.row)
        if key not in self._places:
            o, c, ky, kx = np.unravel_index(self.index.numpy(), self.weight.shape)
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

    def _phases(self, g: Lines, dx: Lines, blocks: int) -> Iterable[tuple[Grid, list]]:
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

    def input_gradient(self, g: Lines, dx: Lines, blocks: int) -> None:
        """From the gradient of the output, into dx."""
        border, k = self.border(dx.shape), self.kernel
        side, step = 2 * border + 1, (k * k, self.inputs * k * k)
        if not self.sparse:
            packed = _Packed("pairs", g, border, side, blocks, g.shape[1:], 1, False)
        for number, (grid, taps) in enumerate(self._phases(g, dx, blocks)):
            if self.sparse:
                self._sparse(number, grid, taps, g, dx, None)
                continue
            at = [packed.tap(down + border, right + border) for *_, down, right in taps]
            self._dense(packed, grid, at, dx, step, [y * k + x for y, x, *_ in taps], None)

    def weight_gradient(self, x: Lines, g: Lines, blocks: int) -> Tensor:
        """Of the non-zeros [nnz], in the order of `values`."""
        key = ("weight", x.plane, x.row, g.shape)
        if key not in self._places:
            self._places[key] = self._runs(x, g)
        strip, offsets, runs, order = self._places[key]
        sums = np.empty(len(order) + 16, np.float32)
        grid = self._forward_grid(x, g, blocks)
        call("sparse_weight", grid, x.data, g.data, offsets, runs, len(runs), sums, strip)
        gradient = torch.empty_like(self.values)
        gradient.numpy()[order] = sums[: len(order)]
        return gradient

    def _runs(self, x: Lines, g: Lines) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """Entries sorted by a few input channels, then output; runs of one output, those of equal
        length after another.
        """
        o, c, ky, kx = np.unravel_index(self.index.numpy(), self.weight.shape)
        density = max(len(o), 1) / self.weight.numel()
        few = min(self.inputs, max(1, round(8 / (density * self.kernel**2))))
        rows = (L1 // (few * x.row) - self.kernel) // self.stride + 1
        strip = max(1, min(rows, g.shape[1]))
        group = c // few * self.outputs + o
        size = np.bincount(group)[group]
        order = np.lexsort((kx, ky, c, group, size, c // few)).astype(np.int32)
        first = np.flatnonzero(np.diff(group[order], prepend=-1))
        runs = np.stack([o[order][first], first, np.diff(first, append=len(o))], 1)
        offsets = (c * x.plane + ky * x.row + kx * LINE)[order]
        return strip, offsets.astype(np.int32), runs.astype(np.int32), order

    def whole_gradient(self, x: Lines, g: Lines, blocks: int, out: Tensor) -> None:
        """Of all weights, into `out`, fp32 as the weight."""
        grid = self._forward_grid(x, g, blocks)
        if tiles().value:
            packed = self._packed("samples", x, g, blocks)
            taps, depth = packed.taps, packed.depth
            sums = _scratch("sums", _padded(self.outputs) * len(taps) * _padded(depth) * 4)
            call(
                "dense_weight_tiles", packed.read(grid), packed.lines, g.data, taps, len(taps),
                depth, sums, out,
            )  # fmt: skip
        else:
            offsets = _offsets(x, self.kernel)
            strip = max(1, min(g.shape[1], L1 // (8 * x.row)))
            call("dense_weight", grid, x.data, g.data, offsets, len(offsets), out, strip)
