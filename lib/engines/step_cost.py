"""What a step costs dense and sparse, measured once per machine."""

from __future__ import annotations

import copy
import time
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lib.engines.calibrate import kept
from lib.engines.network import sparse_network


class StepCost(NamedTuple):
    """Seconds of forward and backward of one mini-batch: dense in torch's faster memory format,
    sparse, and sparse with the gradients of inactive weights.
    """

    dense: float
    sparse: float
    window: float

    def sparse_is_faster(self, share: float, margin: float = 0.1) -> bool:
        """Whether the sparse network wins by the margin with `share` of its steps in a window.

        The margin is for masks that move: early layers become denser than at the start.
        """
        return share * self.window + (1 - share) * self.sparse < (1 - margin) * self.dense


def step_cost(what: str, model: nn.Module, density: float, images: Tensor) -> StepCost:
    """The cost of training `model` with uniform masks, measured once per machine and `what`.

    Args:
        what: names model, density and batch; `model` and `images` [N, ...] are left as they are.
    """

    def measure() -> dict:
        dense = copy.deepcopy(model).to(memory_format=torch.channels_last).train()
        twin = copy.deepcopy(model).train()
        masks = {
            n: torch.rand(p.shape) < density for n, p in twin.named_parameters() if p.dim() > 1
        }
        sparse = sparse_network(twin, masks)
        by_channel = images.contiguous(memory_format=torch.channels_last)

        def seconds(network: nn.Module, x: Tensor, window: bool) -> float:
            sparse.dense_gradients = window
            start = time.perf_counter()
            network(x).sum().backward()
            return time.perf_counter() - start

        variants = ((dense, by_channel, False), (sparse, images, False), (sparse, images, True))
        rounds = [[seconds(*variant) for variant in variants] for _ in range(3)]
        best = [min(times) for times in list(zip(*rounds, strict=True))]
        return dict(zip(StepCost._fields, best, strict=True))

    return StepCost(**kept(what, measure))
