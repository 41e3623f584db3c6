"""How the prune rate falls while a network trains."""

from __future__ import annotations

import math
from collections.abc import Callable

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
