"""Sparse training on the CPU: convolutions over the non-zero weights only (see sparse.hpp)."""

from .library import available, keep_freed_memory, require
from .network import SparseNetwork, StepCost, dense_window, sparse_network, step_cost
from .ops import (
    LANES,
    Pattern,
    batch_norm,
    conv2d,
    dense_gradient,
    from_blocked,
    gather,
    linear,
    max_pool2d,
    mean_pool2d,
    to_blocked,
)
from .optimizer import SparseSGD
from .perceptron import MAX_SAMPLES, SPARSE_BELOW, PerceptronTrainer, Track, perceptron_layers

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
