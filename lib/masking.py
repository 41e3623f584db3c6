"""Sparse momentum, the algorithm of the paper, in the paper's order: prune, redistribute, grow.

A network is trained with a fixed number of non-zero weights. After every mini-batch the inactive
weights are set back to zero (`Masking.step`); once per epoch (`Masking.update`)

1. the importance of each layer is measured: the mean magnitude of the momentum of its active
   weights, normalised over the layers;
2. **prune**: in each layer the active weights of smallest magnitude are removed;
3. **redistribute**: the removed weights are shared out among the layers by importance;
4. **grow**: in each layer the inactive weights of largest momentum become active, at zero.

Source: Dettmers and Zettlemoyer 2019 (arXiv 1907.04840), section 3 and algorithm 1. Where the
official code (commit e19ff16) leaves the paper, the docstrings say which way this one goes. Beside
this file, in `lib/methods`: what rules see and how counts are rounded (`parts`), what is masked and
the masks at the start (`masks`), what is refused (`checks`), other methods' rules (`rules`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from lib.config import UNMASKED, known, method_of
from lib.methods import checks, parts
from lib.methods.masks import (
    INITS,
    Masks,
    from_rank_zero,
    initial_masks,
    maskable_parameters,
    shared_stream,
    unwrapped,
)
from lib.methods.parts import GROWTH, PRUNE, REDISTRIBUTION, DivergenceError, Layer, clear_outside
from lib.methods.rules import choose_anywhere, deepr_step, reset_momentum, share_out_by_feedback

__all__ = ["EVERY_STEP", "GROWTH", "PRUNE", "REDISTRIBUTION", "DivergenceError", "Layer"]
__all__ += ["LayerReport", "Masking", "clear_outside"]

# Name -> share of the prune rate that is left when this share of the steps is done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "cosine_floor": lambda done: 0.5 * (1 + math.cos(math.pi * done)),  # to 0.005, not to 0
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
EVERY_STEP = {"deepr": deepr_step}  # method -> what it does after each mini-batch

# ---- 1. Prune ------------------------------------------------------------


@PRUNE.register("magnitude")
def prune_magnitude(layers: Sequence[Layer], rate: float, state: dict[str, Any]) -> list[Tensor]:
    """In each layer the rate * active smallest |w| go (paper, algorithm 1); nearly dense, important
    layers lose less (`own_rate`), fractions of a weight are carried to the next update (`carried`).
    """
    rates = [layer.own_rate(rate, len(layers)) for layer in layers]
    return parts.prune_smallest(layers, rates, state)


# ---- 2. Redistribute ------------------------------------------------------------


@REDISTRIBUTION.register("momentum", needs="momentum", before_pruning=True)
def redistribute_momentum(layer: Layer) -> float:
    """Mean |momentum| of the weights active before pruning (paper, section 3)."""
    return layer.mean_momentum


def share_out(layers: Sequence[Layer], state: dict[str, Any]) -> list[int]:
    """How many weights each layer grows: as many as were pruned in all, by the layers' shares;
    fractions of a weight are carried to the next update here too.
    """
    total = sum(layer.pruned for layer in layers)
    capacity = [layer.room for layer in layers]
    shares = parts.quotas(total, [layer.share or 0.0 for layer in layers], capacity)
    quota = {f"grown/{layer.name}": share for layer, share in zip(layers, shares, strict=True)}
    return parts.carried(quota, state, lambda wanted: parts.whole(total, wanted, capacity))


# ---- 3. Grow ------------------------------------------------------------


@GROWTH.register("momentum", needs="momentum")
def grow_momentum(layer: Layer) -> Tensor:
    """Largest |momentum| first (paper, section 3)."""
    return layer.momentum.abs()


def choose(layer: Layer, growth: parts.Rule, number: int) -> Tensor:
    """The survivors and so many inactive weights of the highest scores (bool, the weight's shape).
    A weight that was pruned just now is a candidate.
    """
    if number == 0:
        return layer.survivors
    scores = growth.function(layer)
    if scores.shape != layer.mask.shape or not scores.isfinite().all():
        raise ValueError(f"growth rule {growth.name!r} gave {layer.name} scores {scores}")
    if growth.needs and int((scores[~layer.survivors] > 0).sum()) < number:
        chance = parts.drawn(torch.rand, scores.shape, by=layer.generator, device=scores.device)
        scores = torch.where(scores > 0, scores, chance - 1)  # where there is no signal, at random
    return layer.survivors | parts.pick(scores, ~layer.survivors, number)


class LayerReport(NamedTuple):
    """One layer's line of an update. Counts of weights; momentum_share is NaN without momentum."""

    name: str
    active_before: int
    pruned: int
    grown: int
    active_after: int
    momentum_share: float


class Masking:
    """Sparse training of `model` by `optimizer`: masks, and the cycle that moves them.

    ```python
    masking = Masking(model, optimizer, density=0.05, prune_rate=0.2, total_steps=54_000)
    loss.backward(); optimizer.step(); masking.step()   # every mini-batch
    report = masking.update()                           # end of every epoch but the last
    ```

    Args:
        model: its weights are masked (`maskable_parameters` says which), no bias, norm or table.
        optimizer: holds those parameters, and the momentum where a rule reads it.
        density: share of the maskable weights that is active, in (0, 1].
        prune_rate: share of the active weights removed per update, in [0, 1].
        total_steps: optimizer steps over which the prune rate is annealed; constant without it.
        schedule: "cosine" or "linear", to zero at `total_steps`, evaluated per step;
            "cosine_floor": to 0.005, as the official code; "constant".
        method: a key of METHODS; `prune`, `redistribution`, `growth` override its rules by name.
        init: densities of the layers at the start: "uniform" (the paper's), "erk" or "half_output"
            (`initial_counts`); with "uniform_drawn" and "erk_drawn" each weight is drawn by
            itself, as in the official code, so that their number is right only in expectation.
        keep_dense: parameter names or patterns (`*`, `?`) left out of the masks and of the budget.
        generator: random stream of the initial masks and of random growth (torch's own without).
        options: numbers of single rules by name (see `lib/methods/rules.py`).
        masks: parameter name -> bool mask to start from; `density` is theirs then.

    In a process group of torch.distributed the masks and the random stream of rank 0 count for all:
    each process makes its Masking and calls `step` and `update` alike. A layer that is frozen
    (`requires_grad=False`) or has no signal to grow by keeps its mask in an update.

    Raises:
        ValueError: a value out of range, an unknown name, an optimizer without the momentum that
            the rules need, a pattern that matches nothing, a layer that would be empty, SNIP
            without its masks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        density: float = 1.0,
        prune_rate: float = 0.2,
        total_steps: int | None = None,
        *,
        schedule: str = "cosine",
        method: str = "sparse_momentum",
        prune: str | None = None,
        redistribution: str | None = None,
        growth: str | None = None,
        init: str = "uniform",
        keep_dense: str | Sequence[str] | None = (),
        generator: parts.Stream = None,
        options: Mapping[str, float] | None = None,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        checks.arguments(density, total_steps, options or {})
        known("schedule", schedule, SCHEDULES)
        known("init", init, INITS)
        named, dense = method_of(method), method in UNMASKED
        if dense and density != 1:
            raise ValueError(f"method {method!r} has density 1, got {density}")
        if method == "snip" and masks is None:  # put in later, they would find cleared weights
            raise ValueError("method 'snip' needs masks=lib.methods.masks.snip_masks(...)")
        self.model, self.optimizer, self.keep_dense = model, optimizer, keep_dense
        self.generator = shared_stream(generator)
        self.method = method
        self.prune = PRUNE[prune or named.prune]
        self.redistribution = REDISTRIBUTION[redistribution or named.redistribution]
        self.growth = GROWTH[growth or named.growth]
        self.prune_rate = checks.share("prune_rate", prune_rate)
        self.schedule, self.total_steps = schedule, total_steps
        self.options: dict[str, float] = dict(options or {})
        self.steps = 0
        self.rule_state: dict[str, Any] = {}

        self.parameters = {} if dense else maskable_parameters(model, keep_dense)
        if not self.parameters and not dense:
            raise ValueError("no weight is left to mask: all are frozen, unknown or in keep_dense")
        if meta := [name for name, p in self.parameters.items() if p.is_meta]:
            raise ValueError(f"{meta[0]} is on the meta device: call model.to_empty(...) before")
        checks.holds(optimizer, self.parameters, (self.redistribution, self.growth))
        self._watch = checks.Watch(self)
        self._masks, self._bits = Masks(self.parameters), dict[str, Any]()
        if masks is None:
            if density < 1 and (why := checks.signs_of_training(self)):
                checks.warn(
                    f"the weights look trained ({why}), and random masks zero them: keep zeros by "
                    "Masking.from_weights, or continue a run by load_state_dict"
                )
            masks = initial_masks(self.parameters, density, init, self.generator)
        else:
            self.masks = masks
            if density not in (1, self.density):
                raise ValueError(f"the masks have density {self.density}, not density={density}")
        self.masks = from_rank_zero({name: mask.cpu() for name, mask in masks.items()})
        self.target_density = density if density < 1 else self.density
        self.apply()

    @classmethod
    def from_weights(
        cls, model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Any
    ) -> Self:
        """A masking that keeps the zeros of a sparse network; `settings` as of the class.

        Weights that grew in an update and had no step since are zero too: to continue a run, save
        and load `state_dict()`. Raises ValueError where no weight is zero, or a whole layer.
        """
        weights = maskable_parameters(model, settings.get("keep_dense", ()))
        masks = {name: weight.detach() != 0 for name, weight in weights.items()}
        if all(mask.all() for mask in masks.values()):
            raise ValueError("no weight is zero: use Masking(model, optimizer, density=...)")
        if empty := [name for name, mask in masks.items() if not mask.any()]:
            raise ValueError(f"all weights of {empty[0]} are zero: name it in keep_dense")
        return cls(model, optimizer, masks=masks, **settings)

    # ---- the three calls of a training loop ----

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self) -> None:
        """After every optimizer.step(): set inactive weights back to zero, advance the schedule.

        A step that the optimizer did not make (a GradScaler skipped it, or gradients are
        accumulated) isn't counted.
        """
        self._watch.step(self)
        self.apply()
        if self._watch.skipped(self):
            return
        self.steps += 1
        if self.method in EVERY_STEP:
            EVERY_STEP[self.method](self)
        elif self.steps == self.total_steps:
            self._watch.ended(self)

    def advance(self) -> None:
        """In place of `step` where whoever moved the weights left the inactive ones at zero; not by
        the optimizer alone, so that gradients don't tell which layers learned.
        """
        self.steps += 1
        self._watch.trained.update(self.parameters)

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, prune_rate: float | None = None) -> list[LayerReport]:
        """One cycle: prune, redistribute, grow. The number of active weights stays the same.

        `prune_rate` in [0, 1], by default the schedule's current rate; 0 changes nothing. Returns
        one LayerReport per layer (`pd.DataFrame` makes a table of them). Raises DivergenceError
        when a weight, or the momentum that a rule reads, isn't finite, and ValueError when a layer
        has no active weight or a rule no sense.
        """
        rate = checks.share("prune_rate", self.current_rate if prune_rate is None else prune_rate)
        every, layers = self._watch.survey(self)
        if prune_rate != 0:  # which only looks
            self._watch.update(self, rate)
        if rate == 0 or self.prune.name == "none" or not layers:
            return self._report(every)
        if self.redistribution.before_pruning:
            self._measure_importance(layers)

        # 1. Prune.
        kept = self.prune.function(layers, rate, self.rule_state)
        checks.pruned(self.prune.name, layers, kept)
        remaining = [int(torch.count_nonzero(survivors)) for survivors in kept]
        for layer, survivors, left in zip(layers, kept, remaining, strict=True):
            layer.survivors, layer.pruned = survivors, layer.active - left

        # 2. Redistribute.
        if not self.redistribution.before_pruning:
            self._measure_importance(layers)
        share = share_out_by_feedback if self.options.get("feedback") else share_out
        numbers = parts.leave_no_layer_empty(share(layers, self.rule_state), remaining)

        # 3. Grow. Grown weights start at zero.
        grow = choose_anywhere if self.options.get("grow_anywhere") else choose
        for layer, number in zip(layers, numbers, strict=True):
            mask = self._masks[layer.name] = grow(layer, self.growth, number)
            keeps = mask if self.options.get("keep_regrown") else layer.survivors
            clear_outside(layer.weight, keeps)
        if self.options.get("reset_momentum"):
            reset_momentum(layers, self._masks)
        return self._report(every)

    # ---- what can be read ----

    @property
    def masks(self) -> Masks:
        """Parameter name -> bool mask. Assignable, one mask or all; applied at the next call.

        A weight that an assigned mask adds begins at zero.
        """
        return self._masks

    @masks.setter
    def masks(self, masks: Mapping[str, Tensor]) -> None:
        self._masks.assign(masks)

    @property
    def current_rate(self) -> float:
        """The prune rate now: annealed per step, or (option `anneal_every_steps`) once per so many
        steps, when the update at the end of such a period still has the rate of its beginning.
        """
        if self.total_steps is None:
            return self.prune_rate
        steps, every = self.steps, int(self.options.get("anneal_every_steps", 0))
        if every:
            steps = max(0, steps - 1) // every * every
        floor = min(0.005, self.prune_rate) if self.schedule == "cosine_floor" else 0.0
        left = SCHEDULES[self.schedule](min(1.0, steps / self.total_steps))
        return floor + (self.prune_rate - floor) * left

    @property
    def weights_total(self) -> int:
        """Number of maskable weights."""
        return sum(p.numel() for p in self.parameters.values())

    def active(self) -> dict[str, int]:
        """Number of active weights per layer."""
        return {name: int(torch.count_nonzero(mask)) for name, mask in self._masks.items()}

    @property
    def density(self) -> float:
        """Share of the maskable weights that is active now (1 for a dense run)."""
        return sum(self.active().values()) / self.weights_total if self._masks else 1.0

    def __repr__(self) -> str:
        import pandas as pd

        active, sizes = self.active(), {n: p.numel() for n, p in self.parameters.items()}
        table = pd.DataFrame({"weights": sizes, "active": active}, dtype=int)
        table.loc["all"] = table.sum()
        table["density"] = table["active"] / table["weights"]
        rules = f"{self.prune.name}, {self.redistribution.name}, {self.growth.name}"
        end = "" if self.total_steps is None else f" of {self.total_steps}"
        return (
            f"Masking: {self.method} ({rules}), prune rate {self.current_rate:.3g} at step "
            f"{self.steps}{end}\n{table.to_string(float_format='{:.2%}'.format)}"
        )

    # ---- persistence ----

    def state_dict(self) -> dict[str, Any]:
        """Masks, position in the schedule, state of rules and of the random stream."""
        return {
            **self._identity(),
            "masks": {name: mask.clone() for name, mask in self._masks.items()},
            "steps": self.steps,
            "rule_state": copy.deepcopy(self.rule_state),
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; ValueError for other rules, settings, names or shapes."""
        for what, own in self._identity().items():
            if state[what] != own:
                raise ValueError(f"the saved state has {what} {state[what]}, this Masking {own}")
        self.masks = {name: mask.clone() for name, mask in state["masks"].items()}
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"].cpu())
        self.steps, self.rule_state = state["steps"], copy.deepcopy(state["rule_state"])
        self._watch.updated_at = 0 if self.steps else -1  # it may have been updated before
        self.apply()

    def _identity(self) -> dict[str, Any]:
        names = ("target_density", "prune_rate", "schedule", "total_steps")
        return {
            "rules": (self.method, self.prune.name, self.redistribution.name, self.growth.name),
            "settings": {name: getattr(self, name) for name in names},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # a copy: of its optimizer too, which has forgotten its hooks
        self.optimizer.register_step_post_hook(self._watch.stepped)

    # ---- inside ----

    @torch.inference_mode(False)
    @torch.no_grad()
    def apply(self, model: nn.Module | None = None) -> None:
        """Set the inactive weights to zero; also after weights were loaded into the model.

        Of `model`, if given: a copy of the network, such as torch's AveragedModel (EMA, SWA).
        """
        parameters, bits = self.parameters, self._bits
        if model is not None:
            parameters, bits = dict(unwrapped(model).named_parameters()), {}
        parts.clear_by_bits(parameters, self._masks, bits)

    def _measure_importance(self, layers: Sequence[Layer]) -> None:
        shares = [float(self.redistribution.function(layer)) for layer in layers]
        if any(not 0 <= share < math.inf for share in shares):
            raise ValueError(f"redistribution rule {self.redistribution.name!r} gave {shares}")
        total = sum(shares)
        for layer, share in zip(layers, shares, strict=True):
            layer.share = share / total if total > 0 else 0.0

    def _report(self, layers: Sequence[Layer]) -> list[LayerReport]:
        active, report = self.active(), []
        for layer in layers:
            now, share = active[layer.name], layer.momentum_share
            grown = now - layer.active + layer.pruned
            report.append(LayerReport(layer.name, layer.active, layer.pruned, grown, now, share))
        return report
