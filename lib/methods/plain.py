"""Plain alternatives for each step, for ablations and for masks that stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lib.methods.counts import rounded
from lib.methods.registry import GROWTH, PRUNE, REDISTRIBUTION, Layer
from lib.methods.selection import mean_active, pick


@PRUNE.register("global_magnitude")
def prune_global_magnitude(
    layers: Sequence[Layer], rate: float, state: dict[str, Any]
) -> list[Tensor]:
    """Over all layers together the rate * active smallest |w| go."""
    flat_mask = torch.cat([layer.mask.reshape(-1) for layer in layers])
    flat_weight = torch.cat([layer.weight.reshape(-1) for layer in layers])
    active = sum(layer.active for layer in layers)
    count = rounded(rate * active, active, "pruned", state)
    kept = flat_mask ^ pick(flat_weight, flat_mask, count, "smallness")
    parts = kept.split([layer.numel for layer in layers])
    return [part.view_as(layer.mask) for part, layer in zip(parts, layers, strict=True)]


@PRUNE.register("none")
def prune_none(layers: Sequence[Layer], rate: float, state: dict[str, Any]) -> list[Tensor]:
    """Nothing goes: static masks."""
    return [layer.mask for layer in layers]


@REDISTRIBUTION.register("magnitude", before_pruning=True)
def redistribute_magnitude(layer: Layer) -> Tensor | float:
    """Mean |w| of the weights active before pruning."""
    return mean_active(layer.weight, layer.mask)


@REDISTRIBUTION.register("layer_size")
def redistribute_layer_size(layer: Layer) -> float:
    """Number of positions: what the official code calls 'none' since August 2019."""
    return layer.numel


@GROWTH.register("none")
def grow_none(layer: Layer) -> Tensor:
    """For static masks, where nothing has to be grown."""
    return torch.zeros_like(layer.weight)
