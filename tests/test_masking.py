"""The algorithm against an independent oracle, and its invariants over all methods and rules."""

from __future__ import annotations

import copy
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import Masking, masking, methods
from lib.masking import (
    GROWTH,
    PRUNE,
    REDISTRIBUTION,
)
from tests.support.masked import (
    SPARSE,
    Net,
    Trained,
    made,
    oracle_update,
    params,
    random_case,
    same,
    seeded,
    sgd,
    small_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("seed", range(60))
def test_one_update_against_the_oracle(seed):
    rng = np.random.default_rng(seed)
    shapes = [
        tuple(rng.integers(1, 9, rng.integers(2, 5)).tolist()) for _ in range(rng.integers(1, 6))
    ]
    density = float(rng.choice([0.05, 0.3, 0.7, 0.9, 1.0]))
    rate = float(rng.choice([0.05, 0.2, 0.5, 0.9, 1.0]))
    case = random_case(rng, shapes, density, coarse=seed % 2 == 0)
    masks, values, pruned, counts, share = oracle_update(*case, rate)
    model, kept = made(*case)
    before = [int(m.sum()) for m in case[1]]
    report = kept.update(rate)
    for i, line in enumerate(report):
        assert np.array_equal(kept.masks[f"w{i}"].numpy(), masks[i])
        assert np.array_equal(getattr(model, f"w{i}").detach().numpy(), values[i])
        assert line[:5] == (
            f"w{i}",
            before[i],
            pruned[i],
            counts[i],
            before[i] - pruned[i] + counts[i],
        )
        if sum(share):
            assert line.momentum_share == pytest.approx(float(share[i]), abs=1e-12)
        else:
            assert math.isnan(line.momentum_share)


def test_the_oracle_meets_every_special_case():
    """The random cases above are worth something only if they reach the rules' corners."""
    met = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        shapes = [
            tuple(rng.integers(1, 9, rng.integers(2, 5)).tolist())
            for _ in range(rng.integers(1, 6))
        ]
        density = float(rng.choice([0.05, 0.3, 0.7, 0.9, 1.0]))
        rate = float(rng.choice([0.05, 0.2, 0.5, 0.9, 1.0]))
        case = random_case(rng, shapes, density, coarse=seed % 2 == 0)
        masks, _, pruned, counts, _ = oracle_update(*case, rate)
        for before, after, gone, grown in zip(case[1], masks, pruned, counts, strict=True):
            if after.all() and grown:
                met.add("full")
            if gone < math.floor(rate * before.sum()):
                met.add("near dense")
            if (before & after).sum() > before.sum() - gone:
                met.add("regrown")
    assert met == {"full", "near dense", "regrown"}


def test_near_dense_important_layer_keeps_its_weights():
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(10, 10)), rng.normal(size=(10, 10))]
    near = np.ones((10, 10), bool)
    near[0, :5] = False  # 5 % inactive
    masks = [near, rng.random((10, 10)) < 0.3]
    momenta = [np.full((10, 10), 5.0), np.full((10, 10), 0.1)]
    report = made(weights, masks, momenta)[1].update(0.5)
    assert report[0].pruned == 5  # 0.05 * 95 = 4.75
    assert report[1].pruned == math.floor(0.5 * masks[1].sum() + 0.5)
    momenta = [np.full((10, 10), 0.1), np.full((10, 10), 5.0)]  # no longer important
    assert made(weights, masks, momenta)[1].update(0.5)[0].pruned == 48  # 47.5


@st.composite
def cases(draw):
    shapes = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5))
    seed = draw(st.integers(0, 2**32 - 1))
    density = draw(st.sampled_from([0.02, 0.2, 0.5, 0.85, 1.0]))
    weights, masks, momenta = random_case(
        np.random.default_rng(seed), shapes, density, coarse=draw(st.booleans())
    )
    kind = draw(st.sampled_from(["as drawn", "all zero", "one layer", "tiny"]))
    if kind != "as drawn":
        for i, m in enumerate(momenta):
            m *= {"all zero": 0, "one layer": i == 0, "tiny": 1e-42}[kind]
    return weights, masks, momenta


@settings(max_examples=150, deadline=None)
@given(cases(), st.floats(0, 1))
def test_update_invariants(case, rate):
    model, kept = made(*case)
    old = {n: m.clone() for n, m in kept.masks.items()}
    was = {n: p.detach().clone() for n, p in kept.parameters.items()}
    report = kept.update(rate)
    assert sum(line.active_after for line in report) == sum(int(m.sum()) for m in old.values())
    for line in report:
        new, weight = kept.masks[line.name], kept.parameters[line.name].detach()
        assert line.active_before == int(old[line.name].sum())
        assert line.active_after == int(new.sum()) > 0
        assert line.active_after == line.active_before - line.pruned + line.grown
        assert 0 <= line.pruned <= line.active_before
        assert not weight[~new].any()
        assert not weight[new & ~old[line.name]].any()
        stayed = weight != 0
        assert (weight[stayed] == was[line.name][stayed]).all()
        assert int((stayed & ~old[line.name]).sum()) == 0
    if rate == 0:
        assert all(torch.equal(kept.masks[n], old[n]) for n in old)
        assert all(torch.equal(kept.parameters[n].detach(), was[n]) for n in old)
    assert torch.equal(model.bias.detach(), torch.ones(3))


@pytest.mark.parametrize("method", SPARSE)
@pytest.mark.parametrize("density", [0.1, 0.6, 0.97, 1.0])
def test_every_method_keeps_the_budget(method, density):
    run = Trained(method=method, density=density)
    budget = round(density * run.masking.weights_total)
    for _ in range(4):
        for _ in range(3):
            run.steps(1)
            assert sum(run.masking.active().values()) == budget
        report = run.masking.update()
        assert sum(line.active_after for line in report) == budget
        assert {line.name: line.active_after for line in report} == run.masking.active()
        for name, mask in run.masking.masks.items():
            assert not run.masking.parameters[name].detach()[~mask].any()


@pytest.mark.parametrize(
    ("prune", "redistribution", "growth"),
    list(itertools.product(sorted(PRUNE), sorted(REDISTRIBUTION), sorted(GROWTH))),
)
def test_every_combination_of_rules_keeps_the_budget(prune, redistribution, growth):
    run = Trained(prune=prune, redistribution=redistribution, growth=growth)
    budget = round(0.2 * run.masking.weights_total)
    moved = False
    for rate in (0.3, 1.0):
        run.steps(2)
        report = run.masking.update(rate)
        moved |= sum(line.pruned for line in report) > 0
        assert sum(line.active_after for line in report) == budget
        assert all(line.active_after > 0 for line in report)
    assert moved or prune in ("none", "sign_flip", "adaptive_threshold")


@pytest.mark.parametrize("method", SPARSE)
def test_rate_zero_changes_nothing(method):
    run = Trained(method=method)
    run.steps(3)
    before = run.bits()
    report = run.masking.update(prune_rate=0.0)
    assert same(run.bits(), before)
    assert all(line.pruned == line.grown == 0 for line in report)


@pytest.mark.parametrize("method", ["dense", "small_dense"])
def test_dense_has_no_masks(method):
    run = Trained(method=method, density=1.0)
    run.steps(2)
    assert run.masking.masks == {} and run.masking.update() == []
    assert run.masking.density == 1.0
    with pytest.raises(ValueError, match=f"method '{method}' has density 1, got 0.5"):
        Trained(method=method, density=0.5)


def test_momentum_rules_read_the_dense_momentum_of_sgd():
    """The buffer is a*M + g with gradients of inactive weights too, and is never reset."""
    run = Trained(method="sparse_momentum")
    expected = {n: torch.zeros_like(p) for n, p in params(run)}
    for _ in range(5):
        run.steps(1)
        for name, p in params(run):
            expected[name] = 0.9 * expected[name] + p.grad
    run.masking.update(0.3)
    for name, p in params(run):
        buffer = run.optimizer.state[p]["momentum_buffer"]
        torch.testing.assert_close(buffer, expected[name], rtol=1e-5, atol=1e-7)
        assert (buffer[~run.masking.masks[name]] != 0).any()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_scores_by_m_over_root_v(kind):
    run = Trained(optimizer=lambda m: kind(m.parameters(), lr=1e-2, eps=1e-3))
    run.steps(4)
    names = [n for n, _ in params(run)]
    score = {}
    for name, p in params(run):
        state = run.optimizer.state[p]
        m, v = state["exp_avg"].numpy(), state["exp_avg_sq"].numpy()
        score[name] = m / (np.sqrt(v) + np.float32(1e-3))
    masks = [run.masking.masks[n].numpy().copy() for n in names]
    weights = [p.detach().numpy().copy() for _, p in params(run)]
    expected = oracle_update(weights, masks, [score[n] for n in names], 0.3)
    run.masking.update(0.3)
    for name, mask in zip(names, expected[0], strict=True):
        assert np.array_equal(run.masking.masks[name].numpy(), mask)


def test_schedules():
    for schedule, formula in {
        "cosine": lambda t: 0.3 * 0.5 * (1 + math.cos(math.pi * t)),
        "linear": lambda t: 0.3 * (1 - t),
        "constant": lambda t: 0.3,
        None: lambda t: 0.3,
    }.items():
        model = Net((4, 5))
        kept = Masking(model, sgd(model), prune_rate=0.3, total_steps=20, schedule=schedule)
        for step in range(25):
            assert kept.current_rate == pytest.approx(formula(min(step, 20) / 20), abs=1e-15)
            kept.step()
    kept = Masking(model, sgd(model), prune_rate=0.3)
    for _ in range(50):
        kept.step()
    assert kept.current_rate == 0.3


def test_update_uses_the_current_rate():
    run = Trained(total_steps=10, schedule="linear", method="set", prune_rate=0.5)
    run.steps(4)
    active = run.masking.active()
    for line in run.masking.update():
        assert line.pruned == math.floor(0.5 * 0.6 * active[line.name] + 0.5)


@pytest.mark.parametrize("method", SPARSE)
def test_state_dict_continues_identically(method):
    whole = Trained(method=method, total_steps=20)
    whole.steps(5)
    whole.masking.update()
    state = copy.deepcopy(
        (whole.model.state_dict(), whole.optimizer.state_dict(), whole.masking.state_dict())
    )
    other = Trained(seed=99, method=method, total_steps=20)
    other.model.load_state_dict(state[0])
    other.optimizer.load_state_dict(state[1])
    other.masking.load_state_dict(state[2])
    other.data.set_state(whole.data.get_state())
    for run in (whole, other):
        run.steps(5)
        run.masking.update()
        run.steps(1)
    assert same(whole.bits(), other.bits())
    assert whole.masking.current_rate == other.masking.current_rate
    with pytest.raises(ValueError, match="the saved state is of the rules"):
        Trained(prune="global_magnitude").masking.load_state_dict(state[2])


def test_a_copy_goes_its_own_way():
    """What a masking keeps between updates is never shared."""
    rng = np.random.default_rng(5)
    shapes = [(40, 50), (20, 30)]
    weights, momenta = ([rng.normal(size=s) for s in shapes] for _ in range(2))
    masks = [rng.random(s) < 0.2 for s in shapes]
    one = made(weights, masks, momenta)[1]
    one.update(0.3)
    two = copy.deepcopy(one)
    before = {name: mask.clone() for name, mask in one.masks.items()}
    with torch.no_grad():
        for parameter in two.parameters.values():
            parameter.mul_(torch.rand(parameter.shape, generator=seeded(1)))
    one.advance(), two.advance()
    two.update(0.3)
    assert all(torch.equal(before[name], mask) for name, mask in one.masks.items())
    three = copy.deepcopy(one)
    assert one.update(0.3) == three.update(0.3)
    assert all(torch.equal(one.masks[name], mask) for name, mask in three.masks.items())
    assert any(not torch.equal(one.masks[name], mask) for name, mask in two.masks.items())


@pytest.mark.parametrize("method", ["set", "sparse_momentum", "deepr"])
def test_the_generator_decides(method):
    def bits(seed: int) -> list[torch.Tensor]:
        run = Trained(seed=seed, method=method)
        torch.rand(seed + 1)  # torch's own stream is of no matter
        run.steps(3)
        run.masking.update()
        return run.bits()

    assert same(bits(0), bits(0))
    assert not same(bits(0), bits(1))


@pytest.mark.parametrize("method", SPARSE)
def test_channels_last_weights(method):
    one = Trained(method=method)
    two = Trained(method=method, model=small_model().to(memory_format=torch.channels_last))
    assert not two.model[0].weight.is_contiguous()
    for run in (one, two):
        run.steps(1)
    with torch.no_grad():  # from the same numbers on: convolutions differ in the last bit
        for (_, a), (_, b) in zip(params(one), params(two), strict=True):
            b.copy_(a)
            two.optimizer.state[b]["momentum_buffer"].copy_(
                one.optimizer.state[a]["momentum_buffer"]
            )
            b.grad.copy_(a.grad)
    two.masking.rule_state = {
        k: v.clone() if isinstance(v, torch.Tensor) else v
        for k, v in one.masking.rule_state.items()
    }
    two.masking.masks = {n: m.clone() for n, m in one.masking.masks.items()}
    two.masking.generator.set_state(one.masking.generator.get_state())
    old = {n: m.clone() for n, m in two.masking.masks.items()}
    if method == "dsr":
        one.masking.rule_state["threshold"] = two.masking.rule_state["threshold"] = 0.05
    for run in (one, two):
        if method == "deepr":  # push a weight over zero, so that one is re-wired
            name = "0.weight"
            run.masking.parameters[name].data.copy_(
                -0.5 * run.masking.rule_state[f"sign/{name}"] * run.masking.masks[name]
            )
        run.masking.update(0.4)
        run.masking.step()
    assert same([p for _, p in params(one)], [p for _, p in params(two)])
    assert same(list(one.masking.masks.values()), list(two.masking.masks.values()))
    assert method in ("snip", "static") or any(
        not torch.equal(m, old[n]) for n, m in two.masking.masks.items()
    )


def test_a_new_rule_is_one_function_and_one_registration():
    @masking.GROWTH.register("first")
    def grow_first(layer: masking.Layer) -> torch.Tensor:
        return -torch.arange(layer.numel, dtype=torch.float32).view(layer.mask.shape)

    @masking.REDISTRIBUTION.register("second_only")
    def second_only(layer: masking.Layer) -> float:
        return float(layer.name == "w1")

    try:
        weights = [np.arange(1, 26.0).reshape(5, 5)] * 2
        masks = [np.eye(5, dtype=bool)] * 2
        _, kept = made(
            weights, masks, [np.ones((5, 5))] * 2, growth="first", redistribution="second_only"
        )
        report = kept.update(0.4)
        assert [line.grown for line in report] == [0, 4]
        assert kept.masks["w1"].view(-1).nonzero().squeeze(1).tolist() == [0, 1, 2, 3, 12, 18, 24]
    finally:
        del GROWTH["first"], REDISTRIBUTION["second_only"]


def test_registries_are_complete_whichever_module_comes_first() -> None:
    """Rules import the vocabulary, never the algorithm: no circle."""
    folder = Path(methods.__file__).parent
    for path in folder.glob("*.py"):
        assert "lib.masking import" not in path.read_text(), path.name
    code = "import lib.methods.deepr; from lib.masking import GROWTH, PRUNE, REDISTRIBUTION as R;"
    code += "from lib import Masking, build_model; print(sorted(GROWTH), sorted(PRUNE), sorted(R))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{sorted(GROWTH)} {sorted(PRUNE)} {sorted(REDISTRIBUTION)}"
