"""What the perceptron's trainer refuses, and what it holds beside the model: masks, non-zeros,
momentum, DeepR's connections.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from lib.cpu import library
from lib.cpu.chain import perceptron_layers
from lib.cpu.compact import CompactLayer
from lib.cpu.trainer import PerceptronTrainer
from lib.masking import LayerReport, Masking
from lib.methods import rules
from tests.support.perceptrons import (
    CLOSE,
    FIRST,
    MORE,
    NOTHING,
    Reference,
    chain,
    deepr_setup,
    off_by,
    setup,
)

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler")

# ---------------------------------------------------------------------------- errors


def test_mini_batches_of_a_wrong_size() -> None:
    own = setup([30, 20, 5], [0.2, None])
    trainer = own.trainer()
    before = [t.clone() for t in own.bits()]
    for index in (torch.zeros(129, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match="1 to 128 samples"):
            trainer.step(own.images, own.labels, index)
    trainer.sync()
    assert all(torch.equal(a, b) for a, b in zip(before, own.bits(), strict=True))


def test_images_that_are_not_there_and_labels_beyond_the_classes() -> None:
    own = setup([30, 20, 5], [0.2, None], images=50)
    trainer = own.trainer()
    before = [t.clone() for t in own.bits()]
    for index in (torch.tensor([3, 50]), torch.tensor([-1])):
        with pytest.raises(RuntimeError, match=r"no image .* among 50"):
            trainer.step(own.images, own.labels, index)
    for label in (-1, 5):
        labels = own.labels.clone()
        labels[7] = label
        with pytest.raises(RuntimeError, match=rf"label {label} .* 5 classes"):
            trainer.step(own.images, labels, torch.arange(20))
    trainer.sync()
    assert all(torch.equal(a, b) for a, b in zip(before, own.bits(), strict=True))


def test_data_of_another_type_or_shape() -> None:
    own = setup([30, 20, 5], [0.2, None], images=50)
    trainer, x, y, index = own.trainer(), own.images, own.labels, torch.arange(20)
    for images in (x.double(), x[:, :, :29], x[..., ::2], x.squeeze(1).T.contiguous().T):
        with pytest.raises(ValueError, match="images"):
            trainer.step(images, y, index)
        with pytest.raises(ValueError, match="images"):
            trainer.wrong(images, y)
    for labels in (y.int(), y[:49], y.repeat(2)[::2]):
        with pytest.raises(ValueError, match="labels"):
            trainer.step(x, labels, index)
        with pytest.raises(ValueError, match="labels"):
            trainer.wrong(x, labels)
    for places in (index.int(), index[::2], index[None]):
        with pytest.raises(ValueError, match="index"):
            trainer.step(x, y, places)
    assert math.isfinite(trainer.step(x, y, index))


def test_other_models() -> None:
    for model in (
        chain([8, 6, 4]).double(),
        nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)),
        nn.Sequential(nn.Linear(8, 6), nn.ReLU()),
        nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)),
        nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(5, 4)),
        nn.Sequential(nn.Conv2d(1, 1, 1)),
        nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 4)),
        nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)),
        nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6)),
        nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)),
        chain([8, 6, 4], [nn.BatchNorm1d(5)]),
        chain([8, 6, 4], [nn.BatchNorm1d(6, momentum=None)]),
        chain([8, 6, 4], [nn.BatchNorm1d(6, affine=False)]),
        chain([8, 6, 4], [nn.BatchNorm1d(6, track_running_stats=False)]),
        chain([8, 6, 4], [nn.BatchNorm1d(6).double()]),
        nn.Sequential(),
        nn.Linear(8, 4),
    ):
        assert perceptron_layers(model) is None
        if not list(model.parameters()):
            continue
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        masking = Masking(model, optimizer, method="dense")
        with pytest.raises(ValueError, match="chain of linear layers with ReLU in float32"):
            PerceptronTrainer(model, optimizer, masking)
    found = perceptron_layers(chain([8, 6, 4]))
    assert found is not None and [layer.name for layer in found] == ["0", "2"]
    norm = nn.BatchNorm1d(6)
    found = perceptron_layers(chain([8, 7, 6, 4], [None, norm]))
    assert found is not None and [layer.norm for layer in found] == [None, norm, None]
    found = perceptron_layers(chain([8, 7, 6], [None, norm], bias=False))
    assert found is not None and [layer.norm for layer in found] == [None, norm]


def test_other_optimizers() -> None:
    model = chain([8, 6, 4])
    parameters = list(model.parameters())
    groups = [{"params": parameters[:2]}, {"params": parameters[2:]}]
    for optimizer, message in (
        (torch.optim.Adam(parameters), "SGD"),
        (torch.optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.1), "dampening"),
        (torch.optim.SGD(parameters, lr=0.1, momentum=0.9, maximize=True), "minimising"),
        (torch.optim.SGD(parameters, lr=0.1), "momentum must be above 0, got 0"),
        (torch.optim.SGD(groups, lr=0.1, momentum=0.9), "one group"),
        (torch.optim.SGD(parameters[:3], lr=0.1, momentum=0.9), "all parameters"),
    ):
        masking = Masking(model, optimizer, method="dense")
        with pytest.raises(ValueError, match=message):
            PerceptronTrainer(model, optimizer, masking)


def test_more_non_zeros_than_an_index_can_count() -> None:
    with pytest.raises(ValueError, match=r"non-zeros, got 2147483640"):
        CompactLayer(2, 3, 2**31 - 8)


# ---------------------------------------------------------------------------- what torch holds


@pytest.mark.parametrize("norm", [False, True])
def test_sync_and_reload_change_nothing(norm: bool) -> None:
    plain, own = (
        setup(
            [60, 40, 7],
            [0.1, 0.9],
            norms=[nn.BatchNorm1d(40), nn.BatchNorm1d(7)] if norm else [],
            bias=not norm,
        )
        for _ in range(2)
    )
    a, b = plain.trainer(), own.trainer()
    for k in range(6):
        index, track = torch.arange(k, k + 50), (NOTHING, FIRST, MORE)[k % 3]
        assert a.step(plain.images, plain.labels, index, track=track) == b.step(
            own.images, own.labels, index, track=track
        )
        b.sync()
        if k % 2:
            b.reload()
        else:
            b = own.trainer()
    a.sync(), b.sync()
    assert all(torch.equal(x, y) for x, y in zip(plain.bits(), own.bits(), strict=True))
    for x, y in zip(plain.model.buffers(), own.model.buffers(), strict=True):
        assert torch.equal(x, y)
    first, momentum = own.model.get_parameter("0.weight").clone(), own.buffer("0.weight").clone()
    b.sync(), b.reload(), b.sync()
    assert torch.equal(first, own.model.get_parameter("0.weight"))
    assert torch.equal(momentum, own.buffer("0.weight"))


def test_following_an_update_is_reloading_after_it() -> None:
    """With a layer that outgrows its room and one that crosses the density of sparse layers."""
    follows, reloads = (setup([60, 40, 30, 7], [0.1, 0.28, 0.5]) for _ in range(2))
    a, b = follows.trainer(), reloads.trainer()
    rooms, kinds = set(), set()
    for k, (first, second) in enumerate([(0.08, 0.2), (0.2, 0.25), (0.1, 0.5), (0.1, 0.6)] * 2):
        moved = {}
        for name, density in {"0.weight": first, "2.weight": second, "4.weight": 0.5}.items():
            torch.manual_seed(k)
            moved[name] = torch.rand(follows.masking.masks[name].shape) < density
        for own, trainer in ((follows, a), (reloads, b)):
            trainer.step(own.images, own.labels, torch.arange(k, k + 50), track=MORE)
            trainer.sync()
            own.masking.masks = {name: mask.clone() for name, mask in moved.items()}
            own.masking.apply()
        report = [LayerReport(n, 0, 0, 0, int(m.sum()), 0.0) for n, m in moved.items()]
        a.follow(report), b.reload()
        rooms.add(a._sparse["0.weight"].room)
        kinds.add("2.weight" in a._sparse)
    for own, trainer in ((follows, a), (reloads, b)):
        trainer.step(own.images, own.labels, torch.arange(50))
        trainer.sync()
    assert all(torch.equal(x, y) for x, y in zip(follows.bits(), reloads.bits(), strict=True))
    assert len(rooms) > 1 and len(kinds) == 2


@pytest.mark.parametrize("density", [0.1, 0.9])
def test_reload_takes_masks_and_weights_from_outside(density: float) -> None:
    own = setup([60, 40, 7], [density, density])
    trainer = own.trainer()
    trainer.step(own.images, own.labels, torch.arange(50), track=FIRST)
    trainer.sync()
    masks = {n: torch.rand(m.shape) < 0.2 for n, m in own.masking.masks.items()}
    own.masking.masks = masks
    with torch.no_grad():
        own.model.get_parameter("0.weight").normal_()
    trainer.reload()
    reference = Reference(own)
    with torch.no_grad():
        for name, mask in masks.items():
            reference.model.get_parameter(name).mul_(mask)
            state = reference.optimizer.state[reference.model.get_parameter(name)]
            state["momentum_buffer"] = own.buffer(name).double()
        for name in ("0.bias", "2.bias"):
            state = reference.optimizer.state[reference.model.get_parameter(name)]
            state["momentum_buffer"] = own.buffer(name).double()
    index = torch.arange(60, 90)
    want = reference.step(own.images[index], own.labels[index], NOTHING)
    assert trainer.step(own.images, own.labels, index) == pytest.approx(want, rel=CLOSE)
    trainer.sync()
    for name, mask in masks.items():
        weight = own.model.get_parameter(name)
        assert not weight[~mask].any()
        assert off_by(weight, reference.model.get_parameter(name)) < CLOSE


@pytest.mark.parametrize("density", [0.1, 0.9])
def test_masks_assigned_without_a_reload_are_noticed(density: float) -> None:
    own = setup([60, 40, 7], [density, density])
    trainer = own.trainer()
    index = torch.arange(50)
    trainer.step(own.images, own.labels, index)
    masks = {n: torch.rand(m.shape) < 0.2 for n, m in own.masking.masks.items()}
    own.masking.masks = masks
    trainer.step(own.images, own.labels, index)
    masks["0.weight"][0] = False  # in place
    own.masking.masks["0.weight"][0] = False
    loss = trainer.step(own.images, own.labels, index)
    trainer.sync()
    for name, mask in own.masking.masks.items():
        assert not own.model.get_parameter(name)[~mask].any()
    assert trainer.step(own.images, own.labels, index) < loss


def test_gradients_survive_their_removal() -> None:
    """Whoever sets gradients to None between steps finds new ones, not freed memory."""
    own = setup([60, 40, 7], [0.1, None])
    trainer, index = own.trainer(), torch.arange(50)
    weight = own.model.get_parameter("0.weight")
    for _ in range(2):
        trainer.step(own.images, own.labels, index, gradients=True)
        assert weight.grad is not None and weight.grad.any()
        own.optimizer.zero_grad(set_to_none=True)
    trainer.step(own.images, own.labels, index)
    assert weight.grad is None


# ---------------------------------------------------------------------------- DeepR


@pytest.mark.parametrize("keep_dense", [(), ("2.weight",), ("0.weight",)])
@pytest.mark.parametrize(
    ("densities", "options"),
    [
        ((0.05, 0.1, 0.2), {}),
        ((0.05, 0.1, 0.2), {"l1": 0.5, "temperature": 0.01}),  # many die in each step
        ((0.05, 0.1, 0.2), {"l1": 0.5, "temperature": 0.0}),  # no noise
        ((0.05, 0.1, 0.2), {"l1": 0.0, "temperature": 0.0}),  # gradients alone
        ((0.9, 0.9, 0.9), {"l1": 1.0}),  # more than a twentieth of the dormant ones wakes
        ((0.95, 0.02, 1.0), {"l1": 1.0}),
        ((1.0, 1.0, 1.0), {"l1": 1.0}),  # only the dead are dormant
    ],
)
def test_deepr_on_the_non_zeros_is_that_of_torch(
    densities: Sequence[float], options: dict[str, float], keep_dense: Sequence[str]
) -> None:
    """From the same numbers: the same draws, masks, weights and momentum, bit by bit."""
    own = deepr_setup(densities, keep_dense, **options)
    trainer = PerceptronTrainer(own.model, own.optimizer, own.masking, rewires=True)
    masks, died = own.masking.masks, 0
    for k in range(12):
        trainer.step(own.images, own.labels, torch.arange(10 * k, 10 * k + 30))
        trainer.sync()
        twin = copy.deepcopy(own)
        assert twin.masking.generator is not None and own.masking.generator is not None
        active = sum(own.masking.active().values())
        rules.deepr_step(twin.masking)
        trainer.deepr_step()
        trainer.sync()
        for name, mask in masks.items():
            a, b = own.model.get_parameter(name), twin.model.get_parameter(name)
            assert torch.equal(mask, twin.masking.masks[name])
            assert torch.equal(a, b) and not a[~mask].any()
            assert torch.equal(own.buffer(name), twin.buffer(name) * mask)
            assert torch.equal(
                own.masking.rule_state[f"sign/{name}"], twin.masking.rule_state[f"sign/{name}"]
            )
            died += int((a[mask] == 0).sum())  # as many as woke, at zero
        assert sum(own.masking.active().values()) == active
        assert torch.equal(own.masking.generator.get_state(), twin.masking.generator.get_state())
    assert died > 12


def test_deepr_without_writing_back_between_the_steps() -> None:
    """Masks, values by row and values by column that only the kernels know for a while."""
    bits = []
    for every in (1, 5, 40):
        own = deepr_setup((0.05, 0.1, 0.2), (), l1=0.01)
        trainer = PerceptronTrainer(own.model, own.optimizer, own.masking, rewires=True)
        losses = []
        for k in range(40):
            losses.append(trainer.step(own.images, own.labels, torch.arange(k, k + 50)))
            trainer.deepr_step()
            if (k + 1) % every == 0:
                trainer.sync(), trainer.reload()
        bits.append([torch.tensor(losses), *own.bits(), *own.masking.masks.values()])
    for other in bits[1:]:
        assert all(torch.equal(a, b) for a, b in zip(bits[0], other, strict=True))


def test_masks_assigned_between_two_steps_of_deepr() -> None:
    """They count, and what was re-wired in the other layers stays."""
    own = deepr_setup((0.05, 0.1, 0.2), (), l1=0.05)
    trainer = PerceptronTrainer(own.model, own.optimizer, own.masking, rewires=True)
    masks, index = own.masking.masks, torch.arange(50)
    for k in range(5):
        trainer.step(own.images, own.labels, index)
        trainer.deepr_step()
        if k == 0:  # it has written back to read the signs
            start = masks["2.weight"]
    assert masks["2.weight"] is start
    generator = torch.Generator().manual_seed(5)
    masks["0.weight"] = given = torch.rand(masks["0.weight"].shape, generator=generator) < 0.1
    trainer.step(own.images, own.labels, index)
    trainer.sync()
    assert torch.equal(masks["0.weight"], given)
    assert not torch.equal(masks["2.weight"], start)
    for name, mask in masks.items():
        assert not own.model.get_parameter(name)[~mask].any()
        assert own.model.get_parameter(name)[mask].any()
