"""What an update does to the numbers of one layer: pick the largest, count, average, clear.

Nothing else knows where tensors live. On the CPU NumPy selects, many times faster than torch does
there; elsewhere torch, without synchronising with the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Score = Literal["value", "magnitude", "smallness"]


def pick(values: Tensor, candidates: Tensor, k: int, score: Score = "value") -> Tensor:
    """Bool tensor with exactly k of the candidates: those of the largest scores, O(n).

    `values` (float) and `candidates` (bool) have the same shape; the score is the "value", its
    "magnitude" |v| or its "smallness" -|v|. Among equal scores the positions that come first win,
    so that the choice is the same everywhere. Raises ValueError when there are fewer than k
    candidates (checked on the CPU, where counting costs no synchronisation).
    """
    if k == 0:
        return torch.zeros_like(candidates)
    scores = values if score == "value" else values.abs()
    scores = -scores if score == "smallness" else scores
    if scores.device.type == "cpu":
        array, allowed = _numpy(scores), candidates.numpy()
        chosen = array[allowed]
        if k > chosen.size:
            raise ValueError(f"cannot pick {k} of {chosen.size} candidates")
        lowest = np.partition(chosen, chosen.size - k)[chosen.size - k]
        over, equal = (array > lowest) & allowed, (array == lowest) & allowed
        missing = k - np.count_nonzero(over)
        if np.count_nonzero(equal) > missing:
            equal.flat[np.flatnonzero(equal)[missing:]] = False
        return torch.from_numpy(over | equal)
    # Selecting by a mask would synchronise with the host; filling does not.
    filled = scores.float().masked_fill(~candidates, -math.inf)
    threshold = filled.reshape(-1).topk(k, sorted=False).values.min()
    above = filled > threshold
    ties = (filled == threshold) & candidates
    first = (ties.reshape(-1).cumsum(0) <= k - above.sum()).view(ties.shape)
    return above | (ties & first)


def count(mask: Tensor) -> Tensor | int:
    """Number of true positions (0-d on a GPU; see `to_host`)."""
    if mask.device.type == "cpu":
        return int(np.count_nonzero(mask.numpy()))
    return torch.count_nonzero(mask)


def mean_active(values: Tensor, mask: Tensor) -> Tensor | float:
    """Mean of |values| where mask is true, in float64; 0 where it never is (0-d on a GPU)."""
    if values.device.type != "cpu":
        return (values.abs() * mask).sum(dtype=torch.float64) / mask.sum().clamp(min=1)
    places = np.flatnonzero(mask.numpy())
    chosen = np.abs(_numpy(values).reshape(-1)[places])
    # In the order of the first rows, which were summed by vectors: sixteen sums, begun anew by each
    # 4096 positions. Another order changes the last bit.
    before = np.searchsorted(places, np.arange(0, mask.numel(), 4096))
    lane = (np.arange(places.size) - before[places >> 12]) & 15
    return float(np.bincount(lane, chosen, 16).cumsum()[-1]) / max(1, places.size)


def clear_outside(values: Tensor, mask: Tensor) -> None:
    """Set `values` to zero, in place, where `mask` (bool, same shape) is false; NaN too."""
    values.masked_fill_(~mask, 0)


def to_host(numbers: Sequence[Tensor | float]) -> list[float]:
    """The numbers as Python's; those that are tensors [0-d] cross in one transfer."""
    tensors = [n.double() for n in numbers if isinstance(n, Tensor)]
    crossed = iter(torch.stack(tensors).tolist() if tensors else ())
    return [next(crossed) if isinstance(n, Tensor) else float(n) for n in numbers]


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class BitMasks:
    """The masks once more as bits, all ones or zeros, so that a layer is cleared by one "and":
    several times faster than by filling, and what isn't finite becomes zero like the rest.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Tensor, int, Tensor]] = {}

    def clear(self, parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        """Set the weights outside of their masks to zero."""
        for name, mask in masks.items():
            weight = parameters[name].detach()
            bits = self._of(name, weight, mask)
            weight.view(bits.dtype).bitwise_and_(bits)

    def _of(self, name: str, weight: Tensor, mask: Tensor) -> Tensor:
        seen, version, bits = self._kept.get(name, (None, 0, weight))
        if seen is None or bits.stride() != weight.stride() or bits.device != weight.device:
            seen = None
            bits = torch.empty_like(weight, dtype=INTEGERS[weight.element_size()])
        if seen is not mask or version != mask._version:
            bits.copy_(mask).neg_()
            self._kept[name] = mask, mask._version, bits
        return bits


def _numpy(values: Tensor) -> npt.NDArray[Any]:
    """The tensor as an array, without a copy where NumPy knows its type."""
    values = values.detach()
    return (values if values.dtype in (torch.float32, torch.float64) else values.float()).numpy()
