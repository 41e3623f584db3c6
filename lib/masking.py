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
this file, in `lib/methods`: the vocabulary of rules (`layer`), how counts are rounded (`counting`),
how weights are picked (`selection`), what is masked and the masks at the start (`masks`), what is
refused (`checks`), the rules of other methods (`rules`, `deepr`), and variants of this one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from lib.config import UNMASKED, method_of, unknown
from lib.methods import checks
from lib.methods.counting import (
    SCHEDULES,
    annealed,
    leave_no_layer_empty,
    left_over,
    own_rate,
    quotas,
    rounded,
    whole,
    with_carried,
)
from lib.methods.layer import (
    AFTERWARDS,
    CHOOSE,
    EVERY_STEP,
    GROWTH,
    PRUNE,
    REDISTRIBUTION,
    SHARE_OUT,
    DivergenceError,
    GrowthRule,
    Layer,
    Rule,
)
from lib.methods.masks import (
    INITS,
    Masks,
    from_rank_zero,
    initial_masks,
    maskable_parameters,
    plain_name,
    shared_stream,
)
from lib.methods.reporting import LayerReport, Report, layers_table, report
from lib.methods.selection import BitMasks, clear_outside, count, pick, to_host

__all__ = [  # what the rest of lib and new rules take from here
    "EVERY_STEP",
    "GROWTH",
    "PRUNE",
    "REDISTRIBUTION",
    "DivergenceError",
    "Layer",
    "LayerReport",
    "Masking",
    "clear_outside",
    "maskable_parameters",
]

# ---- 1. Prune ------------------------------------------------------------


@PRUNE.register("magnitude")
def prune_magnitude(layers: Sequence[Layer], rate: float, state: dict[str, Any]) -> list[Tensor]:
    """In each layer the rate * active smallest |w| go (paper, algorithm 1); nearly dense, important
    layers lose less (`own_rate`), fractions of a weight are carried to the next update (`rounded`).
    """
    survivors = []
    for layer in layers:
        quota = own_rate(layer, rate, len(layers)) * layer.active
        number = rounded(quota, layer.active, f"pruned/{layer.name}", state)
        survivors.append(layer.without_smallest(number))
    return survivors


# ---- 2. Redistribute ------------------------------------------------------------


@REDISTRIBUTION.register("momentum", needs="momentum", before_pruning=True)
def redistribute_momentum(layer: Layer) -> Tensor | float:
    """Mean |momentum| of the weights active before pruning (paper, section 3)."""
    return layer.mean_momentum


def share_out(layers: Sequence[Layer], state: dict[str, Any]) -> list[int]:
    """How many weights each layer grows: as many as were pruned in all, by the layers' shares.

    As in pruning, the fraction of a weight that a layer's quota leaves over is carried to the next
    update: a small layer whose share is below one weight grows one every few updates.
    """
    total = sum(layer.pruned for layer in layers)
    capacity = [layer.numel - layer.active + layer.pruned for layer in layers]
    quota = quotas(total, [layer.share or 0.0 for layer in layers], capacity)
    keys = [f"grown/{layer.name}" for layer in layers]
    wanted = [with_carried(q, key, state) for q, key in zip(quota, keys, strict=True)]
    numbers = whole(total, wanted, capacity)
    for key, want, number in zip(keys, wanted, numbers, strict=True):
        state[key] = left_over(want, number)
    return numbers


# ---- 3. Grow ------------------------------------------------------------


@GROWTH.register("momentum", needs="momentum", score="magnitude")
def grow_momentum(layer: Layer) -> Tensor:
    """Largest |momentum| first (paper, section 3)."""
    return layer.momentum


def choose(layer: Layer, growth: Rule[GrowthRule], number: int) -> Tensor:
    """The survivors and what grows (bool, the weight's shape): so many inactive weights of the
    highest scores. A weight that was pruned just now is a candidate.
    """
    if number == 0:
        return layer.survivors
    scores = growth.function(layer)
    if scores.shape != layer.mask.shape or not scores.isfinite().all():
        raise ValueError(f"growth rule {growth.name!r} gave {layer.name} scores {scores}")
    return layer.survivors | pick(scores, ~layer.survivors, number, growth.score)


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
        options: numbers of single rules by name (see `lib/methods/deepr.py` and `variants.py`).
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
        schedule: str | None = "cosine",
        method: str = "sparse_momentum",
        prune: str | None = None,
        redistribution: str | None = None,
        growth: str | None = None,
        init: str = "uniform",
        keep_dense: str | Sequence[str] | None = (),
        generator: torch.Generator | None = None,
        options: Mapping[str, float] | None = None,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        checks.arguments(density, total_steps, generator, options or {})
        if schedule not in SCHEDULES:
            raise ValueError(unknown("schedule", schedule, filter(None, SCHEDULES)))
        if init not in INITS:
            raise ValueError(unknown("init", init, INITS))
        named, dense = method_of(method), method in UNMASKED
        if dense and density != 1:
            raise ValueError(f"method {method!r} has density 1, got {density}")
        if method == "snip" and masks is None:  # put in later, they would find cleared weights
            raise ValueError(
                "method 'snip' draws no masks: give it those of lib.methods.masks.snip_masks as "
                "masks="
            )
        self.model, self.optimizer, self.keep_dense = model, optimizer, keep_dense
        self.generator = shared_stream(generator)
        self.method, self.target_density = method, density
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
            raise ValueError("no weight is left to mask: keep_dense covers the whole model")
        if meta := [name for name, p in self.parameters.items() if p.is_meta]:
            raise ValueError(f"{meta[0]} is on the meta device: call model.to_empty(...) before")
        checks.optimizer(optimizer, self.parameters, (self.redistribution, self.growth))
        self._watch = checks.Watch(self)
        self._masks, self._bits = Masks(self.parameters), BitMasks()
        if masks is None:
            why = checks.signs_of_training(model, optimizer, self.parameters) if density < 1 else ""
            if why:
                self._watch.warn(
                    f"the weights look trained ({why}), and random masks are drawn over them: keep "
                    "a sparse network's zeros by Masking.from_weights, or continue a run by "
                    "load_state_dict of a Masking made before its first step"
                )
            masks = initial_masks(self.parameters, density, init, self.generator)
        else:
            self.masks = masks
            if density not in (1, self.density):
                raise ValueError(f"the masks have density {self.density}, not density={density}")
            self.target_density = self.density
        self.masks = from_rank_zero({name: mask.cpu() for name, mask in masks.items()})
        self._watch.updated(-1, self.active())
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
        """In place of `step` where whoever moved the weights left the inactive ones at zero."""
        self.steps += 1

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, prune_rate: float | None = None) -> list[LayerReport]:
        """One cycle: prune, redistribute, grow. The number of active weights stays the same.

        `prune_rate` in [0, 1], by default the schedule's current rate; 0 changes nothing. Returns
        one LayerReport per layer. Raises DivergenceError when a weight, or the momentum that a rule
        reads, isn't finite, and ValueError when a layer has no active weight or a rule no sense.
        """
        rate = checks.share("prune_rate", self.current_rate if prune_rate is None else prune_rate)
        every, layers = self._survey()
        if prune_rate == 0:  # only looks
            return report(every, self.active())
        self._watch.update(self, every, rate)
        if rate == 0 or self.prune.name == "none" or not layers:
            return self._report(every)
        if self.redistribution.before_pruning:
            self._measure_importance(layers)

        # 1. Prune.
        kept = self.prune.function(layers, rate, self.rule_state)
        checks.pruned(self.prune.name, layers, kept)
        remaining = [int(n) for n in to_host([count(survivors) for survivors in kept])]
        for layer, survivors, left in zip(layers, kept, remaining, strict=True):
            layer.survivors, layer.pruned = survivors, layer.active - left

        # 2. Redistribute.
        if not self.redistribution.before_pruning:
            self._measure_importance(layers)
        numbers = self._option(SHARE_OUT, share_out)(layers, self.rule_state)
        numbers = leave_no_layer_empty(numbers, remaining)

        # 3. Grow. Grown weights start at zero.
        for layer, number in zip(layers, numbers, strict=True):
            mask = self._option(CHOOSE, choose)(layer, self.growth, number)
            self._masks[layer.name] = mask
            keeps = mask if self.options.get("keep_regrown") else layer.survivors
            clear_outside(layer.weight, keeps)
        self._option(AFTERWARDS, lambda *_: None)(layers, self._masks)
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
        """The prune rate now: annealed per step to zero at `total_steps`."""
        every = int(self.options.get("anneal_every_steps", 0))
        return annealed(self.schedule, self.prune_rate, self.steps, self.total_steps, every)

    @property
    def weights_total(self) -> int:
        """Number of maskable weights."""
        return sum(p.numel() for p in self.parameters.values())

    def active(self) -> dict[str, int]:
        """Number of active weights per layer."""
        numbers = to_host([count(mask) for mask in self._masks.values()])
        return {name: int(number) for name, number in zip(self._masks, numbers, strict=True)}

    @property
    def density(self) -> float:
        """Share of the maskable weights that is active now (1 for a dense run)."""
        return sum(self.active().values()) / self.weights_total if self._masks else 1.0

    def __repr__(self) -> str:
        rules = f"{self.prune.name}, {self.redistribution.name}, {self.growth.name}"
        end = "" if self.total_steps is None else f" of {self.total_steps}"
        return (
            f"Masking: {self.method} ({rules}), prune rate {self.current_rate:.3g} at step "
            f"{self.steps}{end}\n{layers_table(self.parameters, self.active())}"
        )

    # ---- persistence ----

    def state_dict(self) -> dict[str, Any]:
        """Masks, position in the schedule, state of rules and of the random stream."""
        return {
            "masks": {name: mask.clone() for name, mask in self._masks.items()},
            "steps": self.steps,
            **checks.identity(self),
            "rule_state": _copied(self.rule_state),
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; ValueError for other rules, settings, names or shapes."""
        checks.state(state, checks.identity(self))
        self.masks = {name: mask.clone() for name, mask in state["masks"].items()}
        self.steps, self.rule_state = state["steps"], _copied(state["rule_state"])
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"].cpu())
        self._watch.updated(-1, self.active())
        self.apply()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # a copy: of its optimizer too, which has forgotten its hooks
        self._watch.count_steps_of(self.optimizer)

    # ---- inside ----

    @torch.inference_mode(False)
    @torch.no_grad()
    def apply(self, model: nn.Module | None = None) -> None:
        """Set the inactive weights to zero; also after weights were loaded into the model.

        Of `model`, if given: a copy of the network, such as torch's AveragedModel (EMA, SWA).
        """
        if model is None:
            self._bits.clear(self.parameters, self._masks)
            return
        for name, parameter in model.named_parameters():
            if (mask := self._masks.get(plain_name(model, name))) is not None:
                clear_outside(parameter, mask.to(parameter.device))

    def _survey(self) -> tuple[list[Layer], list[Layer]]:
        """What rules may read, of all layers and of those that take part; inactive weights at 0."""
        self._watch.step(self)
        checks.optimizer(self.optimizer, self.parameters, (self.redistribution, self.growth))
        self.apply()
        layers = [
            Layer(name, self.parameters[name], mask, self.optimizer, self.generator)
            for name, mask in self._masks.items()
        ]
        return layers, self._watch.survey(self, layers)

    def _measure_importance(self, layers: Sequence[Layer]) -> None:
        shares = to_host([self.redistribution.function(layer) for layer in layers])
        if any(not 0 <= share < math.inf for share in shares):
            raise ValueError(f"redistribution rule {self.redistribution.name!r} gave {shares}")
        total = sum(shares)
        for layer, share in zip(layers, shares, strict=True):
            layer.share = share / total if total > 0 else 0.0

    def _option(self, registry: Mapping[str, Any], default: Any) -> Any:
        """What an option that is on registered in place of a part of the cycle."""
        return next((registry[o] for o in registry if self.options.get(o)), default)

    def _report(self, layers: Sequence[Layer]) -> Report:
        active = self.active()
        self._watch.updated(self.steps, active)
        return report(layers, active)


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
