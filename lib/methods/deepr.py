"""DeepR (Bellec et al. 2018): signs are fixed, a weight that crosses zero is re-wired at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lib.methods.layer import EVERY_STEP, PRUNE, REDISTRIBUTION, Layer

if TYPE_CHECKING:
    from lib.masking import Masking


@PRUNE.register("sign_flip")
def prune_sign_flip(layers: Sequence[Layer], rate: float, state: dict[str, Any]) -> list[Tensor]:
    """Active weights on the wrong side of zero go; `deepr_step` has usually re-wired them."""
    return [
        layer.mask
        & (layer.weight * signs_of(state, layer.name, layer.weight, layer.generator) >= 0)
        for layer in layers
    ]


@REDISTRIBUTION.register("inactive")
def redistribute_inactive(layer: Layer) -> float:
    """Number of inactive positions: a new connection is uniform over all of them (DeepR)."""
    return layer.numel - layer.active + layer.pruned


def deepr_step(masking: Masking) -> None:
    """One step of DeepR after the gradient step (Bellec et al. 2018, algorithm 1).

    With w = sign * theta: theta shrinks by lr * l1 and takes a random step of standard deviation
    sqrt(2 * lr * temperature); a connection whose theta is negative becomes dormant, and as many
    dormant ones, uniform over the whole network, wake up at zero and without momentum. Every
    possible connection has one sign for the whole training, dormant or not. Options: `l1` (1e-4)
    and `temperature` (lr * l1^2 / 18), the paper's for MNIST.
    """
    shrinkage, noise = deepr_rates(masking)
    generator = masking.generator
    died = 0
    alive = {}  # the places of each layer, in row-major order
    for name in [name for name, p in masking.parameters.items() if p.requires_grad]:
        mask, weight = masking.masks[name], masking.parameters[name].data
        signs = signs_of(masking.rule_state, name, weight, generator)
        places = _true(mask)
        index = _index(weight, places)
        sign = _flat(signs)[_index(signs, places)].to(weight.dtype)
        moved = _flat(weight)[index] - shrinkage * sign
        if noise > 0:
            moved += noise * randn(moved.numel(), weight, generator)
        dead = moved * sign < 0
        _flat(weight)[index] = moved.masked_fill(dead, 0.0)
        gone = int(dead.sum())
        if gone:
            masking.masks[name] = mask = mask.clone()  # whoever assigned it keeps it unchanged
            _flat(mask)[_index(mask, places[dead])] = False
            places = places[~dead]
            died += gone
        alive[name] = places
    if died:
        _wake(masking, died, alive)


def deepr_rates(masking: Masking) -> tuple[float, float]:
    """What one step takes off each |w|, and the standard deviation of its noise (`deepr_step`)."""
    lr = float(masking.optimizer.param_groups[0]["lr"])
    l1 = masking.options.get("l1", 1e-4)
    return lr * l1, math.sqrt(2 * lr * masking.options.get("temperature", lr * l1**2 / 18))


def _true(mask: Tensor) -> Tensor:
    """Where the mask is true: places in row-major order, int64."""
    if mask.device.type == "cpu":  # several times faster than torch's
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.reshape(-1).nonzero().squeeze(1)


def _flat(tensor: Tensor) -> Tensor:
    """A view in one dimension where the memory is in row-major order; see `_index`."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor


def _index(tensor: Tensor, places: Tensor) -> Any:
    """Row-major `places` as an index of `_flat(tensor)`; any memory layout, channels-last too."""
    return places if tensor.is_contiguous() else torch.unravel_index(places, tensor.shape)


def _wake(masking: Masking, count: int, alive: Mapping[str, Tensor]) -> None:
    """Activate `count` dormant connections, uniform without replacement over these layers."""
    names = list(alive)
    sizes = [masking.masks[name].numel() for name in names]
    device = masking.masks[names[0]].device
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    active = torch.cat(
        [places + first for places, first in zip(alive.values(), starts, strict=True)]
    )
    chosen = some_of(sum(sizes) - active.numel(), count, masking.generator, device)
    # The dormant position number r lies behind the active ones that have r or fewer before them.
    before = active - torch.arange(active.numel(), device=device)
    position = chosen + torch.searchsorted(before, chosen, right=True)
    start = 0
    for name, size in zip(names, sizes, strict=True):
        flat_here = position[(position >= start) & (position < start + size)] - start
        start += size
        if not flat_here.numel():
            continue
        masking.masks[name] = mask = masking.masks[name].clone()
        _flat(mask)[_index(mask, flat_here)] = True
        weight = masking.parameters[name].data
        _flat(weight)[_index(weight, flat_here)] = 0.0
        state = masking.optimizer.state.get(masking.parameters[name], {})
        for key in ("momentum_buffer", "exp_avg"):
            if state.get(key) is not None:
                _flat(state[key])[_index(state[key], flat_here)] = 0.0


def some_of(
    total: int, count: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """`count` different ones of the numbers 0 to total - 1, uniform, ascending: int64."""
    draw_on = generator.device if generator is not None else device
    if count * 20 >= total:
        order = torch.randperm(total, generator=generator, device=draw_on)
        return order[:count].sort().values.to(device)
    chosen = torch.empty(0, dtype=torch.long, device=draw_on)
    while chosen.numel() < count:  # rejecting repeats is much cheaper than a permutation
        more = torch.randint(total, (count - chosen.numel(),), generator=generator, device=draw_on)
        chosen = torch.cat([chosen, more]).unique()
    return chosen.to(device)


def signs_of(
    state: dict[str, Any], name: str, weight: Tensor, generator: torch.Generator | None
) -> Tensor:
    """int8 signs, same shape as the weight: fixed at the first look, random where it is 0."""
    key = f"sign/{name}"
    if key not in state:
        signs = weight.detach().sign().to(torch.int8)
        state[key] = torch.where(
            signs == 0, _random_signs(signs.numel(), signs, generator).view_as(signs), signs
        )
    return state[key]


def _random_signs(count: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else like.device
    bits = torch.randint(0, 2, (count,), generator=generator, device=device, dtype=torch.int8)
    return (2 * bits - 1).to(like.device)


def randn(count: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers [count] of the type of `like` and on its device."""
    device = generator.device if generator is not None else like.device
    return torch.randn(count, generator=generator, device=device).to(like)


EVERY_STEP["deepr"] = deepr_step
