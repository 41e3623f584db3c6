"""Perceptrons in training, by the kernels and by torch in float64: what tests of both share."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.config import Run
from lib.cpu.perceptron import SPARSE_BELOW, PerceptronEngine, Track, perceptron_layers
from lib.data import Dataset
from lib.engine import Task
from lib.masking import Masking
from lib.schedule import Schedule

NOTHING, MORE, FIRST = Track.NOTHING, Track.MORE, Track.FIRST
# Of the largest entry of a tensor: sums of up to 900 products in float32, through up to 7 layers.
CLOSE = 1e-5
# With batch norm, which divides what is left of a difference by its standard deviation.
CLOSE_NORM = 1e-4


@dataclass
class Setup:
    """A chain of linear layers in training, with images to train on."""

    model: nn.Sequential
    optimizer: torch.optim.SGD
    masking: Masking
    images: Tensor
    labels: Tensor

    def engine(self, sparse_below: float = SPARSE_BELOW) -> PerceptronEngine:
        part = self.images, self.labels
        data = Dataset(*part, *part, *part, sha256="0" * 64)
        rewires = self.masking.method == "deepr"
        run = Run(method="deepr", density=0.2) if rewires else Run(method="dense")
        task = Task(
            run,
            Schedule(run, 10),
            data,
            torch.device("cpu"),
            self.model,
            self.optimizer,
            self.masking,
            batch=lambda index: (self.images[index], self.labels[index]),
        )
        return PerceptronEngine(task, sparse_below)

    def buffer(self, name: str) -> Tensor:
        state = self.optimizer.state[self.model.get_parameter(name)]
        return state["momentum_buffer"]

    def bits(self) -> list[Tensor]:
        """Weights, biases and momentum."""
        names = [name for name, _ in self.model.named_parameters()]
        return [*self.model.parameters(), *(self.buffer(name) for name in names)]


def chain(
    widths: Sequence[int], norms: Sequence[nn.BatchNorm1d | None] = (), bias: bool = True
) -> nn.Sequential:
    """Linear layers named 0, 2, 4, ..., with norms[k] behind layer k and ReLU between layers."""
    model = nn.Sequential()
    for k in range(len(widths) - 1):
        model.add_module(f"{2 * k}", nn.Linear(widths[k], widths[k + 1], bias))
        if k < len(norms) and (norm := norms[k]) is not None:
            model.add_module(f"norm{2 * k}", norm)
        if k < len(widths) - 2:
            model.add_module(f"{2 * k + 1}", nn.ReLU())
    return model


def setup(
    widths: Sequence[int],
    densities: Sequence[float | str | None],
    *,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 5e-4,
    lr: float = 0.05,
    images: int = 150,
    seed: int = 0,
    norms: Sequence[nn.BatchNorm1d | None] = (),
    bias: bool = True,
) -> Setup:
    """Layer k has masks of densities[k]; None: no mask, "rows": an empty and a full row, "one": a
    single non-zero.
    """
    generator = torch.Generator().manual_seed(seed)
    model = chain(widths, norms, bias)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=lr,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
    )
    names = [f"{2 * k}.weight" for k in range(len(densities))]
    masked = {n: d for n, d in zip(names, densities, strict=True) if d is not None}
    if masked:
        unmasked = [n for n in names if n not in masked]
        masking = Masking(model, optimizer, density=1.0, method="static", keep_dense=unmasked)
    else:
        masking = Masking(model, optimizer, method="dense")
    for name, density in masked.items():
        shape = model.get_parameter(name).shape
        mask = torch.rand(shape, generator=generator) < (
            density if isinstance(density, float) else 0.2
        )
        if density == "rows":
            mask[0] = False
            mask[-1] = True
        elif density == "one":
            mask[:] = False
            mask[shape[0] // 2, shape[1] // 2] = True
        masking.masks[name] = mask
    for k, name in enumerate(names):
        weight, *biases = model.get_submodule(str(2 * k)).parameters()
        terms = weight.shape[1]
        if name in masked:  # so that activations neither fade nor explode over the layers
            terms = max(1.0, float(masking.masks[name].sum()) / weight.shape[0])
        nn.init.normal_(weight, std=(1.5 / terms) ** 0.5, generator=generator)
        for shift in biases:
            nn.init.normal_(shift, std=0.3, generator=generator)
    for norm in norms:
        if norm is not None:
            nn.init.normal_(norm.weight, mean=1.0, std=0.2, generator=generator)
            nn.init.normal_(norm.bias, std=0.3, generator=generator)
    masking.apply()
    x = torch.randn(images, 1, widths[0], generator=generator)
    y = torch.randint(widths[-1], (images,), generator=generator)
    return Setup(model, optimizer, masking, x, y)


def off_by(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    want = want.detach()
    error = float((got.detach().double() - want).abs().max()) / (float(want.abs().max()) or 1.0)
    return error if math.isfinite(error) else math.inf


class Reference:
    """The same model in float64 with torch's operators, its masks applied after each step."""

    def __init__(self, own: Setup) -> None:
        self.model = copy.deepcopy(own.model).double()
        self.masks = dict(own.masking.masks)
        (group,) = own.optimizer.param_groups
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=group["lr"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            weight_decay=group["weight_decay"],
        )
        self.tracked = {n: torch.zeros(m.shape).double() for n, m in self.masks.items()}
        self.gradients: dict[str, Tensor] = {}
        self.clear = True  # no ReLU's input so near zero that float32 may see its other side

    def step(self, images: Tensor, labels: Tensor, track: Track) -> float:
        x = images.double().flatten(1)
        for layer in self.model:
            if isinstance(layer, nn.ReLU):
                self.clear &= float(x.detach().abs().min()) > 2e-6 * float(x.detach().abs().max())
            x = layer(x)
        loss = F.cross_entropy(x, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        momentum = self.optimizer.param_groups[0]["momentum"]
        with torch.no_grad():
            for name, mask in self.masks.items():
                parameter = self.model.get_parameter(name)
                parameter *= mask
                gradient = parameter.grad
                assert gradient is not None
                self.gradients[name] = gradient
                old = self.tracked[name]
                if track != NOTHING:
                    self.tracked[name] = gradient + (momentum * old if track == MORE else 0)
        return loss.item()

    def momentum(self, name: str, sparse: bool) -> Tensor:
        """What a layer's buffer should hold: with `sparse`, inactive weights as tracked."""
        buffer = self.optimizer.state[self.model.get_parameter(name)]["momentum_buffer"]
        if not sparse or name not in self.masks:
            return buffer
        return torch.where(self.masks[name], buffer, self.tracked[name])


def check_steps(
    own: Setup,
    batches: Sequence[Tensor],
    tracks: Sequence[Track],
    below: float,
    *,
    gradients: bool = False,
    close: float = CLOSE,
) -> bool:
    """Steps of the kernels against float64; False where a ReLU may take the other side."""
    reference = Reference(own)
    engine = own.engine(below)
    found = perceptron_layers(own.model) or []
    before_norm = [f"{layer.name}.bias" for layer in found if layer.norm is not None]
    losses = [
        reference.step(own.images[index], own.labels[index], track)
        for index, track in zip(batches, tracks, strict=True)
    ]
    if not reference.clear:
        return False
    for index, track, want in zip(batches, tracks, losses, strict=True):
        loss = engine.learn(index, track=track, gradients=gradients)
        own.masking.step() if below == 0 else own.masking.advance()
        assert loss == pytest.approx(want, rel=close, abs=close)
    engine.write_back()
    for name, buffer in own.model.named_buffers():
        want = reference.model.get_buffer(name)
        assert off_by(buffer, want) < close, name
        assert buffer.dtype.is_floating_point or torch.equal(buffer, want)
    for name, parameter in own.model.named_parameters():
        want = reference.model.get_parameter(name)
        assert off_by(parameter, want) < close, name
        mask = reference.masks.get(name)
        sparse = mask is not None and int(mask.sum()) < below * mask.numel()
        momentum = reference.momentum(name, sparse)
        if name in before_norm:  # batch norm takes the bias away: its gradient is only rounding
            assert (own.buffer(name) - momentum).abs().max() < close, name
        else:
            assert off_by(own.buffer(name), momentum) < close, name
        if mask is not None:
            assert not parameter[~mask].any()
        if mask is not None and gradients:
            assert parameter.grad is not None
            assert off_by(parameter.grad, reference.gradients[name]) < close, name
        else:
            assert parameter.grad is None
    return True


def deepr_setup(densities: Sequence[float], keep_dense: Sequence[str], **options: float) -> Setup:
    """DeepR on layers of 70, 40, 30 and 6 features, layer k with masks of densities[k]."""
    own = setup([70, 40, 30, 6], [None] * 3, weight_decay=0.0)
    own.masking = Masking(
        own.model,
        own.optimizer,
        density=0.2,
        method="deepr",
        keep_dense=keep_dense,
        generator=torch.Generator().manual_seed(3),
        options=options,
    )
    generator = torch.Generator().manual_seed(4)
    for name, density in zip(("0.weight", "2.weight", "4.weight"), densities, strict=True):
        if name in own.masking.masks:
            own.masking.masks[name] = (
                torch.rand(own.masking.masks[name].shape, generator=generator) < density
            )
    own.masking.apply()
    return own
