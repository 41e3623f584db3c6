"""Which models are perceptrons: chains of linear layers, batch norms and ReLUs."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn


class PerceptronLayer(NamedTuple):
    """A linear layer, by its name in the model, and the batch norm behind it."""

    name: str
    linear: nn.Linear
    norm: nn.BatchNorm1d | None


def perceptron_layers(model: nn.Module) -> list[PerceptronLayer] | None:
    """The layers of a chain Linear, ReLU, Linear, ... in float32 on the CPU; None for any other
    model. Linear layers may be without bias. Batch norm may come between one and its ReLU and
    after the last, with scale, shift and running estimates that decay.
    """
    if not isinstance(model, nn.Sequential):
        return None
    found: list[PerceptronLayer] = []
    last: nn.Module | None = None
    for name, module in model.named_children():
        if isinstance(module, nn.Linear) and (last is None or isinstance(last, nn.ReLU)):
            found.append(PerceptronLayer(name, module, None))
        elif isinstance(module, nn.BatchNorm1d) and isinstance(last, nn.Linear):
            found[-1] = found[-1]._replace(norm=module)
        elif not isinstance(module, nn.ReLU) or not isinstance(last, nn.Linear | nn.BatchNorm1d):
            return None
        last = module
    if not isinstance(last, nn.Linear | nn.BatchNorm1d):
        return None
    if any(a.linear.out_features != b.linear.in_features for a, b in itertools.pairwise(found)):
        return None
    for _, linear, norm in found:
        numbers: list[Tensor | None] = [linear.weight]
        if linear.bias is not None:
            numbers.append(linear.bias)
        if norm is not None:
            if norm.momentum is None or norm.num_features != linear.out_features:
                return None
            numbers += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        if any(n is None or n.dtype != torch.float32 or n.device.type != "cpu" for n in numbers):
            return None
    return found
