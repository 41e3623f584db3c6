"""Which weights are masked, what their masks must be like, and the masks at the start."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lib.config import known, unknown
from lib.methods.parts import DivergenceError, Stream, drawn, pick, quotas, whole

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
LAYERS += (nn.RNNBase, nn.RNNCellBase, nn.Embedding, nn.EmbeddingBag)
# What the weights of layers that torch doesn't know are called: "weight", "w0", "qkv_proj".
_CALLED = re.compile(r"(?:^|_)(?:w|weights?|kernel|proj)\d*(?:$|_)")
_POSITIONS = re.compile(r"(?:^|[._])(?:wpe|pos)\w*\.weight$")  # embeddings of that name
T = TypeVar("T")


def maskable_parameters(
    model: nn.Module, keep_dense: str | Sequence[str] | None = ()
) -> dict[str, nn.Parameter]:
    """Name -> parameter of all weights that may be masked, by module and role: the trainable
    weights of linear, bilinear, convolutional, recurrent and embedding layers and the projections
    of attention. Of a module that torch doesn't know, what is called a weight, kernel or projection
    and has several outputs and inputs. No bias, norm or scale, no token or table of positions.

    `keep_dense` names parameters, modules or patterns to leave out. Names are those of the model
    without wrappers (`unwrapped`). Raises ValueError for a pattern that matches nothing, and for a
    weight that can't be masked (`_obstacle`).
    """
    model = unwrapped(model)
    patterns = [keep_dense] if isinstance(keep_dense, str) else list(keep_dense or ())
    every = dict(model.named_parameters(remove_duplicate=False))
    kept: set[nn.Parameter] = set()
    for pattern in patterns:
        hit = {every[n] for n in every if fnmatchcase(n, pattern) or n.startswith(pattern + ".")}
        if not hit:
            raise ValueError(unknown("keep_dense name", pattern, every))
        kept.update(hit)
    found: dict[str, nn.Parameter] = {}
    for name, parameter in every.items():
        if parameter.requires_grad and parameter not in kept:
            module, role = _layer_of(model, name)
            positions = isinstance(module, nn.Embedding) and _POSITIONS.search(name)
            if _is_weight(module, role, parameter) and not positions:
                if obstacle := _obstacle(module, role, parameter):
                    raise ValueError(f"{name} {obstacle}, or name it in keep_dense")
                kept.add(parameter)  # a tied weight counts once, by its first name
                found[name] = parameter
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside torch.compile, (Distributed)DataParallel and AveragedModel: its names are
    taken, so that masks fit wrapped and plain models alike.
    """
    inner = getattr(model, "_orig_mod", None)
    inner = model.module if isinstance(model, WRAPPERS) else inner
    return model if inner is None else unwrapped(inner)


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
    matrix = len(parameter) > 1 and parameter[0].numel() > 1 and "bias" not in role
    norm = any("Norm" in kind.__name__ for kind in type(module).__mro__)
    return matrix and not norm and bool(_CALLED.search(role))


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
    box = [value]
    if in_a_group():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def shared_stream(generator: Stream) -> Stream:
    """The random stream of rank 0 in all processes of a group; one's own without a group."""
    if in_a_group():
        generator = generator or torch.Generator().manual_seed(torch.initial_seed())
        generator.set_state(from_rank_zero(generator.get_state()))
    return generator


class Masks(Mapping[str, Tensor]):
    """Parameter name -> bool mask. One is assigned by `masks[name] = mask`, checked for its name,
    shape and type; a name may also be that of the parameter in a wrapped model.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._masks: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[self._own_name(name)]

    def __setitem__(self, name: str, mask: Tensor) -> None:
        self._masks |= self._checked(name, mask)

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def assign(self, masks: Mapping[str, Tensor]) -> None:
        """All masks at once, or none where one doesn't fit."""
        given: dict[str, Tensor] = {}
        for name, mask in masks.items():
            given |= self._checked(name, mask)
        if missing := self._parameters.keys() - given.keys():
            raise ValueError(f"masks are missing for {', '.join(sorted(missing))}")
        self._masks = {name: given[name] for name in self._parameters}

    def _own_name(self, name: str) -> str:
        plain = name.replace("_orig_mod.", "")
        called = (name, plain, plain.removeprefix("module."))
        return next((own for own in called if own in self._parameters), name)

    def _checked(self, name: str, mask: Tensor) -> dict[str, Tensor]:
        name = self._own_name(name)
        known("masked parameter", name, self._parameters)
        weight = self._parameters[name]
        shape = tuple(weight.shape)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape:
            raise ValueError(f"the mask of {name} must be a bool tensor {shape}, got {mask}")
        return {name: mask.to(weight.device)}


INITS = ("uniform", "erk", "half_output", "uniform_drawn", "erk_drawn")


def initial_masks(
    parameters: Mapping[str, nn.Parameter], density: float, init: str, generator: Stream
) -> dict[str, Tensor]:
    """Random masks of the densities that `init`, one of INITS, gives the layers."""
    counts = initial_counts(parameters, density, init.removesuffix("_drawn"))
    start = _drawn_mask if init.endswith("_drawn") else _random_mask
    return {name: start(p, counts[name], generator) for name, p in parameters.items()}


def _random_mask(weight: Tensor, count: int, generator: Stream) -> Tensor:
    order = drawn(torch.randperm, weight.numel(), by=generator, device=weight.device)
    mask = torch.zeros_like(order, dtype=torch.bool)
    mask[order[:count]] = True
    return mask.view(weight.shape)


def _drawn_mask(weight: Tensor, count: int, generator: Stream) -> Tensor:
    """Each weight active with probability count / weights; one at least, as no layer may be empty
    (the official code stops with an error there).
    """
    random = drawn(torch.rand, weight.shape, by=generator, device=weight.device)
    mask = random * weight.numel() < count
    return mask if mask.any() else _random_mask(weight, 1, generator)


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
    sizes = [p.numel() for p in parameters.values()]
    total = round(density * sum(sizes))
    shares = [float(size) for size in sizes]
    if init == "half_output":
        half = sizes[-1] / 2
        shares[-1] = sum(sizes[:-1]) * half / max(total - half, 1)
    elif init == "erk":
        shares = [float(sum(p.shape)) for p in parameters.values()]
    counts = whole(total, quotas(total, shares, sizes), sizes)
    if 0 in counts:
        empty = list(parameters)[counts.index(0)]
        raise ValueError(
            f"density {density} leaves {empty} without an active weight: raise it, or name the "
            "layer in keep_dense"
        )
    return dict(zip(parameters, counts, strict=True))


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
