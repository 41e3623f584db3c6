"""Runs of perceptrons by the kernels: the same training as torch's."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from torch import Tensor

from lib import data as datasets
from lib.config import Run
from lib.cpu import library
from lib.cpu.perceptron import PerceptronEngine
from lib.masking import DivergenceError
from lib.train import Interrupted, TrainingLoop
from tests.support import made_up_data

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler")
METHODS = ["sparse_momentum", "set", "rigl", "deepr", "dsr", "dense", "static", "snip"]


@pytest.fixture(scope="module")
def mnist() -> datasets.Dataset:
    return made_up_data.mnist(2000)


def momentum(loop: TrainingLoop, name: str) -> Tensor:
    return loop.optimizer.state[loop.model.get_parameter(name)]["momentum_buffer"]


def epoch_of(run: Run, mnist: datasets.Dataset) -> TrainingLoop:
    """After the first epoch and the update of the masks that ends it."""
    loop = TrainingLoop(run, mnist)
    assert loop.engine.name == ("torch" if run.kernels == "torch" else "perceptron")
    stop = iter([False] * (loop.schedule.steps_per_epoch - 1) + [True])
    with pytest.raises(Interrupted):
        loop.run_to_end(should_stop=lambda: next(stop))
    assert loop.state.epoch == 1 and loop.state.step_in_epoch == 0
    loop.engine.write_back()
    return loop


def check_epoch(run: Run, mnist: datasets.Dataset, close: float) -> None:
    """An epoch by the kernels is that of torch."""
    ours, torchs = (epoch_of(replace(run, kernels=k), mnist) for k in ("auto", "torch"))
    masks = torchs.masking.masks
    moved = sum(int((ours.masking.masks[n] != mask).sum()) for n, mask in masks.items())
    assert moved <= sum(torchs.masking.active().values()) // 1000
    for name, want in torchs.model.state_dict().items():
        got = ours.model.state_dict()[name]
        assert (got - want).double().norm() <= close * want.double().norm(), name
    for name, _ in torchs.model.named_parameters():
        first, second = momentum(ours, name), momentum(torchs, name)
        if run.method == "deepr" and name in masks:  # a connection wakes without any
            first, second = first * masks[name], second * masks[name]
        assert first.shape == second.shape and second.any()
        # Those without batch norm, whose shift makes a bias' momentum rounding; and static methods
        # never ask for the momentum of inactive weights.
        if moved == 0 and close < 1e-2 and run.method not in ("static", "snip"):
            assert (first - second).norm() <= 1e-2 * second.norm()
    for what, margin in (("train_loss", close / 10), ("val_error_pct", 0.61)):
        one, two = (loop.state.curves[0][what] for loop in (ours, torchs))
        assert one == pytest.approx(two, rel=1e-4, abs=margin), what


@pytest.mark.parametrize("every", [0, 7])
@pytest.mark.parametrize("method", METHODS)
def test_an_epoch_is_that_of_torch(method: str, every: int, mnist: datasets.Dataset) -> None:
    run = Run(method=method, train_samples=2000, epochs=2, update_every_steps=every)
    check_epoch(replace(run, lr_decay_every_steps=9), mnist, 1e-3)


@pytest.mark.parametrize("model", ["mlpbn-60x3", "lenet300-100-bn"])
@pytest.mark.parametrize("method", ["sparse_momentum", "rigl", "deepr", "dense"])
def test_an_epoch_with_batch_norm_is_that_of_torch(
    method: str, model: str, mnist: datasets.Dataset
) -> None:
    # Dense enough for every feature to have non-zeros: rounding decides what one without does.
    run = Run(model=model, method=method, density=0.2, train_samples=2000, epochs=2)
    check_epoch(run, mnist, 1e-2)


def test_deepr_above_the_density_of_sparse_layers(mnist: datasets.Dataset) -> None:
    """Dense layers there, re-wired by torch's operators."""
    run = Run(method="deepr", train_samples=2000, epochs=2, density=0.5)
    for density, rewires in ((0.5, False), (0.2, True)):
        engine = TrainingLoop(replace(run, density=density), mnist).engine
        assert isinstance(engine, PerceptronEngine) and engine.rewires == rewires
    check_epoch(run, mnist, 1e-3)


def test_the_window_gives_the_masks_of_full_tracking() -> None:
    """Gradients of inactive weights in the last 153 of 180 steps, in all of them, in the last 5."""
    data = made_up_data.mnist(9000)
    run = Run(train_samples=9000, batch_size=50, epochs=4)

    def masks(window: int) -> list[Tensor]:
        loop = TrainingLoop(replace(run, dense_window_steps=window), data)
        assert loop.engine.name == "perceptron" and loop.schedule.steps_per_epoch == 180
        assert loop.schedule.window == (window or 153)
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


def test_a_run_with_an_infinite_weight_diverges(mnist: datasets.Dataset) -> None:
    loop = TrainingLoop(Run(train_samples=2000, epochs=2), mnist)
    assert loop.engine.name == "perceptron"
    loop.model.get_parameter("fc2.bias").data[0] = math.inf
    with pytest.raises(DivergenceError, match=r"loss is|weight isn't finite"):
        loop.run_to_end()
