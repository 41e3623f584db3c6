"""The rules of the other methods, and plain alternatives for ablations.

SET (Mocanu et al. 2018) prunes the smallest weights of each layer and grows in it at random; as the
code of DSR's authors trains it (PAPER.md 12c) one weight more goes, and what was pruned just now
does not come back. DSR (Mostafa and Wang 2019) has one global threshold that adapts, and layers
grow by what they have left; as its authors train it, at a constant rate. RigL (Evci et al. 2020)
grows where the last mini-batch's gradient is largest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lib.methods.layer import GROWTH, PRUNE, REDISTRIBUTION, Layer
from lib.methods.selection import mean_active

# ---- prune: layers, rate and the rule's state to the survivors of each layer -------------------


@PRUNE.register("none")
def prune_none(layers: Sequence[Layer], rate: float, state: dict[str, Any]) -> list[Tensor]:
    """Nothing goes: static masks."""
    return [layer.mask for layer in layers]


@PRUNE.register("magnitude_and_one")
def prune_magnitude_and_one(
    layers: Sequence[Layer], rate: float, state: dict[str, Any]
) -> list[Tensor]:
    """In each layer the int(rate * active) + 1 smallest |w| go (SET in the code of DSR)."""
    return [
        layer.without_smallest(min(layer.active, math.floor(rate * layer.active) + 1))
        for layer in layers
    ]


@PRUNE.register("adaptive_threshold")
def prune_adaptive_threshold(
    layers: Sequence[Layer], rate: float, state: dict[str, Any]
) -> list[Tensor]:
    """Every active |w| below one threshold goes; then the threshold adapts (DSR, algorithm 1).

    It starts at 0.001, doubles when fewer than 0.9 of rate * active went, and halves when more
    than 1.1 of it went.
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


# ---- redistribute: a layer to its importance --------------------------------------------------


@REDISTRIBUTION.register("none")
def redistribute_none(layer: Layer) -> float:
    """Each layer gets back what it lost: its density never changes (official code of July 2019)."""
    return layer.pruned


@REDISTRIBUTION.register("nonzeros")
def redistribute_nonzeros(layer: Layer) -> float:
    """Number of weights that survived pruning (DSR)."""
    return layer.active - layer.pruned


@REDISTRIBUTION.register("magnitude", before_pruning=True)
def redistribute_magnitude(layer: Layer) -> Tensor | float:
    """Mean |w| of the weights active before pruning."""
    return mean_active(layer.weight, layer.mask)


@REDISTRIBUTION.register("layer_size")
def redistribute_layer_size(layer: Layer) -> float:
    """Number of positions: what the official code calls 'none' since August 2019."""
    return layer.numel


# ---- grow: a layer to the scores of its weights -----------------------------------------------


@GROWTH.register("none")
def grow_none(layer: Layer) -> Tensor:
    """For static masks, where nothing has to be grown."""
    return torch.zeros_like(layer.weight)


@GROWTH.register("gradient", needs="gradient", score="magnitude")
def grow_gradient(layer: Layer) -> Tensor:
    """Largest |gradient| of the last mini-batch first (RigL)."""
    return layer.gradient


@GROWTH.register("random")
def grow_random(layer: Layer) -> Tensor:
    """Uniformly at random, in exact number (SET, DSR)."""
    device = layer.generator.device if layer.generator is not None else layer.mask.device
    return torch.rand(layer.mask.shape, generator=layer.generator, device=device).to(
        layer.mask.device
    )


@GROWTH.register("random_elsewhere")
def grow_random_elsewhere(layer: Layer) -> Tensor:
    """Uniformly at random among the weights that were not pruned just now, these only if all
    others are active (SET in the code of DSR).
    """
    scores = grow_random(layer)
    return scores - (layer.mask & ~layer.survivors).to(scores.dtype)
