"""The perceptron's training step in one call, against torch in float64, and what its engine holds
beside the model: masks, non-zeros, momentum, DeepR's connections.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lib.cpu import library
from lib.cpu.perceptron import perceptron_layers
from lib.methods import rules
from tests.support.perceptrons import (
    CLOSE,
    CLOSE_NORM,
    FIRST,
    MORE,
    NOTHING,
    Reference,
    chain,
    check_steps,
    deepr_setup,
    off_by,
    setup,
)

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler")
BELOW = [0.0, 0.3, 2.0]  # no sparse layers, those of few non-zeros, all masked ones
EDGES = st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 100])


def a_perceptron(draw: Any, norm: bool) -> dict[str, Any]:
    """What `setup` takes."""
    # With batch norm not narrower: where few numbers enter one, or what it normalised goes straight
    # into another one, gradients are next to nothing, and all of them rounding.
    narrow = 15 if norm else 1
    width = st.one_of(EDGES.filter(lambda n: n >= narrow), st.integers(narrow, 120))
    hidden, classes = draw(st.lists(width, min_size=1, max_size=6 - norm)), draw(st.integers(1, 30))
    inputs = draw(st.integers(60, 900) if norm else st.one_of(EDGES, st.integers(1, 900)))
    density = [0.1, 0.2, 0.31, 1.0, "rows", None] + ([] if norm else [0.01, 0.05, 0.7, "one"])
    norms = [
        nn.BatchNorm1d(
            width,
            eps=draw(st.sampled_from([1e-5, 1e-2])),
            momentum=draw(st.sampled_from([0.1, 0.5, 1.0])),
        )
        if draw(st.integers(0, 3))
        else None
        for width in (*hidden, classes)
    ]
    return {
        "widths": [inputs, *hidden, classes],
        "densities": [draw(st.sampled_from(density)) for _ in range(len(hidden) + 1)],
        "momentum": draw(st.sampled_from([0.5, 0.9] if norm else [0.5, 0.9, 0.99])),
        "nesterov": draw(st.booleans()),
        "weight_decay": draw(st.sampled_from([0.0, 5e-4, 0.1])),
        "seed": draw(st.integers(0, 2**20)),
        "norms": norms if norm else [],
        "bias": draw(st.booleans()),
    }


@pytest.mark.parametrize("norm", [False, True])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_steps_match_torch(norm: bool, data: st.DataObject) -> None:
    draw = data.draw
    own = setup(**a_perceptron(draw, norm))
    least = 15 if norm else 1
    sizes = st.one_of(st.sampled_from([15, 16, 17, 100, 127, 128]), st.integers(least, 128))
    steps = draw(st.integers(1, 4 - norm))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    batches = [torch.randperm(150, generator=generator)[: draw(sizes)] for _ in range(steps)]
    tracks = [draw(st.sampled_from([NOTHING, MORE, FIRST])) for _ in range(steps)]
    below, gradients = draw(st.sampled_from(BELOW)), norm or draw(st.booleans())
    close = CLOSE_NORM if norm else CLOSE
    assume(check_steps(own, batches, tracks, below, gradients=gradients, close=close))


@pytest.mark.parametrize("batch", range(1, 129))
def test_any_size_of_the_mini_batch(batch: int) -> None:
    for seed in range(batch, batch + 20):  # the first draw in which rounding decides nothing
        own = setup([37, 21, 5], [0.2, "rows"], seed=seed)
        if check_steps(own, [torch.randperm(150)[:batch]], [FIRST], 0.3):
            return
    raise AssertionError("no draw is clear of rounding")


@pytest.mark.parametrize("below", BELOW)
@pytest.mark.parametrize("logits", [False, True])
def test_batch_norm_answers_by_the_running_estimates(below: float, logits: bool) -> None:
    norms = [nn.BatchNorm1d(21, eps=0.1), None, nn.BatchNorm1d(17)]
    norms += [nn.BatchNorm1d(5)] if logits else []
    densities = [0.2, None, 0.5, "rows"]
    own = setup([37, 21, 18, 17, 5], densities, images=300, norms=norms, bias=not logits)
    engine = own.engine(below)
    for k in range(5):
        engine.learn(torch.arange(50 * k, 50 * k + 50))
    before = [buffer.clone() for buffer in own.model.buffers()]
    wrong = engine.wrong(own.images, own.labels)
    assert all(torch.equal(a, b) for a, b in zip(before, own.model.buffers(), strict=True))
    engine.write_back()
    counts = [int(b) for n, b in own.model.named_buffers() if n.endswith("num_batches_tracked")]
    assert counts == [5] * (2 + logits)

    def wrong_of(training: bool) -> int:
        model = copy.deepcopy(own.model).double().train(training)
        with torch.no_grad():
            logits = model(own.images.double().flatten(1))
        top = logits.topk(2).values
        assert (top[:, 0] - top[:, 1] > 1e-4).all()  # rounding decides nothing
        return int((logits.argmax(1) != own.labels).sum())

    assert wrong_of(training=False) == wrong != wrong_of(training=True)


def test_features_without_non_zeros_are_open_as_often_as_with_torch() -> None:
    """With a shift of zero only rounding opens their ReLUs; closed ones would never learn."""
    opened = []
    for computed_by in ("torch", "kernels"):
        own = setup([30, 400, 5], [1.0, None], norms=[nn.BatchNorm1d(400)])
        own.masking.masks["0.weight"] = torch.zeros(400, 30, dtype=torch.bool)
        own.masking.apply()
        shift, index = own.model.get_parameter("norm0.bias"), torch.arange(100)
        with torch.no_grad():
            shift.zero_()
        if computed_by == "torch":
            F.cross_entropy(own.model(own.images[index].flatten(1)), own.labels[index]).backward()
            own.optimizer.step()
        else:
            own.engine().learn(index)
        opened.append(float((shift != 0).float().mean()))
    assert opened[0] == pytest.approx(0.5, abs=0.15)
    assert opened[1] == pytest.approx(opened[0], abs=0.15)


def with_threads(
    threads: int, below: float, scale: float = 1.0, norm: bool = False
) -> list[Tensor]:
    """Weights, momentum, running estimates, losses and wrong answers of a few steps."""
    norms = [nn.BatchNorm1d(250), nn.BatchNorm1d(90), nn.BatchNorm1d(10)] if norm else []
    densities = [0.05, 0.5, None]
    own = setup([300, 250, 90, 10], densities, weight_decay=1e-3, norms=norms, bias=not norm)
    with torch.no_grad():
        for parameter in own.model.parameters():
            parameter *= scale
    torch.set_num_threads(threads)
    try:
        engine = own.engine(below)
        losses = [
            engine.learn(torch.arange(k, k + 70), track=track, gradients=True)
            for k, track in enumerate([NOTHING, FIRST, MORE, MORE, NOTHING])
        ]
        wrong = engine.wrong(own.images, own.labels)
    finally:
        torch.set_num_threads(1)
    engine.write_back()
    grads = [p.grad for p in own.model.parameters() if p.grad is not None]
    assert len(grads) == 2
    numbers = torch.tensor([*losses, wrong], dtype=torch.float64)
    return [numbers, *own.bits(), *own.model.buffers(), *grads]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("below", BELOW)
def test_bits_do_not_depend_on_the_threads(below: float, norm: bool) -> None:
    one = with_threads(1, below, norm=norm)
    for threads in (2, 3):
        more = with_threads(threads, below, norm=norm)
        assert all(torch.equal(a, b) for a, b in zip(one, more, strict=True))


@pytest.mark.parametrize("flush", [True, False])
def test_all_threads_treat_denormals_alike(flush: bool) -> None:
    torch.set_num_threads(2)  # a pool of threads whose mode is not flushing
    torch.rand(10**6).exp().sum()
    torch.set_num_threads(1)
    with_threads(2, 0.3)
    torch.set_flush_denormal(flush)
    try:
        one, two = (with_threads(threads, 0.3, scale=1e-20) for threads in (1, 2))
    finally:
        torch.set_flush_denormal(False)
    tiny = torch.finfo(torch.float32).tiny
    denormal = sum(int(((t != 0) & (t.abs() < tiny)).sum()) for t in one[1:])
    assert (denormal == 0) == flush  # otherwise the test would show nothing
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("images", [1, 16, 100, 128, 129, 300])
@pytest.mark.parametrize("below", BELOW)
def test_wrong_answers_are_counted_as_argmax_does(images: int, below: float) -> None:
    """Whole numbers: exact in float32 whatever the order, and with many ties; NaN is the answer."""
    own = setup([23, 18, 6], [0.2, 0.5], images=images)
    with torch.no_grad():
        for parameter in own.model.parameters():
            parameter.copy_((2 * parameter).round())
        own.masking.apply()
        x = own.images.round()
        logits = own.model(x.flatten(1))
    if images >= 100:
        assert ((logits == logits.max(1, keepdim=True).values).sum(1) > 1).any()  # a tie
    engine = own.engine(below)
    assert engine.wrong(x, own.labels) == int((logits.argmax(1) != own.labels).sum())
    with torch.no_grad():
        own.model.get_parameter("2.bias")[4:] = math.nan
    assert engine.wrong(x, own.labels) == int((own.labels != 4).sum())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["image", "0.weight", "2.weight", "2.bias", "4.bias"])
@pytest.mark.parametrize("density", [0.2, 0.6, None])
def test_what_is_not_finite_is_seen(density: float | None, where: str, value: float) -> None:
    own = setup([30, 25, 20, 5], [density] * 3)
    index = torch.arange(40)
    with torch.no_grad():
        if where == "image":
            own.images[3] = value
        else:
            place = own.model.get_parameter(where)
            mask = own.masking.masks.get(where, torch.ones_like(place, dtype=torch.bool))
            place.view(-1)[mask.view(-1).nonzero()[:7]] = value
        logits = own.model(own.images[index].flatten(1))
        finite = F.cross_entropy(logits, own.labels[index]).isfinite()
    engine = own.engine()
    loss = engine.learn(index, track=FIRST)
    engine.write_back()
    weights = torch.stack([p.sum() for p in own.model.parameters()])
    assert not math.isfinite(loss) or not weights.isfinite().all()
    assert math.isfinite(loss) == bool(finite)


def test_mini_batches_that_the_kernels_refuse_change_nothing() -> None:
    own = setup([30, 20, 5], [0.2, None], norms=[nn.BatchNorm1d(20)], images=50)
    engine, y, index = own.engine(), own.labels, torch.arange(20)
    before = [t.clone() for t in [*own.bits(), *own.model.buffers()]]
    data = engine.task.data
    beyond, negative = y.clone(), y.clone()
    beyond[7], negative[7] = 5, -1
    for changed, places, message in (
        ({}, torch.zeros(129, dtype=torch.int64), "1 to 128 samples"),
        ({}, index[:0], "1 to 128 samples"),
        ({}, index[:1], "more than one sample"),
        ({}, torch.tensor([3, 50]), "no image 50 among 50"),
        ({}, torch.tensor([3, -1]), "no image -1 among 50"),
        ({"train_y": beyond}, index, "label 5 is none of the 5 classes"),
        ({"train_y": negative}, index, "label -1 is none of the 5 classes"),
        ({"train_x": own.images.double()}, index, "contiguous tensors"),
        ({"train_x": own.images.repeat(1, 1, 2)[..., ::2]}, index, "contiguous tensors"),
        ({}, torch.arange(40)[::2], "contiguous tensors"),
    ):
        engine.task.data = replace(data, **changed)
        with pytest.raises((RuntimeError, TypeError), match=message):
            engine.learn(places)
    engine.write_back()
    after = [*own.bits(), *own.model.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_which_models_are_perceptrons() -> None:
    for model in (
        nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)),
        nn.Sequential(nn.Linear(8, 6), nn.ReLU()),
        nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)),
        nn.Sequential(nn.Conv2d(1, 1, 1)),
        nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 4)),
        nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)),
        nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6)),
        nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)),
        nn.Sequential(),
        nn.Linear(8, 4),
    ):
        assert perceptron_layers(model) is None
    norm = nn.BatchNorm1d(6)
    for model, norms in (
        (chain([8, 6, 4]), [None, None]),
        (chain([8, 7, 6, 4], [None, norm]), [None, norm, None]),
        (chain([8, 7, 6], [None, norm], bias=False), [None, norm]),
    ):
        found = perceptron_layers(model)
        assert found is not None and [layer.norm for layer in found] == norms


@pytest.mark.parametrize("norm", [False, True])
def test_writing_back_and_reloading_change_nothing(norm: bool) -> None:
    norms = [nn.BatchNorm1d(40), nn.BatchNorm1d(7)] if norm else []
    plain, own = (
        setup([60, 40, 7], [0.1, 0.9], norms=copy.deepcopy(norms), bias=not norm) for _ in range(2)
    )
    a, b = plain.engine(), own.engine()
    for k in range(6):
        index, track = torch.arange(k, k + 50), (NOTHING, FIRST, MORE)[k % 3]
        assert a.learn(index, track=track) == b.learn(index, track=track)
        b.write_back()
        if k % 2:
            b.follow()
        else:
            b = own.engine()
    a.write_back(), b.write_back()
    for x, y in zip(
        [*plain.bits(), *plain.model.buffers()], [*own.bits(), *own.model.buffers()], strict=True
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("density", [0.1, 0.9])
def test_follow_takes_masks_and_weights_from_outside(density: float) -> None:
    own = setup([60, 40, 7], [density, density])
    engine, index = own.engine(), torch.arange(50)
    engine.learn(index, track=FIRST)
    engine.write_back()
    own.masking.masks = {n: torch.rand(m.shape) < 0.2 for n, m in own.masking.masks.items()}
    with torch.no_grad():
        own.model.get_parameter("0.weight").normal_()
    engine.follow()
    reference = Reference(own)
    for name, parameter in reference.model.named_parameters():
        reference.optimizer.state[parameter]["momentum_buffer"] = own.buffer(name).double()
    want = reference.step(own.images[index], own.labels[index], NOTHING)
    assert engine.learn(index) == pytest.approx(want, rel=CLOSE)
    engine.write_back()
    for name, parameter in own.model.named_parameters():
        assert off_by(parameter, reference.model.get_parameter(name)) < CLOSE
    for name, mask in own.masking.masks.items():
        assert not own.model.get_parameter(name)[~mask].any()
        assert own.model.get_parameter(name)[mask].any()


def test_gradients_survive_their_removal() -> None:
    """Whoever sets gradients to None between steps finds new ones, not freed memory."""
    own = setup([60, 40, 7], [0.1, None])
    engine, index = own.engine(), torch.arange(50)
    weight = own.model.get_parameter("0.weight")
    for _ in range(2):
        engine.learn(index, gradients=True)
        assert weight.grad is not None and weight.grad.any()
        own.optimizer.zero_grad(set_to_none=True)
    engine.learn(index)
    assert weight.grad is None


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
    engine = own.engine()
    masks, died = own.masking.masks, 0
    for k in range(12):
        engine.learn(torch.arange(10 * k, 10 * k + 30))
        engine.write_back()
        twin = copy.deepcopy(own)
        assert twin.masking.generator is not None and own.masking.generator is not None
        active = sum(own.masking.active().values())
        rules.deepr_step(twin.masking)
        engine.deepr_step()
        engine.write_back()
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
        engine, losses = own.engine(), []
        for k in range(40):
            losses.append(engine.learn(torch.arange(k, k + 50)))
            engine.deepr_step()
            if (k + 1) % every == 0:
                engine.write_back(), engine.follow()
        bits.append([torch.tensor(losses), *own.bits(), *own.masking.masks.values()])
    for other in bits[1:]:
        assert all(torch.equal(a, b) for a, b in zip(bits[0], other, strict=True))
