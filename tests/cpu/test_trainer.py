"""The perceptron's training step in one call, against torch in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lib.cpu import library
from lib.cpu.trainer import Track
from tests.support.perceptrons import (
    CLOSE,
    CLOSE_NORM,
    FIRST,
    MORE,
    NOTHING,
    Reference,
    check_steps,
    off_by,
    setup,
)

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler")

# ---------------------------------------------------------------------------- against torch


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_steps_match_torch(data: st.DataObject) -> None:
    draw = data.draw
    edges = st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 100])
    hidden = draw(st.lists(st.one_of(edges, st.integers(1, 120)), min_size=1, max_size=6))
    inputs = draw(st.one_of(edges, st.integers(1, 900)))
    density = st.sampled_from([0.01, 0.05, 0.2, 0.29, 0.31, 0.7, 1.0, "rows", "one", None])
    own = setup(
        [inputs, *hidden, draw(st.integers(1, 30))],
        [draw(density) for _ in range(len(hidden) + 1)],
        momentum=draw(st.sampled_from([0.5, 0.9, 0.99])),
        nesterov=draw(st.booleans()),
        weight_decay=draw(st.sampled_from([0.0, 5e-4, 0.1])),
        seed=draw(st.integers(0, 2**20)),
        bias=draw(st.booleans()),
    )
    sizes = st.one_of(st.sampled_from([1, 15, 16, 17, 100, 127, 128]), st.integers(1, 128))
    steps = draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    batches = [torch.randint(150, (draw(sizes),), generator=generator) for _ in range(steps)]
    tracks = [draw(st.sampled_from([NOTHING, MORE, FIRST])) for _ in range(steps)]
    below = draw(st.sampled_from([0.0, None, 2.0]))
    assume(check_steps(own, batches, tracks, below, gradients=draw(st.booleans())))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_steps_with_batch_norm_match_torch(data: st.DataObject) -> None:
    draw = data.draw
    # Not narrower: where few numbers enter a batch norm, or what it normalised goes straight into
    # another one, gradients are next to nothing, and all of them rounding.
    widths = st.one_of(st.sampled_from([15, 16, 17, 33, 64, 100]), st.integers(15, 120))
    hidden, classes = draw(st.lists(widths, min_size=1, max_size=4)), draw(st.integers(1, 30))
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
    density = st.sampled_from([0.1, 0.2, 0.31, 1.0, "rows", None])
    own = setup(
        [draw(st.integers(60, 900)), *hidden, classes],
        [draw(density) for _ in range(len(hidden) + 1)],
        momentum=draw(st.sampled_from([0.5, 0.9])),
        nesterov=draw(st.booleans()),
        weight_decay=draw(st.sampled_from([0.0, 5e-4, 0.1])),
        seed=draw(st.integers(0, 2**20)),
        norms=norms,
        bias=draw(st.booleans()),
    )
    sizes = st.one_of(st.sampled_from([15, 16, 17, 100, 127, 128]), st.integers(15, 128))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    steps = draw(st.integers(1, 3))
    batches = [torch.randperm(150, generator=generator)[: draw(sizes)] for _ in range(steps)]
    tracks = [draw(st.sampled_from([NOTHING, MORE, FIRST])) for _ in range(steps)]
    below = draw(st.sampled_from([0.0, None, 2.0]))
    assume(check_steps(own, batches, tracks, below, gradients=True, close=CLOSE_NORM))


WIDTHS = {
    "LeNet-300-100": [784, 300, 100, 10],
    "widest": [900, 90, 30],
    "one of each": [1, 1, 1],
    "whole vectors": [64, 48, 16, 16],
    "one more": [65, 49, 17, 17],
    "six hidden": [20, 30, 40, 50, 40, 30, 20, 10],
    "no hidden layer": [50, 10],
}


@pytest.mark.parametrize("below", [0.0, None, 2.0])
@pytest.mark.parametrize("density", [0.02, 0.3, 1.0, "rows", "one", None])
@pytest.mark.parametrize("name", WIDTHS)
def test_special_shapes(name: str, density: float | str | None, below: float | None) -> None:
    widths = WIDTHS[name]
    for seed in range(20):  # the first draw in which rounding decides nothing
        own = setup(widths, [density] * (len(widths) - 1), seed=seed)
        batches = list(torch.randperm(150).split([40, 33, 77]))
        if check_steps(own, batches, [MORE, NOTHING, MORE], below, gradients=True):
            return
    raise AssertionError("no draw is clear of rounding")


@pytest.mark.parametrize("batch", range(1, 129))
def test_any_size_of_the_mini_batch(batch: int) -> None:
    for seed in range(batch, batch + 20):
        own = setup([37, 21, 5], [0.2, "rows"], seed=seed)
        if check_steps(own, [torch.randperm(150)[:batch]], [FIRST], None):
            return
    raise AssertionError("no draw is clear of rounding")


@pytest.mark.parametrize("batch", range(2, 129))
def test_statistics_of_mini_batches_of_any_size(batch: int) -> None:
    norms = [nn.BatchNorm1d(21), nn.BatchNorm1d(18), nn.BatchNorm1d(5)]
    own = setup([37, 21, 18, 5], [0.2, None, "rows"], seed=batch, norms=norms)
    reference, trainer = Reference(own), own.trainer()
    index = torch.randperm(150)[:batch]
    want = reference.step(own.images[index], own.labels[index], NOTHING)
    assert trainer.step(own.images, own.labels, index) == pytest.approx(want, rel=CLOSE_NORM)
    trainer.sync()
    for got, expected in zip(own.model.buffers(), reference.model.buffers(), strict=True):
        assert off_by(got, expected) < CLOSE_NORM


@pytest.mark.parametrize("images", [1, 128, 300])
@pytest.mark.parametrize("below", [0.0, None, 2.0])
@pytest.mark.parametrize("logits", [False, True])
def test_batch_norm_answers_by_the_running_estimates(
    images: int, below: float | None, logits: bool
) -> None:
    norms = [nn.BatchNorm1d(21, eps=0.1), None, nn.BatchNorm1d(17)]
    norms += [nn.BatchNorm1d(5)] if logits else []
    densities = [0.2, None, 0.5, "rows"]
    own = setup([37, 21, 18, 17, 5], densities, images=300, norms=norms, bias=not logits)
    trainer = own.trainer(below)
    for k in range(5):
        trainer.step(own.images, own.labels, torch.arange(50 * k, 50 * k + 50))
    x, y = own.images[:images].contiguous(), own.labels[:images].contiguous()
    before = [buffer.clone() for buffer in own.model.buffers()]
    wrong = trainer.wrong(x, y)
    assert all(torch.equal(a, b) for a, b in zip(before, own.model.buffers(), strict=True))
    trainer.sync()
    counts = [int(b) for n, b in own.model.named_buffers() if n.endswith("num_batches_tracked")]
    assert counts == [5] * (2 + logits)

    def answers(training: bool) -> Tensor:
        model = copy.deepcopy(own.model).double().train(training)
        with torch.no_grad():
            logits = model(x.double().flatten(1))
        top = logits.topk(2).values
        assert (top[:, 0] - top[:, 1] > 1e-4).all()  # rounding decides nothing
        return logits.argmax(1)

    assert int((answers(training=False) != y).sum()) == wrong
    if images == 300:  # otherwise the test would not tell the estimates apart
        assert int((answers(training=True) != y).sum()) != wrong


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
            own.trainer().step(own.images, own.labels, index)
        opened.append(float((shift != 0).float().mean()))
    assert opened[0] == pytest.approx(0.5, abs=0.15)
    assert opened[1] == pytest.approx(opened[0], abs=0.15)


def test_batch_norm_of_a_single_image() -> None:
    own = setup([30, 20, 5], [0.2, None], norms=[nn.BatchNorm1d(20)])
    trainer = own.trainer()
    before = [t.clone() for t in [*own.bits(), *own.model.buffers()]]
    with pytest.raises(RuntimeError, match="more than one sample"):
        trainer.step(own.images, own.labels, torch.arange(1))
    trainer.sync()
    assert all(
        torch.equal(a, b) for a, b in zip(before, [*own.bits(), *own.model.buffers()], strict=True)
    )


def test_inactive_momentum_is_what_the_track_says() -> None:
    own = setup([40, 30, 4], [0.1, 0.1])
    name, inactive = "0.weight", ~own.masking.masks["0.weight"]
    trainer = own.trainer()
    index = torch.arange(20)

    def step(track: Track) -> Tensor:
        trainer.step(own.images, own.labels, index, track=track, gradients=True)
        trainer.sync()
        return own.buffer(name)[inactive].clone()

    def gradient() -> Tensor:
        grad = own.model.get_parameter(name).grad
        assert grad is not None
        return grad[inactive].clone()

    own.buffer(name)[inactive] = 7.0
    assert (step(NOTHING) == 7.0).all()
    first = step(FIRST)
    assert torch.equal(first, gradient()) and first.any()
    assert torch.equal(step(NOTHING), first)
    torch.testing.assert_close(step(MORE), 0.9 * first + gradient())


def test_learning_rate_and_momentum_are_read_in_each_step() -> None:
    own = setup([30, 20, 4], [0.2, None])
    index = torch.arange(30)
    trainer, reference = own.trainer(), Reference(own)
    for lr, decay in ((0.1, 0.0), (0.01, 0.1), (0.0, 0.0)):
        for optimizer in (own.optimizer, reference.optimizer):
            optimizer.param_groups[0].update(lr=lr, weight_decay=decay)
        before = [p.clone() for p in own.model.parameters()]
        reference.step(own.images[index], own.labels[index], NOTHING)
        trainer.step(own.images, own.labels, index)
        trainer.sync()
        for parameter, want in zip(
            own.model.parameters(), reference.model.parameters(), strict=True
        ):
            assert off_by(parameter, want) < CLOSE
    for parameter, old in zip(own.model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)  # a learning rate of zero


# ---------------------------------------------------------------------------- threads


def with_threads(
    threads: int, *, below: float | None, scale: float = 1.0, norm: bool = False
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
        trainer = own.trainer(below)
        order = torch.arange(150)
        losses = [
            trainer.step(own.images, own.labels, order[k : k + 70], track=track, gradients=True)
            for k, track in enumerate([NOTHING, FIRST, MORE, MORE, NOTHING])
        ]
        wrong = trainer.wrong(own.images, own.labels)
    finally:
        torch.set_num_threads(1)
    trainer.sync()
    grads = [p.grad for n, p in own.model.named_parameters() if n in own.masking.masks]
    assert all(g is not None for g in grads)
    numbers = torch.tensor([*losses, wrong], dtype=torch.float64)
    return [numbers, *own.bits(), *own.model.buffers(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("below", [0.0, None, 2.0])
def test_bits_do_not_depend_on_the_threads(below: float | None, norm: bool) -> None:
    one = with_threads(1, below=below, norm=norm)
    for threads in (2, 3):
        more = with_threads(threads, below=below, norm=norm)
        assert all(torch.equal(a, b) for a, b in zip(one, more, strict=True))


@pytest.mark.parametrize("flush", [True, False])
def test_all_threads_treat_denormals_alike(flush: bool) -> None:
    torch.set_num_threads(2)  # a pool of threads whose mode is not flushing
    torch.rand(10**6).exp().sum()
    torch.set_num_threads(1)
    with_threads(2, below=None)
    torch.set_flush_denormal(flush)
    try:
        one, two = (with_threads(threads, below=None, scale=1e-20) for threads in (1, 2))
    finally:
        torch.set_flush_denormal(False)
    tiny = torch.finfo(torch.float32).tiny
    denormal = sum(int(((t != 0) & (t.abs() < tiny)).sum()) for t in one[1:])
    assert (denormal == 0) == flush  # otherwise the test would show nothing
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# ---------------------------------------------------------------------------- wrong answers


@pytest.mark.parametrize("images", [1, 16, 100, 128, 129, 300])
@pytest.mark.parametrize("below", [0.0, None, 2.0])
def test_wrong_answers_are_counted_as_argmax_does(images: int, below: float | None) -> None:
    """Whole numbers: exact in float32 whatever the order, and with many ties."""
    own = setup([23, 18, 6], [0.2, 0.5], images=images)
    with torch.no_grad():
        for parameter in own.model.parameters():
            parameter.copy_((2 * parameter).round())
        own.masking.apply()
        x = own.images.round()
        logits = own.model(x.flatten(1))
    if images >= 100:
        assert ((logits == logits.max(1, keepdim=True).values).sum(1) > 1).any()  # a tie
    want = int((logits.argmax(1) != own.labels).sum())
    assert own.trainer(below).wrong(x, own.labels) == want


def test_ties_go_to_the_first_class() -> None:
    own = setup([5, 4], [None], images=12)
    with torch.no_grad():
        own.model.get_parameter("0.weight").zero_()
        own.model.get_parameter("0.bias").copy_(torch.tensor([0.0, 1.0, 1.0, -1.0]))
    trainer = own.trainer()
    counts = [trainer.wrong(own.images, torch.full((12,), c)) for c in range(4)]
    assert counts == [12, 0, 12, 12]


@pytest.mark.parametrize("place", range(4))
def test_a_logit_that_is_not_a_number_is_the_answer_as_in_argmax(place: int) -> None:
    own = setup([5, 4], [None], images=12)
    with torch.no_grad():
        own.model.get_parameter("0.bias")[place:] = math.nan
        logits = own.model(own.images.flatten(1))
    trainer = own.trainer()
    for c in range(4):
        labels = torch.full((12,), c)
        assert trainer.wrong(own.images, labels) == int((logits.argmax(1) != labels).sum())


# ---------------------------------------------------------------------------- not finite


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
    with torch.no_grad():
        finite = F.cross_entropy(
            own.model(own.images[index].flatten(1)), own.labels[index]
        ).isfinite()
    trainer = own.trainer()
    loss = trainer.step(own.images, own.labels, index, track=FIRST)
    trainer.sync()
    weights = torch.stack([p.sum() for p in own.model.parameters()])
    assert not math.isfinite(loss) or not weights.isfinite().all()
    assert math.isfinite(loss) == bool(finite)
