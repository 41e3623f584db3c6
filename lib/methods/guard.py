"""What can go wrong while a `Masking` is at work: refused, or warned of once."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from lib.methods.masks import Masks
from lib.methods.registry import Layer


class Watched(Protocol):
    """What is read of a `Masking`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    parameters: dict[str, nn.Parameter]
    steps: int
    total_steps: int | None

    @property
    def masks(self) -> Masks:
        """Parameter name -> bool mask."""


_NEWEST: weakref.WeakValueDictionary[int, Watched] = weakref.WeakValueDictionary()


class Guard:
    """Sees to it that a masking's parameters are still the model's and no newer masking's, that
    steps are counted, and that the number of active weights stays what it was.
    """

    def __init__(self, masking: Watched) -> None:
        self._warned: set[str] = set()
        self._places = [
            (place, key, child, name)
            for name, parameter in masking.parameters.items()
            for place, key, child in _path(masking.model, parameter)
        ]
        self._steps, self._budget = -1, 0

    def claim(self, masking: Watched) -> None:
        """The masking is made: it is the one of its parameters from now on."""
        for parameter in masking.parameters.values():
            _NEWEST[id(parameter)] = masking

    def warn(self, sentence: str) -> None:
        """Once for each sentence."""
        if sentence not in self._warned:
            self._warned.add(sentence)
            warnings.warn(sentence, UserWarning, stacklevel=3)

    def step(self, masking: Watched) -> None:
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
            if _NEWEST.get(id(parameter), masking) is not masking:
                raise ValueError(f"a newer Masking has {name}: use one Masking for a model")

    def update(self, masking: Watched, layers: Sequence[Layer], rate: float) -> None:
        """Before an update at the schedule's `rate`."""
        steps, end = masking.steps, masking.total_steps
        if steps == self._steps:
            self.warn(
                "update() without a step() since the last one: call masking.step() after every "
                "optimizer.step()"
            )
        if rate == 0 and end is not None and steps > end:
            self.warn(
                f"the schedule ended at total_steps={end}, so that updates no longer move masks: "
                "let total_steps be the optimizer steps of the whole training, and call step() "
                "once for each, also when gradients are accumulated over several mini-batches"
            )
        active = sum(layer.active for layer in layers)
        if active != self._budget:
            self.warn(
                f"{active} weights are active, {self._budget} were before masks were assigned: "
                "from now on the updates keep this number"
            )
        for layer in layers:
            if not layer.optimizer.state.get(layer.parameter) and layer.optimizer.state:
                self.warn(
                    f"the optimizer has never moved {layer.name}: name it in keep_dense if the "
                    "forward pass doesn't use it"
                )

    def updated(self, steps: int, active: Mapping[str, int]) -> None:
        """Until the next update: steps made by now, active weights per layer."""
        self._steps, self._budget = steps, sum(active.values())


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
