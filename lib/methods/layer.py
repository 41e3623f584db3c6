"""The vocabulary of rules: what a rule sees (`Layer`), and where it is registered by name.

A new rule is one function and one registration; see the rules of `lib/masking.py` for examples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lib.config import unknown
from lib.methods.selection import Score, mean_active, pick

if TYPE_CHECKING:
    from lib.masking import Masking


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

    def __post_init__(self) -> None:
        self.survivors = self.mask

    @property
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
        return self.mask ^ pick(self.weight, self.mask, k, "smallness")


PruneRule = Callable[[Sequence[Layer], float, dict[str, Any]], list[Tensor]]
RedistributionRule = Callable[[Layer], "Tensor | float"]
GrowthRule = Callable[[Layer], Tensor]
R = TypeVar("R")


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

    def register(self, name: str, **keywords: Any) -> Callable[[R], R]:
        """Decorate the function of a new rule; see `Rule` for the keywords."""

        def decorate(function: R) -> R:
            self[name] = Rule(name, function, **keywords)
            return function

        return decorate

    def __missing__(self, name: str) -> Rule[R]:
        raise ValueError(unknown(f"{self.kind} rule", name, self))


PRUNE: Registry[PruneRule] = Registry("prune")
REDISTRIBUTION: Registry[RedistributionRule] = Registry("redistribution")
GROWTH: Registry[GrowthRule] = Registry("growth")
# Method name -> what it does after each mini-batch (DeepR re-wires there).
EVERY_STEP: dict[str, Callable[[Masking], None]] = {}
# Option -> what takes the place of a part of the cycle where the option is on (`variants.py`): of
# `share_out` and of `choose`; and what is done to the layers when the masks have moved.
SHARE_OUT: dict[str, Callable[[Sequence[Layer], dict[str, Any]], list[int]]] = {}
CHOOSE: dict[str, Callable[[Layer, Rule[GrowthRule], int], Tensor]] = {}
AFTERWARDS: dict[str, Callable[[Sequence[Layer], Mapping[str, Tensor]], None]] = {}


def momentum_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, name: str) -> Tensor:
    """The momentum of one parameter, same shape: SGD's buffer, or Adam's m / (sqrt(v) + eps).

    The buffer is PyTorch's a*M + g, kept densely and never reset, as in the official code (the
    paper's (1 - a) factor scales all weights alike and changes no decision). Raises ValueError
    where there is none yet.
    """
    state: Mapping[str, Any] = optimizer.state.get(parameter, {})
    if state.get("momentum_buffer") is not None:
        return state["momentum_buffer"]
    if "exp_avg" in state and "exp_avg_sq" in state:
        groups = optimizer.param_groups
        group = next(g for g in groups if any(p is parameter for p in g["params"]))
        return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group.get("eps", 1e-8))
    if "exp_avg" in state:  # Lion and its kind
        return state["exp_avg"]
    raise ValueError(
        f"{name} has no momentum in {type(optimizer).__name__} yet: call optimizer.step() before "
        "masking.update(), and name a layer that the forward pass doesn't use in keep_dense"
    )
