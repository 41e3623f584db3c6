"""Wrong uses of `Masking`: each raises a sentence and leaves the weights as they were."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib.masking import Masking

GOOD: dict[str, Any] = {"density": 0.2, "total_steps": 20}


def made(method: str = "sparse_momentum", **changes: Any) -> tuple[nn.Module, Masking]:
    """A small network and its masks, with these arguments in place of good ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    arguments = {"model": model, "optimizer": optimizer, **GOOD, "method": method, **changes}
    return model, Masking(**arguments)


def _step(model: nn.Module, mask: Masking, spoil: bool = False) -> None:
    mask.optimizer.zero_grad()
    model(torch.randn(8, 20)).square().sum().backward()
    if spoil:
        model[0].weight.grad[0, 0] = math.nan
    mask.optimizer.step()
    mask.step()


def inputs() -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Name and work of each."""
    for changes in (
        {"density": 0.0},
        {"density": -0.1},
        {"density": 1.5},
        {"density": math.nan},
        {"density": None},
        {"prune_rate": -0.1},
        {"prune_rate": 1.1},
        {"prune_rate": math.nan},
        {"total_steps": math.nan},
        {"total_steps": -1},
        {"schedule": "magic"},
        {"method": "magic"},
        {"prune": "magic"},
        {"growth": "magic"},
        {"redistribution": "magic"},
        {"init": "magic"},
        {"keep_dense": "magic"},
        {"masks": {}},
        {"masks": {"magic": torch.ones(3, dtype=torch.bool)}},
        {"options": {"magic": 1.0}},
    ):
        name = ", ".join(f"{key}={value!r}" for key, value in changes.items())
        yield name, lambda folder, changes=changes: made(**changes)
    yield (
        "an optimizer of another model",
        lambda folder: made(optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)),
    )
    yield "a model without weights", lambda folder: made(model=nn.ReLU())

    def used(change: Callable[[nn.Module, Masking], object]) -> Callable[[Path], object]:
        def work(folder: Path) -> None:
            model, mask = made()
            _step(model, mask)
            change(model, mask)
            _step(model, mask)

        return work

    def replaced_parameter(model: nn.Module, mask: Masking) -> None:
        model[0].weight = nn.Parameter(torch.randn(30, 20))

    def replaced_layer(model: nn.Module, mask: Masking) -> None:
        model[0] = nn.Linear(20, 30)

    def drop(model: nn.Module, mask: Masking) -> None:
        del mask.masks["0.weight"]

    def merge(model: nn.Module, mask: Masking) -> None:
        mask.masks |= {"0.weight": torch.ones(2, 2, dtype=torch.bool)}

    for name, change in (
        ("a replaced parameter", replaced_parameter),
        ("a replaced layer", replaced_layer),
        ("del masks[...]", drop),
        ("masks |=", merge),
        ("masks.clear()", lambda model, mask: mask.masks.clear()),
        ("masks.setdefault()", lambda m, mask: mask.masks.setdefault("magic", torch.ones(2) > 0)),
        ("masks = None", lambda model, mask: setattr(mask, "masks", None)),
        ("load_state_dict({})", lambda model, mask: mask.load_state_dict({})),
        ("load_state_dict(None)", lambda model, mask: mask.load_state_dict(None)),
        *(
            (
                f"a state of another {key}",
                lambda model, mask, c=changes: mask.load_state_dict(made(**c)[1].state_dict()),
            )
            for key, changes in (
                ("density", {"density": 0.5}),
                ("schedule", {"schedule": "linear"}),
                ("rate", {"prune_rate": 0.5}),
            )
        ),
    ):
        yield name, used(change)
    for method in ("sparse_momentum", "set", "dsr", "deepr", "rigl", "static"):

        def spoilt(folder: Path, method: str = method) -> None:
            model, mask = made(method)
            for k in range(4):
                _step(model, mask, spoil=k == 3)
            mask.update()

        yield f"a NaN gradient in {method}", spoilt
