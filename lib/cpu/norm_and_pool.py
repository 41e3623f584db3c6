"""Batch norm and pooling of batch-blocked activations (lib/cpu/blocked.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from .blocked import LANES, as_blocked, as_float, pointer, thread_count
from .library import require


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
        x = as_blocked(x, "input", samples)
        weight, bias = as_float(weight, "weight"), as_float(bias, "bias")
        if not training:
            mean, var = as_float(mean, "running mean"), as_float(var, "running variance")
        channels = x.shape[1]
        sizes = {t.numel() for t in (weight, bias, mean, var)}
        if sizes != {channels}:
            raise ValueError(f"batch norm of {channels} channels got parameters of {sizes}")
        y = torch.empty_like(x)
        shape = (samples, channels, x.shape[2] * x.shape[3], thread_count())
        require().sparse_norm_forward(
            *(t.data_ptr() for t in (x, y, mean, var, weight, bias)),
            eps,
            int(relu),
            int(training),
            *shape,
        )
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.arguments = (eps, int(relu), int(not training), *shape)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, var = ctx.saved_tensors
        grad = as_float(grad, "gradient")
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
        require().sparse_norm_backward(
            *(pointer(t) for t in (x, grad, dx, dweight, dbias, mean, var, weight, bias)),
            *ctx.arguments,
        )
        return dx, dweight, dbias, *[None] * 6


def batch_norm(x: Tensor, norm: _BatchNorm, samples: int, *, relu: bool = False) -> Tensor:
    """Batch normalisation (training or evaluation, as `norm` is set), with ReLU if asked.

    The same as relu(norm(.)) on the ordinary layout, running statistics included.

    Args:
        x: batch-blocked [B, C, H, W, 16].
        norm: an affine module; its running statistics are updated in training.
        samples: batch size without padding; the statistics ignore the rest.

    Raises:
        ValueError: the module has no weight and bias, or training sees one value per channel.
    """
    if norm.weight is None or norm.bias is None:
        raise ValueError("batch_norm needs an affine module (weight and bias)")
    count = samples * x.shape[2] * x.shape[3]
    training = norm.training or norm.running_mean is None or norm.running_var is None
    if training:
        if count < 2:
            raise ValueError(
                f"batch norm needs more than one value per channel in training, got {count}"
            )
        mean, var = x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
    else:
        assert norm.running_mean is not None and norm.running_var is not None
        mean, var = norm.running_mean, norm.running_var
    y = _Norm.apply(x, norm.weight, norm.bias, mean, var, training, norm.eps, relu, samples)
    if norm.training and norm.running_mean is not None and norm.running_var is not None:
        with torch.no_grad():
            rate = norm.momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
                if rate is None:
                    rate = 1.0 / float(norm.num_batches_tracked)
            assert rate is not None
            norm.running_mean.lerp_(mean, rate)
            norm.running_var.lerp_(var * (count / (count - 1)), rate)
    return y


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, stride: int, relu: bool) -> Tensor:
        blocks, channels, h, w, _ = x.shape
        shape = (blocks, channels, (h - size) // stride + 1, (w - size) // stride + 1, LANES)
        y, which = x.new_empty(shape), x.new_empty(shape, dtype=torch.uint8)
        ctx.pool = (blocks * channels, h, w, size, stride)
        require().sparse_max_pool(
            0, int(relu), *ctx.pool, x.data_ptr(), y.data_ptr(), which.data_ptr(), thread_count()
        )
        ctx.save_for_backward(which)
        ctx.shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (which,) = ctx.saved_tensors
        grad = as_float(grad, "gradient")
        dx = grad.new_empty(ctx.shape)
        require().sparse_max_pool(
            1, 0, *ctx.pool, grad.data_ptr(), dx.data_ptr(), which.data_ptr(), thread_count()
        )
        return dx, None, None, None


class _MeanPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, stride: int) -> Tensor:
        blocks, channels, h, w, _ = x.shape
        y = x.new_empty(blocks, channels, (h - size) // stride + 1, (w - size) // stride + 1, LANES)
        ctx.pool, ctx.shape = (blocks * channels, h, w, size, stride), x.shape
        require().sparse_mean_pool(0, *ctx.pool, x.data_ptr(), y.data_ptr(), thread_count())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = as_float(grad, "gradient")
        dx = grad.new_empty(ctx.shape)
        require().sparse_mean_pool(1, *ctx.pool, grad.data_ptr(), dx.data_ptr(), thread_count())
        return dx, None, None


def _pool_input(x: Tensor, size: int, stride: int) -> Tensor:
    x = as_float(x, "input")
    if x.dim() != 5 or x.shape[4] != LANES or not 1 <= size <= min(x.shape[2:4]) or stride < 1:
        raise ValueError(
            f"pooling of size {size}, stride {stride} does not fit an input of {list(x.shape)}"
        )
    if size > 16:
        raise ValueError(f"pooling windows go up to 16 x 16, got {size} x {size}")
    return x


def max_pool2d(x: Tensor, size: int, stride: int | None = None, *, relu: bool = False) -> Tensor:
    """Max pooling without padding of a batch-blocked tensor; stride `size` by default.

    With `relu`, of windows up to 15 x 15: the same as relu(max_pool2d(.)).
    """
    stride = stride or size
    if relu and size > 15:
        raise ValueError(f"with ReLU pooling windows go up to 15 x 15, got {size} x {size}")
    return _MaxPool.apply(_pool_input(x, size, stride), size, stride, relu)


def mean_pool2d(x: Tensor, size: int, stride: int | None = None) -> Tensor:
    """Average pooling without padding of a batch-blocked tensor; stride `size` by default."""
    stride = stride or size
    return _MeanPool.apply(_pool_input(x, size, stride), size, stride)
