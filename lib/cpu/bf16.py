"""Trains a network in bfloat16 over its non-zero weights, every layer through lib/cpu/bf16.cpp.

Activations and their gradients stay in one layout, `Lines`: no conversion between layers. Weights,
momentum and sums are fp32. A sparse layer keeps its weights and momentum as [nnz].
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

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

_P, _I, _L, _D = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
_SIGNATURES: dict[str, list[Any]] = {
    "tiles": [_I],
    "load": [_P, _P, _L, _I],
    "store": [_P, _P, _L, _I],
    "fill": [_P, _P, _P, _L],
    "sparse": [_P] * 6 + [_I],
    "sparse_weight": [_P] * 5 + [_L, _P, _L, _I],
    "pack_weights": [_P, _L, _L, _L, _L, _P, _L, _P, _I],
    "pack_pairs": [_P, _P, _P, _L, _P, _I],
    "pack_samples": [_P, _P, _P, _L, _P, _I],
    "dense": [_P] * 5 + [_L, _L, _P, _I],
    "dense_weight": [_P] * 4 + [_L, _P, _L, _I],
    "norm": [_P] * 6 + [_D, _I, _I, _L, _I],
    "norm_backward": [_P] * 7 + [_D, _I, _P, _P, _L, _I],
    "relu": [_P, _P, _L, _I],
    "relu_backward": [_P, _P, _P, _L, _I],
    "add": [_P, _P, _P, _L, _I],
    "channel_sums": [_P, _P, _L, _I],
    "dropout": [_P, _P, _D, ctypes.c_uint64, _L, _I],
    "pool": [_P, _P, _L, _I, _L, _I],
    "pool_backward": [_P] * 4 + [_L, _I, _L, _I],
}
_TILES = {"dense_weight_tiles": [_P] * 5 + [_L] * 4 + [_P, _P, _I]}


class _View(ctypes.Structure):
    _fields_ = [("at", _P), *((n, _L) for n in ("channels", "height", "width", "halo"))]


class _Grid(ctypes.Structure):
    _names = ("blocks", "rows", "cols", "outputs", "x", "x_row", "x_col", "x_block")
    _fields_ = [(n, _L) for n in (*_names, "y", "y_row", "y_col", "y_block", "y_plane")]


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The kernels, or why there are none."""
    if "avx512_bf16" not in cpu_id():
        return "this processor has no AVX-512 with bfloat16"
    here = Path(__file__).resolve().parent
    try:
        library = ctypes.CDLL(str(build(sources=(here / "bf16.hpp", here / "bf16.cpp"))))
    except (KernelsUnavailable, OSError) as error:
        return str(error)
    known = {**_SIGNATURES, **(_TILES if hasattr(library, "bf16_dense_weight_tiles") else {})}
    for name, arguments in known.items():
        function = getattr(library, f"bf16_{name}")
        function.argtypes = arguments
        function.restype = _I if name == "tiles" else None
    _state["tiles"] = bool(library.bf16_tiles(1))
    return library


_state = {"tiles": False}


def sparse_up_to(kernel: int) -> float:
    """The density up to which a layer of this kernel is computed over its non-zeros here."""
    return SPARSE_UP_TO[_state["tiles"]][kernel == 1]


def available() -> bool:
    """Whether the kernels work here (compiling them on the first call)."""
    return not isinstance(_library(), str)


def call(name: str, *arguments: Any) -> None:
    """One kernel, with torch's number of threads; tensors, arrays and Lines by their address."""
    library = _library()
    if isinstance(library, str):
        raise KernelsUnavailable(library)
    addresses = [
        a.data_ptr() if isinstance(a, Tensor) else a.ref if isinstance(a, Lines) else a
        for a in arguments
    ]
    getattr(library, f"bf16_{name}")(*addresses, torch.get_num_threads())


def use_tiles(wanted: bool) -> bool:
    """Dense products by AMX from now on, or not; returns whether they are."""
    library = _library()
    if isinstance(library, str):
        raise KernelsUnavailable(library)
    _state["tiles"] = bool(library.bf16_tiles(int(wanted)))
    return _state["tiles"]


class Lines:
    """A tensor [N, C, H, W] as [N/32][C][H + 2 halo][W + 2 halo][32] in bfloat16, border zero."""

    def __init__(self, blocks: int, shape: Sequence[int], halo: int = 0) -> None:
        self.shape, self.halo, self.blocks = tuple(shape), halo, blocks
        channels, height, width = self.shape
        self.row = (width + 2 * halo) * LINE
        self.plane = (height + 2 * halo) * self.row
        self.block = channels * self.plane
        # AMX reads 16 planes at once, so up to 15 after the last: of zeros.
        size = (blocks * self.block + 15 * self.plane) // 2
        self.data = torch.zeros(size, dtype=torch.bfloat16)
        self.wrap()

    def wrap(self) -> None:
        """Describe the memory to the kernels."""
        self._view = _View(self.data.data_ptr(), *self.shape, self.halo)
        self.ref = ctypes.addressof(self._view)

    def seen_as(self, shape: Sequence[int]) -> Lines:
        """The same memory in another shape; no border."""
        other = Lines.__new__(Lines)
        other.shape, other.halo, other.blocks, other.data = tuple(shape), 0, self.blocks, self.data
        other.row, other.plane, other.block = (
            shape[2] * LINE,
            shape[1] * shape[2] * LINE,
            self.block,
        )
        other.wrap()
        return other

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


class _Product:
    """What a dense layer multiplies at each pixel of `source`: lines of `depth` channels, for the
    taps (rows, columns) from there, or all taps and channels where these are few.
    """

    def __init__(
        self, source: Lines, border: int, pixels: Sequence[int], step: int, taps: list, few: bool
    ) -> None:
        rows, cols = pixels
        channels = source.shape[0]
        self.source, self.border, self.few = source, border, few
        self.step, self.rows, self.cols = (step, rows, cols) if few else (1, 0, 0)
        where = [dy * source.row + dx * LINE for dy, dx in taps]
        if few:
            at = [c * source.plane + w for c in range(channels) for w in where]
            self.taps = [0]
        else:
            at = [c * source.plane for c in range(channels)]
            self.rows = (rows - 1) * step + 1 + max((dy for dy, _ in taps), default=0)
            self.cols = (cols - 1) * step + 1 + max((dx for _, dx in taps), default=0)
        self.depth, self.pixel = len(at), _padded(len(at)) * LINE
        self.jump = 1 if few else step
        if not few:
            self.taps = [(dy * self.cols + dx) * self.pixel for dy, dx in taps]
        self.offsets = torch.tensor(at)
        self.bytes = torch.tensor(self.taps)

    def pack(self, kind: str, blocks: int) -> Tensor:
        """The lines by the kernel pack_`kind`."""
        s = self.source
        grid = _Grid(blocks, self.rows, self.cols, 0)
        grid.x, grid.x_block = s.inner(self.border), s.block
        grid.x_row, grid.x_col = self.step * s.row, self.step * LINE
        out = _scratch(kind, blocks * self.rows * self.cols * self.pixel)
        call(f"pack_{kind}", ctypes.byref(grid), s.data, self.offsets, self.depth, out)
        return out

    def read(self, grid: _Grid) -> _Grid:
        """The grid, reading the packed lines."""
        grid.x, grid.x_col = 0, self.jump * self.pixel
        grid.x_row = self.jump * self.cols * self.pixel
        grid.x_block = self.rows * self.cols * self.pixel
        return grid


class Weighted:
    """A convolution or linear layer between two Lines, forward and backward.

    Args:
        weight: [O, C, k, k], fp32, contiguous; inactive ones are zero.
        stride: 1 or 2.
        x, y: input and output; x.halo is at least the padding.
        g: the gradient of y; its border at least `border`.
    """

    def __init__(self, weight: Tensor, stride: int, padding: int) -> None:
        self.weight, self.stride, self.padding = weight, stride, padding
        self.values: Tensor | None = None  # [nnz], where computed over the non-zeros
        self.outputs, self.inputs, self.kernel = weight.shape[:3]

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

    def follow(self, mask: Tensor | None, sparse: bool) -> None:
        """Take on a mask, bool as the weight; values come from the weight."""
        self.values = None
        if mask is None or not sparse:
            return
        self.index = mask.reshape(-1).nonzero()[:, 0]
        self.values = self.weight.detach().reshape(-1)[self.index]
        self._places: dict[Any, Any] = {}

    def kept(self) -> Tensor:
        """The values [nnz] of a layer that is computed over its non-zeros."""
        assert self.values is not None
        return self.values

    def _grid(self, x: Lines, y: Lines, blocks: int) -> _Grid:
        s, (outputs, rows, cols) = self.stride, y.shape
        x_at, y_at = x.inner(self.padding), y.inner()
        return _Grid(
            blocks, rows, cols, outputs, x_at, s * x.row, s * LINE, x.block, y_at, y.row, LINE,
            y.block, y.plane,
        )  # fmt: skip

    def _phases(self, g: Lines, dx: Lines, blocks: int) -> Iterable[tuple[_Grid, list]]:
        """The input's gradient, stride x stride passes: each with its taps (ky, kx, dy, dx)."""
        s, (inputs, height, width) = self.stride, dx.shape
        for py in range(min(s, height)):
            for px in range(min(s, width)):
                taps = [
                    (ky, kx, (py + self.padding - ky) // s, (px + self.padding - kx) // s)
                    for ky in range(self.kernel)
                    for kx in range(self.kernel)
                    if (py + self.padding - ky) % s == 0 and (px + self.padding - kx) % s == 0
                ]
                y_at = dx.inner() + py * dx.row + px * LINE
                yield _Grid(
                    blocks, -(-(height - py) // s), -(-(width - px) // s), inputs, g.inner(), g.row,
                    LINE, g.block, y_at, s * dx.row, s * LINE, dx.block, dx.plane,
                ), taps  # fmt: skip

    def _entries(self, key: Any, find: Callable[[], tuple[np.ndarray, ...]]) -> tuple:
        """Places of the non-zeros for one pass and geometry: made once, filled by each step."""
        if key not in self._places:
            self._places[key] = find()
        return self._places[key]

    def _coordinates(self) -> list[np.ndarray]:
        k = self.kernel
        return list(np.unravel_index(self.index.numpy(), (self.outputs, self.inputs, k, k)))

    def forward(self, x: Lines, y: Lines, bias: Tensor | None, blocks: int) -> None:
        """The convolution of x."""
        grid = self._grid(x, y, blocks)
        b = None if bias is None else bias.data_ptr()
        if self.values is None:
            self._dense_forward(grid, x, y, b, blocks)
            return

        def find() -> tuple[np.ndarray, ...]:
            o, c, ky, kx = self._coordinates()
            entries = np.zeros((len(o) + AHEAD, 2), np.int32)
            entries[: len(o), 0] = c * x.plane + ky * x.row + kx * LINE
            start = np.searchsorted(o, np.arange(self.outputs + 1)).astype(np.int32)
            return entries, start

        entries, start = self._entries((x.plane, x.row), find)
        call_fill(entries, self.values, None)
        call(
            "sparse", ctypes.byref(grid), x.data, y.data, entries.ctypes.data, start.ctypes.data, b
        )

    def _dense_forward(self, grid: _Grid, x: Lines, y: Lines, bias: Any, blocks: int) -> None:
        product, steps, depth, step = self._product(x, y)
        lines = product.pack("pairs", blocks)
        area = self.kernel**2
        weights = self._packed(self.outputs, self.inputs * area, depth, step, steps)
        call(
            "dense", ctypes.byref(product.read(grid)), lines, y.data, weights, product.bytes,
            len(product.taps), depth, bias,
        )  # fmt: skip

    def _product(self, x: Lines, y: Lines) -> tuple[_Product, list[int], int, int]:
        """Of the forward pass; also where its weights are: of the taps, and channels a step."""
        k, few = self.kernel, self.inputs < 32
        taps = [(a, b) for a in range(k) for b in range(k)]
        product = _Product(x, self.padding, y.shape[1:], self.stride, taps, few)
        steps = [0] if few else [a * k + b for a, b in taps]
        return product, steps, product.depth, 1 if few else k * k

    def _packed(self, rows: int, row: int, depth: int, step: int, steps: list[int]) -> Tensor:
        size = -(-rows // 32) * 32 * len(steps) * _padded(depth) * 2
        out = _scratch("weights", size)
        taps = torch.tensor(steps)
        call("pack_weights", self.weight.detach(), rows, row, depth, step, taps, len(steps), out)
        return out

    def input_gradient(self, g: Lines, dx: Lines, blocks: int) -> None:
        """From the gradient of the output, into dx."""
        if self.values is not None:
            for number, (grid, taps) in enumerate(self._phases(g, dx, blocks)):
                key = ("dx", number, g.plane, g.row)
                entries, start, order = self._entries(
                    key, functools.partial(self._transposed, g, taps)
                )
                call_fill(entries, self.values, order)
                e, s = entries.ctypes.data, start.ctypes.data
                call("sparse", ctypes.byref(grid), g.data, dx.data, e, s, None)
            return
        border, k = self.border(dx.shape), self.kernel
        taps = [(a, b) for a in range(2 * border + 1) for b in range(2 * border + 1)]
        product = _Product(g, border, g.shape[1:], 1, taps, False)
        lines = product.pack("pairs", blocks)
        for grid, found in self._phases(g, dx, blocks):
            at = [((a + border) * product.cols + b + border) * product.pixel for *_, a, b in found]
            steps = [ky * k + kx for ky, kx, *_ in found]
            weights = self._packed(self.inputs, k * k, self.outputs, self.inputs * k * k, steps)
            where = torch.tensor(at, dtype=torch.int64)
            call(
                "dense", ctypes.byref(product.read(grid)), lines, dx.data, weights, where, len(at),
                self.outputs, None,
            )  # fmt: skip

    def _transposed(self, g: Lines, taps: list) -> tuple[np.ndarray, ...]:
        o, c, ky, kx = self._coordinates()
        shift = np.full((self.kernel, self.kernel), np.iinfo(np.int64).min)
        for y, x, down, right in taps:
            shift[y, x] = down * g.row + right * LINE
        here = np.nonzero(shift[ky, kx] != np.iinfo(np.int64).min)[0]
        order = here[np.argsort(c[here], kind="stable")].astype(np.int32)
        entries = np.zeros((len(order) + AHEAD, 2), np.int32)
        entries[: len(order), 0] = o[order] * g.plane + shift[ky[order], kx[order]]
        start = np.searchsorted(c[order], np.arange(self.inputs + 1)).astype(np.int32)
        return entries, start, order

    def weight_gradient(self, x: Lines, g: Lines, blocks: int) -> Tensor:
        """Of the non-zeros [nnz], in the order of `values`."""
        assert self.values is not None
        grid = self._grid(x, g, blocks)
        strip, offsets, runs, order, count = self._entries(
            ("dw", x.plane, x.row, g.shape), functools.partial(self._runs, x, g)
        )
        sums = np.empty(len(order) + 16, np.float32)
        call(
            "sparse_weight", ctypes.byref(grid), x.data, g.data, offsets.ctypes.data,
            runs.ctypes.data, count, sums.ctypes.data, strip,
        )  # fmt: skip
        gradient = torch.empty_like(self.values)
        gradient.numpy()[order] = sums[: len(order)]
        return gradient

    def _runs(self, x: Lines, g: Lines) -> tuple:
        """Entries sorted by a few input channels, then output; runs of one output, those of equal
        length after another.
        """
        o, c, ky, kx = self._coordinates()
        density = max(len(o), 1) / self.weight.numel()
        few = min(self.inputs, max(1, round(8 / (density * self.kernel**2))))
        rows = (L1 // (few * x.row) - self.kernel) // self.stride + 1
        strip = max(1, min(rows, g.shape[1]))
        group = (c // few).astype(np.int64) * self.outputs + o
        count = np.bincount(group, minlength=1) if len(o) else np.zeros(1, np.int64)
        size = count[group] if len(o) else np.zeros(0, np.int64)
        order = np.lexsort((kx, ky, c, group, size, c // few)).astype(np.int32)
        first = np.flatnonzero(np.diff(group[order], prepend=-1)).astype(np.int32)
        runs = np.empty((len(first), 3), np.int32)
        runs[:, 0], runs[:, 1] = o[order][first], first
        runs[:, 2] = np.diff(first, append=np.int32(len(o)))
        offsets = (c * x.plane + ky * x.row + kx * LINE)[order].astype(np.int32)
        return strip, offsets, runs, order, len(runs)

    def whole_gradient(self, x: Lines, g: Lines, blocks: int, out: Tensor) -> None:
        """Of all weights, into `out`, fp32 as the weight."""
        grid, k = self._grid(x, g, blocks), self.kernel
        if _state["tiles"]:
            product, steps, depth, step = self._product(x, g)
            lines = product.pack("samples", blocks)
            taps, wide = torch.tensor(steps), _padded(depth) * len(steps)
            sums = _scratch("sums", -(-self.outputs // 32) * 32 * wide * 4)
            call(
                "dense_weight_tiles", ctypes.byref(product.read(grid)), lines, g.data,
                product.bytes, taps, len(steps), depth, self.inputs * k * k, step, sums, out,
            )  # fmt: skip
            return
        at = [
            c * x.plane + a * x.row + b * LINE
            for c in range(self.inputs)
            for a in range(k)
            for b in range(k)
        ]
        strip = max(1, min(g.shape[1], L1 // (8 * x.row)))
        offsets = torch.tensor(at)
        call("dense_weight", ctypes.byref(grid), x.data, g.data, offsets, len(at), out, strip)


def call_fill(entries: np.ndarray, values: Tensor, order: np.ndarray | None) -> None:
    """Write the values into the entries of a pass."""
    library = _library()
    assert not isinstance(library, str)
    where = None if order is None else order.ctypes.data
    library.bf16_fill(entries.ctypes.data, values.data_ptr(), where, len(entries) - AHEAD)
