"""Whole networks by the sparse kernels against torch, and what it is that decides between them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from lib.cpu import library
from lib.cpu.network import SparseNetwork, sparse_network
from lib.cpu.optimizer import SparseSGD
from lib.masking import Masking
from lib.models import build_model
from lib.schedule import dense_window

needs_compiler = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler")


def masked_model(
    name: str, density: float = 0.5, *, momentum: float = 0.9, **options: float
) -> tuple[torch.nn.Module, torch.optim.SGD, Masking]:
    torch.manual_seed(10)
    model = build_model(name, **options)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
    generator = torch.Generator().manual_seed(11)
    return model, optimizer, Masking(model, optimizer, density, 0.3, generator=generator)


MODELS = {
    "lenet300-100": ((1, 28, 28), {}),
    "lenet5": ((1, 28, 28), {}),
    "alexnet-s": ((3, 32, 32), {"width_scale": 0.1}),
    "vgg16-d": ((3, 32, 32), {"width_scale": 0.1}),
    "vgg16-c": ((3, 32, 32), {"width_scale": 0.1}),
    "wrn-10-1": ((3, 32, 32), {"dropout": 0.0}),
}


def check_network(
    network: SparseNetwork, masking: Masking, shape: tuple[int, ...], dense: bool
) -> None:
    """Outputs, gradients and running statistics against the model in double precision."""
    reference = copy.deepcopy(network.model).double()
    x, target = torch.randn(40, *shape), torch.randint(0, 10, (40,))
    network.dense_gradients = dense
    network.model.zero_grad()
    got, want = network(x), reference(x.double())
    assert got.shape == want.shape
    F.cross_entropy(got, target).backward()
    F.cross_entropy(want, target).backward()
    assert (got - want).norm() <= 1e-3 * want.norm()
    wanted = dict(reference.named_parameters())
    for name, parameter in network.model.named_parameters():
        if name not in masking.masks:
            continue
        gradient, exact = parameter.grad, wanted[name].grad
        assert gradient is not None and exact is not None
        if not dense and masking.masks[name].float().mean() <= network.sparse_up_to:
            assert not gradient[~masking.masks[name]].any()
            exact = exact * masking.masks[name]
        assert (gradient - exact).norm() <= 1e-2 * exact.norm(), name  # a ReLU may flip
    buffers = dict(reference.named_buffers())
    for name, buffer in network.model.named_buffers():
        assert torch.allclose(buffer.double(), buffers[name].double(), rtol=1e-3, atol=1e-5), name


@needs_compiler
@pytest.mark.parametrize("name", MODELS)
def test_network_matches_its_model(name: str) -> None:
    shape, options = MODELS[name]
    model, optimizer, masking = masked_model(name, **options)
    network = sparse_network(model, masking.masks, sparse_up_to=1.0)
    for dense in (False, True):
        check_network(network, masking, shape, dense)

    # Masks move, weights move: the network follows.
    optimizer.step()
    masking.step()
    before = {k: v.clone() for k, v in masking.masks.items()}
    masking.update()
    assert any(not torch.equal(before[k], v) for k, v in masking.masks.items())
    check_network(network, masking, shape, dense=False)

    network.eval()
    x = torch.randn(19, *shape)
    with torch.no_grad():
        want = model(x)
        assert torch.allclose(network(x), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@needs_compiler
@pytest.mark.parametrize("name", ["vgg16-d", "wrn-10-1"])
def test_network_mixes_sparse_and_dense_layers(name: str) -> None:
    """Every other layer dense by its number of weights: conversions on all the borders."""
    shape, options = MODELS[name]
    model, _, masking = masked_model(name, **options)
    for k, (layer, mask) in enumerate(masking.masks.items()):
        masking.masks[layer] = torch.rand(mask.shape) < (0.7 if k % 2 else 0.3)
    masking.apply()
    network = sparse_network(model, masking.masks, sparse_up_to=0.5)
    for dense in (False, True):
        check_network(network, masking, shape, dense)


@needs_compiler
@pytest.mark.parametrize("nesterov", [False, True])
def test_sparse_sgd_takes_the_steps_of_torch(nesterov: bool) -> None:
    """Steps with and without the gradients of inactive weights, and masks that move."""
    found = []
    for compact in (False, True):
        model, _, masking = masked_model("lenet5", 0.2)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.05, momentum=0.9, nesterov=nesterov, weight_decay=1e-3
        )
        masking.optimizer = optimizer
        network = sparse_network(model, masking.masks, sparse_up_to=1.0)
        sparse = SparseSGD(network, optimizer, masking) if compact else None
        generator = torch.Generator().manual_seed(12)
        for step in range(9):
            network.dense_gradients = step % 4 == 0
            optimizer.param_groups[0]["lr"] = 0.05 if step < 5 else 0.02
            x = torch.randn(20, 1, 28, 28, generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(network(x), torch.arange(20) % 10).backward()
            if sparse is None:
                optimizer.step()
                masking.step()
            else:
                sparse.step()
                masking.advance()
                whole = model.get_parameter("fc3.weight").grad is not None
                assert whole == network.dense_gradients
            if step == 6:
                if sparse is not None:
                    assert set(sparse.pending.values()) == {2}
                    sparse.sync()
                masking.update()
        if sparse is not None:
            sparse.sync()
        found.append((model, optimizer, masking))
    (model, optimizer, masking), (other, other_optimizer, other_masking) = found
    assert masking.steps == other_masking.steps == 9
    for name, parameter in model.named_parameters():
        twin = other.get_parameter(name)
        momentum = optimizer.state[parameter]["momentum_buffer"]
        other_momentum = other_optimizer.state[twin]["momentum_buffer"]
        assert torch.allclose(twin, parameter, rtol=1e-4, atol=1e-6), name
        assert torch.allclose(other_momentum, momentum, rtol=1e-4, atol=1e-6), name
        if name in masking.masks:
            assert torch.equal(masking.masks[name], other_masking.masks[name])
            assert not twin[~masking.masks[name]].any()
    inactive = ~masking.masks["fc3.weight"]
    assert optimizer.state[model.get_parameter("fc3.weight")]["momentum_buffer"][inactive].any()


@needs_compiler
def test_sparse_sgd_refuses_other_optimizers() -> None:
    model, _, masking = masked_model("lenet5")
    network = sparse_network(model, masking.masks)
    with pytest.raises(ValueError, match="Adam"):
        SparseSGD(network, torch.optim.Adam(model.parameters()), masking)
    with pytest.raises(ValueError, match="with momentum"):
        SparseSGD(network, torch.optim.SGD(model.parameters()), masking)


@needs_compiler
def test_dropout_acts_in_training_only() -> None:
    model, _, masking = masked_model("wrn-10-1", dropout=0.5)
    network = sparse_network(model, masking.masks, sparse_up_to=1.0)
    x = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(network(x), network(x))
        network.eval()
        assert torch.equal(network(x), network(x))


@needs_compiler
def test_window_grows_the_weights_of_full_tracking() -> None:
    """Dense gradients in the last K steps give the masks of dense gradients in all of them."""

    def masks_after(window: int | None, steps: int = 60) -> list[torch.Tensor]:
        model, optimizer, masking = masked_model("lenet300-100", 0.05, momentum=0.6)
        network = sparse_network(model, masking.masks, sparse_up_to=1.0)
        generator = torch.Generator().manual_seed(12)
        for step in range(steps):
            x = torch.randn(32, 1, 28, 28, generator=generator)
            target = (x.flatten(1)[:, :10]).argmax(1)
            network.dense_gradients = window is None or step >= steps - window
            optimizer.zero_grad()
            F.cross_entropy(network(x), target).backward()
            optimizer.step()
            masking.step()
        masking.update()
        return list(masking.masks.values())

    full, window = masks_after(None), masks_after(dense_window(0.6))
    active = sum(int(m.sum()) for m in full)
    assert sum(int((a != b).sum()) for a, b in zip(full, window, strict=True)) <= active // 1000
    short = masks_after(1)
    assert sum(int((a != b).sum()) for a, b in zip(full, short, strict=True)) > active // 100
