"""What a `Masking` refuses, postpones or warns of, in one sentence that says what to do."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lib.config import unknown
from lib.methods.layer import (
    AFTERWARDS,
    CHOOSE,
    SHARE_OUT,
    DivergenceError,
    Layer,
    Rule,
)
from lib.methods.masks import maskable_parameters
from lib.methods.selection import count, to_host

if TYPE_CHECKING:
    from lib.masking import Masking

# ---- when a Masking is made -------------------------------------------------------------------


def arguments(
    density: float, total_steps: int | None, generator: Any, options: Mapping[str, float]
) -> None:
    """The numbers that a `Masking` is made of; names are looked up where they are used."""
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    if total_steps is not None and not total_steps > 0:
        raise ValueError(f"total_steps must be the optimizer's steps in all, got {total_steps}")
    if not isinstance(generator, torch.Generator | None):
        raise ValueError(f"generator must be a torch.Generator, got {generator!r}")
    known = {"l1", "temperature", "keep_regrown", "anneal_every_steps"}
    known |= {*SHARE_OUT, *CHOOSE, *AFTERWARDS}
    for option, value in options.items():
        if option not in known:
            raise ValueError(unknown("option", option, known))
        if not math.isfinite(value):
            raise ValueError(f"option {option} must be finite, got {value}")


def share(name: str, value: float) -> float:
    """`value`, a number in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return float(value)


def optimizer(
    optimizer: torch.optim.Optimizer, masked: Mapping[str, nn.Parameter], rules: Sequence[Rule[Any]]
) -> None:
    """The optimizer holds what is masked, with a momentum where one of the rules reads it."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    readers = " and ".join(sorted({repr(rule.name) for rule in rules if rule.needs == "momentum"}))
    for name, parameter in masked.items():
        if id(parameter) not in groups:
            raise ValueError(f"{name} is masked but the optimizer doesn't hold it")
        group = groups[id(parameter)]
        if readers and not (group.get("momentum", 0) > 0 or "betas" in group):
            raise ValueError(
                f"rule {readers} reads the momentum of {name}, but {type(optimizer).__name__} runs "
                f"with momentum={group.get('momentum', 'none')}: use SGD or RMSprop with momentum "
                "above 0, or Adam, or other rules"
            )


def signs_of_training(
    model: nn.Module, optimizer: torch.optim.Optimizer, masked: Mapping[str, nn.Parameter]
) -> str:
    """Why the weights look trained; empty where they don't.

    An optimizer counts its steps or has a momentum, batch norm counts its mini-batches, and a layer
    with some zeros, not only zeros, has been pruned. (A trained dense network without batch norm,
    loaded for a fresh optimizer, looks like a new one.)
    """
    for name, p in masked.items():
        state = optimizer.state.get(p, {})
        if float(state.get("step", 0)) or state.get("momentum_buffer") is not None:
            return f"the optimizer has already moved {name}"
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked") and buffer > 10:
            return f"{name} is {int(buffer)}"
    numbers = to_host([torch.count_nonzero(p.detach()) for p in masked.values()])
    for (name, p), nonzero in zip(masked.items(), numbers, strict=True):
        if 0 < nonzero < 0.99 * p.numel():
            return f"{name} has {p.numel() - int(nonzero)} zeros among {p.numel()} weights"
    return ""


# ---- while training ---------------------------------------------------------------------------

_NEWEST: Any = WeakTensorKeyDictionary()  # parameter -> weak reference to its newest Masking


class Watch:
    """What a `Masking` remembers from call to call to notice what goes wrong between them."""

    def __init__(self, masking: Masking) -> None:
        self._warned: set[str] = set()
        self._places = [
            (place, key, child, name)
            for name, parameter in masking.parameters.items()
            for place, key, child in _path(masking.model, parameter)
        ]
        for parameter in masking.parameters.values():
            _NEWEST[parameter] = weakref.ref(masking)
        self._steps, self._budget, self.updates = -1, 0, 0
        self._last: dict[str, float] = {}  # the signals of the last update, and of this one
        self._now: dict[str, float] = {}
        self._moved = self._counted = self._surveyed = 0  # steps of the optimizer
        self.count_steps_of(masking.optimizer)

    def count_steps_of(self, optimizer: torch.optim.Optimizer) -> None:
        """Notice its steps; not those that a GradScaler has a fused optimizer skip."""

        def stepped(optimizer: Any, args: Any, keywords: Any) -> None:
            found_inf = getattr(optimizer, "found_inf", None)
            self._moved += found_inf is None or not bool(found_inf)

        getattr(optimizer, "register_step_post_hook", lambda hook: None)(stepped)

    def warn(self, sentence: str) -> None:
        """Once for each sentence."""
        if sentence not in self._warned:
            self._warned.add(sentence)
            warnings.warn(sentence, UserWarning, stacklevel=3)

    def step(self, masking: Masking) -> None:
        """Before every step: a few look-ups. Raises ValueError where a layer or parameter was
        replaced, or a newer `Masking` has it.
        """
        for place, key, child, name in self._places:
            if place.get(key) is not child:
                raise ValueError(
                    f"{name} was replaced in the model after Masking was made: make a new Masking, "
                    "or change the weight in place (parameter.data.copy_)"
                )
        for name, parameter in masking.parameters.items():
            if _NEWEST.get(parameter, lambda: None)() not in (None, masking):
                raise ValueError(f"a newer Masking has {name}: use one Masking for a model")

    def ended(self, masking: Masking) -> None:
        """At the last step of the schedule."""
        if not self.updates and masking.prune.name != "none":
            self.warn("all total_steps were made without one update(): the masks never moved")

    def skipped(self, masking: Masking) -> bool:
        """Whether the optimizer made no step since the last call, as where a GradScaler found an
        infinite gradient. One whose steps were never seen is taken to have made it, as long as the
        gradients are finite.
        """
        if self._moved:
            before, self._counted = self._counted, self._moved
            return before == self._moved
        gradients = [p.grad for p in masking.parameters.values() if p.grad is not None]
        return not all(bool(g.isfinite().all()) for g in gradients)

    def update(self, masking: Masking, layers: Sequence[Layer], rate: float) -> None:
        """Before an update at the schedule's `rate`."""
        self.updates += 1
        steps, end = masking.steps, masking.total_steps
        if steps == self._steps:
            self.warn(
                "update() without a step of the optimizer since the last one: call masking.step() "
                "after every optimizer.step() of the optimizer that Masking holds"
            )
        if rate == 0 and end is not None and steps > end:
            self.warn(
                f"the schedule ended at total_steps={end}, so that updates no longer move masks: "
                "let total_steps be the optimizer steps of the whole training"
            )
        active = sum(layer.active for layer in layers)
        if active != self._budget:
            self.warn(
                f"{active} weights are active, {self._budget} were before masks were assigned: "
                "from now on the updates keep this number"
            )
        now = maskable_parameters(masking.model, masking.keep_dense)
        if masking.parameters and (new := now.keys() - masking.parameters.keys()):
            self.warn(
                f"{', '.join(sorted(new))} can be masked now, unlike when Masking was made: make a "
                "new one (Masking.from_weights keeps the zeros) or let it be dense"
            )
        states = masking.optimizer.state
        if states and not isinstance(masking.optimizer, torch.optim.LBFGS):  # it has one for all
            for name, parameter in masking.parameters.items():
                if parameter.requires_grad and not states.get(parameter):
                    self.warn(
                        f"the optimizer has never moved {name}: name it in keep_dense if the "
                        "forward pass doesn't use it"
                    )

    def updated(self, steps: int, active: Mapping[str, int]) -> None:
        """Until the next update: steps made by now (-1: anew), active weights per layer."""
        self._last = {} if steps < 0 else dict(self._now)
        self._steps, self._budget, self._surveyed = steps, sum(active.values()), self._moved

    def survey(self, masking: Masking, layers: Sequence[Layer]) -> list[Layer]:
        """Count active weights and measure momentum; the layers that take part in the update.

        Not those that are frozen now, and none without a signal to grow by: where that of every
        inactive weight is zero, or the same as at the last update, or an infinite gradient that the
        optimizer did not follow. Raises DivergenceError when a weight, or the momentum a rule
        reads, isn't finite, and ValueError for a layer without an active weight.
        """
        needs = masking.growth.needs
        read = sorted({"weight", needs, masking.redistribution.needs} - {""})
        free = [layer for layer in layers if layer.parameter.requires_grad]
        numbers: list[Tensor | float] = [count(layer.mask) for layer in layers]
        for layer in free:
            numbers.append(_mean_momentum(layer, needed="momentum" in read))
            numbers += [getattr(layer, what).abs().max() for what in read]
            if needs:
                signal = getattr(layer, needs)
                numbers += [((signal != 0) & ~layer.mask).any(), signal.sum(dtype=torch.float64)]
        found = iter(to_host(numbers))
        for layer in layers:
            layer.active = int(next(found))
            if layer.active == 0 and masking.prune.name != "none":  # SNIP may well cut a network
                raise ValueError(f"{layer.name} has no active weight: give it at least one")
        infinite, moving = "", []
        for layer in free:
            layer.momentum_share = next(found)
            for what, value in [(what, next(found)) for what in read]:
                if not math.isfinite(value) and what == "gradient":
                    infinite = f"the gradient of {layer.name} is {value}, its weights are finite"
                elif not math.isfinite(value):
                    raise DivergenceError(
                        f"{layer.name}: the largest |{what}| is {value} after {masking.steps} "
                        "steps; training has diverged, lower the learning rate"
                    )
            if not needs or self._signals(layer, masking.steps, next(found), next(found)):
                moving.append(layer)
        total = sum(layer.momentum_share for layer in free)
        for layer in free:
            layer.momentum_share = layer.momentum_share / total if total > 0 else math.nan
        silent = ", ".join(layer.name for layer in free if layer not in moving)
        if infinite or silent:
            why = infinite or f"the {needs} of all inactive weights is zero or old in {silent}"
            self.warn(f"{why}: nothing tells what to grow, the masks stay until the next update")
        return [] if infinite else moving

    def _signals(self, layer: Layer, steps: int, anywhere: float, total: float) -> bool:
        """Whether there is a signal at an inactive weight, and another one than last time although
        the optimizer made steps since, or although there were none.
        """
        may_be_old = steps == self._steps or self._moved > self._surveyed
        old = may_be_old and total != 0 and self._last.get(layer.name) == total
        self._now[layer.name] = total
        return not old and bool(anywhere or layer.active == layer.numel)


def pruned(rule: str, layers: Sequence[Layer], kept: Sequence[Tensor]) -> None:
    """A pruning rule gave each layer a part of its mask."""
    for layer, survivors in zip(layers, kept, strict=True):
        fits = survivors.dtype == torch.bool and survivors.shape == layer.mask.shape
        if not fits or (survivors & ~layer.mask).any():
            raise ValueError(f"prune rule {rule!r} gave {layer.name} no part of its mask")


def _mean_momentum(layer: Layer, needed: bool) -> Tensor | float:
    try:
        return layer.mean_momentum
    except ValueError:
        if needed:
            raise
        return math.nan


def _path(model: nn.Module, parameter: nn.Parameter) -> list[tuple[dict[str, Any], str, Any]]:
    """The dictionaries of modules that lead to the parameter, with key and value of each."""
    name = next(n for n, p in model.named_parameters() if p is parameter)
    *modules, last = name.split(".")
    path: list[tuple[dict[str, Any], str, Any]] = []
    module: Any = model
    for part in modules:
        path.append((module._modules, part, module._modules[part]))
        module = module._modules[part]
    return [*path, (module._parameters, last, parameter)]


# ---- a saved state ----------------------------------------------------------------------------

SETTINGS = ("target_density", "prune_rate", "schedule", "total_steps")


def identity(masking: Masking) -> dict[str, Any]:
    """What a state says of the masking that it is of."""
    names = masking.prune.name, masking.redistribution.name, masking.growth.name
    return {
        "rules": (masking.method, *names),
        "settings": {name: getattr(masking, name) for name in SETTINGS},
    }


def state(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """A state of `Masking.state_dict` and of the same rules and settings as one's own identity.
    States that were saved before settings were part of them have none to compare.
    """
    if tuple(saved["rules"]) != own["rules"]:
        raise ValueError(f"the saved state is of the rules {saved['rules']}, not of {own['rules']}")
    for name, value in own["settings"].items():
        if (before := saved.get("settings", own["settings"])[name]) != value:
            raise ValueError(f"the saved state has {name}={before!r}, this Masking {value!r}")
    if type(steps := saved["steps"]) is not int or steps < 0:
        raise ValueError(f"the saved state has steps={steps!r}")
    if not isinstance(saved["rule_state"], Mapping):
        raise ValueError(f"the saved state has rule_state={saved['rule_state']!r}")
