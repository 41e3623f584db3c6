"""What a `Masking` refuses or warns of, in one sentence that says what to do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from lib.config import unknown
from lib.methods.registry import OPTIONS, DivergenceError, Layer, Rule
from lib.methods.selection import count, to_host

# ---- arguments -----------------------------------------------------------------------------------


def arguments(
    model: Any, optimizer: Any, density: Any, prune_rate: Any, total_steps: Any, options: Any
) -> None:
    """The numbers and objects a `Masking` is made of; names are looked up where they are used."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {model!r}")
    if not hasattr(optimizer, "param_groups"):
        raise ValueError(
            "optimizer must be a torch.optim.Optimizer that holds the model's parameters, got "
            f"{optimizer!r}"
        )
    if share("density", density) == 0:
        raise ValueError(f"density must be in (0, 1], got {density}")
    share("prune_rate", prune_rate)
    whole = isinstance(total_steps, Integral) and not isinstance(total_steps, bool)
    if total_steps is not None and not (whole and total_steps > 0):
        raise ValueError(
            f"total_steps must be positive and whole, got {total_steps!r}: the number of optimizer "
            "steps of the whole training, or None for a constant prune rate"
        )
    for option, value in (options or {}).items():
        if option not in OPTIONS:
            raise ValueError(unknown("option", option, OPTIONS))
        if not _is_number(value) or not math.isfinite(value):
            raise ValueError(f"option {option} must be a finite number, got {value!r}")


def share(name: str, value: Any) -> float:
    """`value`, a number in [0, 1]."""
    range_ = "(0, 1]" if name == "density" else "[0, 1]"
    if not _is_number(value):
        raise ValueError(f"{name} must be a number in {range_}, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in {range_}, got {value}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def parameters(model: nn.Module, masked: Mapping[str, nn.Parameter]) -> list[str]:
    """Refuse what can't be masked; sentences to warn with for what hardly should be."""
    vectors = {id(p) for p in _magnitude_vectors(model)}
    rows = {
        id(m.weight): m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)
    }
    warnings = []
    for name, parameter in masked.items():
        if parameter.is_meta:
            raise ValueError(
                f"{name} is on the meta device: give the model its memory (model.to_empty(...) and "
                "its initial weights) before Masking"
            )
        if id(parameter) in vectors:
            raise ValueError(
                f"{name} is the magnitude vector of weight_norm, one number for each output: name "
                "it in keep_dense"
            )
        if id(parameter) in rows:
            warnings.append(
                f"{name} belongs to an embedding, whose rows are looked up and seldom have a "
                "gradient: name it in keep_dense unless it is to be sparse"
            )
    return warnings


def _magnitude_vectors(model: nn.Module) -> Iterable[nn.Parameter]:
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        yield from (p for n, p in own.items() if n.endswith("_g") and n[:-1] + "v" in own)
        if "original0" in own and type(module[0]).__name__ == "_WeightNorm":  # type: ignore[index]
            yield own["original0"]


def optimizer(
    optimizer: torch.optim.Optimizer, masked: Mapping[str, nn.Parameter], rules: Sequence[Rule[Any]]
) -> None:
    """The optimizer holds what is masked, with a momentum where one of the rules reads it."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    readers = " and ".join(repr(rule.name) for rule in rules if rule.needs == "momentum")
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


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, masked: Mapping[str, nn.Parameter]
) -> str:
    """What to say of weights that look trained; empty where they don't.

    An optimizer with a state has made steps, batch norm counts its mini-batches, and a layer with
    some zeros, not only zeros, has been pruned. (A trained dense network without batch norm, loaded
    for a fresh optimizer, looks like a new one.)
    """
    why = _signs_of_training(model, optimizer, masked)
    return why and (
        f"the weights look trained ({why}), and random masks are drawn over them: keep a sparse "
        "network's zeros by Masking.from_weights, or continue a run by load_state_dict of a "
        "Masking made before its first step"
    )


def _signs_of_training(
    model: nn.Module, optimizer: torch.optim.Optimizer, masked: Mapping[str, nn.Parameter]
) -> str:
    if stepped := [name for name, p in masked.items() if optimizer.state.get(p)]:
        return f"the optimizer has already moved {stepped[0]}"
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked") and not buffer.is_meta and buffer > 10:
            return f"{name} is {int(buffer)}"
    numbers = to_host([torch.count_nonzero(p.detach()) for p in masked.values()])
    for (name, p), nonzero in zip(masked.items(), numbers, strict=True):
        if 0 < nonzero < 0.99 * p.numel():
            return f"{name} has {p.numel() - int(nonzero)} zeros among {p.numel()} weights"
    return ""


# ---- while training ------------------------------------------------------------------------------


def survey(
    layers: Sequence[Layer], needs: Iterable[str], steps: int, *, may_be_empty: bool
) -> None:
    """Count the active weights and measure the momentum of each layer; one transfer to the host.

    Raises DivergenceError when a weight, or what the rules need ("momentum", "gradient"), isn't
    finite, and ValueError for a layer without an active weight, or without what is needed.
    """
    read = ("weight", *sorted(set(needs) - {"", "weight"}))
    numbers: list[Tensor | float] = []
    for layer in layers:
        numbers += [count(layer.mask), _mean_momentum(layer, needed="momentum" in read)]
        numbers += [getattr(layer, what).abs().max() for what in read]
    found = iter(to_host(numbers))
    means = []
    for layer in layers:
        layer.active = int(next(found))
        means.append(next(found))
        if layer.active == 0 and not may_be_empty:
            raise ValueError(
                f"{layer.name} has no active weight among {layer.numel}: give it at least one, "
                "raise the density or name it in keep_dense"
            )
        for what in read:
            if not math.isfinite(value := next(found)):
                raise DivergenceError(
                    f"{layer.name}: the largest |{what}| is {value} after {steps} steps; training "
                    "has diverged, lower the learning rate"
                )
    total = sum(means)
    for layer, mean in zip(layers, means, strict=True):
        layer.momentum_share = mean / total if total > 0 else math.nan


def _mean_momentum(layer: Layer, needed: bool) -> Tensor | float:
    try:
        return layer.mean_momentum
    except ValueError:
        if needed:
            raise
        return math.nan


# ---- a saved state -------------------------------------------------------------------------------


def given_density(density: float, found: float) -> float:
    """The density of masks that are given; ValueError where another one was asked for."""
    if density not in (1, found):
        raise ValueError(
            f"the masks have density {found:.6g}, density={density} was asked for: leave it out"
        )
    return found


PARTS = ("masks", "steps", "rules", "rule_state", "generator")
SETTINGS = ("target_density", "prune_rate", "schedule", "total_steps")


def identity(masking: Any) -> dict[str, Any]:
    """What a state says of the masking that it is of."""
    names = masking.prune.name, masking.redistribution.name, masking.growth.name
    return {
        "rules": (masking.method, *names),
        "settings": {name: getattr(masking, name) for name in SETTINGS},
    }


def state(saved: Any, own: Mapping[str, Any]) -> None:
    """A state of `Masking.state_dict` and of the same rules and settings as one's own identity.
    States that were saved before settings were part of them have none to compare.
    """
    lacking = [part for part in PARTS if not isinstance(saved, Mapping) or part not in saved]
    if lacking:
        raise ValueError(f"this is no state of a Masking: {', '.join(lacking)} are missing")
    if tuple(saved["rules"]) != own["rules"]:
        raise ValueError(f"the saved state is of the rules {saved['rules']}, not of {own['rules']}")
    for name, value in own["settings"].items():
        before = saved.get("settings", own["settings"])[name]
        if before != value:
            raise ValueError(
                f"the saved state has {name}={before!r}, this Masking {value!r}: make the Masking "
                "with the settings that were saved"
            )
