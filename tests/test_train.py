"""Training runs on real data: same bits, kill and resume, the protocol, what a row says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from lib import data as datasets
from lib.config import Run
from lib.cpu import bf16
from lib.masking import Masking
from lib.models import build_model
from lib.results import store as results
from lib.runs import single
from lib.schedule import Schedule, dense_window
from lib.start import stream
from lib.train import Interrupted, TrainingLoop, train
from tests.support import made_up_data
from tests.support.made_up_data import cifar
from tests.support.masked import SPARSE

SMALL = Run(epochs=2, train_samples=2000, lr_decay_every_steps=30)


@pytest.fixture(scope="module")
def mnist() -> datasets.Dataset:
    return made_up_data.mnist(2000)


@pytest.fixture(scope="module")
def images() -> dict[str, datasets.Dataset]:
    return {"cifar10": cifar(128), "mnist": datasets.load("mnist", train_subset=600)}


def bits(loop: TrainingLoop) -> list[torch.Tensor]:
    """Weights, buffers, momentum and masks."""
    loop.engine.write_back()
    momentum = [s["momentum_buffer"] for s in loop.optimizer.state.values()]
    return [*loop.model.state_dict().values(), *momentum, *loop.masking.masks.values()]


def same(a: TrainingLoop, b: TrainingLoop) -> bool:
    return all(torch.equal(x, y) for x, y in zip(bits(a), bits(b), strict=True))


def trained(run: Run, data: datasets.Dataset) -> TrainingLoop:
    loop = TrainingLoop(run, data)
    loop.run_to_end()
    return loop


# ------------------------------------------------------------------------------------- same bits


def test_streams_are_separate(mnist):
    """Start, order and masks depend on the seed alone: methods are compared on the same ones."""
    a = TrainingLoop(SMALL, mnist)
    b = TrainingLoop(Run(method="dense", epochs=2, train_samples=2000), mnist)
    for name, p in a.model.named_parameters():
        mask = a.masking.masks.get(name, torch.ones_like(p, dtype=torch.bool))
        assert torch.equal(p[mask], b.model.get_parameter(name)[mask])
    assert torch.equal(a.order(), b.order())
    c = TrainingLoop(replace(SMALL, seed=1), mnist)
    assert not torch.equal(a.order(), c.order())
    assert not any(torch.equal(x, y) for x, y in zip(bits(a)[:2], bits(c)[:2], strict=True))
    a.state.epoch = 1
    assert not torch.equal(a.order(), b.order())
    assert sorted(a.order().tolist()) == list(range(2000))


def test_the_steps_are_those_of_a_plain_loop(mnist):
    """Dense training, written down in the usual way with plain SGD, gives the same weights."""
    run = Run(method="dense", epochs=1, train_samples=2000, lr_decay_every_steps=8)
    loop = trained(run, mnist)
    model = build_model("lenet300-100", generator=stream(run, "init"))
    order = torch.randperm(2000, generator=stream(run, "order", 0))
    sgd = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, foreach=False
    )
    losses = []
    for step, index in enumerate(order.split(100)):
        for group in sgd.param_groups:
            group["lr"] = 0.1 * 0.1 ** (step // 8)
        sgd.zero_grad()
        loss = F.nll_loss(F.log_softmax(model(mnist.train_x[index]), 1), mnist.train_y[index])
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    for ours, plain in zip(loop.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)
    assert loop.state.curves[0]["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    model.eval()
    wrong = (loop.model.eval()(mnist.test_x).argmax(1) != mnist.test_y).float().mean()
    assert loop.outcome().test_error_pct == pytest.approx(100 * float(wrong), abs=1e-5)


# ------------------------------------------------------------------------------- kill and resume


def interrupted(run: Run, data: datasets.Dataset, checkpoint: Path, every: int) -> TrainingLoop:
    """Stop after `every` steps, go on from the file in a new loop, and so on."""
    for _ in range(100):
        loop = TrainingLoop(run, data)
        if checkpoint.exists():
            loop.load(checkpoint)
        calls = iter(range(every, -1, -1))
        try:
            loop.run_to_end(checkpoint, should_stop=lambda calls=calls: next(calls) == 1)
        except Interrupted:
            torch.rand(3)
            continue
        return loop
    raise AssertionError("never ended")


MNIST_SET = Run(method="set", epochs=2, train_samples=600)  # 6 steps an epoch
WRN = Run(dataset="cifar10", model="wrn-10-1", epochs=2, batch_size=32, train_samples=128)  # 4
RESUMED = {
    "every step": (MNIST_SET, 1),
    "within epochs": (MNIST_SET, 4),
    "at their ends": (MNIST_SET, 6),
    "one step later": (MNIST_SET, 7),
    "gradients that grow": (replace(MNIST_SET, method="rigl", growth="", method_version=0), 6),
    "dropout": (replace(WRN, dropout=0.3, density=0.2, update_every_steps=3), 3),
    # also where the momentum of inactive weights lags behind when the checkpoint is written
    "dense windows": (
        replace(WRN, update_every_steps=3, dense_window_steps=1, kernels="sparse"),
        1,
    ),
    "longer": (replace(WRN, update_every_steps=3, dense_window_steps=2, kernels="sparse"), 3),
}
# Stopped in the window, the last 4 of an epoch's 6 steps, just before it and at its end.
for method in ("sparse_momentum", "rigl", "deepr", "dsr", "dense", "static", "snip"):
    RESUMED |= {
        f"{method}, {model}": (
            Run(model=model, method=method, epochs=3, train_samples=600, dense_window_steps=4),
            4,
        )
        for model in ("lenet300-100", "lenet300-100-bn")
    }


@pytest.mark.parametrize("case", RESUMED)
def test_interrupted_runs_resume_identically(case, images, tmp_path):
    run, every = RESUMED[case]
    whole = trained(run, images[run.dataset])
    parts = interrupted(run, images[run.dataset], tmp_path / "a.pt", every)
    assert same(whole, parts)
    assert whole.state.curves == parts.state.curves and whole.state.layers == parts.state.layers
    assert whole.outcome().test_error_pct == parts.outcome().test_error_pct
    if run.dropout > 0:
        for other in ({"dropout": 0.0}, {"augment": False}):
            assert not same(whole, trained(replace(run, **other), images["cifar10"]))


def test_convolutions_go_through_the_sparse_kernels_where_that_pays(images):
    """The masks are torch's as long as only rounding differs."""
    data = images["cifar10"]
    run = replace(WRN, dropout=0.0, prune_rate=0.5, update_every_steps=2, dense_window_steps=2)

    def computed_by(**changes: object) -> str:
        return TrainingLoop(run.overridden(**changes), data).engine.name

    assert computed_by() == "torch"
    large = {"model": "alexnet-s", "batch_size": 128}
    assert computed_by(**large, density=0.2) == "sparse"
    for other in ({"density": 0.3}, {"batch_size": 32}, {"kernels": "torch"}, {"method": "dense"}):
        assert computed_by(**{**large, **other}) == "torch", other
    low = "bf16" if bf16.available() else "torch"
    assert computed_by(kernels="sparse", precision="bf16") == low
    assert computed_by(precision="bf16") == "torch"
    assert computed_by(kernels="sparse", method="dense") == "torch"

    sparse, plain = (trained(replace(run, epochs=1, kernels=k), data) for k in ("sparse", "torch"))
    assert (sparse.outcome().kernels, plain.outcome().kernels) == ("sparse", "torch")
    loss = plain.state.curves[0]["train_loss"]
    assert sparse.state.curves[0]["train_loss"] == pytest.approx(loss, rel=1e-3)
    moved = [(a ^ b).sum() for a, b in zip(bits(plain)[-9:], bits(sparse)[-9:], strict=True)]
    assert sum(map(int, moved)) <= 0.01 * sum(plain.masking.active().values())
    short = replace(run, dense_window_steps=1, epochs=1, kernels="sparse")
    assert trained(short, data).outcome().train_flops_rel < plain.outcome().train_flops_rel


def test_snip_masks_depend_on_the_seed_alone(images):
    run = replace(WRN, method="snip", method_version=0)
    torch.manual_seed(1)
    one = TrainingLoop(run, images["cifar10"])
    torch.manual_seed(2)
    assert same(one, TrainingLoop(run, images["cifar10"]))
    assert one.masking.density == pytest.approx(0.05, abs=1e-4)
    dense = TrainingLoop(run.overridden(method="dense", density=1.0), images["cifar10"])
    for name, buffer in dense.model.named_buffers():
        assert torch.equal(buffer, one.model.get_buffer(name))


@pytest.mark.parametrize("method", SPARSE)
def test_active_weights_start_as_the_dense_network_s(method, mnist):
    dense = TrainingLoop(Run(method="dense", train_samples=200), mnist).model
    loop = TrainingLoop(Run(method=method, train_samples=200), mnist)
    for name, mask in loop.masking.masks.items():
        first, weight = dense.get_parameter(name), loop.model.get_parameter(name)
        if method == "deepr":  # its signs are drawn apart
            first, weight = first.abs(), weight.abs()
        assert mask.any() and torch.equal(weight[mask], first[mask])
        assert not weight[~mask].any()


# ------------------------------------------------------------------------------------- protocol


def test_learning_rate_warms_up_decays_and_is_logged(mnist):
    schedule = Schedule(Run(epochs=3, warmup_epochs=1, lr_decay_every_steps=25), 20)
    rates = [schedule.lr(step) for step in range(60)]
    assert rates[:20] == pytest.approx([0.1 * (s + 1) / 20 for s in range(20)])
    assert rates[20:] == pytest.approx([0.1] * 5 + [0.01] * 25 + [0.001] * 10)
    curves = trained(replace(SMALL, lr_decay_every_steps=30), mnist).state.curves
    assert [c["lr"] for c in curves] == pytest.approx([0.1, 0.01])


@pytest.mark.parametrize("every", [0, 7, 25])
def test_steps_count_down_to_each_update_but_none_after_the_last(every):
    run = Run(epochs=3, update_every_steps=every)
    schedule, period = Schedule(run, 20), every or 20
    updates = [done for done in range(1, 60) if done % period == 0]
    for step in range(60):
        ahead = [done - step for done in updates if done > step]
        assert schedule.until_update(step) == (min(ahead) if ahead else math.inf)
    assert Schedule(replace(run, prune="none"), 20).until_update(0) == math.inf


def test_dense_window():
    assert (dense_window(0.9), dense_window(0.0)) == (153, 1)
    assert 0.7 ** dense_window(0.7) <= 1e-7 < 0.7 ** (dense_window(0.7) - 1)
    assert Schedule(Run(), 540).window == 153
    assert Schedule(Run(dense_window_steps=7), 540).window == 7


def test_prune_rate_is_annealed_and_logged(mnist):
    curves = trained(replace(SMALL, epochs=4, schedule="linear"), mnist).state.curves
    assert [c["prune_rate"] for c in curves] == pytest.approx([0.15, 0.1, 0.05, 0.0])
    assert {c["density"] for c in curves} == {13_310 / 266_200}


@pytest.mark.parametrize(("every", "updates"), [(0, 2), (7, 8), (20, 2), (60, 0), (1, 59)])
def test_masks_move_after_every_epoch_but_the_last(every, updates, mnist, monkeypatch):
    seen = []
    update = Masking.update

    def counted(self, *args):
        seen.append(self.steps)
        return update(self, *args)

    monkeypatch.setattr(Masking, "update", counted)
    run = replace(SMALL, epochs=3, update_every_steps=every)
    loop = trained(run, mnist)
    period = every or 20
    assert seen == [s for s in range(1, 60) if s % period == 0]
    assert len(seen) == updates and loop.masking.steps == loop.state.step == 60


def test_the_test_set_is_read_once_after_the_end(mnist, monkeypatch):
    reads = []
    measure = TrainingLoop.error_pct

    def counted(self, images, labels):
        sets = {mnist.test_x.data_ptr(): "test", mnist.val_x.data_ptr(): "val"}
        reads.append((sets.get(images.data_ptr()), self.state.step))
        return measure(self, images, labels)

    monkeypatch.setattr(TrainingLoop, "error_pct", counted)
    outcome = train(SMALL, mnist)
    assert reads == [("val", 20), ("val", 40), ("test", 40)]
    assert outcome.status == "ok" and 0 < outcome.test_error_pct < 100
    assert outcome.val_error_pct == outcome.curves[-1]["val_error_pct"]


def test_ragged_last_batch_and_layers(mnist):
    run = replace(SMALL, batch_size=300, epochs=3)
    loop = trained(run, mnist)
    assert loop.schedule.steps_per_epoch == 7 and loop.state.step == 21
    frame = pd.DataFrame(loop.state.layers)
    assert sorted(frame["epoch"].unique()) == [1, 2, 3]
    assert (frame.groupby("epoch")["active"].sum() == 13_310).all()
    assert frame.groupby("epoch")["momentum_share"].sum().tolist() == pytest.approx([1, 1, 1])
    assert frame["weights"].unique().tolist() == [235_200, 30_000, 1_000]


# ------------------------------------------------------------------------------------ divergence


def test_a_diverging_run_is_recorded_without_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("CHECKPOINT_ROOT", str(tmp_path / "checkpoints"))
    run = replace(SMALL, lr=1e6)
    csv = tmp_path / "a.csv"
    task = single.Task(run, "main_results", "smoke", csv)
    assert single.train_and_store(task) == "diverged"
    row = results.read_runs(csv).iloc[0]
    assert row["status"] == "diverged" and row["run_id"] == run.run_id and row["lr"] == 1e6
    for name in ("test_error_pct", "val_error_pct", "train_loss", "density_final"):
        assert pd.isna(row[name])
    assert single.train_and_store(task) == "done"
    assert not list((tmp_path / "checkpoints").rglob("*.pt"))


def test_divergence_in_the_very_last_step(mnist, monkeypatch):
    step = TrainingLoop.step

    def spoilt(self, index):
        loss = step(self, index)
        if self.state.step == self.schedule.total_steps:
            self.model.get_parameter("fc1.bias").data[0] = math.nan
        return loss

    monkeypatch.setattr(TrainingLoop, "step", spoilt)
    outcome = train(SMALL, mnist)
    assert outcome.status == "diverged" and outcome.test_error_pct is None
    assert len(outcome.curves) == 1


# ----------------------------------------------------------------------------------------- FLOPs


def test_flops_relations(mnist):
    def flops(**fields) -> tuple[float, float]:
        outcome = trained(Run(epochs=2, train_samples=500, **fields), data).outcome()
        return outcome.train_flops_rel, outcome.inference_flops_rel

    data = replace(mnist, train_x=mnist.train_x[:500], train_y=mnist.train_y[:500])
    assert flops(method="dense") == (1.0, 1.0)
    train_static, static = flops(method="static")
    assert static == pytest.approx(0.05, rel=1e-4) and train_static == pytest.approx(static)
    assert flops(method="set")[0] == pytest.approx(flops(method="set")[1])
    train_rigl, rigl = flops(method="rigl")
    assert train_rigl == pytest.approx((2 * rigl + 1 / 5 + 4 / 5 * rigl) / 3)  # 5 steps an epoch
    loop = trained(Run(epochs=2, train_samples=500, prune_rate=0.5), data)
    ours = [  # LeNet-300-100's FLOPs are its weights
        sum(layer["active"] for layer in loop.state.layers if layer["epoch"] == e) / 266_200
        for e in (1, 2)
    ]
    start = round(0.05 * 266_200) / 266_200
    mean = (start + ours[0]) / 2  # the second epoch has the masks of the first update
    assert loop.outcome().train_flops_rel == pytest.approx((2 * mean + 1) / 3)
    assert loop.outcome().inference_flops_rel == pytest.approx(ours[1])


def test_kept_dense_layers_and_small_dense_networks_count(mnist):
    last = list(TrainingLoop(SMALL, mnist).masking.masks)[-1]
    outcome = trained(replace(SMALL, keep_dense=(last,)), mnist).outcome()
    assert outcome.weights_total == 266_200
    assert outcome.weights_active == 1_000 + round(0.05 * 265_200)
    assert outcome.density_final == round(0.05 * 265_200) / 265_200
    small = trained(Run(method="small_dense", epochs=1, train_samples=2000), mnist).outcome()
    assert small.weights_total == small.weights_active and small.density_final == 1.0
    assert small.weights_total == pytest.approx(0.05 * 266_200, rel=0.05)


def test_progress_is_told_after_each_epoch(mnist):
    told = []
    curves = train(SMALL, mnist, progress=told.append).curves
    assert [error for error in told if error is not None][-1] == curves[-1]["val_error_pct"]
    assert {c["val_error_pct"] for c in curves} <= set(told)
