"""The other readings, each against NumPy written from what is known of the official code."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from lib import Masking
from lib import data as datasets
from lib.config import Run
from lib.methods.counts import allocate
from lib.train import Interrupted, TrainingLoop
from tests.support.masked import Net, made, oracle_fill, random_case, sgd

pytestmark = pytest.mark.usefixtures("one_thread")


def case_of(seed: int, density: float = 0.4):
    rng = np.random.default_rng(seed)
    shapes = [(int(rng.integers(2, 9)), int(rng.integers(2, 9))) for _ in range(3)]
    return random_case(rng, shapes, density, coarse=False)


def shares_of(momenta, masks) -> np.ndarray:
    """Mean |momentum| (float32) where the masks are true, normalised."""
    means = np.array(
        [
            np.abs(m.astype(np.float32)[k]).mean(dtype=np.float64) if k.any() else 0.0
            for m, k in zip(momenta, masks, strict=True)
        ]
    )
    return means / means.sum()


def smallest_gone(weight: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
    """The mask without its `count` smallest |weight|; the weights are distinct but for the sign."""
    size = np.where(mask, np.abs(weight.astype(np.float32)), np.inf).ravel()
    kept = mask.copy().ravel()
    kept[np.argsort(size, kind="stable")[:count]] = False
    return kept.reshape(mask.shape)


# -------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("seed", range(20))
def test_statistics_after_pruning(seed: int) -> None:
    weights, masks, momenta = case_of(seed)
    rate = 0.5
    _, kept = made(
        weights, masks, momenta, redistribution="momentum_after", prune="magnitude_plain"
    )
    survivors = [
        smallest_gone(w, m, math.floor(rate * m.sum() + 0.5))
        for w, m in zip(weights, masks, strict=True)
    ]
    share = shares_of(momenta, survivors)
    pruned = [int(m.sum() - s.sum()) for m, s in zip(masks, survivors, strict=True)]
    expected = allocate(sum(pruned), share.tolist(), [int((~s).sum()) for s in survivors])
    report = kept.update(rate)
    assert [line.pruned for line in report] == pruned
    grown = np.array([line.grown for line in report])
    exact = oracle_fill(
        sum(pruned), [Fraction(float(x)) for x in share], [int((~s).sum()) for s in survivors]
    )
    assert np.abs(grown - expected).max() <= 1 and np.abs(grown - exact).max() <= 1
    assert grown.sum() == sum(pruned)


def test_statistics_after_pruning_differ_from_those_before() -> None:
    """One layer's large momentum sits on the weights that go."""
    weight = np.arange(1, 11.0).reshape(2, 5)
    masks = [np.ones((2, 5), bool), np.ones((2, 5), bool)]
    small = np.where(weight <= 5, 9.0, 1.0)  # mean 5 before, 1 after
    momenta = [small, np.full((2, 5), 2.0)]
    both = {"prune": "magnitude_plain"}
    before = made([weight] * 2, masks, momenta, **both)[1].update(0.5)
    after = made([weight] * 2, masks, momenta, redistribution="momentum_after", **both)[1]
    assert [line.grown for line in before] == [5, 5]  # 10 by 5 : 2, at most 5 each
    assert [line.grown for line in after.update(0.5)] == [5, 5]
    masks = [np.arange(20).reshape(4, 5) < 10 for _ in range(2)]
    weights = [np.pad(weight, ((0, 2), (0, 0)))] * 2
    momenta = [np.pad(m, ((0, 2), (0, 0))) for m in momenta]
    before = made(weights, masks, momenta, **both)[1].update(0.5)
    after = made(weights, masks, momenta, redistribution="momentum_after", **both)[1]
    assert [line.grown for line in before] == [7, 3]  # 10 by 5 : 2
    assert [line.grown for line in after.update(0.5)] == [3, 7]  # 10 by 1 : 2


# ----------------------------------------------------------------------------- near-dense, schedule


def near_dense():
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(10, 10)), rng.normal(size=(10, 10))]
    masks = [np.ones((10, 10), bool), rng.random((10, 10)) < 0.3]
    masks[0][0, :5] = False  # 5 % inactive
    return weights, masks, [np.full((10, 10), 5.0), np.full((10, 10), 0.1)]


@pytest.mark.parametrize(
    ("rules", "pruned"),
    [
        ({}, 5),  # the exception: 5 % of 95
        ({"prune": "magnitude_plain"}, 48),  # 50 % of 95
        ({"redistribution": "momentum_after", "prune": "magnitude_before"}, 5),
        ({"redistribution": "momentum_after"}, 48),  # nothing is measured yet
    ],
)
def test_near_dense_layers_with_and_without_their_exception(rules, pruned: int) -> None:
    weights, masks, momenta = near_dense()
    report = made(weights, masks, momenta, **rules)[1].update(0.5)
    assert [line.pruned for line in report] == [pruned, math.ceil(0.5 * masks[1].sum())]


def test_the_prune_rate_falls_to_a_floor() -> None:
    net = Net((4, 5))
    kept = Masking(net, sgd(net), prune_rate=0.2, total_steps=30, schedule="cosine_floor")
    for step in range(40):
        done = min(step, 30) / 30
        expected = 0.005 + (0.2 - 0.005) * (1 + math.cos(math.pi * done)) / 2
        assert kept.current_rate == pytest.approx(expected, abs=1e-15)
        kept.step()
    low = Masking(net, sgd(net), prune_rate=0.001, total_steps=30, schedule="cosine_floor")
    assert low.current_rate == 0.001  # never above what was asked for


def test_annealing_once_per_epoch_lags_one_epoch_behind() -> None:
    """The update at the end of epoch k has the rate after k - 1 decays."""
    net = Net((4, 5))
    options = {"anneal_every_steps": 10.0}
    kept = Masking(net, sgd(net), prune_rate=0.2, total_steps=30, options=options)
    rates = []
    for _ in range(30):
        kept.step()
        rates.append(kept.current_rate)
    expected = [0.1 * (1 + math.cos(math.pi * k / 3)) for k in range(3) for _ in range(10)]
    assert rates == pytest.approx(expected, abs=1e-15)


# ---------------------------------------------------------------------------------------- feedback


class Feedback:
    """The regrowth of the official code, with every past deficit kept in a list."""

    def __init__(self, budget: int) -> None:
        self.budget, self.correction, self.deficits = budget, 0.0, []

    def after_update(self, active: int) -> None:
        self.deficits.append(self.budget - active)
        self.correction = 0.25 * self.correction + 0.75 * self.deficits[-1] + np.mean(self.deficits)

    def grow(self, share: np.ndarray, pruned: np.ndarray, zeros: np.ndarray) -> np.ndarray:
        most = 0.99 * (zeros + pruned)
        wanted = np.ceil(share * max(0.0, pruned.sum() + self.correction))
        for _ in range(1000):
            residual = np.clip(wanted - most, 0, None).sum()
            wanted = np.minimum(wanted, most)
            if residual == 0:
                break
            wanted = wanted + residual / len(share)
        return np.floor(np.minimum(wanted, most)).astype(int)


@pytest.mark.parametrize("seed", range(12))
def test_feedback_over_several_updates(seed: int) -> None:
    rng = np.random.default_rng(seed)
    density = float(rng.choice([0.3, 0.6, 0.9]))
    weights, masks, momenta = random_case(rng, [(20, 20), (10, 10), (5, 8)], density, coarse=False)
    model, kept = made(weights, masks, momenta, prune="magnitude_up", options={"feedback": 1.0})
    oracle = Feedback(sum(int(m.sum()) for m in masks))
    drifted = False
    for _ in range(6):
        before = np.array(list(kept.active().values()))
        now = [m.numpy().copy() for m in kept.masks.values()]
        zeros = np.array([m.size for m in masks]) - before
        share, inactive = shares_of(momenta, now), zeros / (zeros + before)
        rate = np.where((inactive < 0.2) & (share > 1 / 3), np.minimum(0.3, inactive), 0.3)
        pruned = np.ceil(np.round(rate * before, 6)).astype(int)
        expected = oracle.grow(share, pruned, zeros)
        report = kept.update(0.3)
        kept.advance()
        assert [line.pruned for line in report] == pruned.tolist()
        assert [line.grown for line in report] == expected.tolist()
        after = sum(kept.active().values())
        drifted |= after != oracle.budget
        oracle.after_update(after)
        for i, name in enumerate(kept.masks):  # new values and momentum, as after an epoch
            momenta[i] = rng.normal(size=momenta[i].shape) * (i + 1)
            parameter = getattr(model, name)
            fresh = torch.from_numpy(rng.normal(size=momenta[i].shape).astype(np.float32))
            parameter.data = fresh * kept.masks[name]
            kept.optimizer.state[parameter]["momentum_buffer"] = torch.from_numpy(
                momenta[i].astype(np.float32)
            )
    assert drifted  # else nothing was steered


def test_an_isolated_deficit_is_answered_with_three_quarters_too_many() -> None:
    weights, masks, momenta = case_of(1)
    _, kept = made(weights, masks, momenta, options={"feedback": 1.0})
    kept.update(0.1)
    state = kept.rule_state
    state["feedback/budget"] = sum(kept.active().values()) + 8
    state["feedback/correction"] = 0.0
    state["feedback/deficits"] = state["feedback/updates"] = 0
    kept.advance()
    kept.update(0.1)
    assert state["feedback/correction"] == 1.75 * 8


def test_a_layer_is_never_quite_filled_nor_left_empty_by_feedback() -> None:
    weights = [np.ones((10, 20)), np.ones((1, 1)), np.ones((30, 30))]
    masks = [np.arange(200).reshape(10, 20) < 150, np.ones((1, 1), bool), np.ones((30, 30), bool)]
    momenta = [np.full((10, 20), 99.0), np.zeros((1, 1)), np.full((30, 30), 0.01)]
    _, kept = made(weights, masks, momenta, prune="magnitude_plain", options={"feedback": 1.0})
    report = kept.update(0.5)
    assert [line.pruned for line in report] == [75, 1, 450]
    # The first layer wants nearly all 526 and takes 99 % of its 125 places; the third takes what is
    # left as far as it can; the second has a single place, 99 % of which is none.
    assert [line.grown for line in report] == [math.floor(0.99 * 125), 1, 402]
    assert 526 - sum(line.grown for line in report) == 0


# ------------------------------------------------------------------------------------------ growth


@pytest.mark.parametrize("seed", range(10))
def test_regrown_weights_keep_their_value_where_asked(seed: int) -> None:
    weights, masks, momenta = case_of(seed, 0.7)
    weights = [np.where(w == 0, 1.0, w) for w in weights]
    usual, keeping = (made(weights, masks, momenta, options=o) for o in ({}, {"keep_regrown": 1.0}))
    for _, kept in (usual, keeping):
        kept.update(0.5)
    regrown = 0
    for i, (weight, mask) in enumerate(zip(weights, masks, strict=True)):
        new = keeping[1].masks[f"w{i}"].numpy()
        assert np.array_equal(new, usual[1].masks[f"w{i}"].numpy())
        value = np.where(mask & new, weight, 0).astype(np.float32)
        assert np.array_equal(getattr(keeping[0], f"w{i}").detach().numpy(), value)
        zero = getattr(usual[0], f"w{i}").detach().numpy() == 0
        regrown += int((mask & new & zero).sum())
    assert regrown  # else the test compares nothing


@pytest.mark.parametrize("seed", range(10))
def test_growth_may_choose_active_weights_again(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights, masks, momenta = case_of(seed, 0.6)
    momenta = [m * (rng.random(m.shape) < 0.1) for m in momenta]  # most have no momentum
    _, kept = made(
        weights,
        masks,
        momenta,
        prune="magnitude_plain",
        redistribution="none",
        options={"grow_anywhere": 1.0},
    )
    report = kept.update(0.5)
    lost = 0
    for line, weight, mask, momentum in zip(report, weights, masks, momenta, strict=True):
        count = math.ceil(0.5 * mask.sum())
        survivors = smallest_gone(weight, mask, count)
        score = np.where(survivors, 0, np.abs(momentum.astype(np.float32))).ravel()
        grown = survivors.copy().ravel()
        grown[np.argsort(-score, kind="stable")[:count]] = True
        new = kept.masks[line.name].numpy()
        assert np.array_equal(new, grown.reshape(mask.shape))
        assert line.active_after == new.sum() == line.active_before - line.pruned + line.grown
        lost += count - line.grown
    assert lost > 0


# ----------------------------------------------------------------------------------------- options


def test_momentum_can_be_reset_after_an_update():
    rng = np.random.default_rng(5)
    case = random_case(rng, [(8, 9), (5, 7)], 0.4, coarse=False)
    _, kept = made(*case, options={"reset_momentum": 1.0})
    _, plain = made(*case)
    kept.update(0.3), plain.update(0.3)
    for name, mask in kept.masks.items():
        assert torch.equal(mask, plain.masks[name])
        buffer = kept.optimizer.state[kept.parameters[name]]["momentum_buffer"]
        old = plain.optimizer.state[plain.parameters[name]]["momentum_buffer"]
        assert torch.equal(buffer[mask], old[mask])
        mean = old[mask].double().mean()
        assert torch.allclose(buffer[~mask].double(), mean, atol=1e-7)


def test_options_that_are_off_change_nothing() -> None:
    weights, masks, momenta = case_of(3)
    off = {"feedback": 0.0, "keep_regrown": 0.0, "grow_anywhere": 0.0, "anneal_every_steps": 0.0}
    a, b = made(weights, masks, momenta), made(weights, masks, momenta, options=off)
    assert a[1].update(0.4) == b[1].update(0.4)
    for name in a[1].masks:
        assert torch.equal(a[1].masks[name], b[1].masks[name])
        assert torch.equal(getattr(a[0], name), getattr(b[0], name))


def test_all_together_train_and_resume_to_the_same_bits(tmp_path: Path) -> None:
    run = Run(
        schedule="cosine_floor",
        options=(("feedback", 1.0), ("keep_regrown", 1.0), ("grow_anywhere", 1.0)),
        density=0.05,
        epochs=4,
        train_samples=60,
        batch_size=10,
        lr_decay_every_steps=20,
    )
    data = datasets.load("mnist", train_subset=60)
    whole = TrainingLoop(run, data)
    whole.run_to_end()
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls == 15

    first = TrainingLoop(run, data)
    with pytest.raises(Interrupted, match=run.run_id):
        first.run_to_end(tmp_path / "checkpoint", should_stop=stop)
    second = TrainingLoop(run, data)
    second.load(tmp_path / "checkpoint")
    second.run_to_end()
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.masking.rule_state == second.masking.rule_state
    assert whole.masking.rule_state["feedback/updates"] == 2  # three updates, corrected twice
