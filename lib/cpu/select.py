"""Masks and the non-zeros under them, for the perceptron engine (see select.hpp)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .layouts import Nonzeros
from .library import available, check, require


def counts(mask: Tensor) -> bool:
    """Whether `count` can be used: bool, without gaps in memory, on the CPU."""
    return mask.is_cpu and mask.dtype is torch.bool and mask.is_contiguous() and available()


def count(mask: Tensor) -> int:
    """Number of true positions."""
    number: int = require().mask_count(mask.data_ptr(), mask.numel())
    return number


def as_floats(mask: Tensor, out: Tensor) -> None:
    """Write the mask to `out` (float32, same shape, contiguous) as ones and zeros."""
    require().mask_as_floats(mask.data_ptr(), mask.numel(), out.data_ptr())


def take_nonzeros(
    mask: Tensor, count: int, weight: Tensor, momentum: Tensor, arrays: Nonzeros
) -> None:
    """Fill the arrays, which have room for `count`, with the non-zeros of `weight`, those where
    `mask` is true; RuntimeError where these are more or fewer.
    """
    check(
        require().mask_take_nonzeros(
            mask.data_ptr(), count, weight.data_ptr(), momentum.data_ptr(), ctypes.byref(arrays)
        )
    )


def put_nonzeros(arrays: Nonzeros, count: int, weight: Tensor, momentum: Tensor) -> None:
    """Write the first `count` values back to where `index` says."""
    require().mask_put_nonzeros(ctypes.byref(arrays), count, weight.data_ptr(), momentum.data_ptr())
