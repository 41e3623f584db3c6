"""What happens when in a run, counted in mini-batches: learning rate, mask updates, dense windows.

Sparse momentum grows weights by the momentum of inactive ones, but reads it only when the masks
move. With momentum a and gradients g_t, the buffer then is

    m_T = sum over t of a^(T - t) g_t = sum over the last K steps + a^K m_(T - K),

so inactive weights need gradients only in the last K steps before an update: what is left out
keeps the share a^K of its value, below 1e-7 for K = 153 at a = 0.9, less than float32 resolves.
`dense_window` gives K. Active weights have their gradient in every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from lib.config import Run


def dense_window(momentum: float) -> int:
    """Steps K before an update in which inactive weights need gradients: momentum^K <= 1e-7, 153
    at 0.9; at least 1. `momentum` is in [0, 1).
    """
    return math.ceil(math.log(1e-7) / math.log(momentum)) if momentum > 0 else 1


@dataclass(frozen=True)
class Schedule:
    """A run whose epochs have `steps_per_epoch` mini-batches; `step` counts the ones done."""

    run: Run
    steps_per_epoch: int

    @cached_property
    def total_steps(self) -> int:
        """Mini-batches of the whole run."""
        return self.run.epochs * self.steps_per_epoch

    @cached_property
    def period(self) -> int:
        """Mini-batches from one update of the masks to the next."""
        return self.run.update_every_steps or self.steps_per_epoch

    @cached_property
    def window(self) -> int:
        """Mini-batches before an update that gather the momentum of inactive weights."""
        return self.run.dense_window_steps or dense_window(self.run.momentum)

    def lr(self, step: int) -> float:
        """Learning rate of the next mini-batch: linear warm-up, then x`lr_decay` in steps."""
        run, warmup = self.run, self.run.warmup_epochs * self.steps_per_epoch
        if step < warmup:
            return run.lr * (step + 1) / warmup
        return run.lr * run.lr_decay ** (step // run.lr_decay_every_steps)

    def until_update(self, step: int) -> float:
        """Mini-batches up to the next update of the masks, the next one included; inf: none."""
        if self.run.prune == "none":
            return math.inf
        left = self.period - step % self.period
        return left if step + left < self.total_steps else math.inf
