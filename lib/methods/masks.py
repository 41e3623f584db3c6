"""Which weights are masked, what their masks must be like, and the masks at the start."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lib.config import unknown
from lib.methods.counting import allocate
from lib.methods.layer import DivergenceError
from lib.methods.selection import pick

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
LAYERS = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Embedding,
    nn.EmbeddingBag,
)
# What the weights of layers that torch doesn't know are called: "weight", "w0", "qkv_proj".
_CALLED = re.compile(r"(?:^|_)(?:w|weights?|kernel|proj)\d*(?:$|_)")
T = TypeVar("T")


def maskable_parameters(
    model: nn.Module, keep_dense: str | Sequence[str] | None = ()
) -> dict[str, nn.Parameter]:
    """Name -> parameter of all weights that may be masked, by module and role: the trainable
    weights of linear, bilinear, convolutional, recurrent and embedding layers and the projections
    of attention. Of a module that torch doesn't know, what is called a weight, kernel or projection
    and has several outputs and inputs. No bias, norm or scale, no token or table of positions.

    `keep_dense` names parameters, modules or patterns to leave out. Names are those of the model
    without wrappers (`plain_name`). Raises ValueError for a pattern that matches nothing, and for a
    weight that can't be masked (`_obstacle`).
    """
    patterns = [keep_dense] if isinstance(keep_dense, str) else list(keep_dense or ())
    every = list(model.named_parameters(remove_duplicate=False))
    names = [plain_name(model, name) for name, _ in every]
    kept: set[int] = set()
    for pattern in patterns:
        hit = [fnmatchcase(name, pattern) or name.startswith(pattern + ".") for name in names]
        if not any(hit):
            raise ValueError(unknown("keep_dense name", pattern, names))
        kept |= {id(p) for (_, p), one in zip(every, hit, strict=True) if one}
    found: dict[str, nn.Parameter] = {}
    for (full, parameter), name in zip(every, names, strict=True):
        if parameter.requires_grad and id(parameter) not in kept:
            module, role = _layer_of(model, full)
            if _is_weight(module, role, parameter):
                if obstacle := _obstacle(module, role, parameter):
                    raise ValueError(f"{name} {obstacle}, or name it in keep_dense")
                kept.add(id(parameter))  # a tied weight counts once, by its first name
                found[name] = parameter
    return found


def _layer_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that a parameter belongs to, and what it is there ("weight"), also where the
    weight is computed from the parameter (torch.nn.utils.parametrizations).
    """
    if computed := re.fullmatch(r"(?:(.*)\.)?parametrizations\.(\w+)\.original\d*", name):
        return model.get_submodule(computed[1] or ""), computed[2]
    path, _, role = name.rpartition(".")
    return model.get_submodule(path), role


def _is_weight(module: nn.Module, role: str, parameter: nn.Parameter) -> bool:
    if parameter.dim() < 2:
        return False
    if isinstance(module, LAYERS):
        return role.startswith("weight")
    if isinstance(module, nn.MultiheadAttention):
        return role.endswith("_weight")
    matrix = len(parameter) > 1 and parameter[0].numel() > 1
    return matrix and "Norm" not in type(module).__name__ and bool(_CALLED.search(role))


def _obstacle(module: nn.Module, role: str, parameter: nn.Parameter) -> str:
    """Why this weight can't be masked, and what to do; empty where it can."""
    if parameter.is_complex():
        return "is complex, and importance is of real numbers: hold both parts as real weights"
    if hasattr(parameter, "device_mesh"):
        return "is sharded (DTensor of FSDP2): train by DistributedDataParallel"
    if getattr(module, "sparse", False):
        return "has sparse gradients: make its layer with sparse=False"
    if hasattr(module, f"{role.removesuffix('_orig')}_mask"):
        return "is pruned by torch.nn.utils.prune: call prune.remove, then Masking.from_weights"
    computed = getattr(module, "parametrizations", {})
    by = [type(p).__name__ for p in computed[role]] if role in computed else []
    if role.endswith(("_g", "_v")) and hasattr(module, role[:-1] + "g"):
        by = ["weight_norm"]
    if set(by) - {"_SpectralNorm"}:  # it divides by a number, zeros stay zeros
        return f"is no weight itself, {by[0]} computes one from it: remove the parametrization"
    return ""


def in_a_group() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def from_rank_zero(value: T) -> T:
    """The value that the first process has, in all processes of a group (each must call this)."""
    if not in_a_group():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def shared_stream(generator: torch.Generator | None) -> torch.Generator | None:
    """The random stream of rank 0 in all processes of a group; one's own without a group."""
    if not in_a_group():
        return generator
    own = generator or torch.Generator().manual_seed(torch.initial_seed())
    return own.set_state(from_rank_zero(own.get_state()))


def plain_name(model: nn.Module, name: str) -> str:
    """A parameter's name without what `torch.compile`, (Distributed)DataParallel and AveragedModel
    put into it, so that masks fit wrapped and plain models alike.
    """
    module: Any = model
    kept = []
    for part in name.split("."):
        if part != "_orig_mod" and not (part == "module" and isinstance(module, WRAPPERS)):
            kept.append(part)
        module = getattr(module, part)
    return ".".join(kept)


class Masks(Mapping[str, Tensor]):
    """Parameter name -> bool mask. One is assigned by `masks[name] = mask`, checked for its name,
    shape and type.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._masks: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name if name in self._masks else self._own_name(name)]

    def __setitem__(self, name: str, mask: Tensor) -> None:
        name = self._own_name(name)
        self._masks[name] = self._checked(name, mask)

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return repr(self._masks)

    def assign(self, masks: Mapping[str, Tensor]) -> None:
        """All masks at once, or none where one doesn't fit."""
        given = {self._own_name(name): mask for name, mask in masks.items()}
        if missing := self._parameters.keys() - given.keys():
            raise ValueError(f"masks are missing for {', '.join(sorted(missing))}")
        self._masks.update({name: self._checked(name, given[name]) for name in self._parameters})

    def _own_name(self, name: str) -> str:
        """The name here of a parameter that is called so here or in a wrapped model."""
        plain = name.replace("_orig_mod.", "")
        for called in (name, plain, plain.removeprefix("module.")):
            if called in self._parameters:
                return called
        raise UnknownMask(unknown("masked parameter", name, self._parameters))

    def _checked(self, name: str, mask: Tensor) -> Tensor:
        shape = self._parameters[name].shape
        if not isinstance(mask, Tensor) or mask.shape != shape or mask.dtype != torch.bool:
            raise ValueError(f"the mask of {name} must be a bool tensor {tuple(shape)}, got {mask}")
        return mask.to(self._parameters[name].device)


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


def snip_masks(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    density: float,
    loss: Callable[[], Tensor],
) -> dict[str, Tensor]:
    """SNIP's masks, chosen once, before training: the round(density * weights) largest
    |gradient * weight| over all layers (Lee et al. 2019, algorithm 1).

    `loss()` is the loss of one mini-batch with all weights present; the model's gradients and
    buffers are left as they were. Raises DivergenceError for a gradient or weight that isn't
    finite.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = torch.autograd.grad(loss(), list(parameters.values()))
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    pairs = zip(gradients, parameters.values(), strict=True)
    score = torch.cat([(g * p.detach()).abs().reshape(-1) for g, p in pairs])
    if not math.isfinite(total := float(score.sum(dtype=torch.float64))):
        raise DivergenceError(f"SNIP: the sum of |gradient * weight| is {total}")
    chosen = pick(score, torch.ones_like(score, dtype=torch.bool), round(density * score.numel()))
    parts = chosen.split([p.numel() for p in parameters.values()])
    named = zip(parameters.items(), parts, strict=True)
    return {name: part.view(p.shape).clone() for (name, p), part in named}
