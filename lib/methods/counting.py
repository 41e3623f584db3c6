"""How much: the prune rate's schedule, and whole numbers from real-valued quotas, exact in every
update.

What rounding leaves over is carried to the next update, so that over time every layer follows its
quota. Rounding up in each update, as the official code does, drains small layers at small prune
rates (PAPER.md 12f).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lib.methods.layer import Layer

# Name -> share of the prune rate that is left when this share of the steps is done.
SCHEDULES: dict[str | None, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "cosine_floor": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
    None: lambda done: 1.0,
}

FLOORS: dict[str | None, float] = {"cosine_floor": 0.005}  # the prune rate falls to it, not to 0


def annealed(
    schedule: str | None, rate: float, steps: int, total_steps: int | None, every: int = 0
) -> float:
    """The prune rate after `steps` of `total_steps`, `rate` at first; constant without a total.

    It falls with every step, or once per `every` steps; the update at the end of such a period
    still has the rate of its beginning.
    """
    if total_steps is None:
        return rate
    if every:
        steps = max(0, steps - 1) // every * every
    floor = min(FLOORS.get(schedule, 0.0), rate)
    return floor + (rate - floor) * SCHEDULES[schedule](min(1.0, steps / total_steps))


def rounded(quota: float, most: int, key: str, state: dict[str, Any]) -> int:
    """`quota` as a whole number from 0 to `most`; what rounding leaves over is carried, in
    `state[key]`, to the next call, so that over the updates counts follow their quotas within one.
    """
    wanted = with_carried(quota, key, state)
    number = min(most, max(0, math.floor(wanted + 0.5)))
    state[key] = left_over(wanted, number)
    return number


def with_carried(quota: float, key: str, state: dict[str, Any]) -> float:
    """`quota` and what earlier roundings left over, to nine digits: 1 - 0.9 is no tenth."""
    return round(quota + state.get(key, 0.0), 9)


def left_over(wanted: float, number: int) -> float:
    """What is carried on; at most one weight where a cap kept more from being taken."""
    return max(-1.0, min(1.0, round(wanted - number, 9)))


def own_rate(layer: Layer, rate: float, layers: int) -> float:
    """The layer's prune rate: `rate`, but for a nearly dense and important layer.

    One with under 20 % inactive weights that is more important than the average layer loses at
    most its share of inactive weights: the early layers of deep networks stay as dense as their
    importance asks (official code e19ff16, core.py; PAPER.md 10e).
    """
    inactive = (layer.numel - layer.active) / layer.numel
    if layer.share is not None and inactive < 0.2 and layer.share > 1 / layers:
        return min(rate, inactive)
    return rate


def quotas(total: int, shares: Sequence[float], capacity: Sequence[int]) -> list[float]:
    """Split `total` proportionally to `shares`, none above its capacity: real numbers.

    What a full layer can't take overflows to the others by their shares. Shares that are all zero
    count as equal to the free capacity. Raises ValueError for a negative or non-finite share and
    for a total beyond the whole capacity.
    """
    if any(not math.isfinite(s) or s < 0 for s in shares):
        raise ValueError(f"shares must be finite and not negative, got {list(shares)}")
    if not 0 <= total <= sum(capacity):
        raise ValueError(f"cannot place {total} weights in {sum(capacity)} free positions")
    quota = [0.0] * len(shares)
    free = [i for i, room in enumerate(capacity) if room > 0]
    left = total
    while free and left > 0:
        weight = {i: shares[i] for i in free}
        if sum(weight.values()) <= 0:
            weight = {i: float(capacity[i]) for i in free}
        scale = left / sum(weight.values())
        if not math.isfinite(scale):  # shares near the smallest float
            top = max(weight.values())
            weight = {i: share / top for i, share in weight.items()}
            scale = left / sum(weight.values())
        full = [i for i in free if weight[i] * scale >= capacity[i]]
        if not full:
            for i in free:
                quota[i] = weight[i] * scale
            break
        for i in full:
            quota[i] = capacity[i]
            left -= capacity[i]
        free = [i for i in free if i not in full]
    return quota


def whole(total: int, wanted: Sequence[float], capacity: Sequence[int]) -> list[int]:
    """`wanted` as whole numbers from 0 to the capacity whose sum is `total` exactly.

    Rounded down; the rest goes to the largest remainders (ties: the earlier layer). Where layers
    that want less than nothing leave too little, the smallest remainders give one back.
    """
    counts = [min(room, max(0, math.floor(w))) for w, room in zip(wanted, capacity, strict=True)]
    while left := total - sum(counts):
        one = 1 if left > 0 else -1
        able = [i for i, n in enumerate(counts) if (n < capacity[i] if one > 0 else n > 0)]
        able.sort(key=lambda i: (one * (counts[i] - wanted[i]), i))
        for i in able[: abs(left)]:
            counts[i] += one
    return counts


def allocate(total: int, shares: Sequence[float], capacity: Sequence[int]) -> list[int]:
    """`quotas` in whole numbers: see there, and `whole`."""
    return whole(total, quotas(total, shares, capacity), capacity)


def leave_no_layer_empty(numbers: list[int], survivors: Sequence[int]) -> list[int]:
    """Move single weights so that no layer ends without one: an empty layer would cut the network
    and has no momentum to be measured by (the official code stops with an error there).
    """
    for i, survived in enumerate(survivors):
        if survived + numbers[i] == 0:
            after = [left + n for left, n in zip(survivors, numbers, strict=True)]
            donor = max(range(len(after)), key=lambda j: (numbers[j] > 0, after[j]))
            numbers[donor] -= 1
            numbers[i] += 1
    return numbers
