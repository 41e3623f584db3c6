"""SNIP (Lee et al. 2019): masks chosen once, before training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lib.methods.registry import DivergenceError
from lib.methods.selection import pick


def snip_masks(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    density: float,
    loss: Callable[[], Tensor],
) -> dict[str, Tensor]:
    """Masks of the round(density * weights) largest |gradient * weight| over all layers.

    `loss()` is the loss of one mini-batch with all weights present (Lee et al. 2019, algorithm 1);
    the model's gradients and buffers are left as they were. Raises DivergenceError for a gradient
    or weight that isn't finite.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = torch.autograd.grad(loss(), list(parameters.values()))
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    score = torch.cat(
        [
            (g * p.detach()).abs().reshape(-1)
            for g, p in zip(gradients, parameters.values(), strict=True)
        ]
    )
    if not math.isfinite(total := float(score.sum(dtype=torch.float64))):
        raise DivergenceError(f"SNIP: the sum of |gradient * weight| is {total}")
    chosen = pick(score, torch.ones_like(score, dtype=torch.bool), round(density * score.numel()))
    parts = chosen.split([p.numel() for p in parameters.values()])
    return {
        name: part.view(p.shape).clone()
        for (name, p), part in zip(parameters.items(), parts, strict=True)
    }
