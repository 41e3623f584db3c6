"""Convolutional networks by the sparse kernels against torch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib.config import Run
from lib.cpu import library
from lib.cpu.network import SparseEngine, SparseNetwork
from lib.data import Dataset
from lib.engine import Task
from lib.masking import Masking
from lib.models import build_model
from lib.schedule import Schedule

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler")
MODELS = {
    "lenet300-100": ((1, 28, 28), {}),
    "lenet5": ((1, 28, 28), {}),
    "alexnet-s": ((3, 32, 32), {"width_scale": 0.1}),
    "vgg16-d": ((3, 32, 32), {"width_scale": 0.1}),
    "vgg16-c": ((3, 32, 32), {"width_scale": 0.1}),
    "wrn-10-1": ((3, 32, 32), {"dropout": 0.0}),
}


def masked(
    model: nn.Module, density: float = 0.5, nesterov: bool = False
) -> tuple[torch.optim.SGD, Masking]:
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, nesterov=nesterov, weight_decay=1e-3
    )
    generator = torch.Generator().manual_seed(11)
    return optimizer, Masking(model, optimizer, density, 0.3, generator=generator)


def check_network(network: SparseNetwork, shape: tuple[int, ...], dense: bool) -> None:
    """Outputs, gradients and running statistics against the model in double precision."""
    reference = copy.deepcopy(network.module).double()
    x, target = torch.randn(40, *shape), torch.randint(0, 10, (40,))
    network.dense_gradients = dense
    network.module.zero_grad()
    got, want = network(x), reference(x.double())
    assert got.shape == want.shape
    F.cross_entropy(got, target).backward()
    F.cross_entropy(want, target).backward()
    assert (got - want).norm() <= 1e-3 * want.norm()
    for name in network.masks:
        gradient = network.module.get_parameter(name).grad
        exact = reference.get_parameter(name).grad
        assert exact is not None
        if name in network.values:
            assert gradient is None and not dense
            pattern, values = network.values[name]
            gradient, exact = values.grad, exact.flatten()[pattern.index]
        assert gradient is not None
        assert (gradient - exact).norm() <= 1e-2 * exact.norm(), name  # a ReLU may flip
    for name, buffer in network.module.named_buffers():
        want = reference.get_buffer(name).double()
        assert torch.allclose(buffer.double(), want, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("name", MODELS)
def test_network_matches_its_model(name: str) -> None:
    torch.manual_seed(10)
    shape, options = MODELS[name]
    model = build_model(name, **options)
    optimizer, masking = masked(model)
    network = SparseNetwork(model, masking.masks, sparse_up_to=1.0)
    for dense in (False, True):
        check_network(network, shape, dense)

    # Masks move, weights move: the network follows.
    optimizer.step()
    masking.step()
    before = {k: v.clone() for k, v in masking.masks.items()}
    masking.update()
    assert any(not torch.equal(before[k], v) for k, v in masking.masks.items())
    check_network(network, shape, dense=False)
    assert set(network.values) == set(masking.masks)

    network.eval()
    x = torch.randn(19, *shape)
    with torch.no_grad():
        want = model(x)
        assert torch.allclose(network(x), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("name", ["vgg16-d", "wrn-10-1"])
@pytest.mark.parametrize("cpu", ["avx512f", ""])
def test_network_mixes_sparse_and_dense_layers(
    name: str, cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other layer dense by its number of weights: conversions on all the borders, or without
    AVX-512 on those of large layers.
    """
    monkeypatch.setattr("lib.cpu.network.cpu_id", lambda: cpu)
    torch.manual_seed(10)
    shape, options = MODELS[name]
    model = build_model(name, **options)
    _, masking = masked(model)
    for k, (layer, mask) in enumerate(masking.masks.items()):
        masking.masks[layer] = torch.rand(mask.shape) < (0.7 if k % 2 else 0.3)
    masking.apply()
    network = SparseNetwork(model, masking.masks, sparse_up_to=0.5)
    for dense in (False, True):
        check_network(network, shape, dense)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_engine_takes_the_steps_of_torch(nesterov: bool) -> None:
    """Steps with and without the gradients of inactive weights, and masks that move."""
    torch.manual_seed(10)
    images, labels = torch.randn(180, 1, 28, 28), torch.arange(180) % 10
    data = Dataset(*[images, labels] * 3, sha256="0" * 64)
    run = Run(model="lenet5", kernels="sparse", dense_window_steps=1)
    models = [build_model("lenet5")]
    models.append(copy.deepcopy(models[0]))
    (optimizer, masking), (twin_optimizer, twin_masking) = (
        masked(model, 0.2, nesterov) for model in models
    )
    engine = SparseEngine(
        Task(
            run,
            Schedule(run, 9),
            data,
            torch.device("cpu"),
            models[0],
            optimizer,
            masking,
            batch=lambda index: (images[index], labels[index]),
        )
    )
    for step in range(9):
        dense, index = step % 4 == 0, torch.arange(20 * step, 20 * step + 20)
        for one in (optimizer, twin_optimizer):
            one.param_groups[0]["lr"] = 0.05 if step < 5 else 0.02
        engine.step(index, 1 if dense else math.inf)
        assert (models[0].get_parameter("fc3.weight").grad is not None) == dense

        twin_optimizer.zero_grad()
        F.cross_entropy(models[1](images[index]), labels[index]).backward()
        for name, mask in twin_masking.masks.items():
            gradient = models[1].get_parameter(name).grad
            assert gradient is not None
            gradient *= mask | dense
        twin_optimizer.step()
        twin_masking.step()
        if step == 6:
            assert set(engine.pending.values()) == {2}
            engine.write_back()
            masking.update(), twin_masking.update()
    engine.write_back()
    assert masking.steps == twin_masking.steps == 9
    for name, parameter in models[0].named_parameters():
        twin = models[1].get_parameter(name)
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert torch.allclose(parameter, twin, rtol=1e-3, atol=1e-5), name
        want = twin_optimizer.state[twin]["momentum_buffer"]
        assert torch.allclose(momentum, want, rtol=1e-3, atol=1e-5), name
        if name in masking.masks:
            mask = masking.masks[name]
            assert torch.equal(mask, twin_masking.masks[name])
            assert not parameter[~mask].any()
            assert momentum[~mask].any() or mask.all()


def test_dropout_acts_in_training_only() -> None:
    model = build_model("wrn-10-1", dropout=0.5)
    network = SparseNetwork(model, masked(model)[1].masks, sparse_up_to=1.0)
    x = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(network(x), network(x))
        network.eval()
        assert torch.equal(network(x), network(x))
