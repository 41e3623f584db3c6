"""What a run will cost, by the rows of runs like it."""

from __future__ import annotations

import pandas as pd
import pytest

from lib.config import Run
from lib.results import store as results
from lib.runs import cost
from tests.support.made_up_runs import make_row

SECONDS = 1e-6  # of a forward pass of one image


def row(number: int, machine: str, *, passes: float = 1.0, **fields: object) -> dict[str, object]:
    """A row of 540 steps of 100 images whose every forward pass took `passes` times SECONDS."""
    run = Run(epochs=1)
    return {
        **make_row(number),
        **{name: getattr(run, name) for name in ("model", "method", "density", "precision")},
        **{"dataset": "mnist", "train_samples": 0, "overrides": "", "batch_size": 100},
        **{"steps": 540, "train_seconds": cost.passes(run) * passes * SECONDS, "device": machine},
        **fields,
    }


def estimator(monkeypatch: pytest.MonkeyPatch, *rows: dict[str, object]) -> cost.Estimator:
    monkeypatch.setattr(cost, "device_name", lambda device: "here")
    return cost.Estimator(pd.DataFrame(list(rows), columns=list(results.COLUMNS)), "cpu")


def of_a_pass(estimate: cost.Estimator, run: Run) -> float:
    """In units of SECONDS."""
    return (estimate.seconds(run) - cost.BESIDE_TRAINING_SECONDS) / cost.passes(run) / SECONDS


def test_the_nearest_rows_count_and_a_suspended_machine_does_not(monkeypatch):
    """Network, way of computing, density, method: what differs first excludes a row."""
    rows = [row(i, "here") for i in range(3)]
    rows += [row(3, "here", passes=400.0)]  # the machine slept meanwhile
    rows += [row(4, "here", passes=9.0, overrides='{"kernels": "torch"}')]
    rows += [row(5, "here", passes=3.0, density=1.0, method="dense")]
    rows += [row(6, "here", passes=70.0, model="lenet5"), row(7, "NVIDIA H100", passes=0.1)]
    estimate = estimator(monkeypatch, *rows)
    assert of_a_pass(estimate, Run()) == pytest.approx(1)
    assert of_a_pass(estimate, Run(method="set", density=0.04, epochs=7)) == pytest.approx(1)
    assert of_a_pass(estimate, Run(method="dense")) == pytest.approx(3)
    assert of_a_pass(estimate, Run(kernels="torch")) == pytest.approx(9)
    assert estimate.known(Run()) and not estimate.known(Run(model="mlp-20x1"))
    assert 0 < of_a_pass(estimate, Run(model="mlp-20x1")) < 1  # by its share of the FLOPs


def test_the_newest_rows_count(monkeypatch):
    """A machine of the same name that has become slower is known by its last runs."""
    rows = [row(i, "here", finished_utc=f"2026-11-25T10:{i:02}:00Z") for i in range(40)]
    assert of_a_pass(estimator(monkeypatch, *rows), Run()) == pytest.approx(1)
    slow = [
        row(i, "here", passes=3.0, finished_utc=f"2026-11-29T10:{i}:00Z") for i in range(40, 44)
    ]
    assert of_a_pass(estimator(monkeypatch, *slow, *rows), Run()) == pytest.approx(3)


def test_rows_of_another_machine_are_scaled_by_what_both_have_done(monkeypatch):
    rows = [row(1, "there"), row(2, "there", passes=5.0, density=1.0, method="dense")]
    assert of_a_pass(estimator(monkeypatch, *rows), Run(method="dense")) == pytest.approx(5)
    assert estimator(monkeypatch, *rows).rows_of == ["there"]
    both = estimator(monkeypatch, *rows, row(3, "here", passes=0.5))
    assert of_a_pass(both, Run(method="dense")) == pytest.approx(2.5)
    assert both.rows_of == ["here"]


def test_runs_side_by_side_and_times_for_people():
    assert cost.makespan([3, 1, 1, 1], 2) == 3
    assert cost.makespan([], 4) == 0
    times = (0.4, 89, 100, 5000, 6000, 200_000, 1e12)
    assert [cost.clock(t) for t in times[:4]] == ["0 s", "89 s", "2 min", "83 min"]
    assert [cost.clock(t) for t in times[4:]] == ["1.7 h", "2 days", "11,574,074 days"]
