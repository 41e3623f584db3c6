"""The bfloat16 kernels: right against fp64, whole networks, runs that resume to the same bits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import Masking, build_model
from lib.config import Run
from lib.cpu import accelerate, bf16
from lib.cpu.bf16 import Layer, Lines, Op, call
from lib.cpu.bf16_engine import Bf16Network
from lib.train import TrainingLoop
from tests.support.made_up_data import cifar
from tests.support.masked import seeded, sgd
from tests.test_train import interrupted, same, trained

pytestmark = pytest.mark.skipif(
    not bf16.available(), reason="no C++ compiler, or no AVX-512 with bfloat16"
)
BOUND = 4e-3


@pytest.fixture(params=[True, False], ids=["as here", "without AMX"])
def products(request: pytest.FixtureRequest) -> Iterator[None]:
    switch = bf16.tiles()
    there, switch.value = switch.value, switch.value and request.param
    yield
    switch.value = there


def rounded(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16().float()


def error(found: Tensor, right: Tensor) -> float:
    """Of the root mean square, relative."""
    return float((found.double() - right).norm() / right.double().norm())


def lines(values: Tensor, halo: int = 0) -> Lines:
    return Lines(-(-len(values) // 32), values.shape[1:], halo).load(values)


# (samples, inputs, outputs, height, width, kernel, stride, padding, density)
LAYERS = [
    (64, 3, 16, 8, 8, 3, 1, 1, 1.0),
    (40, 16, 24, 9, 7, 3, 2, 1, 0.3),
    (33, 40, 10, 5, 5, 3, 1, 0, 0.1),
    (128, 64, 48, 4, 4, 3, 2, 1, 0.05),
    (64, 33, 70, 1, 1, 1, 1, 0, 0.1),
    (20, 8, 8, 2, 2, 3, 2, 1, 0.5),
    (64, 64, 64, 8, 8, 3, 1, 1, 0.001),
    (32, 5, 7, 13, 11, 5, 2, 2, 0.5),
    (32, 32, 32, 8, 8, 1, 2, 0, 0.3),
    (300, 96, 3, 1, 1, 1, 1, 0, 0.2),
    (32, 3, 20, 32, 32, 11, 2, 2, 0.4),
    (31, 40, 40, 6, 6, 1, 1, 1, 0.2),
]


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layers_are_right(
    layer: tuple, sparse: bool, products: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is not the first, so that its input has a gradient."""
    n, c, o, height, width, k, stride, padding, density = layer
    monkeypatch.setattr(bf16, "SPARSE_UP_TO", dict.fromkeys((True, False), (1.0, 1.0)))
    module = nn.Conv2d(c, o, k, stride, padding)
    mask, x = torch.rand(o, c, k, k) < density, rounded(n, c, height, width)
    module.weight.data = torch.randn(o, c, k, k) * mask
    before, ours = Op(), Layer("", module, stride, padding)
    before.inputs, before.size, before.out = [before], x.shape[1:], lines(x, max(padding, 1))
    ours.inputs, ours.dense_gradients = [before], not sparse
    ours.follow(mask if sparse else None)
    ours.out = Lines(-(-n // 32), ours.shape(), 1)
    ours.forward(n, True)
    right, x64 = copy.deepcopy(module).double(), x.double().requires_grad_()
    y = right(x64)
    assert error(ours.out.plain(n), y.detach()) < BOUND
    g, dx = rounded(*y.shape), lines(rounded(*x.shape))
    y.backward(g.double())
    ours.whole = torch.full_like(mask, 9.0, dtype=torch.float32)
    ours.backward(lines(g, ours.border), dx, n)
    assert error(dx.plain(n), x64.grad) < BOUND
    assert error(module.bias.grad, right.bias.grad) < 1e-5
    if sparse:
        assert error(ours.gradient, right.weight.grad[mask]) < 1e-5
    else:
        assert error(ours.whole, right.weight.grad) < 1e-5


class TwoReaders(nn.Module):
    """A batch norm whose result is read as it is beside its ReLU, which an identity hides."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.same = nn.BatchNorm2d(3), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.flatten(F.relu(self.same(y)) + y, 1)


def test_what_is_between_the_layers_is_right() -> None:
    """Batch norm with and without ReLU, poolings with what they cut off, and flattening; 41
    samples, so that most lanes of the last block hold none.
    """
    for model in (
        nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        nn.Sequential(nn.BatchNorm2d(3), nn.MaxPool2d(3), nn.ReLU(), nn.Flatten()),
        nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.AvgPool2d(2), nn.Flatten()),
        nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.ReLU()),
        TwoReaders(),
    ):
        x = (torch.randn(41, 3, 7, 7) + 3).bfloat16().float()
        torch.nn.init.normal_(
            next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).weight
        )
        right, net = copy.deepcopy(model).double(), Bf16Network(model, {})
        ours, theirs = net.forward(x, True), right(x.double())
        assert error(ours, theirs.detach()) < BOUND
        g = rounded(*ours.shape)
        net.backward(g)
        theirs.backward(g.double())
        for mine, his in zip(model.parameters(), right.parameters(), strict=True):
            assert mine.grad is not None and his.grad is not None
            assert error(mine.grad, his.grad) < BOUND
        torch.testing.assert_close(dict(model.named_buffers()), dict(right.named_buffers()),
                                   check_dtype=False, rtol=1e-3, atol=1e-3)  # fmt: skip
        assert error(net.forward(x, False), right.eval()(x.double()).detach()) < BOUND


def test_dropout_keeps_a_share_and_the_gradient_passes_where_the_value_did() -> None:
    x = torch.ones(50, 30, 9, 9)
    a, b, other = lines(x), lines(x, 1), lines(x)
    for into, seed in ((a, 7), (b, 7), (other, 8)):
        call("dropout", into, into, 0.3, seed, len(x))
    y = a.plain(50)
    assert torch.equal(y, b.plain(50)) and not torch.equal(y, other.plain(50))
    kept = y > 0
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.7).bfloat16())}
    assert abs(float(kept.double().mean()) - 0.7) < 5 * (0.21 / kept.numel()) ** 0.5
    both = (kept[:, :, 1:] & kept[:, :, :-1]).double().mean()  # neighbours are independent
    assert abs(float(both) - 0.49) < 5 * (0.25 / kept.numel()) ** 0.5


@pytest.mark.parametrize("name", ["alexnet-s", "wrn-10-4", "vgg16-c", "lenet5"])
def test_networks_are_as_near_to_fp64_as_torchs_autocast(name: str) -> None:
    """Rounding is amplified on the way through a network, so the bound is what autocast has."""
    model = build_model(name, width_scale=0.25, generator=seeded(1))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    masking = Masking(model, sgd(model), density=0.08, generator=seeded(2))
    right, auto = copy.deepcopy(model).double(), copy.deepcopy(model)
    x, labels = rounded(33, *((1, 28, 28) if name == "lenet5" else (3, 32, 32))), torch.arange(33)
    net = Bf16Network(model, masking.masks)
    logits = net.forward(x, True).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels % 10), logits)
    net.backward(gradient)
    theirs = right(x.double())
    F.cross_entropy(theirs, labels % 10).backward()
    with torch.autocast("cpu", torch.bfloat16):
        low = auto(x)
    F.cross_entropy(low.float(), labels % 10).backward()
    assert error(logits.detach(), theirs.detach()) < 1.3 * error(low.detach(), theirs.detach())

    def gradients(of: nn.Module) -> Tensor:
        found = []
        for key, p in of.named_parameters():
            layer = net.layers.get(key) if of is model else None
            found.append((p.grad if layer is None else layer.whole).double().flatten())
        return torch.cat(found)

    assert error(gradients(model), gradients(right)) < 1.3 * error(
        gradients(auto), gradients(right)
    )


RUN = Run(
    dataset="cifar10",
    model="wrn-10-1",
    density=0.05,
    epochs=2,
    batch_size=40,
    train_samples=200,
    update_every_steps=4,
    dense_window_steps=2,
    prune_rate=0.5,
    precision="bf16",
    kernels="sparse",
)


def test_runs_resume_to_the_same_bits(tmp_path: Path) -> None:
    """Dropout, ragged batches, momentum that lags behind; with two threads too."""
    data = cifar(200)
    whole = trained(RUN, data)
    assert same(whole, interrupted(RUN, data, tmp_path / "a.pt", every=3))
    torch.set_num_threads(2)
    assert same(whole, trained(RUN, data))
    torch.set_num_threads(1)
    assert not same(whole, trained(replace(RUN, dropout=0.0), data))
    row = whole.outcome()
    assert row.kernels == "bf16" and row.weights_active == sum(whole.masking.active().values())
    assert row.weights_active == round(RUN.density * whole.masking.weights_total)
    for name, mask in whole.masking.masks.items():
        assert not whole.model.get_parameter(name).detach()[~mask].any()


def test_the_window_gives_the_momentum_of_every_step() -> None:
    """Short of rounding; and other methods and networks stay with torch."""
    data, run = cifar(200), replace(RUN, dropout=0.0, epochs=1)
    momentum = {}
    for steps in (1, 4):
        loop = TrainingLoop(replace(run, dense_window_steps=steps), data)
        loop.model.train()
        for index in loop.order().split(40)[:3]:
            loop.step(index)
        loop.engine.write_back()
        momentum[steps] = [s["momentum_buffer"].clone() for s in loop.optimizer.state.values()]
        masks = loop.masking.masks
        for name, mask in masks.items():
            kept = loop.optimizer.state[loop.model.get_parameter(name)]["momentum_buffer"]
            assert bool(kept[~mask].any()) == (steps == 4)
    for method in ("dense", "deepr"):
        assert TrainingLoop(run.overridden(method=method), data).engine.name == "torch"


def test_a_network_of_ones_own_trains_in_ones_own_loop() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 40, 3, padding=1, bias=False), nn.BatchNorm2d(40)
            self.second, self.drop = nn.Conv2d(40, 40, 3, padding=1), nn.Dropout(0.1)
            self.last = nn.Linear(40, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.norm(self.first(x)))
            return self.last((x + self.drop(self.second(x))).mean((2, 3)))

    model = Residual()
    optimizer = sgd(model, lr=0.05)
    masking = Masking(model, optimizer, density=0.07)
    fast, labels = accelerate(model, optimizer, masking), torch.arange(64) % 4
    images = torch.randn(64, 3, 8, 8) + labels[:, None, None, None]
    losses = []
    for step in range(30):
        loss = F.cross_entropy(fast(images), labels)
        loss.backward()
        fast.step()
        losses.append(float(loss.detach()))
        if step % 10 == 9:
            fast.update()
    assert losses[-1] < 0.5 * losses[0]
    fast.write_back()
    assert int(sum(p.count_nonzero() for p in masking.parameters.values())) <= sum(
        masking.active().values()
    )
    model.eval()
    right = (fast(images).argmax(1) == model(images).argmax(1)).float().mean()
    assert right > 0.9
    odd = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid())
    with pytest.raises(ValueError, match="Sigmoid"):
        accelerate(odd, sgd(odd), Masking(odd, sgd(odd)))
