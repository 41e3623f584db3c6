"""Sparse training on the CPU: convolutions over the non-zero weights only (see sparse.hpp).

What trains whole networks by these kernels is in `lib.engines`, and found from here on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .blocked import LANES, from_blocked, to_blocked
from .library import available, keep_freed_memory, require
from .norm_and_pool import batch_norm, max_pool2d, mean_pool2d
from .ops import Pattern, conv2d, dense_gradient, gather, linear

if TYPE_CHECKING:
    from lib.engines.network import (
        SparseNetwork,
        StepCost,
        dense_window,
        sparse_network,
        step_cost,
    )
    from lib.engines.optimizer import SparseSGD
    from lib.engines.perceptron import (
        MAX_SAMPLES,
        SPARSE_BELOW,
        PerceptronTrainer,
        Track,
        perceptron_layers,
    )

__all__ = [
    "LANES",
    "MAX_SAMPLES",
    "SPARSE_BELOW",
    "Pattern",
    "PerceptronTrainer",
    "SparseNetwork",
    "SparseSGD",
    "StepCost",
    "Track",
    "available",
    "batch_norm",
    "conv2d",
    "dense_gradient",
    "dense_window",
    "from_blocked",
    "gather",
    "keep_freed_memory",
    "linear",
    "max_pool2d",
    "mean_pool2d",
    "perceptron_layers",
    "require",
    "sparse_network",
    "step_cost",
    "to_blocked",
]

_HOME = {
    "MAX_SAMPLES": "lib.engines.perceptron",
    "SPARSE_BELOW": "lib.engines.perceptron",
    "PerceptronTrainer": "lib.engines.perceptron",
    "SparseNetwork": "lib.engines.network",
    "SparseSGD": "lib.engines.optimizer",
    "StepCost": "lib.engines.network",
    "Track": "lib.engines.perceptron",
    "dense_window": "lib.engines.network",
    "perceptron_layers": "lib.engines.perceptron",
    "sparse_network": "lib.engines.network",
    "step_cost": "lib.engines.network",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'lib.kernels' has no attribute {name!r}")
