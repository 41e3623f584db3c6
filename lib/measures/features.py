"""How specialised the channels of a trained network are: the paper's feature analysis.

For each channel behind a ReLU: what each class contributes to it, summed over the training images
of the class and over space, and the share of the class that contributes most: 1 / classes for a
perfectly general channel, 1 for one that answers to a single class (official code e19ff16,
`plot_class_feature_histograms`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lib.train import TrainingLoop

# The bins of the paper's histograms: 49 between 0.09 and 0.51.
BIN_EDGES = np.linspace(0.09, 0.51, 50)
LOW_TAIL = 0.05  # share of a layer's contributions that comes from channels left out
_BATCH = 500


def observe_features(loop: TrainingLoop) -> Callable[[], list[dict[str, Any]]]:
    """The measure "features": nothing during training; rows of the finished network.

    One layer per ReLU with an output [N, C, H, W], in the order of the forward pass, named by its
    module; the 24 of WRN-28-2 in the paper are those of the blocks, without the last one. Per
    layer: `channels`, `kept` (after the low tail went), `sum` and `sum_of_squares` of the class
    specialisation over the kept channels, `histogram` (position: bin of BIN_EDGES; empty bins are
    left out) and `above` (kept channels beyond the last edge, which the paper's figures don't
    show).
    """

    def rows() -> list[dict[str, Any]]:
        found = class_contributions(
            loop.model, loop.training_batches(_BATCH), loop.data.num_classes
        )
        lines = []
        for layer, contribution in found.items():
            values = class_specialisation(contribution.cpu().numpy())
            counts, _ = np.histogram(values, BIN_EDGES)
            numbers: list[tuple[str, int, float]] = [
                ("channels", 0, contribution.shape[0]),
                ("kept", 0, len(values)),
                ("sum", 0, float(values.sum())),
                ("sum_of_squares", 0, float((values**2).sum())),
                ("above", 0, int((values > BIN_EDGES[-1]).sum())),
                *(("histogram", i, int(n)) for i, n in enumerate(counts) if n),
            ]
            lines += [
                {
                    "run_id": loop.run.run_id,
                    "measure": "features",
                    "layer": layer,
                    "quantity": quantity,
                    "position": position,
                    "value": float(value),
                }
                for quantity, position, value in numbers
            ]
        return lines

    return rows


@torch.no_grad()
def class_contributions(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], num_classes: int
) -> dict[str, Tensor]:
    """Per ReLU layer with feature maps: float64 [channels, classes], the sum of |feature map| over
    the images of the class and over space.

    `batches` yields images [N, ...] and labels [N] on the model's device. The model is run in
    evaluation mode and left in the mode it had. A ReLU module used twice in one forward pass
    raises ValueError: its layers could not be told apart.
    """
    found: dict[str, Tensor] = {}
    seen: set[str] = set()
    current: list[Tensor] = []  # the labels of the batch

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def add(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if output.dim() != 4:
                return
            if name in seen:
                raise ValueError(f"{name} is used twice in one forward pass: give each its own")
            seen.add(name)
            maps = output.abs().sum(dim=(2, 3), dtype=torch.float64)  # [N, C]
            total = found.setdefault(name, maps.new_zeros(num_classes, maps.shape[1]))
            total.index_add_(0, current[0], maps)

        return add

    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ReLU)]
    handles = [module.register_forward_hook(hook(name)) for name, module in modules]
    was_training = model.training
    model.eval()
    try:
        for images, labels in batches:
            seen.clear()
            current[:] = [labels]
            model(images)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return {name: total.T for name, total in found.items()}


def class_specialisation(contribution: np.ndarray) -> np.ndarray:
    """The share of each kept channel's largest class, in the channels' order.

    `contribution` [channels, classes], not negative. The channels with the smallest totals are
    left out as long as they make up at most LOW_TAIL of the layer's total together; so are dead
    ones. An empty array for a layer without any activation.
    """
    totals = contribution.sum(1)
    if totals.sum() == 0:
        return np.empty(0)
    order = np.argsort(totals, kind="stable")
    tail = order[np.cumsum(totals[order]) <= LOW_TAIL * totals.sum()]
    kept = np.setdiff1d(np.flatnonzero(totals), tail)
    return contribution[kept].max(1) / totals[kept]
