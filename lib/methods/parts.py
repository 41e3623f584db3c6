"""What rules are made of: what they see of a layer, where they are registered by name, the passes
over a layer's numbers, and whole numbers from real-valued quotas.

A new rule is one function and one registration; see those of `lib/masking.py` for examples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lib.config import unknown

Stream = torch.Generator | None  # of random numbers; torch's own without


class DivergenceError(FloatingPointError, ValueError):
    """Training left the finite numbers: a loss, weight, gradient or momentum is NaN or infinite."""


@dataclass(eq=False)
class Layer:
    """One masked tensor during one update: all that a rule may read.

    `mask` (bool, the weight's shape; active before the update), `survivors` (bool; active after
    pruning, equal to `mask` before), `share` (importance normalised over layers, only while it is
    known: None before measuring and for rules that measure after pruning).
    """

    name: str
    parameter: nn.Parameter
    mask: Tensor
    survivors: Tensor
    optimizer: torch.optim.Optimizer
    generator: Stream
    active: int
    pruned: int = 0
    share: float | None = None
    momentum_share: float = math.nan

    @property
    def weight(self) -> Tensor:
        """The weight, outside of the graph of gradients."""
        return self.parameter.detach()

    @functools.cached_property
    def momentum(self) -> Tensor:
        """The weight's momentum, same shape: SGD's buffer, or Adam's m / (sqrt(v) + eps).

        The buffer is PyTorch's a*M + g, kept densely and never reset, as in the official code (the
        paper's (1 - a) factor scales all weights alike and changes no decision). Raises ValueError
        where there is none yet.
        """
        state: Mapping[str, Any] = self.optimizer.state.get(self.parameter, {})
        if state.get("momentum_buffer") is not None:
            return state["momentum_buffer"]
        if "exp_avg" not in state:
            raise ValueError(
                f"{self.name} has no momentum yet: call optimizer.step() before update(), and name "
                "a layer that the forward pass doesn't use in keep_dense"
            )
        if "exp_avg_sq" not in state:  # Lion and its kind
            return state["exp_avg"]
        groups = self.optimizer.param_groups
        group = next(g for g in groups if any(p is self.parameter for p in g["params"]))
        return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group.get("eps", 1e-8))

    @functools.cached_property
    def mean_momentum(self) -> float:
        """Mean |momentum| of the weights active before the update (see `mean_active`)."""
        return mean_active(self.momentum, self.mask)

    @property
    def gradient(self) -> Tensor:
        """The last mini-batch's dense gradient, same shape as the weight."""
        if self.parameter.grad is None:
            raise ValueError(f"{self.name} has no gradient: call update() before zero_grad()")
        return self.parameter.grad.detach()

    @property
    def numel(self) -> int:
        """Number of positions, active or not."""
        return self.mask.numel()

    @property
    def room(self) -> int:
        """Number of positions that are inactive after pruning."""
        return self.numel - self.active + self.pruned

    def own_rate(self, rate: float, layers: int) -> float:
        """The layer's prune rate: `rate`, but for a nearly dense and important one of `layers`.

        One with under 20 % inactive weights that is more important than the average layer loses at
        most its share of inactive weights: the early layers of deep networks stay as dense as their
        importance asks (official code e19ff16, core.py; PAPER.md 10e).
        """
        inactive = (self.numel - self.active) / self.numel
        if self.share is not None and inactive < 0.2 and self.share > 1 / layers:
            return min(rate, inactive)
        return rate

    def without_smallest(self, k: int) -> Tensor:
        """The mask less k active positions, those of the smallest |weight|."""
        return self.mask ^ pick(-self.weight.abs(), self.mask, k)


F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Rule:
    """A registered rule: `needs` is "", "momentum" or "gradient"; `before_pruning` is read for
    redistribution rules only (importance measured on the weights active before pruning).
    """

    name: str
    function: Callable[..., Any]
    needs: str = ""
    before_pruning: bool = False


class Registry(dict[str, Rule]):
    """Named rules of one kind. `REGISTRY.register("name")` decorates the function of a new one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, name: str, **keywords: Any) -> Callable[[F], F]:
        """Decorate the function of a new rule; see `Rule` for the keywords."""

        def decorate(function: F) -> F:
            self[name] = Rule(name, function, **keywords)
            return function

        return decorate

    def __missing__(self, name: str) -> Rule:
        raise ValueError(unknown(f"{self.kind} rule", name, self))


PRUNE = Registry("prune")  # layers, prune rate and a dictionary of its own -> their survivors
REDISTRIBUTION = Registry("redistribution")  # layer -> its importance, of any unit
GROWTH = Registry("growth")  # layer -> scores, of which the largest grow

# ---- passes over the numbers of a layer ------------------------------------------------------


def pick(scores: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Bool tensor with exactly k of the candidates (bool, same shape): the largest scores, O(n).

    Among equal scores the positions that come first win. By NumPy, many times faster than torch on
    the CPU. Raises ValueError when there are fewer than k candidates.
    """
    if k == 0:
        return torch.zeros_like(candidates)
    array, allowed = _array(scores), candidates.cpu().numpy()
    chosen = array[allowed]
    if k > chosen.size:
        raise ValueError(f"cannot pick {k} of {chosen.size} candidates")
    lowest = np.partition(chosen, chosen.size - k)[chosen.size - k]
    over, equal = (array > lowest) & allowed, (array == lowest) & allowed
    missing = k - np.count_nonzero(over)
    if np.count_nonzero(equal) > missing:
        equal.flat[np.flatnonzero(equal)[missing:]] = False
    return torch.from_numpy(over | equal).to(candidates.device)


def mean_active(values: Tensor, mask: Tensor) -> float:
    """Mean of |values| where mask is true, in float64; 0 where it never is."""
    places = np.flatnonzero(mask.cpu().numpy())
    chosen = np.abs(_array(values).reshape(-1)[places])
    # In the order of the first rows, which were summed by vectors: sixteen sums, begun anew by each
    # 4096 positions. Another order changes the last bit.
    before = np.searchsorted(places, np.arange(0, mask.numel(), 4096))
    lane = (np.arange(places.size) - before[places >> 12]) & 15
    return float(np.bincount(lane, chosen, 16).cumsum()[-1]) / max(1, places.size)


def _array(values: Tensor) -> npt.NDArray[Any]:
    """The tensor as an array, without a copy where NumPy can have it."""
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def drawn(draw: Callable[..., Tensor], *sizes: Any, by: Stream, device: torch.device) -> Tensor:
    """What torch.rand, randn, randint or randperm draws on the stream's device, brought to this."""
    return draw(*sizes, generator=by, device=by.device if by else device).to(device)


def clear_outside(values: Tensor, mask: Tensor) -> None:
    """Set `values` to zero, in place, where `mask` (bool, same shape) is false; NaN too."""
    values.masked_fill_(~mask, 0)


def clear_by_bits(
    parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor], kept: dict[str, Any]
) -> None:
    """Set the weights outside of their masks to zero by one "and" a layer, many times faster than
    by filling: `kept` has the masks once more as bits, all ones or zeros, for the next call.
    """
    for name, mask in masks.items():
        weight = parameters[name].detach()
        integer = getattr(torch, f"int{8 * weight.element_size()}")
        same = mask, mask._version, integer, weight.stride(), weight.device
        *before, bits = kept.get(name, (None, None))
        if before[0] is not mask or before[1:] != [*same[1:]]:
            bits = torch.empty_like(weight, dtype=integer).copy_(mask).neg_()
            kept[name] = *same, bits
        weight.view(integer).bitwise_and_(bits)


# ---- whole numbers ---------------------------------------------------------------------------


def carried(
    quota: Mapping[str, float], state: dict[str, Any], rounded: Callable[[list[float]], list[int]]
) -> list[int]:
    """The quotas, each with what earlier updates left over of it in `state`, rounded, so that over
    time every layer follows its quota; a cap that kept more from being taken leaves one weight over
    at most. Rounding up in each update, as the official code does, drains small layers at small
    prune rates (PAPER.md 12f).
    """
    wanted = [round(q + state.get(key, 0.0), 9) for key, q in quota.items()]  # 1 - 0.9 is no tenth
    numbers = rounded(wanted)
    for key, want, number in zip(quota, wanted, numbers, strict=True):
        state[key] = max(-1.0, min(1.0, round(want - number, 9)))
    return numbers


def prune_smallest(
    layers: Sequence[Layer], rates: Sequence[float], state: dict[str, Any]
) -> list[Tensor]:
    """What is left of the masks when in each layer the rate * active smallest |w| went."""

    def nearest(wanted: list[float]) -> list[int]:
        pairs = zip(layers, wanted, strict=True)
        return [min(layer.active, math.floor(w + 0.5)) for layer, w in pairs]

    pairs = zip(layers, rates, strict=True)
    quota = {f"pruned/{layer.name}": rate * layer.active for layer, rate in pairs}
    numbers = carried(quota, state, nearest)
    return [layer.without_smallest(n) for layer, n in zip(layers, numbers, strict=True)]


def quotas(total: int, shares: Sequence[float], capacity: Sequence[int]) -> list[float]:
    """Split `total`, at most the whole capacity, proportionally to `shares` (finite, not negative),
    none above its capacity: real numbers.

    What a full layer can't take overflows to the others by their shares. Shares that are all zero
    count as equal to the free capacity.
    """
    quota = [0.0] * len(shares)
    free = [i for i, room in enumerate(capacity) if room > 0]
    left = total
    while free and left > 0:
        weight = {i: shares[i] for i in free}
        if sum(weight.values()) <= 0:
            weight = {i: float(capacity[i]) for i in free}
        scale = left / sum(weight.values())
        full = [i for i in free if weight[i] * scale >= capacity[i]]
        if not full:
            for i in free:
                quota[i] = weight[i] * scale
            break
        for i in full:
            quota[i] = capacity[i]
            left -= capacity[i]
        free = [i for i in free if i not in full]
    return quota


def whole(total: int, wanted: Sequence[float], capacity: Sequence[int]) -> list[int]:
    """`wanted` as whole numbers from 0 to the capacity whose sum is `total` exactly.

    Rounded down; the rest goes to the largest remainders (ties: the earlier layer). Where layers
    that want less than nothing leave too little, the smallest remainders give one back.
    """
    counts = [min(room, max(0, math.floor(w))) for w, room in zip(wanted, capacity, strict=True)]
    while left := total - sum(counts):
        one = 1 if left > 0 else -1
        able = [i for i, n in enumerate(counts) if (n < capacity[i] if one > 0 else n > 0)]
        able.sort(key=lambda i: (one * (counts[i] - wanted[i]), i))
        for i in able[: abs(left)]:
            counts[i] += one
    return counts


def leave_no_layer_empty(numbers: list[int], survivors: Sequence[int]) -> list[int]:
    """Move single weights so that no layer ends without one: an empty layer would cut the network
    and has no momentum to be measured by (the official code stops with an error there).
    """
    for i, survived in enumerate(survivors):
        if survived + numbers[i] == 0:
            after = [left + n for left, n in zip(survivors, numbers, strict=True)]
            donor = max(range(len(after)), key=lambda j: (numbers[j] > 0, after[j]))
            numbers[donor] -= 1
            numbers[i] += 1
    return numbers
