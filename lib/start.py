"""What a run starts from, all drawn from its seed: random streams, network, optimizer, masks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lib.config import UNMASKED, Run, stream_seed
from lib.masking import Masking
from lib.models import MODELS, build_model, model_spec, small_dense_scale


def stream(
    run: Run, purpose: str, *index: int, device: str | torch.device = "cpu"
) -> torch.Generator:
    """The random stream of one purpose of a run, derived from its seed; none shares draws."""
    return torch.Generator(device=device).manual_seed(stream_seed(run.seed, purpose, *index))


@contextlib.contextmanager
def torch_draws_from(state: Tensor, device: torch.device) -> Iterator[None]:
    """Inside, torch's own generator of the device (dropout's) goes on from `state`, uint8 as
    `get_rng_state` gives it; afterwards it is where it was.
    """
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)
        yield


def network(run: Run) -> nn.Module:
    """The network with its first weights, on the CPU; always the same one for a run. ValueError for
    one of another data set.
    """
    if (dataset := model_spec(run.model).dataset) != run.dataset:
        others = ", ".join(name for name in MODELS if MODELS[name].dataset == run.dataset)
        raise ValueError(f"{run.model} is for {dataset}, not for {run.dataset}: there are {others}")
    return build_model(
        run.model,
        dropout=None if run.dropout < 0 else run.dropout,
        width_scale=(
            small_dense_scale(run.model, run.density) if run.method == "small_dense" else 1.0
        ),
        generator=stream(run, "init"),
    )


def optimizer_and_masks(
    run: Run, model: nn.Module, total_steps: int, masks: Mapping[str, Tensor] | None = None
) -> tuple[torch.optim.SGD, Masking]:
    """SGD over all parameters, and the masks of the method, applied; weights are scaled where
    `init_scale` asks for it. `masks`: by parameter name, in place of drawn ones.
    """
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=run.lr,
        momentum=run.momentum,
        nesterov=run.nesterov and run.momentum > 0,
        weight_decay=run.weight_decay,
        fused=True,
    )
    made = Masking(
        model,
        optimizer,
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
    return optimizer, made
