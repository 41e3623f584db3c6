"""Convolution and linear layers over the non-zeros of a weight, with autograd.

Activations are batch-blocked (lib/cpu/blocked.py).  Weights are the values of the non-zeros,
float32 [nnz], in the row-major order of the mask.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .blocked import LANES, as_blocked, as_float, pointer, thread_count, unblock
from .library import check, require


class _Plan:
    """A plan of the library, freed with this object."""

    def __init__(self, *arguments: Any) -> None:
        library = require()
        handle = ctypes.c_void_p()
        check(library.sparse_plan_create(*arguments, ctypes.byref(handle)))
        self.handle = handle.value
        weakref.finalize(self, library.sparse_plan_free, handle.value)


class Pattern:
    """Where a weight's non-zeros are: immutable, rebuilt when the mask changes.

    Args:
        mask: bool [out, in, kernel_h, kernel_w] or [out, in] (a linear layer).

    Attributes:
        shape: of the weight, four numbers.
        nnz: number of non-zeros.
        index: int64 [nnz], places of the non-zeros in the flattened weight, ascending.

    Raises:
        ValueError: the mask is not 2- or 4-dimensional, or has no place.
    """

    def __init__(self, mask: Tensor) -> None:
        if mask.dim() not in (2, 4) or not mask.numel():
            raise ValueError(
                f"a mask must have 2 or 4 dimensions and no empty one, got {list(mask.shape)}"
            )
        if mask.dim() == 2:
            mask = mask[:, :, None, None]
        self.shape = tuple(mask.shape)
        places = mask.detach().to("cpu").bool().nonzero()
        self.nnz = int(places.shape[0])
        _, c, h, w = self.shape
        steps = torch.tensor([c * h * w, h * w, w, 1])
        self.index = (places * steps).sum(1)
        self._coords = places.to(torch.int32).contiguous()
        self._plans: dict[tuple, list[_Plan]] = {}

    @property
    def density(self) -> float:
        """Fraction of the weights that are non-zero."""
        o, c, h, w = self.shape
        return self.nnz / (o * c * h * w)

    def plans(
        self, height: int, width: int, stride: int, padding: int, blocks: int, transposed: bool
    ) -> list[_Plan]:
        """The library's plans for inputs of this size (one, or one per phase of the stride)."""
        threads = thread_count()
        key = (height, width, stride, padding, blocks, transposed, threads)
        if key not in self._plans:
            shape = torch.tensor([*self.shape, stride, padding, height, width])
            phases = [(y, x) for y in range(stride) for x in range(stride)]
            self._plans[key] = [
                _Plan(
                    shape.data_ptr(),
                    self._coords.data_ptr(),
                    self.nnz,
                    int(transposed),
                    y,
                    x,
                    blocks,
                    threads,
                )
                for y, x in (phases if transposed else [(0, 0)])
            ]
        return self._plans[key]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, pattern: Pattern) -> Tensor:
        ctx.pattern, ctx.shape = pattern, weight.shape
        return weight.detach().reshape(-1).index_select(0, pattern.index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.new_zeros(ctx.shape)
        out.view(-1).index_copy_(0, ctx.pattern.index, grad)
        return out, None


def gather(weight: Tensor, pattern: Pattern) -> Tensor:
    """Values of the non-zeros, [nnz]; the gradient is dense, zero elsewhere.

    Raises:
        ValueError: `weight` does not have the pattern's shape.
    """
    shape = tuple(weight.shape) + (1, 1) * (weight.dim() == 2)
    if shape != pattern.shape:
        raise ValueError(f"weight {list(weight.shape)} does not fit a pattern of {pattern.shape}")
    return _Gather.apply(weight, pattern)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        pattern: Pattern,
        stride: int,
        padding: int,
        samples: int,
        weight: Tensor | None,
        by_torch: bool,
    ) -> Tensor:
        x, values = as_blocked(x, "input", samples), as_float(values, "values")
        bias = None if bias is None else as_float(bias, "bias")
        o, c, kh, kw = pattern.shape
        blocks, channels, h, w, _ = x.shape
        out_h = (h + 2 * padding - kh) // stride + 1
        out_w = (w + 2 * padding - kw) // stride + 1
        if channels != c or values.shape != (pattern.nnz,):
            raise ValueError(
                f"a pattern of {pattern.shape} with {pattern.nnz} non-zeros takes {c} channels and "
                f"as many values, got {channels} channels and {list(values.shape)} values"
            )
        if bias is not None and bias.shape != (o,):
            raise ValueError(f"the bias must be [{o}], got {list(bias.shape)}")
        if stride < 1 or padding < 0 or h + 2 * padding < kh or w + 2 * padding < kw:
            raise ValueError(
                f"no output: input {h}x{w}, kernel {kh}x{kw}, stride {stride}, padding {padding}"
            )
        y = x.new_empty(blocks, o, out_h, out_w, LANES)
        (plan,) = pattern.plans(h, w, stride, padding, blocks, transposed=False)
        check(
            require().sparse_convolve(
                plan.handle,
                values.data_ptr(),
                x.data_ptr(),
                pointer(bias),
                y.data_ptr(),
                blocks,
                thread_count(),
            )
        )
        if weight is None:
            ctx.save_for_backward(x, values)
        else:
            ctx.save_for_backward(x, values, weight)
        ctx.geometry, ctx.by_torch = (pattern, stride, padding, samples), by_torch
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, *weight = ctx.saved_tensors
        pattern, stride, padding, samples = ctx.geometry
        grad = as_blocked(grad, "gradient", samples)
        blocks, _, h, w, _ = x.shape
        library, threads = require(), thread_count()
        dx = dvalues = dbias = dweight = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            for plan in pattern.plans(h, w, stride, padding, blocks, transposed=True):
                check(
                    library.sparse_convolve(
                        plan.handle,
                        values.data_ptr(),
                        grad.data_ptr(),
                        None,
                        dx.data_ptr(),
                        blocks,
                        threads,
                    )
                )
        if ctx.needs_input_grad[1]:
            dvalues = torch.empty_like(values)
            (plan,) = pattern.plans(h, w, stride, padding, blocks, transposed=False)
            check(
                library.sparse_weight_gradient(
                    plan.handle,
                    x.data_ptr(),
                    grad.data_ptr(),
                    dvalues.data_ptr(),
                    samples,
                    threads,
                )
            )
        if ctx.needs_input_grad[2]:
            dbias = channel_sum(grad, samples)
        if ctx.needs_input_grad[7]:
            dweight = dense_gradient(
                x,
                grad,
                weight[0],
                stride=stride,
                padding=padding,
                samples=samples,
                by_torch=ctx.by_torch,
            )
        return dx, dvalues, dbias, None, None, None, None, dweight, None


def dense_gradient(
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    samples: int,
    by_torch: bool = False,
) -> Tensor:
    """Gradient of a whole convolution weight, zeros included, in the weight's shape.

    Args:
        x: the input, batch-blocked [B, in, H, W, 16].
        grad: of the output, batch-blocked [B, out, H', W', 16].
        weight: [out, in, kernel_h, kernel_w] or [out, in]; its values don't matter.
        samples: batch size without padding.
        by_torch: convert to torch's layout and leave it to torch, which is faster for linear layers
            and small images.
    """
    x, grad = as_blocked(x, "input", samples), as_blocked(grad, "gradient", samples)
    if not by_torch:
        out = torch.empty(weight.shape)
        kernel = (*weight.shape, 1, 1)[2:4]
        side = x.shape[2:4]
        sizes = (ctypes.c_int64 * 8)(*weight.shape[:2], *kernel, stride, padding, *side)
        expected = [(n + 2 * padding - k) // stride + 1 for n, k in zip(side, kernel, strict=True)]
        if x.shape[1] != weight.shape[1] or list(grad.shape[1:4]) != [weight.shape[0], *expected]:
            raise ValueError(
                f"an input {list(x.shape)} and a weight {list(weight.shape)} do not give an output "
                f"{list(grad.shape)} with stride {stride} and padding {padding}"
            )
        check(
            require().sparse_dense_gradient(
                sizes, x.data_ptr(), grad.data_ptr(), out.data_ptr(), samples, thread_count()
            )
        )
        return out
    x, grad = unblock(x, samples), unblock(grad, samples)
    if weight.numel() == weight.shape[0] * weight.shape[1] and x.shape[2:] == (1, 1):
        return (grad.flatten(1).T @ x.flatten(1)).view(weight.shape)
    wanted = [False, True, False]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, wanted
    )[1]


def conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: Pattern,
    *,
    stride: int = 1,
    padding: int = 0,
    samples: int,
    dense_gradient_of: Tensor | None = None,
    gradient_by_torch: bool = False,
) -> Tensor:
    """Convolution over the non-zeros of a weight (groups 1, dilation 1).

    Args:
        x: batch-blocked [B, in, H, W, 16].
        values: [nnz] of the pattern (see gather); its gradient is [nnz] too.
        bias: [out] or None.
        samples: batch size without padding.
        dense_gradient_of: the weight the values were taken from; it then receives its gradient at
            every position, zeros of the pattern included (in addition to that of the values).
        gradient_by_torch: who computes that (see dense_gradient).

    Returns:
        batch-blocked [B, out, H', W', 16].

    Raises:
        ValueError, TypeError: shapes or types that do not fit.
        KernelsUnavailable: the kernels cannot be built here.
    """
    return _Conv2d.apply(
        x,
        values,
        bias,
        pattern,
        stride,
        padding,
        samples,
        dense_gradient_of,
        gradient_by_torch,
    )


def linear(
    x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, *, samples: int
) -> Tensor:
    """Linear layer over the non-zeros: [B, in, 1, 1, 16] to [B, out, 1, 1, 16]; see conv2d."""
    return conv2d(x, values, bias, pattern, samples=samples)


def channel_sum(x: Tensor, samples: int) -> Tensor:
    """Sum over samples and pixels of a batch-blocked tensor, [C]."""
    x = as_blocked(x, "input", samples)
    out = x.new_empty(x.shape[1])
    require().sparse_channel_sum(
        x.data_ptr(), out.data_ptr(), samples, x.shape[1], x.shape[2] * x.shape[3], thread_count()
    )
    return out
