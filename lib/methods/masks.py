"""Which weights are masked, what their masks must be like, and the masks at the start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Self

import torch
from torch import Tensor, nn

from lib.config import unknown
from lib.methods.counts import allocate

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def maskable_parameters(
    model: nn.Module, keep_dense: str | Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """Name -> parameter of all weights that may be masked: two and more dimensions, trainable.

    `keep_dense` names parameters, modules or patterns to leave out; ValueError for one that
    matches nothing. Names are those of the model without wrappers (`plain_name`).
    """
    patterns = [keep_dense] if isinstance(keep_dense, str) else list(keep_dense)
    weights = {
        plain_name(model, name): parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and parameter.requires_grad
    }
    kept: set[str] = set()
    for pattern in patterns:
        hits = {n for n in weights if fnmatchcase(n, pattern) or n.startswith(pattern + ".")}
        if not hits:
            raise ValueError(unknown("keep_dense name", pattern, weights))
        kept |= hits
    return {n: p for n, p in weights.items() if n not in kept}


def plain_name(model: nn.Module, name: str) -> str:
    """A parameter's name without what `torch.compile` and (Distributed)DataParallel put into it, so
    that masks fit wrapped and plain models alike.
    """
    module: Any = model
    kept = []
    for part in name.split("."):
        if part != "_orig_mod" and not (part == "module" and isinstance(module, WRAPPERS)):
            kept.append(part)
        module = getattr(module, part)
    return ".".join(kept)


class Masks(MutableMapping[str, Tensor]):
    """Parameter name -> bool mask; assigning a mask of another name, shape or type is refused, and
    so is deleting one.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._masks: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._masks:
            return self._masks[name]
        return self._masks[self._own_name(name)]

    def __setitem__(self, name: str, mask: Tensor) -> None:
        name = self._own_name(name)
        self._masks[name] = self._checked(name, mask)

    def __delitem__(self, name: str) -> None:
        raise ValueError(
            f"the mask of {name} can't be deleted: make a Masking with it in keep_dense"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __ior__(self, masks: Mapping[str, Tensor]) -> Self:
        self.update(masks)
        return self

    def __repr__(self) -> str:
        return repr(self._masks)

    def assign(self, masks: Mapping[str, Tensor]) -> None:
        """All masks at once, or none where one doesn't fit."""
        if not isinstance(masks, Mapping):
            raise ValueError(
                f"masks must be a mapping from parameter name to bool mask, got {masks!r}"
            )
        given = {self._own_name(name): mask for name, mask in masks.items()}
        if missing := self._parameters.keys() - given.keys():
            raise ValueError(f"masks are missing for {', '.join(sorted(missing))}")
        checked = {name: self._checked(name, given[name]) for name in self._parameters}
        self._masks.update(checked)

    def _own_name(self, name: str) -> str:
        """The name here of a parameter that is called so here or in a wrapped model."""
        plain = name.replace("_orig_mod.", "")
        for called in (name, plain, plain.removeprefix("module.")):
            if called in self._parameters:
                return called
        raise UnknownMask(unknown("masked parameter", name, self._parameters))

    def _checked(self, name: str, mask: Tensor) -> Tensor:
        parameter = self._parameters[name]
        if not isinstance(mask, Tensor):
            raise ValueError(f"the mask of {name} must be a bool tensor, got {mask!r}")
        if mask.shape != parameter.shape:
            raise ValueError(
                f"the mask of {name} has shape {tuple(mask.shape)}, its weight has "
                f"{tuple(parameter.shape)}"
            )
        if mask.dtype != torch.bool:
            raise ValueError(f"the mask of {name} must be of type torch.bool, got {mask.dtype}")
        return mask.to(parameter.device)


class UnknownMask(KeyError, ValueError):
    """No masked parameter has this name."""

    def __str__(self) -> str:
        return str(self.args[0])


INITS = ("uniform", "erk", "half_output", "uniform_drawn", "erk_drawn")


def initial_masks(
    parameters: Mapping[str, nn.Parameter],
    density: float,
    init: str,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """Random masks of the densities that `init`, one of INITS, gives the layers."""
    counts = initial_counts(parameters, density, init.removesuffix("_drawn"))
    start = _drawn_mask if init.endswith("_drawn") else _random_mask
    return {name: start(p, counts[name], generator) for name, p in parameters.items()}


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
