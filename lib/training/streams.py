"""The random streams of a run: one for each purpose, derived from its seed, never shared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from lib.config import Run, stream_seed


def stream(
    run: Run, purpose: str, *index: int, device: str | torch.device = "cpu"
) -> torch.Generator:
    """The random stream of one purpose of a run; streams never share draws."""
    return torch.Generator(device=device).manual_seed(stream_seed(run.seed, purpose, *index))


@contextlib.contextmanager
def torch_draws_from(state: Tensor, device: torch.device) -> Iterator[None]:
    """Inside, torch's own generator of the device (dropout's) goes on from `state`, uint8 as
    `get_rng_state` gives it; afterwards it is where it was.
    """
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            yield
    else:
        with torch.random.fork_rng(devices=[device], device_type=device.type):
            torch.cuda.set_rng_state(state, device)
            yield


def torch_state(device: torch.device) -> Tensor:
    """The state of torch's own generator of the device, uint8."""
    return torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)
