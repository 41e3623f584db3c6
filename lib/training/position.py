"""Where a run stands: what its checkpoint holds, and how it goes on from one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lib.config import Run
from lib.masking import Masking
from lib.training.checkpoint import CheckpointError, check_tensors
from lib.training.schedule import Schedule
from lib.training.streams import torch_state


@dataclass
class State:
    """Everything about the position in a run that isn't in model, optimizer or masking."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    flops_sum: float = 0.0
    curves: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    report: list[tuple[Any, ...]] = field(default_factory=list)
    explored: dict[str, Tensor] = field(default_factory=dict)  # weights that were ever active
    observed: dict[str, list[float]] = field(default_factory=dict)  # what a measure collects


class Loop(Protocol):
    """What of the training loop (lib/train.py) is saved."""

    run: Run
    device: torch.device
    schedule: Schedule
    model: nn.Module
    optimizer: torch.optim.SGD
    masking: Masking
    engine: Any  # lib/cpu/base.py, which rests on this package
    augment_stream: torch.Generator
    dropout_state: Tensor
    state: State


def position_of(loop: Loop) -> dict[str, Any]:
    """All that the rest of the run depends on: tensors and plain values."""
    engine = {"name": loop.engine.name, **loop.engine.state_dict()}  # first: it may write back
    return {
        "run_id": loop.run.run_id,
        "engine": engine,
        "model": loop.model.state_dict(),
        "optimizer": loop.optimizer.state_dict(),
        "masking": loop.masking.state_dict(),
        "augment_stream": loop.augment_stream.get_state(),
        "dropout_stream": torch_state(loop.device),
        "gradients": _pending_gradients(loop),
        "state": vars(loop.state),
    }


def go_on(loop: Loop, saved: Mapping[str, Any]) -> None:
    """Put the loop where `position_of` was taken. Raises CheckpointError for a position that isn't
    this run's; the loop is of no use then.
    """
    try:
        _check(loop, saved)
        _restore(loop, saved)
    except CheckpointError:
        raise
    except Exception as error:  # a whole file of this run, but not what `position_of` gives
        raise CheckpointError(f"its content is not a run's: {error!r}") from error


def _check(loop: Loop, saved: Mapping[str, Any]) -> None:
    if missing := sorted(_KEYS - saved.keys()):
        raise CheckpointError(f"it lacks {', '.join(missing)}")
    if (name := saved["engine"]["name"]) != loop.engine.name:
        raise CheckpointError(f"{name!r} computed it, here it would be {loop.engine.name!r}")
    check_tensors("weight", saved["model"], loop.model.state_dict())
    check_tensors("mask", saved["masking"]["masks"], loop.masking.masks)
    streams = {"augment": loop.augment_stream.get_state(), "dropout": loop.dropout_state}
    check_tensors("stream", {name: saved[f"{name}_stream"] for name in streams}, streams)
    (group,) = saved["optimizer"]["param_groups"]
    for number, parameter in zip(group["params"], loop.model.parameters(), strict=True):
        momentum = saved["optimizer"]["state"].get(number, {}).get("momentum_buffer")
        if momentum is not None:
            check_tensors("momentum", {number: momentum}, {number: parameter})
    gradients = saved["gradients"]
    check_tensors("gradient", gradients, {n: loop.masking.parameters[n] for n in gradients})
    state = saved["state"]
    if state.keys() != {item.name for item in fields(State)}:
        raise CheckpointError("its position in the run has other fields")
    for item in fields(State):
        if type(state[item.name]) is not type(getattr(loop.state, item.name)):
            raise CheckpointError(f"its {item.name} is {state[item.name]!r}")


_KEYS = {
    "engine",
    "model",
    "optimizer",
    "masking",
    "augment_stream",
    "dropout_stream",
    "gradients",
    "state",
}


def _restore(loop: Loop, saved: Mapping[str, Any]) -> None:
    loop.model.load_state_dict(saved["model"])
    loop.optimizer.load_state_dict(saved["optimizer"])
    loop.masking.load_state_dict(saved["masking"])
    loop.augment_stream.set_state(saved["augment_stream"].cpu())
    loop.dropout_state = saved["dropout_stream"].cpu()
    loop.state = State(**saved["state"])
    for name, gradient in saved["gradients"].items():
        loop.masking.parameters[name].grad = gradient
    loop.engine.load_state_dict(saved["engine"])


def _pending_gradients(loop: Loop) -> dict[str, Tensor]:
    """What an update of masks reads of the last step, where it's still to come."""
    if loop.masking.growth.needs != "gradient" or loop.run.update_every_steps:
        return {}
    if loop.state.step_in_epoch < loop.schedule.steps_per_epoch:
        return {}
    found = {name: p.grad for name, p in loop.masking.parameters.items()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}
