"""Floating-point operations of a masked network, relative to the dense one's (RigL, appendix H)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RelativeFlops:
    """`layers`: weight name -> FLOPs of its layer in a dense forward pass; `sizes`: name -> weights
    of the masked ones. `active` below: name -> active weights of the masked ones.
    """

    layers: Mapping[str, float]
    sizes: Mapping[str, int]

    def inference(self, active: Mapping[str, int]) -> float:
        """A forward pass over the active weights."""
        total = sum(self.layers.values())
        sparse = sum(
            flops * (active[name] / self.sizes[name] if name in active else 1.0)
            for name, flops in self.layers.items()
        )
        return sparse / total

    def training(self, active: Mapping[str, int], dense_share: float) -> float:
        """Forward, input gradient and weight gradient of one step; the weight gradient is that of
        all weights in `dense_share` (0 to 1) of the steps.
        """
        sparse = self.inference(active)
        return (2 * sparse + dense_share + (1 - dense_share) * sparse) / 3
