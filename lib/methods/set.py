"""SET (Mocanu et al. 2018): prune the smallest weights of each layer, grow in it at random.

And SET as the code of DSR's authors trains it (PAPER.md 12c): one weight more goes, and what was
pruned just now does not come back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lib.methods.registry import GROWTH, PRUNE, REDISTRIBUTION, Layer


@REDISTRIBUTION.register("none")
def redistribute_none(layer: Layer) -> float:
    """Each layer gets back what it lost: its density never changes (official code of July 2019)."""
    return layer.pruned


@GROWTH.register("random")
def grow_random(layer: Layer) -> Tensor:
    """Uniformly at random, in exact number."""
    device = layer.generator.device if layer.generator is not None else layer.mask.device
    return torch.rand(layer.mask.shape, generator=layer.generator, device=device).to(
        layer.mask.device
    )


@PRUNE.register("magnitude_and_one")
def prune_magnitude_and_one(
    layers: Sequence[Layer], rate: float, state: dict[str, Any]
) -> list[Tensor]:
    """In each layer the int(rate * active) + 1 smallest |w| go."""
    return [
        layer.without_smallest(min(layer.active, math.floor(rate * layer.active) + 1))
        for layer in layers
    ]


@GROWTH.register("random_elsewhere")
def grow_random_elsewhere(layer: Layer) -> Tensor:
    """Uniformly at random among the weights that were not pruned just now, these only if all
    others are active.
    """
    scores = grow_random(layer)
    return scores - (layer.mask & ~layer.survivors).to(scores.dtype)
