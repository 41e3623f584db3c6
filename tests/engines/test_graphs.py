"""Steps recorded and replayed. A recorder for the CPU keeps what a CUDA graph keeps: numbers and
masks as they were, gradients where they were. On a GPU the real one is compared with plain steps.
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lib import data as datasets
from lib.config import Run
from lib.engines.eager import TorchEngine
from lib.engines.graphs import WARM_UP, GraphedStep, Step
from lib.train import Interrupted, TrainingLoop

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

# 20 steps an epoch, the last one of 60 images.
RUN = Run(epochs=3, train_samples=1960, lr_decay_every_steps=16, kernels="torch")


@pytest.fixture(scope="module")
def mnist() -> datasets.Dataset:
    whole = datasets.load("mnist", train_subset=RUN.train_samples)
    some = {f"{part}_{xy}": getattr(whole, f"{part}_{xy}")[:500] for part, xy in PARTS}
    return replace(whole, **some)


PARTS = [(part, xy) for part in ("val", "test") for xy in "xy"]


class Keeps:
    """A recording on the CPU."""

    def __init__(self, loop: TrainingLoop, step: Step, index: Tensor) -> None:
        self.loop, self.step, self.index = loop, step, index
        self.settings = dict(loop.optimizer.param_groups[0])
        self.loss = torch.empty(())
        self.parameters = list(loop.model.parameters())
        for parameter in self.parameters:
            parameter.grad = torch.empty_like(parameter)
        self.gradients = [parameter.grad for parameter in self.parameters]

    def replay(self) -> None:
        (group,), now = self.loop.optimizer.param_groups, {}
        now.update(group)
        group.update(self.settings)
        found, masking = [p.grad for p in self.parameters], self.loop.masking
        floats = masking._float_masks
        floats._of = lambda name, *_: floats._kept[name][2]  # type: ignore[method-assign]
        self.loss.copy_(self.step(self.index))
        del floats._of
        for parameter, kept, before in zip(self.parameters, self.gradients, found, strict=True):
            assert parameter.grad is not None and kept is not None
            kept.copy_(parameter.grad)
            parameter.grad = before
        group.update(now)


class OnCpu:
    """Its recorder."""

    def __init__(self, loop: TrainingLoop, fails: bool = False) -> None:
        self.loop, self.fails, self.records = loop, fails, 0

    def warm_up(self, step: Step, index: Tensor) -> Tensor:
        return step(index)

    def record(self, step: Step, index: Tensor) -> Keeps:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        self.records += 1
        return Keeps(self.loop, step, index)


def graphed(run: Run, data: datasets.Dataset, fails: bool = False) -> tuple[TrainingLoop, OnCpu]:
    loop = TrainingLoop(run, data)
    recorder, engine = OnCpu(loop, fails), torch_engine(loop)
    engine.graphed = GraphedStep(engine.compute, engine.parameters, run.batch_size, recorder)
    return loop, recorder


def torch_engine(loop: TrainingLoop) -> TorchEngine:
    assert isinstance(loop.engine, TorchEngine)
    return loop.engine


def steps_of(loop: TrainingLoop) -> GraphedStep:
    found = torch_engine(loop).graphed
    assert found is not None
    return found


def bits(loop: TrainingLoop) -> list[Tensor]:
    momentum = [s["momentum_buffer"] for s in loop.optimizer.state.values()]
    return [*loop.model.state_dict().values(), *momentum, *loop.masking.masks.values()]


def same(a: TrainingLoop, b: TrainingLoop) -> bool:
    return a.state.curves == b.state.curves and all(
        torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True)
    )


@pytest.mark.parametrize(
    ("method", "every"), [("sparse_momentum", 0), ("rigl", 7), ("set", 0), ("dense", 0)]
)
def test_replayed_training_is_training(method: str, every: int, mnist: datasets.Dataset) -> None:
    rules = {"prune": "", "redistribution": "", "growth": "", "method_version": 0}
    run = replace(RUN, method=method, update_every_steps=every, **rules)
    plain = TrainingLoop(run, mnist)
    plain.run_to_end()
    loop, recorder = graphed(run, mnist)
    loop.run_to_end()
    assert same(plain, loop)
    assert recorder.records == 4  # one for each learning rate
    # 60 steps: not the last ones of the epochs (60 images), not the first ones of a learning rate.
    assert steps_of(loop).replayed == 60 - 3 - 4 * WARM_UP


def test_a_loaded_run_is_recorded_anew(mnist: datasets.Dataset, tmp_path: Path) -> None:
    """In the same loop too: loading gives the momentum other addresses."""
    whole, _ = graphed(RUN, mnist)
    whole.run_to_end()
    loop, recorder = graphed(RUN, mnist)
    looked = itertools.count(1)
    with pytest.raises(Interrupted):
        loop.run_to_end(tmp_path / "checkpoint", 1e9, should_stop=lambda: next(looked) == 10)
    assert recorder.records == 1
    loop.step(torch.arange(RUN.batch_size))  # to be forgotten
    loop.load(tmp_path / "checkpoint")
    loop.run_to_end()
    assert same(whole, loop) and recorder.records == 5


def test_what_cannot_be_recorded_goes_on_as_it_is(mnist: datasets.Dataset) -> None:
    plain = TrainingLoop(RUN, mnist)
    plain.run_to_end()
    loop, recorder = graphed(RUN, mnist, fails=True)
    with pytest.warns(UserWarning, match=r"no CUDA graph could be recorded \(operation not perm"):
        loop.run_to_end()
    assert same(plain, loop) and recorder.records == 0
    assert not steps_of(loop).works and steps_of(loop).replayed == 0


def test_without_a_gpu_nothing_is_recorded(mnist: datasets.Dataset) -> None:
    assert torch_engine(TrainingLoop(RUN, mnist)).graphed is None


# ------------------------------------------------------------------------------------ on a GPU


def on_gpu(run: Run, graphs: bool) -> TrainingLoop:
    data = datasets.load(run.dataset, device="cuda", train_subset=run.train_samples)
    loop = TrainingLoop(run, data, device="cuda")
    if not graphs:
        torch_engine(loop).graphed = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop.run_to_end()
    return loop


@gpu
@pytest.mark.parametrize(
    "run",
    [
        RUN,
        replace(RUN, method="rigl", prune="", redistribution="", growth="", method_version=0),
        replace(RUN, dataset="cifar10", model="alexnet-s", batch_size=128),
        replace(RUN, dataset="cifar10", model="wrn-10-1", batch_size=128, precision="bf16"),
    ],
    ids=["mlp", "rigl", "dropout and augmentation", "bf16"],
)
def test_graphs_on_a_gpu(run: Run) -> None:
    """The same draws and arithmetic; only sums whose order is not fixed there may differ."""
    plain, loop = on_gpu(run, graphs=False), on_gpu(run, graphs=True)
    assert steps_of(loop).works and steps_of(loop).replayed > 20
    first, second = (x.state.curves[0]["train_loss"] for x in (plain, loop))
    assert second == pytest.approx(first, rel=0.02)
    assert loop.masking.active() == pytest.approx(plain.masking.active(), rel=0.05)
    assert sum(loop.masking.active().values()) == sum(plain.masking.active().values())


@gpu
def test_the_draws_on_a_gpu_depend_on_the_seed_alone() -> None:
    """What the README promises there: start, masks and order, not the bits of the result."""
    data = datasets.load("mnist", device="cuda", train_subset=RUN.train_samples)
    a, b = (TrainingLoop(RUN, data, device="cuda") for _ in range(2))
    on_cpu = TrainingLoop(RUN, datasets.load("mnist", train_subset=RUN.train_samples))
    for other in (b, on_cpu):
        assert torch.equal(a.order().cpu(), other.order().cpu())
        for x, y in zip(a.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(x.cpu(), y.cpu())
        for name, mask in a.masking.masks.items():
            assert torch.equal(mask.cpu(), other.masking.masks[name].cpu())
