"""Sparse momentum, the algorithm of the paper, in the paper's order: prune, redistribute, grow.

A network is trained with a fixed number of non-zero weights. After every mini-batch the inactive
weights are set back to zero (`Masking.step`); once per epoch (`Masking.update`)

1. the importance of each layer is measured: the mean magnitude of the momentum of its active
   weights, normalised over the layers;
2. **prune**: in each layer the active weights of smallest magnitude are removed;
3. **redistribute**: the removed weights are shared out among the layers by importance;
4. **grow**: in each layer the inactive weights of largest momentum become active, at zero.

Source: Dettmers and Zettlemoyer 2019 (arXiv 1907.04840), section 3 and algorithm 1. Where the
official code (commit e19ff16) leaves the paper, the docstrings below say which way this one goes.
The rules of the other methods (SET, DSR, DeepR, RigL, SNIP) are in `lib/methods/baselines.py`, the
other readings, to be asked for by name, in `lib/methods/readings.py`.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lib.config import UNMASKED, method_of, unknown

# --------------------------------------------------------------------------------------------------
# What a rule sees, and where rules are registered
# --------------------------------------------------------------------------------------------------


class DivergenceError(FloatingPointError, ValueError):
    """Training left the finite numbers: a loss, weight, gradient or momentum is NaN or infinite."""


@dataclass
class Layer:
    """One masked tensor during one update: all that a rule may read.

    `weight` [any shape], `mask` (bool, same shape; active before the update), `survivors` (bool;
    active after pruning, equal to `mask` before), `share` (importance normalised over layers, only
    while it is known: None before measuring and for rules that measure after pruning).
    """

    name: str
    parameter: nn.Parameter
    mask: Tensor
    optimizer: torch.optim.Optimizer
    generator: torch.Generator | None = None
    survivors: Tensor = field(init=False)
    active: int = 0
    pruned: int = 0
    share: float | None = None
    momentum_share: float = math.nan
    listed: Any = None  # the active weights once more, where compiled passes made a list of them
    # The last mask of `without_smallest`, and its k.
    _without: tuple[Tensor, int] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.survivors = self.mask

    @functools.cached_property
    def weight(self) -> Tensor:
        """The weight, outside of the graph of gradients."""
        return self.parameter.detach()

    @functools.cached_property
    def momentum(self) -> Tensor:
        """The momentum that scores weights, same shape as the weight (see `momentum_of`)."""
        return momentum_of(self.optimizer, self.parameter, self.name)

    @functools.cached_property
    def mean_momentum(self) -> Tensor | float:
        """Mean |momentum| of the weights active before the update (see `mean_active`)."""
        return mean_active(self.momentum, self.mask)

    @property
    def gradient(self) -> Tensor:
        """The last mini-batch's dense gradient, same shape as the weight."""
        if self.parameter.grad is None:
            raise ValueError(
                f"{self.name} has no gradient: call masking.update() after loss.backward() and "
                "before optimizer.zero_grad()"
            )
        return self.parameter.grad.detach()

    @property
    def numel(self) -> int:
        """Number of positions, active or not."""
        return self.mask.numel()

    def without_smallest(self, k: int) -> Tensor:
        """The mask less k active positions, those of the smallest |weight|."""
        if self.listed is not None:
            mask = compiled().drop_smallest(self.listed, self.mask, k)
        elif compiled().takes(self.weight, self.mask):
            mask = compiled().flip_largest(self.weight, self.mask, k, True, "smallness")
        else:
            mask = self.mask ^ pick(self.weight, self.mask, k, "smallness")
        self._without = mask, k
        return mask

    def count_of(self, survivors: Tensor) -> Tensor | int:
        """Number of true positions: counted only where `without_smallest` doesn't know it."""
        if self._without is not None and self._without[0] is survivors:
            return self.active - self._without[1]
        return count_of(survivors)

    def clear_outside(self, mask: Tensor) -> None:
        """Set the weights to zero that `mask` doesn't keep; inactive ones are already."""
        if self.listed is not None and compiled().counts(mask):
            compiled().clear_listed(self.parameter, mask, self.listed)
        else:
            clear_outside(self.weight, mask)


PruneRule = Callable[[Sequence[Layer], float, dict[str, Any]], list[Tensor]]
RedistributionRule = Callable[[Layer], "Tensor | float"]
GrowthRule = Callable[[Layer], Tensor]
R = TypeVar("R")
Score = Literal["value", "magnitude", "smallness"]


@dataclass(frozen=True)
class Rule(Generic[R]):
    """A registered rule: `needs` is "", "momentum" or "gradient"; `before_pruning` is read for
    redistribution rules only (importance measured on the weights active before pruning), `score`
    for growth rules only (what counts of what they return: its "value" or its "magnitude").
    """

    name: str
    function: R
    needs: str = ""
    before_pruning: bool = False
    score: Score = "value"


class Registry(dict[str, Rule[R]]):
    """Named rules of one kind. `REGISTRY.register("name")` decorates the function of a new one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(
        self,
        name: str,
        *,
        needs: str = "",
        before_pruning: bool = False,
        score: Score = "value",
    ) -> Callable[[R], R]:
        """Decorate the function of a new rule; see `Rule` for the keywords."""

        def decorate(function: R) -> R:
            self[name] = Rule(name, function, needs, before_pruning, score)
            return function

        return decorate

    def __missing__(self, name: str) -> Rule[R]:
        raise ValueError(unknown(f"{self.kind} rule", name, self))


PRUNE: Registry[PruneRule] = Registry("prune")
REDISTRIBUTION: Registry[RedistributionRule] = Registry("redistribution")
GROWTH: Registry[GrowthRule] = Registry("growth")
# Method name -> what it does after each mini-batch (DeepR re-wires there).
EVERY_STEP: dict[str, Callable[[Masking], None]] = {}
# Option -> what takes the place of a part of the cycle where the option is on
# (lib/methods/readings.py): of `share_out` and of `choose`.
SHARE_OUT: dict[str, Callable[[Sequence[Layer], dict[str, Any]], list[int]]] = {}
CHOOSE: dict[str, Callable[[Layer, Rule[GrowthRule], int], Tensor]] = {}
# Layers up to this density, or of this few active weights, are pruned by a list of these. It takes
# 8 bytes for each, too many for a large dense layer.
LISTED_UP_TO = 0.25
ALWAYS_LISTED = 10_000
# What `Masking(options={...})` knows.
OPTIONS = {"l1", "temperature", "keep_regrown", "reset_momentum", "anneal_every_steps"}


def momentum_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, name: str) -> Tensor:
    """The momentum of one parameter, same shape: SGD's buffer, or Adam's m / (sqrt(v) + eps).

    The buffer is PyTorch's a*M + g, kept densely and never reset, as in the official code (the
    paper's (1 - a) factor scales all weights alike and changes no decision).
    """
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    if state.get("momentum_buffer") is not None:
        return state["momentum_buffer"]
    if "exp_avg" in state and "exp_avg_sq" in state:
        eps = next(g.get("eps", 1e-8) for g in optimizer.param_groups if _holds(g, parameter))
        return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + eps)
    if "exp_avg" in state:  # Lion and its kind
        return state["exp_avg"]
    raise ValueError(
        f"{name} has no momentum in {type(optimizer).__name__} yet: call optimizer.step() at least "
        "once, with a gradient for every masked weight, before masking.update()"
    )


def _holds(group: dict[str, Any], parameter: nn.Parameter) -> bool:
    return any(p is parameter for p in group["params"])


# --------------------------------------------------------------------------------------------------
# 1. Prune
# --------------------------------------------------------------------------------------------------


def pick(values: Tensor, candidates: Tensor, k: int, score: Score = "value") -> Tensor:
    """Bool tensor with exactly k of the candidates: those of the largest scores, O(n).

    `values` (float) and `candidates` (bool) have the same shape; the score is the "value", its
    "magnitude" |v| or its "smallness" -|v|. Among equal scores the positions that come first win,
    so that the choice is the same everywhere. Raises ValueError when there are fewer than k
    candidates (checked on CPU, where counting costs no synchronisation).
    """
    if k == 0:
        return torch.zeros_like(candidates)
    if compiled().takes(values, candidates):
        return candidates ^ compiled().flip_largest(values, candidates, k, True, score)
    scores = values if score == "value" else values.abs()
    scores = -scores if score == "smallness" else scores
    if scores.device.type == "cpu":  # NumPy's selection is vectorised, torch's far slower
        array, allowed = _numpy(scores), candidates.numpy()
        chosen = array[allowed]
        if k > chosen.size:
            raise ValueError(f"cannot pick {k} of {chosen.size} candidates")
        lowest = np.partition(chosen, chosen.size - k)[chosen.size - k]
        over, equal = (array > lowest) & allowed, (array == lowest) & allowed
        missing = k - np.count_nonzero(over)
        if np.count_nonzero(equal) > missing:
            equal.flat[np.flatnonzero(equal)[missing:]] = False
        return torch.from_numpy(over | equal)
    # Selecting by a mask would synchronise with the host; filling does not.
    filled = scores.float().masked_fill(~candidates, -math.inf)
    threshold = filled.reshape(-1).topk(k, sorted=False).values.min()
    above = filled > threshold
    ties = (filled == threshold) & candidates
    first = (ties.reshape(-1).cumsum(0) <= k - above.sum()).view(ties.shape)
    return above | (ties & first)


@functools.cache
def compiled() -> types.ModuleType:
    """The compiled passes of an update (lib/kernels/select.py), for what `takes` says yes to."""
    from lib.kernels import select  # imports this module

    return select


def _numpy(values: Tensor) -> npt.NDArray[Any]:
    """The tensor as an array, without a copy where NumPy knows its type."""
    values = values.detach()
    return (values if values.dtype in (torch.float32, torch.float64) else values.float()).numpy()


def rounded(quota: float, most: int, key: str, state: dict[str, Any]) -> int:
    """`quota` as a whole number from 0 to `most`; what rounding leaves over is carried, in
    `state[key]`, to the next call, so that over the updates counts follow their quotas within one.

    Rounding each update up, as the official code does, drains small layers at small prune rates.
    """
    wanted = round(quota + state.get(key, 0.0), 9)  # 1 - 0.9 is no tenth
    count = min(most, max(0, math.floor(wanted + 0.5)))
    state[key] = _carried(wanted, count)
    return count


def _carried(wanted: float, count: int) -> float:
    """What is left of `wanted`; at most one weight where a cap kept more from being taken."""
    return max(-1.0, min(1.0, round(wanted - count, 9)))


@PRUNE.register("magnitude")
def prune_magnitude(layers: Sequence[Layer], rate: float, state: dict[str, Any]) -> list[Tensor]:
    """In each layer the rate * active smallest |w| go (paper, algorithm 1), see `own_rate`;
    fractions of a weight are carried to the next update (`rounded`).
    """
    survivors = []
    for layer in layers:
        quota = own_rate(layer, rate, len(layers)) * layer.active
        count = rounded(quota, layer.active, f"pruned/{layer.name}", state)
        survivors.append(layer.without_smallest(count))
    return survivors


def own_rate(layer: Layer, rate: float, layers: int) -> float:
    """The layer's prune rate: `rate`, but for a nearly dense and important layer.

    One with under 20 % inactive weights that is more important than the average layer loses at
    most its share of inactive weights: the early layers of deep networks stay as dense as their
    importance asks (official code e19ff16, core.py; PAPER.md 10e).
    """
    inactive = (layer.numel - layer.active) / layer.numel
    if layer.share is not None and inactive < 0.2 and layer.share > 1 / layers:
        return min(rate, inactive)
    return rate


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


# --------------------------------------------------------------------------------------------------
# 2. Redistribute
# --------------------------------------------------------------------------------------------------


@REDISTRIBUTION.register("momentum", needs="momentum", before_pruning=True)
def redistribute_momentum(layer: Layer) -> Tensor | float:
    """Mean |momentum| of the weights active before pruning (paper, section 3)."""
    return layer.mean_momentum


@REDISTRIBUTION.register("magnitude", before_pruning=True)
def redistribute_magnitude(layer: Layer) -> Tensor | float:
    """Mean |w| of the weights active before pruning."""
    return mean_active(layer.weight, layer.mask)


@REDISTRIBUTION.register("nonzeros")
def redistribute_nonzeros(layer: Layer) -> float:
    """Number of weights that survived pruning (DSR)."""
    return layer.active - layer.pruned


@REDISTRIBUTION.register("layer_size")
def redistribute_layer_size(layer: Layer) -> float:
    """Number of positions: what the official code calls 'none' since August 2019."""
    return layer.numel


@REDISTRIBUTION.register("none")
def redistribute_none(layer: Layer) -> float:
    """Each layer gets back what it lost: its density never changes (official code of July 2019)."""
    return layer.pruned


def mean_active(values: Tensor, mask: Tensor) -> Tensor | float:
    """Mean of |values| where mask is true, in float64 (0-d on a GPU, without synchronising)."""
    if compiled().takes(values, mask):
        return compiled().sum_of_magnitudes(values, mask) / max(1, compiled().count(mask))
    if values.device.type == "cpu":
        chosen = np.abs(_numpy(values)[mask.numpy()])
        return float(chosen.sum(dtype=np.float64)) / max(1, chosen.size)
    return (values.abs() * mask).sum(dtype=torch.float64) / mask.sum()


def count_of(mask: Tensor) -> Tensor | int:
    """Number of true positions (0-d on a GPU, without synchronising)."""
    return compiled().count(mask) if compiled().counts(mask) else torch.count_nonzero(mask)


def to_host(numbers: Sequence[Tensor | float]) -> list[float]:
    """The numbers as Python's; those that are tensors [0-d] cross in one transfer."""
    tensors = [n.double() for n in numbers if isinstance(n, Tensor)]
    if not tensors:
        return list(map(float, numbers))
    crossed = iter(torch.stack(tensors).tolist())
    return [next(crossed) if isinstance(n, Tensor) else float(n) for n in numbers]


def clear_outside(values: Tensor, mask: Tensor) -> None:
    """Set `values` to zero, in place, where `mask` (bool, same shape) is false."""
    if compiled().takes(values, mask):
        compiled().clear_outside(values, mask)
    else:
        values.mul_(mask)


def quotas(total: int, shares: Sequence[float], capacity: Sequence[int]) -> list[float]:
    """Split `total` proportionally to `shares`, none above its capacity: real numbers.

    What a full layer can't take overflows to the others by their shares. Shares that are all zero
    count as equal to the free capacity. Raises ValueError for a negative or non-finite share and
    for a total beyond the whole capacity.
    """
    if any(not math.isfinite(s) or s < 0 for s in shares):
        raise ValueError(f"shares must be finite and not negative, got {list(shares)}")
    if not 0 <= total <= sum(capacity):
        raise ValueError(f"cannot place {total} weights in {sum(capacity)} free positions")
    quota = [0.0] * len(shares)
    free = [i for i, room in enumerate(capacity) if room > 0]
    left = total
    while free and left > 0:
        weight = {i: shares[i] for i in free}
        if sum(weight.values()) <= 0:
            weight = {i: float(capacity[i]) for i in free}
        scale = left / sum(weight.values())
        if not math.isfinite(scale):  # shares near the smallest float
            top = max(weight.values())
            weight = {i: share / top for i, share in weight.items()}
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


def allocate(total: int, shares: Sequence[float], capacity: Sequence[int]) -> list[int]:
    """`quotas` in whole numbers: see there, and `whole`."""
    return whole(total, quotas(total, shares, capacity), capacity)


def share_out(layers: Sequence[Layer], state: dict[str, Any]) -> list[int]:
    """How many weights each layer grows: as many as were pruned in all, by the layers' shares.

    As in pruning, the fraction of a weight that a layer's quota leaves over is carried to the next
    update: a small layer whose share is below one weight grows one every few updates.
    """
    total = sum(layer.pruned for layer in layers)
    capacity = [layer.numel - layer.active + layer.pruned for layer in layers]
    quota = quotas(total, [layer.share or 0.0 for layer in layers], capacity)
    keys = [f"grown/{layer.name}" for layer in layers]
    wanted = [round(q + state.get(key, 0.0), 9) for q, key in zip(quota, keys, strict=True)]
    counts = whole(total, wanted, capacity)
    for key, want, count in zip(keys, wanted, counts, strict=True):
        state[key] = _carried(want, count)
    return counts


def leave_no_layer_empty(counts: list[int], survivors: Sequence[int]) -> list[int]:
    """Move single weights so that no layer ends without one: an empty layer would cut the network
    and has no momentum to be measured by (the official code stops with an error there).
    """
    for i, survived in enumerate(survivors):
        if survived + counts[i] == 0:
            donor = max(range(len(counts)), key=lambda j: (counts[j] > 0, survivors[j] + counts[j]))
            counts[donor] -= 1
            counts[i] += 1
    return counts


# --------------------------------------------------------------------------------------------------
# 3. Grow
# --------------------------------------------------------------------------------------------------


@GROWTH.register("momentum", needs="momentum", score="magnitude")
def grow_momentum(layer: Layer) -> Tensor:
    """Largest |momentum| first (paper, section 3)."""
    return layer.momentum


@GROWTH.register("random")
def grow_random(layer: Layer) -> Tensor:
    """Uniformly at random, in exact number."""
    device = layer.generator.device if layer.generator is not None else layer.mask.device
    return torch.rand(layer.mask.shape, generator=layer.generator, device=device).to(
        layer.mask.device
    )


@GROWTH.register("gradient", needs="gradient", score="magnitude")
def grow_gradient(layer: Layer) -> Tensor:
    """Largest |gradient| of the last mini-batch first (RigL)."""
    return layer.gradient


@GROWTH.register("none")
def grow_none(layer: Layer) -> Tensor:
    """For static masks, where nothing has to be grown."""
    return torch.zeros_like(layer.weight)


def choose(layer: Layer, growth: Rule[GrowthRule], count: int) -> Tensor:
    """The survivors and what grows (bool, the weight's shape): `count` inactive weights of the
    highest scores. A weight that was pruned just now is a candidate.
    """
    if count == 0:
        return layer.survivors
    mask, scores = layer.survivors, growth.function(layer)
    if compiled().takes(scores, mask):
        return compiled().flip_largest(scores, mask, count, False, growth.score)
    return mask | pick(scores, ~mask, count, growth.score)


# --------------------------------------------------------------------------------------------------
# Masking: the state, and one cycle
# --------------------------------------------------------------------------------------------------


class LayerReport(NamedTuple):
    """One layer's line of an update. Counts of weights; momentum_share is NaN without momentum."""

    name: str
    active_before: int
    pruned: int
    grown: int
    active_after: int
    momentum_share: float


class Masks(dict[str, Tensor]):
    """Parameter name -> bool mask; assigning a mask of another name, shape or type is refused."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self._parameters = parameters

    def __setitem__(self, name: str, mask: Tensor) -> None:
        if name not in self._parameters:
            raise ValueError(unknown("masked parameter", name, self._parameters))
        parameter = self._parameters[name]
        if mask.shape != parameter.shape:
            raise ValueError(
                f"the mask of {name} has shape {tuple(mask.shape)}, its weight has "
                f"{tuple(parameter.shape)}"
            )
        if mask.dtype != torch.bool:
            raise ValueError(f"the mask of {name} must be of type torch.bool, got {mask.dtype}")
        super().__setitem__(name, mask.to(parameter.device))

    def update(self, *args: Any, **kwargs: Tensor) -> None:
        """As of a dict, with the checks of an assignment."""
        for name, mask in dict(*args, **kwargs).items():
            self[name] = mask


class Masking:
    """Sparse training of `model` by `optimizer`: masks, and the cycle that moves them.

    ```python
    masking = Masking(model, optimizer, density=0.05, prune_rate=0.2, total_steps=54_000)
    loss.backward(); optimizer.step(); masking.step()   # every mini-batch
    report = masking.update()                           # end of every epoch but the last
    ```

    Args:
        model: its parameters of two and more dimensions are masked, so no bias or batch-norm.
        optimizer: holds those parameters, and the momentum where a rule reads it.
        density: share of the maskable weights that is active, in (0, 1].
        prune_rate: share of the active weights removed per update, in [0, 1].
        total_steps: mini-batches over which the prune rate is annealed; constant without it.
        schedule: "cosine" or "linear", to zero at `total_steps`, evaluated per mini-batch;
            "cosine_floor": to 0.005, as the official code.
        method: a key of METHODS; `prune`, `redistribution`, `growth` override its rules by name.
        init: densities of the layers at the start: "uniform" (the paper's), "erk" or
            "half_output" (see `initial_counts`); with
            "uniform_drawn" and "erk_drawn" each weight is drawn by itself, as in the official code,
            so that the number of active weights is the density's only in expectation.
        keep_dense: parameter names or patterns (`*`, `?`) left out of the masks and of the budget.
        generator: random stream of the initial masks and of random growth (torch's own without).
        options: numbers of single rules by name (see `lib/methods/baselines.py` and `readings.py`).

    Raises:
        ValueError: a value out of range, an unknown name, an optimizer without the momentum that
            the rules need, a pattern that matches nothing, a layer that would be empty.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        density: float = 1.0,
        prune_rate: float = 0.2,
        total_steps: int | None = None,
        *,
        schedule: str | None = "cosine",
        method: str = "sparse_momentum",
        prune: str | None = None,
        redistribution: str | None = None,
        growth: str | None = None,
        init: str = "uniform",
        keep_dense: str | Sequence[str] = (),
        generator: torch.Generator | None = None,
        options: Mapping[str, float] | None = None,
    ) -> None:
        if not 0 < density <= 1:
            raise ValueError(f"density must be in (0, 1], got {density}")
        _check_rate(prune_rate)
        if total_steps is not None and total_steps <= 0:
            raise ValueError(f"total_steps must be positive, got {total_steps}")
        if schedule not in SCHEDULES:
            raise ValueError(unknown("schedule", schedule, [s for s in SCHEDULES if s]))
        named = method_of(method)
        if method in UNMASKED and density != 1:
            raise ValueError(f"method {method!r} has density 1, got {density}")
        self.model, self.optimizer, self.generator = model, optimizer, generator
        self.method, self.init = method, init
        self.prune = PRUNE[prune or named.prune]
        self.redistribution = REDISTRIBUTION[redistribution or named.redistribution]
        self.growth = GROWTH[growth or named.growth]
        self.prune_rate, self.schedule, self.total_steps = prune_rate, schedule, total_steps
        self.options: dict[str, float] = dict(options or {})
        for option in self.options:
            if option not in OPTIONS:
                raise ValueError(unknown("option", option, OPTIONS))
        on = {name for name, value in self.options.items() if value}
        self._share_out = next((SHARE_OUT[o] for o in SHARE_OUT if o in on), share_out)
        self._choose = next((CHOOSE[o] for o in CHOOSE if o in on), choose)
        self._keep_regrown = "keep_regrown" in on
        self.steps = 0
        self.rule_state: dict[str, Any] = {}

        dense = method in UNMASKED
        self.parameters = {} if dense else maskable_parameters(model, keep_dense)
        if not self.parameters and not dense:
            raise ValueError("no weight is left to mask: keep_dense covers the whole model")
        self._check_optimizer()
        self._masks = Masks(self.parameters)
        self._multipliers: dict[str, tuple[Tensor, int, Tensor]] = {}
        self._lists: dict[str, Any] = {}  # layer -> room for a list of its active weights
        if init not in INITS:
            raise ValueError(unknown("init", init, INITS))
        counts = initial_counts(self.parameters, density, init.removesuffix("_drawn"))
        start = _drawn_mask if init.endswith("_drawn") else _random_mask
        for name, parameter in self.parameters.items():
            self._masks[name] = start(parameter, counts[name], generator)
        self.apply()

    # ---- the three calls of a training loop ----

    @torch.no_grad()
    def step(self) -> None:
        """After every optimizer.step(): set inactive weights back to zero, advance the schedule."""
        self.steps += 1
        self.apply()
        if self.method in EVERY_STEP:
            EVERY_STEP[self.method](self)

    def advance(self) -> None:
        """In place of `step` where whoever moved the weights left the inactive ones at zero."""
        self.steps += 1

    def update(self, prune_rate: float | None = None) -> list[LayerReport]:
        """One cycle: prune, redistribute, grow. The number of active weights stays the same.

        `prune_rate` in [0, 1], by default the schedule's current rate; 0 changes nothing. Returns
        one LayerReport per layer. Raises DivergenceError when a weight, or the momentum or
        gradient that a rule reads, isn't finite, and ValueError when a layer has no active weight.
        """
        rate = self.current_rate if prune_rate is None else prune_rate
        _check_rate(rate)
        layers = self._survey()
        if rate == 0 or self.prune.name == "none":
            return [_report(layer, grown=0) for layer in layers]

        if self.redistribution.before_pruning:
            self._measure_importance(layers)

        # 1. Prune.
        kept = self.prune.function(layers, rate, self.rule_state)
        counted = [layer.count_of(k) for layer, k in zip(layers, kept, strict=True)]
        remaining = [int(n) for n in to_host(counted)]
        for layer, survivors, count in zip(layers, kept, remaining, strict=True):
            layer.survivors, layer.pruned = survivors, layer.active - count

        # 2. Redistribute.
        if not self.redistribution.before_pruning:
            self._measure_importance(layers)
        counts = leave_no_layer_empty(self._share_out(layers, self.rule_state), remaining)

        # 3. Grow. Grown weights start at zero.
        for layer, count in zip(layers, counts, strict=True):
            self._masks[layer.name] = mask = self._choose(layer, self.growth, count)
            layer.clear_outside(mask if self._keep_regrown else layer.survivors)
        if self._choose is not choose:  # may have chosen survivors
            counts = [n - left for n, left in zip(self.active().values(), remaining, strict=True)]
        if self.options.get("reset_momentum"):
            self._reset_momentum(layers)
        return [_report(layer, n) for layer, n in zip(layers, counts, strict=True)]

    @property
    def masks(self) -> Masks:
        """Parameter name -> bool mask. Assignable, one mask or all; applied at the next call."""
        return self._masks

    @masks.setter
    def masks(self, masks: Mapping[str, Tensor]) -> None:
        if missing := self.parameters.keys() - masks.keys():
            raise ValueError(f"masks are missing for {', '.join(sorted(missing))}")
        self._masks.update(masks)

    # ---- what can be read ----

    @property
    def current_rate(self) -> float:
        """The prune rate now: annealed per mini-batch to zero at `total_steps`."""
        if self.total_steps is None:
            return self.prune_rate
        steps, every = self.steps, int(self.options.get("anneal_every_steps", 0))
        if every:  # the update at the end of such a period still has the rate of its beginning
            steps = max(0, steps - 1) // every * every
        floor = min(FLOORS.get(self.schedule, 0.0), self.prune_rate)
        falling = SCHEDULES[self.schedule](min(1.0, steps / self.total_steps))
        return floor + (self.prune_rate - floor) * falling

    @property
    def weights_total(self) -> int:
        """Number of maskable weights."""
        return sum(p.numel() for p in self.parameters.values())

    def active(self) -> dict[str, int]:
        """Number of active weights per layer."""
        counts = to_host([count_of(mask) for mask in self._masks.values()])
        return {name: int(count) for name, count in zip(self._masks, counts, strict=True)}

    @property
    def density(self) -> float:
        """Share of the maskable weights that is active now (1 for a dense run)."""
        return sum(self.active().values()) / self.weights_total if self._masks else 1.0

    # ---- persistence ----

    def state_dict(self) -> dict[str, Any]:
        """Masks, position in the schedule, state of rules and of the random stream."""
        return {
            "masks": {name: mask.clone() for name, mask in self._masks.items()},
            "steps": self.steps,
            "rules": (self.method, self.prune.name, self.redistribution.name, self.growth.name),
            "rule_state": {
                k: v.clone() if isinstance(v, Tensor) else v for k, v in self.rule_state.items()
            },
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; ValueError when it is of other rules, names or shapes."""
        rules = (self.method, self.prune.name, self.redistribution.name, self.growth.name)
        if tuple(state["rules"]) != rules:
            raise ValueError(f"the saved state is of the rules {state['rules']}, not of {rules}")
        self.masks = {name: mask.clone() for name, mask in state["masks"].items()}
        self.steps = state["steps"]
        self.rule_state = {
            k: v.clone() if isinstance(v, Tensor) else v for k, v in state["rule_state"].items()
        }
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"].cpu())
        self.apply()

    # ---- inside ----

    def apply(self) -> None:
        """Set the inactive weights to zero.

        By one compiled pass per layer; where that is not to be had, by one fused multiplication by
        masks kept as floats.
        """
        left = []
        for name, mask in self._masks.items():
            if compiled().takes(self.parameters[name], mask):
                compiled().clear_outside(self.parameters[name], mask)
            else:
                left.append(name)
        if left:
            self._multiply(left)

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring what `apply` multiplies by up to date with masks that moved: before a CUDA graph
        that contains `apply` is replayed.
        """
        for name in self._multipliers:
            self._multiplier(name)

    def _multiplier(self, name: str) -> Tensor:
        mask, cached = self._masks[name], self._multipliers.get(name)
        if cached is None or cached[0] is not mask or cached[1] != mask._version:
            # In place, so that a captured CUDA graph goes on reading the same memory.
            multiplier = torch.empty_like(self.parameters[name]) if cached is None else cached[2]
            multiplier.copy_(mask)
            self._multipliers[name] = cached = (mask, mask._version, multiplier)
        return cached[2]

    @torch.no_grad()
    def _multiply(self, names: Sequence[str]) -> None:
        weights: list[Tensor] = [self.parameters[name] for name in names]
        multipliers = [self._multiplier(name) for name in names]
        torch._foreach_mul_(weights, multipliers)

    def _survey(self) -> list[Layer]:
        """What rules may read; sets inactive weights to zero, looks for what isn't finite."""
        needs = sorted({self.growth.needs, self.redistribution.needs} - {""})
        layers: list[Layer] = []
        rows: dict[str, Sequence[Tensor | float]] = {}  # active, mean momentum, what to check
        for name, mask in self._masks.items():
            parameter = self.parameters[name]
            layer = Layer(name, parameter, mask, self.optimizer, self.generator)
            layers.append(layer)
            momentum = _look_for_momentum(layer, "momentum" in needs)
            if compiled().takes(parameter, mask, momentum):
                seen = self._survey_at_once(layer, momentum)
                if momentum is not None:
                    layer.mean_momentum = seen.momentum / max(1, seen.active)
                largest = [
                    seen.largest_momentum if need == "momentum" else layer.gradient.abs().max()
                    for need in needs
                ]
                mean = math.nan if momentum is None else layer.mean_momentum
                rows[name] = [seen.active, mean, seen.largest_weight, *largest]
        others = [layer for layer in layers if layer.name not in rows]
        if others:
            self._multiply([layer.name for layer in others])
        for layer in others:
            found = "momentum" in vars(layer)  # looked for above
            mean = layer.mean_momentum if found else math.nan
            largest = [getattr(layer, what).abs().max() for what in ("weight", *needs)]
            rows[layer.name] = [count_of(layer.mask), mean, *largest]
        # One transfer to the host for all layers.
        numbers = iter(to_host([n for layer in layers for n in rows[layer.name]]))
        means = []
        for layer in layers:
            layer.active = int(next(numbers))
            means.append(next(numbers))
            if layer.active == 0 and self.prune.name != "none":  # SNIP may well cut a network
                raise ValueError(
                    f"{layer.name} has no active weight among {layer.numel}: give it at least one, "
                    "raise the density or name it in keep_dense"
                )
            for what in ("weight", *needs):
                if not math.isfinite(value := next(numbers)):
                    raise DivergenceError(
                        f"{layer.name}: the largest |{what}| is {value} after {self.steps} steps; "
                        "training has diverged, lower the learning rate"
                    )
        total = sum(means)
        for layer, mean in zip(layers, means, strict=True):
            layer.momentum_share = mean / total if total > 0 else math.nan
        return layers

    def _survey_at_once(self, layer: Layer, momentum: Tensor | None) -> Any:
        """By the compiled pass, with a list of the active weights where they are few."""
        room = self._lists.get(layer.name)
        seen = compiled().survey(layer.parameter, momentum, layer.mask, room)
        if room is None or room.count != seen.active:
            if seen.active > max(LISTED_UP_TO * layer.numel, ALWAYS_LISTED):
                return seen
            room = self._lists[layer.name] = compiled().ActiveList(seen.active + seen.active // 8)
            seen = compiled().survey(layer.parameter, momentum, layer.mask, room)
        layer.listed = room
        return seen

    def _reset_momentum(self, layers: Sequence[Layer]) -> None:
        """Inactive weights get the signed mean of their layer's active momentum (PAPER.md 12d)."""
        for layer in layers:
            mask = self._masks[layer.name]
            layer.momentum.masked_fill_(~mask, float(layer.momentum[mask].double().mean()))

    def _measure_importance(self, layers: Sequence[Layer]) -> None:
        shares = to_host([self.redistribution.function(layer) for layer in layers])
        total = sum(shares)
        for layer, share in zip(layers, shares, strict=True):
            layer.share = share / total if total > 0 else 0.0

    def _check_optimizer(self) -> None:
        held = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        for name, parameter in self.parameters.items():
            if id(parameter) not in held:
                raise ValueError(f"{name} is masked but the optimizer doesn't hold it")
            group = held[id(parameter)]
            if "momentum" in (self.growth.needs, self.redistribution.needs) and not (
                group.get("momentum", 0) > 0 or "betas" in group
            ):
                raise ValueError(
                    f"redistribution {self.redistribution.name!r} and growth {self.growth.name!r} "
                    f"read the momentum of {name}, but {type(self.optimizer).__name__} runs with "
                    f"momentum={group.get('momentum', 'none')}: use SGD with momentum above 0, or "
                    "Adam, or other rules"
                )


SCHEDULES: dict[str | None, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "cosine_floor": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
    None: lambda done: 1.0,
}

FLOORS: dict[str | None, float] = {"cosine_floor": 0.005}  # the prune rate falls to it, not to 0


def maskable_parameters(
    model: nn.Module, keep_dense: str | Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """Name -> parameter of all weights that may be masked: two and more dimensions, trainable.

    `keep_dense` names parameters, modules or patterns to leave out; ValueError for one that
    matches nothing.
    """
    patterns = [keep_dense] if isinstance(keep_dense, str) else list(keep_dense)
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1 and p.requires_grad}
    kept: set[str] = set()
    for pattern in patterns:
        hits = {n for n in weights if fnmatchcase(n, pattern) or n.startswith(pattern + ".")}
        if not hits:
            raise ValueError(unknown("keep_dense name", pattern, weights))
        kept |= hits
    return {n: p for n, p in weights.items() if n not in kept}


INITS = ("uniform", "erk", "half_output", "uniform_drawn", "erk_drawn")


def initial_counts(
    parameters: Mapping[str, nn.Parameter], density: float, init: str = "uniform"
) -> dict[str, int]:
    """Active weights per layer at the start; they sum to round(density * all weights) exactly.

    "uniform": the same density in every layer (paper). "erk": Erdos-Renyi-kernel, density
    proportional to (sum of the dimensions) / (their product), full where that exceeds one (RigL,
    section 3). "half_output": half of the last layer's weights, the same density in the others (a
    line that is commented out in the code of DSR's authors, PAPER.md 12a). Raises ValueError where
    a layer would be empty.
    """
    sizes = {name: p.numel() for name, p in parameters.items()}
    total = round(density * sum(sizes.values()))
    if init == "uniform":
        shares = [float(size) for size in sizes.values()]
    elif init == "half_output":
        *others, last = sizes.values()
        shares = [float(size) for size in others]
        shares.append(sum(others) * (last / 2) / max(total - last / 2, 1))
    elif init == "erk":
        shares = [float(sum(p.shape)) for p in parameters.values()]
    else:
        raise ValueError(unknown("init", init, ["uniform", "erk", "half_output"]))
    counts = dict(zip(sizes, allocate(total, shares, list(sizes.values())), strict=True))
    if empty := [name for name, count in counts.items() if count == 0]:
        raise ValueError(
            f"density {density} leaves {empty[0]} ({sizes[empty[0]]} weights) without an active "
            "weight: raise the density or name the layer in keep_dense"
        )
    return counts


def _random_mask(parameter: nn.Parameter, count: int, generator: torch.Generator | None) -> Tensor:
    mask = torch.zeros(parameter.numel(), dtype=torch.bool, device=parameter.device)
    device = generator.device if generator is not None else parameter.device
    order = torch.randperm(parameter.numel(), generator=generator, device=device)
    mask[order[:count].to(parameter.device)] = True
    return mask.view(parameter.shape)


def _drawn_mask(parameter: nn.Parameter, count: int, generator: torch.Generator | None) -> Tensor:
    """Each weight active with probability count / weights; one at least, as no layer may be empty
    (the official code stops with an error there).
    """
    device = generator.device if generator is not None else parameter.device
    drawn = torch.rand(parameter.shape, generator=generator, device=device) * parameter.numel()
    mask = drawn.to(parameter.device) < count
    return mask if mask.any() else _random_mask(parameter, 1, generator)


def _look_for_momentum(layer: Layer, needed: bool) -> Tensor | None:
    """None, or ValueError where it is needed, where the optimizer has no momentum."""
    try:
        layer.momentum = momentum_of(layer.optimizer, layer.parameter, layer.name)
    except ValueError:
        if needed:
            raise
        return None
    return layer.momentum


def _report(layer: Layer, grown: int) -> LayerReport:
    after = layer.active - layer.pruned + grown
    return LayerReport(layer.name, layer.active, layer.pruned, grown, after, layer.momentum_share)


def _check_rate(rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"prune_rate must be in [0, 1], got {rate}")


# Register the other methods' rules and the other readings.
from lib import methods  # noqa: E402, F401
