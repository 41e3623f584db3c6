"""RigL (Evci et al. 2020): grow where the last mini-batch's gradient is largest."""

from __future__ import annotations

from torch import Tensor

from lib.methods.registry import GROWTH, Layer


@GROWTH.register("gradient", needs="gradient", score="magnitude")
def grow_gradient(layer: Layer) -> Tensor:
    """Largest |gradient| of the last mini-batch first."""
    return layer.gradient
