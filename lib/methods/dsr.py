"""DSR (Mostafa and Wang 2019): one global threshold that adapts until it prunes the wanted number,
and layers that grow by what they have left.

As the code of its authors trains it (PAPER.md 12c) it prunes a constant number of weights: a
constant rate, since the number of active weights never changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lib.methods.registry import PRUNE, REDISTRIBUTION, Layer


@PRUNE.register("adaptive_threshold")
def prune_adaptive_threshold(
    layers: Sequence[Layer], rate: float, state: dict[str, Any]
) -> list[Tensor]:
    """Every active |w| below one threshold goes; then the threshold adapts.

    It starts at 0.001, doubles when fewer than 0.9 of rate * active went, and halves when more
    than 1.1 of it went (Mostafa and Wang 2019, algorithm 1).
    """
    threshold = state.setdefault("threshold", 1e-3)
    survivors = [layer.mask & (layer.weight.abs() >= threshold) for layer in layers]
    left = torch.stack([s.sum() for s in survivors]).tolist()
    active = sum(layer.active for layer in layers)
    pruned, target = active - sum(left), rate * active
    if pruned < 0.9 * target:
        state["threshold"] = threshold * 2
    elif pruned > 1.1 * target:
        state["threshold"] = threshold / 2
    return survivors


@REDISTRIBUTION.register("nonzeros")
def redistribute_nonzeros(layer: Layer) -> float:
    """Number of weights that survived pruning."""
    return layer.active - layer.pruned
