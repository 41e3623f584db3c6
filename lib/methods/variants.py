"""Variants of sparse momentum: where the official code (commit e19ff16, in core.py and
funcs.py) or the paper's words leave room for another algorithm than that of `lib/masking.py`.

None of them is on by default. Each is a rule, a schedule or an option of its own, so that its
effect can be measured alone (experiment `official_readings`):

- redistribution "momentum_after": importance of the weights that survived pruning; the official
  code measures before, as `lib/masking.py` does;
- prune "magnitude_plain": no exception for nearly dense, important layers;
- schedule "cosine_floor": the prune rate falls to 0.005, not to 0; option `anneal_every_steps`: it
  falls once per so many mini-batches, after the update (in the pseudo-code once per epoch);
- prune "magnitude_up" and option `feedback`: the official code's arithmetic, which rounds up what a
  layer loses and what it regrows, and steers the number of weights back instead of keeping it;
- option `reset_momentum`: after an update inactive weights get the signed mean of their layer's
  active momentum (official code of 9 July 2019, commit 19dcdff);
- option `keep_regrown`: a weight pruned and regrown in one update keeps its value; option
  `grow_anywhere`: too few inactive weights with a momentum, and active ones are chosen again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lib.methods.counting import own_rate, rounded
from lib.methods.layer import (
    AFTERWARDS,
    CHOOSE,
    PRUNE,
    REDISTRIBUTION,
    SHARE_OUT,
    GrowthRule,
    Layer,
    Rule,
)
from lib.methods.selection import mean_active, pick

# --------------------------------------------------------------------------------------------------
# 1. Prune
# --------------------------------------------------------------------------------------------------


@PRUNE.register("magnitude_plain")
def prune_magnitude_plain(
    layers: Sequence[Layer], rate: float, state: dict[str, Any]
) -> list[Tensor]:
    """In each layer the rate * active smallest |w| go, whatever its density."""
    return [
        layer.without_smallest(
            rounded(rate * layer.active, layer.active, f"pruned/{layer.name}", state)
        )
        for layer in layers
    ]


@PRUNE.register("magnitude_up")
def prune_magnitude_up(layers: Sequence[Layer], rate: float, state: dict[str, Any]) -> list[Tensor]:
    """As "magnitude", rounded up in every update as the official code does (PAPER.md 12f)."""
    quota = [own_rate(layer, rate, len(layers)) * layer.active for layer in layers]
    counts = [math.ceil(round(q, 6)) for q in quota]  # 0.1 * 30 is no 3.0000000000000004
    return [
        layer.without_smallest(min(layer.active, n))
        for layer, n in zip(layers, counts, strict=True)
    ]


@PRUNE.register("magnitude_before")
def prune_magnitude_before(
    layers: Sequence[Layer], rate: float, state: dict[str, Any]
) -> list[Tensor]:
    """As "magnitude", with the importance before pruning where redistribution measures after it.

    The exception for nearly dense layers needs an importance before anything is pruned.
    """
    for layer in layers:
        if not math.isnan(layer.momentum_share):
            layer.share = layer.momentum_share
    return PRUNE["magnitude"].function(layers, rate, state)


# --------------------------------------------------------------------------------------------------
# 2. Redistribute
# --------------------------------------------------------------------------------------------------


@REDISTRIBUTION.register("momentum_after", needs="momentum")
def redistribute_momentum_after(layer: Layer) -> Tensor | float:
    """Mean |momentum| of the weights that survived pruning; 0 where none did."""
    return mean_active(layer.momentum, layer.survivors)


MOST = 0.99  # of a layer's free positions that are filled
PASSES = 1000


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
    most = [MOST * (layer.numel - layer.active + layer.pruned) for layer in layers]
    counts = [float(math.ceil((layer.share or 0.0) * total)) for layer in layers]
    for _ in range(PASSES):
        over = sum(max(0.0, n - m) for n, m in zip(counts, most, strict=True))
        counts = [min(n, m) for n, m in zip(counts, most, strict=True)]
        if over <= 0:
            break
        counts = [n + over / len(layers) for n in counts]
    least = [int(layer.active == layer.pruned) for layer in layers]  # no layer is left empty
    return [max(math.floor(min(n, m)), x) for n, m, x in zip(counts, most, least, strict=True)]


SHARE_OUT["feedback"] = share_out_by_feedback


# --------------------------------------------------------------------------------------------------
# 3. Grow
# --------------------------------------------------------------------------------------------------


def choose_anywhere(layer: Layer, growth: Rule[GrowthRule], count: int) -> Tensor:
    """The survivors and the `count` highest scores of the whole layer, where those of active
    weights count as zero.

    With fewer inactive weights of positive score than `count`, active ones can be among them, and
    so many fewer weights grow. (Equal scores: the earlier position.)
    """
    scores = growth.function(layer).masked_fill(layer.survivors, 0.0)
    return layer.survivors | pick(scores, torch.ones_like(layer.mask), count, growth.score)


CHOOSE["grow_anywhere"] = choose_anywhere


def reset_momentum(layers: Sequence[Layer], masks: Mapping[str, Tensor]) -> None:
    """Inactive weights get the signed mean of their layer's active momentum (PAPER.md 12d)."""
    for layer in layers:
        mask = masks[layer.name]
        layer.momentum.masked_fill_(~mask, float(layer.momentum[mask].double().mean()))


AFTERWARDS["reset_momentum"] = reset_momentum
