"""The passes of a mask update over one layer on the CPU, compiled (see select.hpp).

Callers ask `takes` first; what it refuses (another type, memory order or device) is theirs to do by
torch or NumPy.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .library import available, check, require


class _MatrixPattern(ctypes.Structure):
    """MatrixPattern of select.hpp."""

    _fields_ = [
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("index", ctypes.c_void_p),
        ("row_start", ctypes.c_void_p),
        ("column", ctypes.c_void_p),
        ("column_start", ctypes.c_void_p),
        ("row", ctypes.c_void_p),
        ("place", ctypes.c_void_p),
    ]


def counts(mask: Tensor) -> bool:
    """Whether `count` can be used: bool, without gaps in memory, on the CPU."""
    return mask.is_cpu and mask.dtype is torch.bool and mask.is_contiguous() and available()


def takes(values: Tensor, mask: Tensor) -> bool:
    """Whether the passes below can be used: float32 and bool, contiguous, on the CPU."""
    return (
        counts(mask) and values.is_cpu and values.dtype is torch.float32 and values.is_contiguous()
    )


def count(mask: Tensor) -> int:
    """Number of true positions."""
    number: int = require().mask_count(mask.data_ptr(), mask.numel())
    return number


def choose_largest(values: Tensor, candidates: Tensor, k: int, score: str) -> Tensor:
    """Bool, as `candidates`: exactly k of them, of the largest scores; first places win ties.

    `score`: the "value", or its "smallness" -|v|. Raises ValueError for fewer than k candidates
    whose score is a number.
    """
    library = require()
    chosen = torch.empty_like(candidates)
    if library.mask_choose_largest(
        score == "smallness",
        values.data_ptr(),
        candidates.data_ptr(),
        values.numel(),
        k,
        chosen.data_ptr(),
    ):
        raise ValueError(library.sparse_error().decode())
    return chosen


def sum_of_magnitudes(values: Tensor, mask: Tensor) -> float:
    """Sum of |values| where mask is true, added up in double precision."""
    total: float = require().mask_sum_of_magnitudes(
        values.data_ptr(), mask.data_ptr(), values.numel()
    )
    return total


def clear_outside(values: Tensor, mask: Tensor) -> None:
    """Set `values` to zero in place where mask is false."""
    require().mask_clear_outside(
        values.data_ptr(), mask.data_ptr(), values.numel(), torch.get_num_threads()
    )


def list_nonzeros(
    mask: Tensor,
    index: Tensor,
    row_start: Tensor,
    column: Tensor,
    column_start: Tensor,
    row: Tensor,
    place: Tensor,
) -> None:
    """Fill the arrays of a matrix's non-zeros, those where `mask` [rows, columns] is true.

    By row: `index` int64 [nonzeros], places in the flat matrix, and int32 `column` [nonzeros],
    those of row r from row_start[r] to row_start[r + 1]. By column likewise `row`, and `place`,
    where each stands in the order by row.
    """
    arrays = (index, row_start, column, column_start, row, place)
    pattern = _MatrixPattern(*mask.shape, *(array.data_ptr() for array in arrays))
    check(require().mask_list_nonzeros(mask.data_ptr(), ctypes.byref(pattern)))
