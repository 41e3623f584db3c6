"""The passes of a mask update over one layer on the CPU, compiled (see select.hpp).

Callers ask `takes` first; what it refuses (another type, memory order or device) is theirs to do by
torch or NumPy.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .layouts import Nonzeros, Room, Survey
from .library import available, check, require

MOST_PLACES = 2**31 - 1  # of one tensor; int32 in the kernels
SCORES = {"value": 0, "magnitude": 1, "smallness": 2}  # as in sparse.cpp


class ActiveList:
    """Room for the places and values of `count` active weights; `survey` fills it. A copy is as
    large and empty.
    """

    def __init__(self, count: int) -> None:
        self.room = count + 16  # the kernels write sixteen at a time
        self.place = torch.empty(self.room, dtype=torch.int32)
        self.weight = torch.empty(self.room)
        self.count = 0
        self.address = ctypes.byref(Room(self.room, self.place.data_ptr(), self.weight.data_ptr()))

    def __reduce__(self) -> tuple[type[ActiveList], tuple[int]]:
        return ActiveList, (self.room - 16,)


def counts(mask: Tensor) -> bool:
    """Whether `count` can be used: bool, without gaps in memory, on the CPU."""
    return mask.is_cpu and mask.dtype is torch.bool and mask.is_contiguous() and available()


def takes(values: Tensor, mask: Tensor, momentum: Tensor | None = None) -> bool:
    """Whether the passes below can be used, on values and, where there is one, their momentum:
    float32 and bool, contiguous, on the CPU, at most MOST_PLACES of them.
    """
    return (
        counts(mask)
        and mask.numel() <= MOST_PLACES
        and _plain(values)
        and (momentum is None or _plain(momentum))
    )


def _plain(values: Tensor) -> bool:
    return values.is_cpu and values.dtype is torch.float32 and values.is_contiguous()


def count(mask: Tensor) -> int:
    """Number of true positions."""
    number: int = require().mask_count(mask.data_ptr(), mask.numel())
    return number


def as_floats(mask: Tensor, out: Tensor) -> None:
    """Write the mask to `out` (float32, same shape, contiguous) as ones and zeros."""
    require().mask_as_floats(mask.data_ptr(), mask.numel(), out.data_ptr())


def flip_largest(values: Tensor, mask: Tensor, k: int, active: bool, score: str) -> Tensor:
    """`mask` with exactly k of its places that are `active` flipped, those of the largest scores;
    first places win ties.

    `score`: the "value", its "magnitude" |v| or its "smallness" -|v|. Raises ValueError for fewer
    than k candidates whose score is a number.
    """
    library = require()
    result = torch.empty_like(mask)
    if library.mask_flip_largest(
        SCORES[score],
        values.data_ptr(),
        mask.data_ptr(),
        active,
        values.numel(),
        k,
        result.data_ptr(),
    ):
        raise ValueError(library.sparse_error().decode())
    return result


def survey(
    weight: Tensor, momentum: Tensor | None, mask: Tensor, active: ActiveList | None = None
) -> Survey:
    """Look at a layer once, and clear its weights outside of `mask` on the way.

    `active` is filled; its count is 0 afterwards if it had too little room.
    """
    seen = Survey()
    require().mask_survey(
        weight.data_ptr(),
        None if momentum is None else momentum.data_ptr(),
        mask.data_ptr(),
        mask.numel(),
        None if active is None else active.address,
        ctypes.byref(seen),
    )
    if active is not None:
        active.count = seen.active if seen.active + 16 <= active.room else 0
    return seen


def drop_smallest(active: ActiveList, mask: Tensor, k: int) -> Tensor:
    """`mask`, whose finite weights are listed in `active`, less the k smallest of them."""
    result = torch.empty_like(mask)
    check(
        require().mask_drop_smallest(
            active.address,
            active.count,
            mask.data_ptr(),
            mask.numel(),
            k,
            result.data_ptr(),
        )
    )
    return result


def clear_listed(values: Tensor, mask: Tensor, active: ActiveList) -> None:
    """Set the `values` that are listed to zero in place where `mask` is false."""
    require().mask_clear_listed(values.data_ptr(), mask.data_ptr(), active.address, active.count)


def sum_of_magnitudes(values: Tensor, mask: Tensor) -> float:
    """Sum of |values| where mask is true, added up in double precision."""
    total: float = require().mask_sum_of_magnitudes(
        values.data_ptr(), mask.data_ptr(), values.numel()
    )
    return total


def clear_outside(values: Tensor, mask: Tensor) -> None:
    """Set `values` to zero in place where `mask` is false."""
    require().mask_clear_outside(
        values.data_ptr(), mask.data_ptr(), values.numel(), torch.get_num_threads()
    )


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
