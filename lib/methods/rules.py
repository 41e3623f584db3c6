"""The rules of SET (Mocanu et al. 2018; also as DSR's authors have it, PAPER.md 12c), DSR (Mostafa
and Wang 2019), RigL (Evci et al. 2020) and DeepR (Bellec et al. 2018), and variants of sparse
momentum's own.

The variants are where the official code (commit e19ff16, in core.py and funcs.py) or the paper's
words leave room for another algorithm than that of `lib/masking.py`. None is on by default; each is
a rule, a schedule or an option of its own, to be measured alone (experiment `official_readings`).
The options:

- `anneal_every_steps`: the prune rate falls once per so many mini-batches, after the update (in the
  pseudo-code once per epoch);
- `feedback`: `share_out_by_feedback`, with prune "magnitude_up" the official code's arithmetic;
- `reset_momentum`, after an update (official code of 9 July 2019, commit 19dcdff);
- `keep_regrown`: a weight pruned and regrown in one update keeps its value;
- `grow_anywhere`: `choose_anywhere`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lib.methods import parts
from lib.methods.parts import GROWTH, PRUNE, REDISTRIBUTION, Layer, Stream, drawn, mean_active

if TYPE_CHECKING:
    from lib.masking import Masking

# ---- prune: layers, rate and the rule's state to the survivors of each layer -------------------


@PRUNE.register("none")
def prune_none(layers: Sequence[Layer], rate: float, state: dict[str, Any]) -> list[Tensor]:
    """Nothing goes: static masks."""
    return [layer.mask for layer in layers]


@PRUNE.register("magnitude_and_one")
def prune_and_one(layers: Sequence[Layer], rate: float, state: dict[str, Any]) -> list[Tensor]:
    """In each layer the int(rate * active) + 1 smallest |w| go (SET in the code of DSR)."""
    counts = [min(layer.active, math.floor(rate * layer.active) + 1) for layer in layers]
    return [layer.without_smallest(n) for layer, n in zip(layers, counts, strict=True)]


@PRUNE.register("adaptive_threshold")
def prune_by_threshold(layers: Sequence[Layer], rate: float, state: dict[str, Any]) -> list[Tensor]:
    """Every active |w| below one threshold goes; then the threshold adapts (DSR, algorithm 1).

    It starts at 0.001, doubles when fewer than 0.9 of rate * active went, and halves when more
    than 1.1 of it went.
    """
    threshold = state.setdefault("threshold", 1e-3)
    survivors = [layer.mask & (layer.weight.abs() >= threshold) for layer in layers]
    active = sum(layer.active for layer in layers)
    pruned, target = active - sum(int(s.sum()) for s in survivors), rate * active
    if pruned < 0.9 * target:
        state["threshold"] = threshold * 2
    elif pruned > 1.1 * target:
        state["threshold"] = threshold / 2
    return survivors


@PRUNE.register("magnitude_plain")
def prune_plainly(layers: Sequence[Layer], rate: float, state: dict[str, Any]) -> list[Tensor]:
    """In each layer the rate * active smallest |w| go, whatever its density."""
    return parts.prune_smallest(layers, [rate] * len(layers), state)


@PRUNE.register("magnitude_up")
def prune_rounded_up(layers: Sequence[Layer], rate: float, state: dict[str, Any]) -> list[Tensor]:
    """As "magnitude", rounded up in every update as the official code does (PAPER.md 12f)."""
    quota = [layer.own_rate(rate, len(layers)) * layer.active for layer in layers]
    counts = [math.ceil(round(q, 6)) for q in quota]  # 0.1 * 30 is no 3.0000000000000004
    return [layer.without_smallest(n) for layer, n in zip(layers, counts, strict=True)]


@PRUNE.register("magnitude_before")
def prune_measured(layers: Sequence[Layer], rate: float, state: dict[str, Any]) -> list[Tensor]:
    """As "magnitude", with the importance before pruning, which its exception for nearly dense
    layers needs, where redistribution measures after it.
    """
    for layer in layers:
        if not math.isnan(layer.momentum_share):
            layer.share = layer.momentum_share
    return PRUNE["magnitude"].function(layers, rate, state)


@PRUNE.register("sign_flip")
def prune_sign_flip(layers: Sequence[Layer], rate: float, state: dict[str, Any]) -> list[Tensor]:
    """Active weights on the wrong side of zero go; `deepr_step` has usually re-wired them."""
    signs = [signs_of(state, layer.name, layer.weight, layer.generator) for layer in layers]
    pairs = zip(layers, signs, strict=True)
    return [layer.mask & (layer.weight * sign >= 0) for layer, sign in pairs]


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
def redistribute_magnitude(layer: Layer) -> float:
    """Mean |w| of the weights active before pruning."""
    return mean_active(layer.weight, layer.mask)


@REDISTRIBUTION.register("layer_size")
def redistribute_layer_size(layer: Layer) -> float:
    """Number of positions: what the official code calls 'none' since August 2019."""
    return layer.numel


@REDISTRIBUTION.register("momentum_after", needs="momentum")
def redistribute_momentum_after(layer: Layer) -> float:
    """Mean |momentum| of the weights that survived pruning; 0 where none did."""
    return mean_active(layer.momentum, layer.survivors)


@REDISTRIBUTION.register("inactive")
def redistribute_inactive(layer: Layer) -> float:
    """Number of inactive positions: a new connection is uniform over all of them (DeepR)."""
    return layer.room


def share_out_by_feedback(layers: Sequence[Layer], state: dict[str, Any]) -> list[int]:
    """How many weights each layer grows in the official code; the sum is not the number pruned.

    A layer asks for ceil(share * (pruned in all + correction)), takes at most 99 % of its free
    positions, and what all layers could not take is handed out again in equal parts to all of them,
    full ones included, until nothing is left over, at most 1000 times; the results are rounded
    down. The correction steers the number of weights back to that of the first update:
    correction <- correction / 4 + 3/4 deficit + mean of all deficits so far, where the deficit is
    what was missing after an update. A correction beyond what was pruned grows nothing.
    """
    active = sum(layer.active for layer in layers)
    if "feedback/budget" not in state:
        state |= {"feedback/budget": active, "feedback/correction": 0.0}
        state |= {"feedback/deficits": 0, "feedback/updates": 0}
    else:
        deficit = state["feedback/budget"] - active
        state["feedback/deficits"] += deficit
        state["feedback/updates"] += 1
        mean = state["feedback/deficits"] / state["feedback/updates"]
        state["feedback/correction"] = state["feedback/correction"] / 4 + 0.75 * deficit + mean
    total = max(0.0, sum(layer.pruned for layer in layers) + state["feedback/correction"])
    most = [0.99 * layer.room for layer in layers]
    counts = [float(math.ceil((layer.share or 0.0) * total)) for layer in layers]
    for _ in range(1000):
        over = sum(max(0.0, n - m) for n, m in zip(counts, most, strict=True))
        counts = [min(n, m) for n, m in zip(counts, most, strict=True)]
        if over <= 0:
            break
        counts = [n + over / len(layers) for n in counts]
    least = [int(layer.active == layer.pruned) for layer in layers]  # no layer is left empty
    return [max(math.floor(min(n, m)), x) for n, m, x in zip(counts, most, least, strict=True)]


# ---- grow: a layer to the scores of its weights -----------------------------------------------


@GROWTH.register("none")
def grow_none(layer: Layer) -> Tensor:
    """For static masks, where nothing has to be grown."""
    return torch.zeros_like(layer.weight)


@GROWTH.register("gradient", needs="gradient")
def grow_gradient(layer: Layer) -> Tensor:
    """Largest |gradient| of the last mini-batch first (RigL)."""
    return layer.gradient.abs()


@GROWTH.register("random")
def grow_random(layer: Layer) -> Tensor:
    """Uniformly at random, in exact number (SET, DSR)."""
    return drawn(torch.rand, layer.mask.shape, by=layer.generator, device=layer.mask.device)


@GROWTH.register("random_elsewhere")
def grow_random_elsewhere(layer: Layer) -> Tensor:
    """Uniformly at random among the weights that were not pruned just now, these only if all
    others are active (SET in the code of DSR).
    """
    return grow_random(layer) - (layer.mask & ~layer.survivors).float()


def choose_anywhere(layer: Layer, growth: parts.Rule, number: int) -> Tensor:
    """The survivors and so many highest scores of the whole layer, where those of active weights
    count as zero.

    With fewer inactive weights of positive score, active ones can be among them, and so many fewer
    weights grow. (Equal scores: the earlier position.)
    """
    scores = growth.function(layer).masked_fill(layer.survivors, 0.0)
    return layer.survivors | parts.pick(scores, torch.ones_like(layer.mask), number)


def reset_momentum(layers: Sequence[Layer], masks: Mapping[str, Tensor]) -> None:
    """Inactive weights get the signed mean of their layer's active momentum (PAPER.md 12d)."""
    for layer in layers:
        mask = masks[layer.name]
        layer.momentum.masked_fill_(~mask, float(layer.momentum[mask].double().mean()))


# ---- DeepR, after each mini-batch -------------------------------------------------------------


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
    died, names = 0, [name for name, p in masking.parameters.items() if p.requires_grad]
    for name in names:
        mask, weight = masking.masks[name], masking.parameters[name].data
        signs = signs_of(masking.rule_state, name, weight, generator)
        index = mask.nonzero(as_tuple=True)
        sign = signs[index].to(weight.dtype)
        moved = weight[index] - shrinkage * sign
        if noise > 0:
            random = drawn(torch.randn, len(moved), by=generator, device=weight.device)
            moved += noise * random.to(weight.dtype)
        dead = moved * sign < 0
        weight[index] = moved.masked_fill(dead, 0.0)
        if gone := int(dead.sum()):
            masking.masks[name] = mask.index_put(index, ~dead)  # whoever assigned it keeps it
            died += gone
    if died:
        _wake(masking, died, names)


def deepr_rates(masking: Masking) -> tuple[float, float]:
    """What one step takes off each |w|, and the standard deviation of its noise (`deepr_step`)."""
    lr = float(masking.optimizer.param_groups[0]["lr"])
    l1 = masking.options.get("l1", 1e-4)
    return lr * l1, math.sqrt(2 * lr * masking.options.get("temperature", lr * l1**2 / 18))


def _wake(masking: Masking, count: int, names: Sequence[str]) -> None:
    """Activate `count` dormant connections, uniform without replacement over these layers."""
    dormant = torch.cat([~masking.masks[name].reshape(-1) for name in names])
    places = dormant.nonzero().squeeze(1)
    chosen = places[some_of(len(places), count, masking.generator, places.device)]
    woken = torch.zeros_like(dormant).index_fill_(0, chosen, True)
    sizes = [masking.masks[name].numel() for name in names]
    for name, part in zip(names, woken.split(sizes), strict=True):
        mask, parameter = masking.masks[name], masking.parameters[name]
        here = part.view(mask.shape)
        masking.masks[name] = mask | here
        state = masking.optimizer.state.get(parameter, {})
        for values in (parameter.data, state.get("momentum_buffer"), state.get("exp_avg")):
            if values is not None:
                values.masked_fill_(here, 0.0)


def some_of(total: int, count: int, generator: Stream, device: torch.device) -> Tensor:
    """`count` different ones of the numbers 0 to total - 1, uniform, ascending: int64."""
    if count * 20 >= total:
        return drawn(torch.randperm, total, by=generator, device=device)[:count].sort().values
    chosen = torch.empty(0, dtype=torch.long, device=device)
    while chosen.numel() < count:  # rejecting repeats is much cheaper than a permutation
        size = (count - chosen.numel(),)
        more = drawn(torch.randint, total, size, by=generator, device=device)
        chosen = torch.cat([chosen, more]).unique()
    return chosen


def signs_of(state: dict[str, Any], name: str, weight: Tensor, generator: Stream) -> Tensor:
    """int8 signs, same shape as the weight: fixed at the first look, random where it is 0."""
    key = f"sign/{name}"
    if key not in state:
        bits = drawn(torch.randint, 2, weight.shape, by=generator, device=weight.device)
        signs = torch.where(weight == 0, 2 * bits - 1, weight.detach().sign())
        state[key] = signs.to(torch.int8)
    return state[key]
