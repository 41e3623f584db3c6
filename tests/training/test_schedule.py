"""When the learning rate falls, the masks move, and gradients of inactive weights are needed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lib.config import Run
from lib.training.schedule import Schedule, dense_window


def test_learning_rate_warms_up_and_decays() -> None:
    schedule = Schedule(Run(epochs=3, warmup_epochs=1, lr_decay_every_steps=25), 20)
    rates = [schedule.lr(step) for step in range(60)]
    assert rates[:20] == pytest.approx([0.1 * (s + 1) / 20 for s in range(20)])
    assert rates[20:] == pytest.approx([0.1] * 5 + [0.01] * 25 + [0.001] * 10)


@pytest.mark.parametrize("every", [0, 7, 25])
def test_steps_count_down_to_each_update_but_none_after_the_last(every: int) -> None:
    run = Run(epochs=3, update_every_steps=every)
    schedule, period = Schedule(run, 20), every or 20
    updates = [done for done in range(1, 60) if done % period == 0]
    for step in range(60):
        ahead = [done - step for done in updates if done > step]
        assert schedule.until_update(step) == (min(ahead) if ahead else math.inf)
    never = Schedule(replace(run, prune="none"), 20)
    assert never.until_update(0) == math.inf


def test_dense_window() -> None:
    assert dense_window(0.9) == 153
    assert dense_window(0.0) == 1
    assert 0.7 ** dense_window(0.7, 1e-3) <= 1e-3 < 0.7 ** (dense_window(0.7, 1e-3) - 1)
    with pytest.raises(ValueError, match="momentum"):
        dense_window(1.0)
    assert Schedule(Run(), 540).window == 153
    assert Schedule(Run(dense_window_steps=7), 540).window == 7
