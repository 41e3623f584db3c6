"""Made-up rows of every experiment, written once for all tests of figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib import experiments
from lib.config import Run
from tests.support.made_up_effects import EXPERIMENTS, Effects, write
from tests.support.made_up_grid import plausible, write_grid
from tests.support.made_up_kernels import write_kernels
from tests.support.made_up_measures import write_measured

MEASURED = ("speedups", "features")


def error(run: Run) -> float | None:
    """LeNet-5 at 1 % and below: seed 1 stays at chance, seed 2 diverges; all others learn."""
    if run.model == "lenet5" and run.density <= 0.01 and run.method == "sparse_momentum":
        return {0: 1.4, 1: 88.65, 2: None}.get(run.seed, 1.5)
    return plausible(run) + {"mnist": 0, "cifar10": 5, "imagenet": 23}[run.dataset]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of quick, three seeds of hours and of the paper's scale."""
    folder = tmp_path_factory.mktemp("results")
    effects = Effects(prune_rate=0.5, momentum=0.3, noise=0.1)
    for profile in ("quick", "hours", "paper"):
        planned = [name for name in EXPERIMENTS if experiments.runs(name, profile)]
        write(folder, profile, effects.error, tuple(planned))
        for name in experiments.EXPERIMENTS:
            if name not in (*EXPERIMENTS, *MEASURED):
                write_grid(folder, name, profile, error, lambda run: run.seed < 3)
    write_measured(folder)
    write_kernels(folder)
    return folder
