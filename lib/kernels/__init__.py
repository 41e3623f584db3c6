"""Sparse training on the CPU: convolutions over the non-zero weights only (see sparse.hpp)."""

from .library import available, keep_freed_memory, require
from .ops import (
    LANES,
    Pattern,
    batch_norm,
    conv2d,
    from_blocked,
    gather,
    linear,
    max_pool2d,
    mean_pool2d,
    to_blocked,
)

__all__ = [
    "LANES",
    "Pattern",
    "available",
    "batch_norm",
    "conv2d",
    "from_blocked",
    "gather",
    "keep_freed_memory",
    "linear",
    "max_pool2d",
    "mean_pool2d",
    "require",
    "to_blocked",
]
