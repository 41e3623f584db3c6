"""Convolution over the non-zeros of a weight, and batch norm, with autograd.

Activations are batch-blocked: float32 [ceil(N / 16), C, H, W, 16], contiguous; lanes beyond sample
N - 1 mean nothing in activations and are zero in gradients. A linear layer is a convolution of one
pixel. Weights are the values of the non-zeros, float32 [nnz], in the row-major order of the mask.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_weight
from torch.nn.modules.batchnorm import _BatchNorm

from lib.cpu.library import call, cpu_id

LANES = 16


def to_blocked(x: Tensor) -> Tensor:
    """[N, C, H, W] to [ceil(N / 16), C, H, W, 16], zero-padded."""
    if rest := -len(x) % LANES:
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, rest))
    return x.unflatten(0, (-1, LANES)).permute(0, 2, 3, 4, 1).contiguous()


def from_blocked(x: Tensor, samples: int) -> Tensor:
    """[B, C, H, W, 16] to [samples, C, H, W]."""
    return x.permute(0, 4, 1, 2, 3).flatten(0, 1)[:samples].contiguous()


class _Plan:
    """A plan of the library, freed with this object."""

    def __init__(self, *arguments: Any) -> None:
        handle = ctypes.c_int64()
        call("sparse_plan_create", *arguments, ctypes.byref(handle))
        self.handle = handle.value
        weakref.finalize(self, call, "sparse_plan_free", self.handle)


class Pattern:
    """Where a weight's non-zeros are: immutable, rebuilt when the mask changes.

    Args:
        mask: bool [out, in, kernel_h, kernel_w] or [out, in] (a linear layer).

    Attributes:
        mask: as given.
        shape: of the weight, four numbers.
        index: int64 [nnz], places of the non-zeros in the flattened weight, ascending.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask, self.shape = mask, (*mask.shape, 1, 1)[:4]
        self.index = mask.flatten().nonzero().squeeze(1)
        places = mask.reshape(self.shape).nonzero()
        self._coords = places.to(torch.int32).contiguous()
        self._plans: dict[tuple[int, ...], list[_Plan]] = {}
        self.density = len(self.index) / max(1, mask.numel())

    def plans(
        self, height: int, width: int, stride: int, padding: int, blocks: int, transposed: bool
    ) -> list[_Plan]:
        """The library's plans for inputs of this size (one, or one per phase of the stride)."""
        key = (height, width, stride, padding, blocks, transposed, torch.get_num_threads())
        if key not in self._plans:
            shape = [*self.shape, stride, padding, height, width]
            phases = range(stride if transposed else 1)
            self._plans[key] = [
                _Plan(shape, self._coords, len(self.index), transposed, y, x, blocks)
                for y in phases
                for x in phases
            ]
        return self._plans[key]


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        weight: Tensor | None,
        pattern: Pattern,
        stride: int,
        padding: int,
        samples: int,
    ) -> Tensor:
        o, _, kh, kw = pattern.shape
        blocks, _, h, w, _ = x.shape
        sides = (h + 2 * padding - kh) // stride + 1, (w + 2 * padding - kw) // stride + 1
        y = x.new_empty(blocks, o, *sides, LANES)
        (plan,) = pattern.plans(h, w, stride, padding, blocks, transposed=False)
        call("sparse_convolve", plan.handle, values, x, bias, y, blocks)
        ctx.save_for_backward(x, values, weight)
        ctx.geometry = pattern, stride, padding, samples
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, weight = ctx.saved_tensors
        pattern, stride, padding, samples = ctx.geometry
        grad = grad.contiguous()
        blocks, _, h, w, _ = x.shape
        size = h, w, stride, padding, blocks
        dx = dvalues = dbias = dweight = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            for plan in pattern.plans(*size, transposed=True):
                call("sparse_convolve", plan.handle, values, grad, None, dx, blocks)
        if ctx.needs_input_grad[1]:
            dvalues = torch.empty_like(values)
            (plan,) = pattern.plans(*size, transposed=False)
            call("sparse_weight_gradient", plan.handle, x, grad, dvalues, samples)
        if ctx.needs_input_grad[2]:
            channels, pixels = grad.shape[1], grad.shape[2] * grad.shape[3]
            dbias = grad.new_empty(channels)
            call("sparse_channel_sum", grad, dbias, samples, channels, pixels)
        if ctx.needs_input_grad[3]:
            dweight = dense_gradient(x, grad, weight.shape, stride, padding, samples)
        return dx, dvalues, dbias, dweight, None, None, None, None


def dense_gradient(
    x: Tensor, grad: Tensor, shape: torch.Size, stride: int, padding: int, samples: int
) -> Tensor:
    """Gradient of a whole weight of this shape, zeros included, for an input [B, in, H, W, 16] and
    the gradient of the output [B, out, H', W', 16].
    """
    # Torch is faster without a kernel's pixels, and on large layers where there is no AVX-512.
    ours = "avx512f" in cpu_id() or shape[:2].numel() < 64 * 64
    if ours and shape[2:].numel() > 1:
        out = torch.empty(shape)
        sizes = [*shape, stride, padding, *x.shape[2:4]]
        call("sparse_dense_gradient", sizes, x, grad, out, samples)
        return out
    x, grad = from_blocked(x, samples), from_blocked(grad, samples)
    if x.shape[2:] == (1, 1):
        return (grad.flatten(1).T @ x.flatten(1)).view(shape)
    return conv2d_weight(x, shape, grad, stride, padding)


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
) -> Tensor:
    """Convolution over the non-zeros of a weight (groups 1, dilation 1).

    Args:
        x: batch-blocked [B, in, H, W, 16].
        values: [nnz] of the pattern; its gradient is [nnz] too.
        bias: [out] or None.
        samples: batch size without padding.
        dense_gradient_of: the weight the values were taken from; it then receives its gradient at
            every position, zeros of the pattern included (in addition to that of the values).

    Returns:
        batch-blocked [B, out, H', W', 16].

    Raises:
        KernelsUnavailable: the kernels cannot be built here.
    """
    return _Conv2d.apply(
        x.contiguous(), values, bias, dense_gradient_of, pattern, stride, padding, samples
    )


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        training: bool,
        eps: float,
        relu: bool,
        samples: int,
    ) -> Tensor:
        y = torch.empty_like(x)
        shape = samples, x.shape[1], x.shape[2] * x.shape[3]
        call("sparse_norm_forward", x, y, mean, var, weight, bias, eps, relu, training, *shape)
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.arguments = eps, relu, not training, *shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, var = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
        statistics = mean, var, weight, bias
        gradients = grad.contiguous(), dx, dweight, dbias
        call("sparse_norm_backward", x, *gradients, *statistics, *ctx.arguments)
        return dx, dweight, dbias, *[None] * 6


def batch_norm(x: Tensor, norm: _BatchNorm, samples: int, *, relu: bool = False) -> Tensor:
    """Batch normalisation (training or evaluation, as `norm` is set), with ReLU if asked.

    The same as relu(norm(.)) on the ordinary layout, running statistics included.

    Args:
        x: batch-blocked [B, C, H, W, 16].
        norm: with scale and shift, running statistics and a momentum.
        samples: batch size without padding; the statistics ignore the rest.

    Raises:
        ValueError: training sees one value per channel.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.momentum is not None and norm.num_batches_tracked is not None
    mean, var, count = norm.running_mean, norm.running_var, samples * x.shape[2] * x.shape[3]
    if norm.training:
        if count < 2:
            raise ValueError("batch norm needs more than one value per channel in training")
        mean, var = torch.empty_like(mean), torch.empty_like(var)
    y = _Norm.apply(
        x.contiguous(), norm.weight, norm.bias, mean, var, norm.training, norm.eps, relu, samples
    )
    if norm.training:
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * (count / (count - 1)), norm.momentum)
    return y
