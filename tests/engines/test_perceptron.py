"""The perceptron's training step in one call: against torch in float64, alone and within runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lib import data as datasets
from lib import kernels
from lib.config import Run
from lib.engines.perceptron import _Sparse
from lib.kernels import PerceptronTrainer, Track, library
from lib.masking import DivergenceError, LayerReport, Masking
from lib.methods import deepr
from lib.train import Interrupted, TrainingLoop

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler")

NOTHING, MORE, FIRST = Track.NOTHING, Track.MORE, Track.FIRST
# Of the largest entry of a tensor: sums of up to 900 products in float32, through up to 7 layers.
CLOSE = 1e-5
# With batch norm, which divides what is left of a difference by its standard deviation.
CLOSE_NORM = 1e-4


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Setup:
    """A chain of linear layers in training, with images to train on."""

    model: nn.Sequential
    optimizer: torch.optim.SGD
    masking: Masking
    images: Tensor
    labels: Tensor

    def trainer(self, sparse_below: float | None = None) -> PerceptronTrainer:
        return PerceptronTrainer(
            self.model, self.optimizer, self.masking, sparse_below=sparse_below
        )

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
    sparse_below: float | None,
    *,
    gradients: bool = False,
    close: float = CLOSE,
) -> bool:
    """Steps of the kernels against float64; False where a ReLU may take the other side."""
    reference = Reference(own)
    trainer = own.trainer(sparse_below)
    found = kernels.perceptron_layers(own.model) or []
    before_norm = [f"{layer.name}.bias" for layer in found if layer.norm is not None]
    below = 0.3 if sparse_below is None else sparse_below
    losses = [
        reference.step(own.images[index], own.labels[index], track)
        for index, track in zip(batches, tracks, strict=True)
    ]
    if not reference.clear:
        return False
    for index, track, want in zip(batches, tracks, losses, strict=True):
        loss = trainer.step(own.images, own.labels, index, track=track, gradients=gradients)
        own.masking.step() if sparse_below == 0 else own.masking.advance()
        assert loss == pytest.approx(want, rel=close, abs=close)
    trainer.sync()
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


def test_a_run_with_an_infinite_weight_diverges(mnist: datasets.Dataset) -> None:
    loop = TrainingLoop(Run(train_samples=2000, epochs=2), mnist)
    assert loop.perceptron is not None
    loop.model.get_parameter("fc2.bias").data[0] = math.inf
    with pytest.raises(DivergenceError, match=r"loss is|weight isn't finite"):
        loop.run_to_end()


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
        assert kernels.perceptron_layers(model) is None
        if not list(model.parameters()):
            continue
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        masking = Masking(model, optimizer, method="dense")
        with pytest.raises(ValueError, match="chain of linear layers with ReLU in float32"):
            PerceptronTrainer(model, optimizer, masking)
    found = kernels.perceptron_layers(chain([8, 6, 4]))
    assert found is not None and [layer.name for layer in found] == ["0", "2"]
    norm = nn.BatchNorm1d(6)
    found = kernels.perceptron_layers(chain([8, 7, 6, 4], [None, norm]))
    assert found is not None and [layer.norm for layer in found] == [None, norm, None]
    found = kernels.perceptron_layers(chain([8, 7, 6], [None, norm], bias=False))
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
        _Sparse(2, 3, 2**31 - 8)


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
        deepr.deepr_step(twin.masking)
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


# ---------------------------------------------------------------------------- within runs


@pytest.fixture(scope="module")
def mnist() -> datasets.Dataset:
    """The first 2,000 images, 500 for validation and 500 for the test."""
    return shortened(datasets.load("mnist", train_subset=2000))


def shortened(whole: datasets.Dataset) -> datasets.Dataset:
    parts = {name: getattr(whole, name)[:500] for name in ("val_x", "val_y", "test_x", "test_y")}
    return replace(whole, **parts)


METHODS = ["sparse_momentum", "set", "rigl", "deepr", "dsr", "dense", "static", "snip"]


def epoch_of(run: Run, mnist: datasets.Dataset) -> TrainingLoop:
    """After the first epoch and the update of the masks that ends it."""
    loop = TrainingLoop(run, mnist)
    stop = iter([False] * loop.steps_per_epoch + [True])
    with pytest.raises(Interrupted):
        loop.run_to_end(should_stop=lambda: next(stop))
    assert loop.state.epoch == 1 and loop.state.step_in_epoch == 0
    loop.use_torch()  # writes the weights back
    return loop


def test_deepr_above_the_density_of_sparse_layers(mnist: datasets.Dataset) -> None:
    """Dense layers there, re-wired by torch's operators; the same run, also if it is resumed."""
    run = Run(method="deepr", train_samples=2000, epochs=2, density=0.5)
    loop = TrainingLoop(run, mnist)
    assert loop.perceptron is not None and not loop.perceptron.rewires
    sparse = TrainingLoop(replace(run, density=0.2), mnist)
    assert sparse.perceptron is not None and sparse.perceptron.rewires
    ours, torchs = (epoch_of(replace(run, kernels=k), mnist) for k in ("auto", "torch"))
    for a, b in zip(ours.model.parameters(), torchs.model.parameters(), strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm()


@pytest.mark.parametrize("model", ["mlpbn-60x3", "lenet300-100-bn"])
@pytest.mark.parametrize("method", ["sparse_momentum", "rigl", "deepr", "dense"])
def test_an_epoch_with_batch_norm_is_that_of_torch(
    method: str, model: str, mnist: datasets.Dataset
) -> None:
    # Dense enough for every feature to have non-zeros: rounding decides what one without does.
    run = Run(model=model, method=method, density=0.2, train_samples=2000, epochs=2)
    ours, torchs = (epoch_of(replace(run, kernels=k), mnist) for k in ("auto", "torch"))
    assert TrainingLoop(run, mnist).perceptron is not None
    masks = zip(ours.masking.masks.values(), torchs.masking.masks.values(), strict=True)
    active = sum(torchs.masking.active().values())
    assert sum(int((a != b).sum()) for a, b in masks) <= active // 1000
    for (name, a), b in zip(ours.model.named_parameters(), torchs.model.parameters(), strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm(), name
    for a, b in zip(ours.model.buffers(), torchs.model.buffers(), strict=True):
        assert (a - b).double().norm() <= 1e-2 * b.double().norm()
    for what, margin in (("train_loss", 1e-3), ("val_error_pct", 0.61)):
        a, b = (loop.state.curves[0][what] for loop in (ours, torchs))
        assert a == pytest.approx(b, abs=margin), what


@pytest.mark.parametrize("every", [0, 7])
@pytest.mark.parametrize("method", METHODS)
def test_an_epoch_is_that_of_torch(method: str, every: int, mnist: datasets.Dataset) -> None:
    run = Run(method=method, train_samples=2000, epochs=2, update_every_steps=every)
    ours, torchs = (epoch_of(replace(run, kernels=k), mnist) for k in ("auto", "torch"))
    assert TrainingLoop(run, mnist).perceptron is not None
    assert TrainingLoop(replace(run, kernels="torch"), mnist).perceptron is None
    active = sum(torchs.masking.active().values())
    moved = sum(
        int((a != b).sum())
        for a, b in zip(ours.masking.masks.values(), torchs.masking.masks.values(), strict=True)
    )
    assert moved <= active // 1000, f"{moved} of {active} active weights"
    for (name, a), b in zip(ours.model.named_parameters(), torchs.model.parameters(), strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm()
        first, second = (
            loop.optimizer.state[p]["momentum_buffer"] for loop, p in ((ours, a), (torchs, b))
        )
        if method == "deepr" and name in torchs.masking.masks:  # a connection wakes without any
            second = second * torchs.masking.masks[name]
        assert first.shape == second.shape and second.any()
        if moved == 0 and method not in ("static", "snip"):  # those never ask for inactive weights'
            assert (first - second).norm() <= 1e-2 * second.norm()
    assert ours.state.curves[0]["train_loss"] == pytest.approx(
        torchs.state.curves[0]["train_loss"], rel=1e-4
    )
    assert ours.state.curves[0]["val_error_pct"] == pytest.approx(
        torchs.state.curves[0]["val_error_pct"], abs=0.21
    )


def test_the_window_gives_the_masks_of_full_tracking() -> None:
    """Gradients of inactive weights in the last 153 of 180 steps, in all of them, in the last 5."""
    data = shortened(datasets.load("mnist", train_subset=9000))
    run = Run(train_samples=9000, batch_size=50, epochs=4)

    def masks(window: int) -> list[Tensor]:
        loop = TrainingLoop(replace(run, dense_window_steps=window), data)
        assert loop.perceptron is not None and loop.steps_per_epoch == 180
        assert loop._window() == (window or 153)
        before = list(loop.masking.masks.values())
        loop.run_to_end()
        after = list(loop.masking.masks.values())
        assert sum(int((a != b).sum()) for a, b in zip(before, after, strict=True)) > 4000
        return after

    def differences(window: int) -> int:
        return sum(int((a != b).sum()) for a, b in zip(full, masks(window), strict=True))

    full = masks(180)
    assert differences(181) == 0  # the same, bit by bit
    assert differences(0) <= 6  # of 13,310 active weights, after three updates
    assert differences(5) > 200


@pytest.mark.parametrize(
    ("method", "computed_by", "model"),
    [
        *((m, "auto", "lenet300-100") for m in METHODS),
        ("rigl", "torch", "lenet300-100"),
        ("sparse_momentum", "auto", "mlpbn-40x2"),
        ("deepr", "auto", "mlpbn-40x2"),
        ("sparse_momentum", "auto", "lenet300-100-bn"),
        ("deepr", "auto", "lenet300-100-bn"),
    ],
)
@pytest.mark.parametrize("every", [13, 20])
def test_resumed_runs_have_the_same_bits(
    method: str,
    computed_by: str,
    model: str,
    every: int,
    mnist: datasets.Dataset,
    tmp_path: Path,
) -> None:
    """Stopped within an epoch, in the window (K = 14) or before it, and after its last step."""
    run = Run(
        model=model,
        method=method,
        train_samples=2000,
        epochs=3,
        lr_decay_every_steps=9,
        dense_window_steps=14,
        kernels=computed_by,
    )
    whole = TrainingLoop(run, mnist)
    whole.run_to_end()
    file = tmp_path / "a.pt"
    while True:
        part = TrainingLoop(run, mnist)
        if file.exists():
            part.load(file)
        calls = iter(range(1, 100))
        try:
            part.run_to_end(file, should_stop=lambda calls=calls: next(calls) == every)
            break
        except Interrupted:
            continue
    assert file.exists()
    for loop in (whole, part):
        loop.use_torch()
    for a, b in zip(whole.model.parameters(), part.model.parameters(), strict=True):
        assert torch.equal(a, b)
        one, two = (
            loop.optimizer.state[p]["momentum_buffer"] for loop, p in ((whole, a), (part, b))
        )
        assert torch.equal(one, two)
    for a, b in zip(whole.model.buffers(), part.model.buffers(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.masking.masks.values(), part.masking.masks.values(), strict=True):
        assert torch.equal(a, b)
    assert whole.state.curves == part.state.curves


def test_the_optimizers_learning_rate_counts_after_a_load(
    mnist: datasets.Dataset, tmp_path: Path
) -> None:
    run = Run(train_samples=2000, epochs=2, lr_decay_every_steps=3)
    loop = TrainingLoop(run, mnist)
    order = loop._order()
    for k in range(3):
        loop.step(order[100 * k : 100 * k + 100])
    loop.save(tmp_path / "a.pt")
    other = TrainingLoop(run, mnist)
    other.load(tmp_path / "a.pt")
    assert other.optimizer.param_groups[0]["lr"] == 0.1
    losses = [one.step(order[300:400]).item() for one in (loop, other)]
    assert losses[0] == losses[1]
    for one in (loop, other):
        one.use_torch()
        assert one.optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    for a, b in zip(loop.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_the_kernels_do_not_know_goes_to_torch(mnist: datasets.Dataset) -> None:
    def computed_by(**fields: object) -> str:
        return TrainingLoop(Run(train_samples=2000, **fields), mnist).outcome("diverged").kernels

    assert computed_by() == computed_by(batch_size=128) == "perceptron"
    for fields in (
        {"batch_size": 129},
        {"momentum": 0.0, "method": "set"},
        {"label_smoothing": 0.1},
        {"precision": "bf16"},
        {"kernels": "torch"},
        {"model": "lenet5", "density": 0.6},
    ):
        assert computed_by(**fields) == "torch", fields
