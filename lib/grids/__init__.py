"""The experiments as data: which runs, at which profile. The only place where grids are written.

A new experiment is a function under `@grid`. A block is a dict of fields of `Run`; a list is an
axis, and the block stands for all combinations. `seeds` is the number of seeds, 0 to n-1, shared
by all cells so that tests can be paired. A run that is a cell of several experiments has one id
and is trained once.

Profiles: `paper` is the paper's scale; `quick` a reduced one for two CPU cores, with the learning
rate decays at the same fractions of the training; `hours`, for hours of two cores, has networks
that learn CIFAR-10; `smoke` walks the same code in seconds. What is reduced is said on every
figure.
"""

from lib.grids import analyses, comparisons  # noqa: F401  they register their experiments
from lib.grids.comparisons import CIFAR10_TABLE
from lib.grids.official import KEPT_DENSE, READINGS
from lib.grids.protocol import EXPERIMENTS, PAPER_EPOCHS, PROFILES, SEEDS, Experiment

__all__ = [
    "CIFAR10_TABLE",
    "EXPERIMENTS",
    "KEPT_DENSE",
    "PAPER_EPOCHS",
    "PROFILES",
    "READINGS",
    "SEEDS",
    "Experiment",
]
