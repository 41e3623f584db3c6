"""What a `Masking` refuses, postpones or warns of, in one sentence that says what to do."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lib.config import known
from lib.methods.masks import maskable_parameters, unwrapped
from lib.methods.parts import DivergenceError, Layer, Rule

if TYPE_CHECKING:
    from lib.masking import Masking

warn = functools.partial(warnings.warn, stacklevel=2)  # Python shows a sentence once

# ---- when a Masking is made -------------------------------------------------------------------

OPTIONS = {"l1", "temperature", "feedback", "grow_anywhere", "keep_regrown", "reset_momentum"}
OPTIONS |= {"anneal_every_steps"}


def arguments(density: float, total_steps: int | None, options: Mapping[str, float]) -> None:
    """The numbers that a `Masking` is made of."""
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    if total_steps is not None and not total_steps > 0:
        raise ValueError(f"total_steps must be the optimizer's steps in all, got {total_steps}")
    for option, value in options.items():
        known("option", option, OPTIONS)
        if not math.isfinite(value):
            raise ValueError(f"option {option} must be finite, got {value}")


def share(name: str, value: float) -> float:
    """`value`, a number in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return float(value)


def holds(
    optimizer: torch.optim.Optimizer, masked: Mapping[str, nn.Parameter], rules: Sequence[Rule]
) -> None:
    """The optimizer holds what is masked, with a momentum where one of the rules reads it."""
    kind = type(optimizer).__name__
    for held in vars(optimizer).values():
        inner = held[0] if isinstance(held, list | tuple) and held else held
        if isinstance(inner, torch.optim.Optimizer):
            way = "give Masking that one, and step the outer one as before"
            if kind == "ZeroRedundancyOptimizer":  # each process has the momentum of some layers
                way = "train by that one under DistributedDataParallel"
            raise ValueError(f"{kind} wraps another optimizer ({type(inner).__name__}): {way}")
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    readers = " and ".join(sorted({repr(rule.name) for rule in rules if rule.needs == "momentum"}))
    for name, parameter in masked.items():
        if id(parameter) not in groups:
            raise ValueError(f"{name} is masked but the optimizer doesn't hold it")
        group = groups[id(parameter)]
        if readers and not (group.get("momentum", 0) > 0 or "betas" in group):
            raise ValueError(
                f"rule {readers} needs the momentum of {name}, but {kind} runs with momentum="
                f"{group.get('momentum', 'none')}: use SGD with momentum, Adam, or other rules"
            )


def pruned(rule: str, layers: Sequence[Layer], kept: Sequence[Tensor]) -> None:
    """A pruning rule gave each layer a part of its mask."""
    for layer, survivors in zip(layers, kept, strict=True):
        fits = survivors.dtype == torch.bool and survivors.shape == layer.mask.shape
        if not fits or (survivors & ~layer.mask).any():
            raise ValueError(f"prune rule {rule!r} gave {layer.name} no part of its mask")


def signs_of_training(masking: Masking) -> str:
    """Why the weights look trained; empty where they don't.

    An optimizer counts its steps or has a momentum, batch norm counts its mini-batches, and a layer
    with some zeros, not only zeros, has been pruned. (A trained dense network without batch norm,
    loaded for a fresh optimizer, looks like a new one.)
    """
    for name, p in masking.parameters.items():
        state = masking.optimizer.state.get(p, {})
        if float(state.get("step", 0)) or state.get("momentum_buffer") is not None:
            return f"the optimizer has already moved {name}"
        zeros = p.numel() - int(torch.count_nonzero(p.detach()))
        if 0.01 * p.numel() < zeros < p.numel():
            return f"{name} has {zeros} zeros among {p.numel()} weights"
    for name, buffer in masking.model.named_buffers():
        if name.endswith("num_batches_tracked") and buffer > 10:
            return f"{name} is {int(buffer)}"
    return ""


# ---- while training ---------------------------------------------------------------------------

_NEWEST: Any = WeakTensorKeyDictionary()  # parameter -> Watch of its newest Masking, as a number


class Watch:
    """What a `Masking` remembers from call to call to notice what goes wrong between them."""

    def __init__(self, masking: Masking) -> None:
        self._mark = object()  # of this Masking, on its parameters
        self._model = unwrapped(masking.model)
        for parameter in masking.parameters.values():
            _NEWEST[parameter] = self._mark
        self._parameters, self.trained = masking.parameters, set[str]()  # since the last update
        self._moved = self._counted = 0  # steps of the optimizer
        masking.optimizer.register_step_post_hook(self.stepped)
        self.updated_at = -1  # number of steps at the last update

    def stepped(self, optimizer: Any, args: Any, keywords: Any) -> None:
        """After its steps; those that a GradScaler has a fused optimizer skip don't count."""
        if not getattr(optimizer, "found_inf", None):
            self._moved += 1
            self.trained |= {n for n, p in self._parameters.items() if p.grad is not None}

    def step(self, masking: Masking) -> None:
        """Before every step and update: the parameters are the model's, and no other Masking's."""
        for name, parameter in masking.parameters.items():
            path, _, last = name.rpartition(".")
            if getattr(self._model.get_submodule(path), last, None) is not parameter:
                raise ValueError(f"{name} was replaced in the model: make a new Masking")
            if _NEWEST.get(parameter, self._mark) is not self._mark:
                raise ValueError(f"a newer Masking has {name}: use one Masking for a model")

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

    def ended(self, masking: Masking) -> None:
        """At the last step of the schedule."""
        if self.updated_at < 0 and masking.prune.name != "none":
            warn("all total_steps were made without one update(): the masks never moved")

    def survey(self, masking: Masking) -> tuple[list[Layer], list[Layer]]:
        """What rules may read, of all layers and of those that take part in the update; inactive
        weights are zero then.

        Not those that are frozen, or had no gradient since the last update, and none without a
        signal to grow by: where that of every inactive weight is zero, or as old as the last
        update, or an infinite gradient that the optimizer did not follow. Raises DivergenceError
        when a weight, or momentum that a rule reads, isn't finite; ValueError for an empty layer.
        """
        self.step(masking)
        holds(masking.optimizer, masking.parameters, (masking.redistribution, masking.growth))
        masking.apply()
        layers = []
        for name, mask in masking.masks.items():
            active, weight = int(torch.count_nonzero(mask)), masking.parameters[name]
            if active == 0 and masking.prune.name != "none":  # SNIP may well cut a network
                raise ValueError(f"{name} has no active weight: give it at least one")
            optimizer, stream = masking.optimizer, masking.generator
            layers.append(Layer(name, weight, mask, mask, optimizer, stream, active))
        needs, infinite, silent = masking.growth.needs, "", []
        trained = self.trained or masking.parameters.keys()  # of no step that was seen: all
        free = [one for one in layers if one.parameter.requires_grad and one.name in trained]
        for layer in free:
            for what in sorted({"weight", needs, masking.redistribution.needs} - {""}):
                largest = float(getattr(layer, what).abs().max())
                if not math.isfinite(largest) and what == "gradient":
                    infinite = f"the gradient of {layer.name} is {largest}, its weights are finite"
                elif not math.isfinite(largest):
                    raise DivergenceError(
                        f"{layer.name}: the largest |{what}| is {largest} after {masking.steps} "
                        "steps; training has diverged, lower the learning rate"
                    )
            with contextlib.suppress(ValueError):  # none, and no rule needs it
                layer.momentum_share = layer.mean_momentum
            if needs and layer.active < layer.numel:
                old = self.updated_at == masking.steps
                if old or not getattr(layer, needs)[~layer.mask].any():
                    silent.append(layer)
        total = sum(layer.momentum_share for layer in free)
        for layer in free:
            layer.momentum_share = layer.momentum_share / total if total > 0 else math.nan
        if infinite or silent:
            names = ", ".join(layer.name for layer in silent)
            why = infinite or f"the {needs} of all inactive weights is zero or old in {names}"
            warn(f"{why}: nothing tells what to grow, the masks stay until the next update")
        return layers, [] if infinite else [layer for layer in free if layer not in silent]

    def update(self, masking: Masking, rate: float) -> None:
        """Before an update at the schedule's `rate`."""
        end = masking.total_steps
        if masking.steps == self.updated_at:
            warn(
                "update() without a step since the last one: call masking.step() after every "
                "optimizer.step() of the optimizer that Masking holds"
            )
        if rate == 0 and end is not None and masking.steps > end:
            warn(
                f"the masks no longer move, the schedule ended at total_steps={end}: let these be "
                "the optimizer steps of the whole training"
            )
        now = maskable_parameters(masking.model, masking.keep_dense)
        if masking.parameters and (new := now.keys() - masking.parameters.keys()):
            names = ", ".join(sorted(new))
            warn(f"{names} can be masked now: make a new Masking (from_weights), or it is dense")
        self.updated_at, self.trained = masking.steps, set()
