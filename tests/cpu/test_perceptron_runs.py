"""Runs of perceptrons by the kernels: the same training as torch's, resumed to the same bits."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lib import data as datasets
from lib.config import Run
from lib.cpu import library
from lib.cpu.perceptron import PerceptronEngine
from lib.engine import TorchEngine
from lib.masking import DivergenceError
from lib.train import Interrupted, TrainingLoop

pytestmark = [
    pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("one_thread"),
]


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
    stop = iter([False] * (loop.schedule.steps_per_epoch - 1) + [True])
    with pytest.raises(Interrupted):
        loop.run_to_end(should_stop=lambda: next(stop))
    assert loop.state.epoch == 1 and loop.state.step_in_epoch == 0
    loop.use(TorchEngine)  # writes the weights back
    return loop


def test_deepr_above_the_density_of_sparse_layers(mnist: datasets.Dataset) -> None:
    """Dense layers there, re-wired by torch's operators; the same run, also if it is resumed."""
    run = Run(method="deepr", train_samples=2000, epochs=2, density=0.5)
    for density, rewires in ((0.5, False), (0.2, True)):
        engine = TrainingLoop(replace(run, density=density), mnist).engine
        assert isinstance(engine, PerceptronEngine) and engine.rewires == rewires
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
    assert TrainingLoop(run, mnist).engine.name == "perceptron"
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
    assert TrainingLoop(run, mnist).engine.name == "perceptron"
    assert TrainingLoop(replace(run, kernels="torch"), mnist).engine.name == "torch"
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
        loop.use(TorchEngine)
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
