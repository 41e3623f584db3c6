"""What a run starts from: network, optimizer and masks, all drawn from its seed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.config import UNMASKED, Run
from lib.masking import Masking
from lib.methods.masks import maskable_parameters, snip_masks
from lib.models import build_model, small_dense_scale
from lib.training.streams import stream


def network(run: Run) -> nn.Module:
    """The network with its first weights, on the CPU; always the same one for a run."""
    return build_model(
        run.model,
        dropout=None if run.dropout < 0 else run.dropout,
        width_scale=(
            small_dense_scale(run.model, run.density) if run.method == "small_dense" else 1.0
        ),
        generator=stream(run, "init"),
    )


def optimizer(run: Run, model: nn.Module) -> torch.optim.SGD:
    """SGD over all parameters."""
    return torch.optim.SGD(
        model.parameters(),
        lr=run.lr,
        momentum=run.momentum,
        nesterov=run.nesterov and run.momentum > 0,
        weight_decay=run.weight_decay,
        fused=True,
    )


def masking(
    run: Run,
    model: nn.Module,
    sgd: torch.optim.SGD,
    total_steps: int,
    masks: Mapping[str, Tensor] | None = None,
) -> Masking:
    """The masks of the method, applied; weights are scaled where `init_scale` asks for it.

    `masks`: those to start from, by parameter name. They can't be put in place of drawn ones
    afterwards: the weights that those left out are zero.
    """
    made = Masking(
        model,
        sgd,
        density=1.0 if masks is not None or run.method in UNMASKED else run.density,
        prune_rate=run.prune_rate,
        total_steps=total_steps,
        schedule=run.schedule,
        method=run.method,
        prune=run.prune,
        redistribution=run.redistribution,
        growth=run.growth,
        init=run.init,
        keep_dense=run.keep_dense,
        generator=stream(run, "masks"),
        options=dict(run.options),
        masks=masks,
    )
    if run.init_scale == "density":
        with torch.no_grad():
            for name, mask in made.masks.items():
                made.parameters[name].div_(mask.double().mean().sqrt().float())
    return made


def snip(run: Run, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """SNIP's masks, by the unmasked network's gradients for images [B, C, H, W], labels [B]."""
    probe = network(run).to(images.device)
    parameters = maskable_parameters(probe, run.keep_dense)
    return snip_masks(
        probe, parameters, run.density, lambda: F.cross_entropy(probe(images), labels)
    )
