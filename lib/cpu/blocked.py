"""The batch-blocked layout of activations, and the checks of what the kernels are given.

Activations are float32 [ceil(N / 16), C, H, W, 16], contiguous; lanes beyond sample N - 1 mean
nothing in activations and are zero in gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .library import require

LANES = 16


def pointer(tensor: Tensor | None) -> int | None:
    """Address of the first element; None (a null pointer) without a tensor."""
    return None if tensor is None else tensor.data_ptr()


def as_float(tensor: Tensor, name: str) -> Tensor:
    """`tensor`, contiguous.

    Raises:
        TypeError: it is not a float32 tensor on the CPU.
    """
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise TypeError(
            f"sparse kernels take float32 on the CPU, but {name} is {tensor.dtype} on "
            f"{tensor.device}; use masked dense layers for it"
        )
    return tensor.contiguous()


def as_blocked(x: Tensor, name: str, samples: int) -> Tensor:
    """`x`, contiguous.

    Raises:
        TypeError, ValueError: it is not what the layout of `samples` samples asks for.
    """
    x = as_float(x, name)
    blocks = -(-samples // LANES)
    if x.dim() != 5 or x.shape[0] != blocks or x.shape[4] != LANES or samples < 1:
        raise ValueError(
            f"{name} must be batch-blocked [{blocks}, C, H, W, {LANES}] for {samples} samples, "
            f"got {list(x.shape)}; use to_blocked"
        )
    return x


def thread_count() -> int:
    """How many threads the kernels take: as many as torch's operators."""
    return torch.get_num_threads()


def _convert(plain: Tensor, blocked: Tensor, to_blocked: bool) -> None:
    n, c, h, w = plain.shape
    last = plain.is_contiguous(memory_format=torch.channels_last) and not plain.is_contiguous()
    strides = (c * h * w, 1, c) if last else (c * h * w, h * w, 1)
    require().sparse_convert(
        int(to_blocked), plain.data_ptr(), *strides, blocked.data_ptr(), n, c, h * w, thread_count()
    )


def block(x: Tensor) -> Tensor:
    """`to_blocked` without autograd.

    Raises:
        TypeError, ValueError: another type or shape, or no sample.
    """
    if x.dim() != 4 or x.shape[0] < 1:
        raise ValueError(f"to_blocked takes [N, C, H, W] with N > 0, got {list(x.shape)}")
    if not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous()
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise TypeError(f"sparse kernels take float32 on the CPU, got {x.dtype} on {x.device}")
    n, c, h, w = x.shape
    out = x.new_empty(-(-n // LANES), c, h, w, LANES)
    _convert(x, out, True)
    return out


def unblock(
    x: Tensor, samples: int, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """`from_blocked` without autograd."""
    x = as_blocked(x, "input", samples)
    shape = (samples, *x.shape[1:4])
    out = torch.empty(shape, dtype=x.dtype, memory_format=memory_format)
    _convert(out, x, False)
    return out


class _ToBlocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.samples = x.shape[0]
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        ctx.format = torch.channels_last if last else torch.contiguous_format
        return block(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return unblock(grad, ctx.samples, ctx.format)


class _FromBlocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, samples: int, memory_format: torch.memory_format) -> Tensor:
        return unblock(x, samples, memory_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return block(grad), None, None


def to_blocked(x: Tensor) -> Tensor:
    """[N, C, H, W] (contiguous or channels last) to [ceil(N / 16), C, H, W, 16], zero-padded."""
    return _ToBlocked.apply(x)


def from_blocked(
    x: Tensor, samples: int, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """[B, C, H, W, 16] to [samples, C, H, W] in the given memory format."""
    return _FromBlocked.apply(x, samples, memory_format)
