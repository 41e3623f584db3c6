"""Sparse training on the CPU: convolutions over the non-zero weights only (see sparse.hpp).

What trains whole networks by these kernels is in `lib.engines`; `sparse_network` is found from here
on first use.
"""

from typing import TYPE_CHECKING, Any

from .blocked import LANES, from_blocked, to_blocked
from .library import available, keep_freed_memory, require
from .norm_and_pool import batch_norm, max_pool2d, mean_pool2d
from .ops import Pattern, conv2d, dense_gradient, gather, linear

if TYPE_CHECKING:
    from lib.engines.network import sparse_network

__all__ = [
    "LANES",
    "Pattern",
    "available",
    "batch_norm",
    "conv2d",
    "dense_gradient",
    "from_blocked",
    "gather",
    "keep_freed_memory",
    "linear",
    "max_pool2d",
    "mean_pool2d",
    "require",
    "sparse_network",
    "to_blocked",
]


def __getattr__(name: str) -> Any:
    if name == "sparse_network":
        from lib.engines.network import sparse_network

        return sparse_network
    raise AttributeError(f"module 'lib.kernels' has no attribute {name!r}")
