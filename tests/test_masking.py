"""The algorithm against an independent oracle, its invariants over all methods and rules, and each
rule against what its paper, or what is known of the official code, says.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from torch import nn

from lib import Masking, build_model
from lib.masking import GROWTH, PRUNE, REDISTRIBUTION, DivergenceError, Layer, share_out
from lib.methods import rules
from lib.methods.masks import initial_counts, maskable_parameters, snip_masks
from lib.methods.parts import clear_by_bits, clear_outside, pick, prune_smallest
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


def case_of(seed: int, density: float = 0.4):
    rng = np.random.default_rng(seed)
    shapes = [(int(rng.integers(2, 9)), int(rng.integers(2, 9))) for _ in range(3)]
    return random_case(rng, shapes, density, coarse=False)


# --------------------------------------------------------------------------------- one whole update


@pytest.mark.filterwarnings("ignore:the momentum of all inactive weights is zero")
@pytest.mark.parametrize("kind", ["fine", "coarse", "all zero", "one layer", "tiny"])
def test_one_update_against_the_oracle(kind: str) -> None:
    met: set[str] = set()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        shapes = [tuple(rng.integers(1, 9, rng.integers(2, 5))) for _ in range(rng.integers(1, 6))]
        density = float(rng.choice([0.05, 0.3, 0.7, 0.9, 1.0]))
        rate = float(rng.choice([0.0, 0.05, 0.2, 0.5, 0.9, 1.0]))
        case = random_case(rng, shapes, density, coarse=kind == "coarse")
        for i, momentum in enumerate(case[2]):
            momentum *= {"all zero": 0, "one layer": i == 0, "tiny": 1e-42}.get(kind, 1)
        masks, values, pruned, counts, share = oracle_update(*case, rate)
        model, kept = made(*case)
        for i, line in enumerate(kept.update(rate)):
            before = case[1][i]
            assert np.array_equal(kept.masks[line.name].numpy(), masks[i]), seed
            assert np.array_equal(model.get_parameter(line.name).detach().numpy(), values[i]), seed
            assert line[1:5] == (before.sum(), pruned[i], counts[i], masks[i].sum())
            assert line.momentum_share == pytest.approx(float(share[i]), abs=1e-12, nan_ok=True)
            met |= {"full"} if masks[i].all() and counts[i] else set()
            met |= {"near dense"} if 0 < pruned[i] < math.floor(rate * before.sum()) else set()
            met |= {"regrown"} if (before & masks[i]).sum() > before.sum() - pruned[i] else set()
            met |= {"no signal"} if not pruned[i] and rate == 1 else set()
        assert torch.equal(model.bias.detach(), torch.ones(3))
    wanted = {"fine": {"full", "regrown", "near dense"}, "one layer": {"no signal"}}
    assert wanted.get(kind, set()) <= met


COMBINATIONS = itertools.product(sorted(PRUNE), sorted(REDISTRIBUTION), sorted(GROWTH))
METHODS = itertools.product(SPARSE, [0.1, 0.6, 0.97, 1.0])


@pytest.mark.filterwarnings("ignore:the (gradient|momentum) of all inactive")
@pytest.mark.parametrize(
    "settings",
    [
        *({"method": method, "density": density} for method, density in METHODS),
        *(dict(zip(("prune", "redistribution", "growth"), c, strict=True)) for c in COMBINATIONS),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_every_method_and_combination_of_rules_keeps_the_budget(settings) -> None:
    run = Trained(**settings)
    budget = round(settings.get("density", 0.2) * run.masking.weights_total)
    for rate in (None, 0.3, 1.0):
        for _ in range(2):
            run.steps(1)
            assert sum(run.masking.active().values()) == budget
        before = run.bits()
        assert not any(line.pruned or line.grown for line in run.masking.update(0.0))
        assert same(run.bits(), before)
        report = run.masking.update(rate)
        assert {line.name: line.active_after for line in report} == run.masking.active()
        assert sum(line.active_after for line in report) == budget
        for line, mask in zip(report, run.masking.masks.values(), strict=True):
            assert line.active_after == line.active_before - line.pruned + line.grown > 0
            assert not run.masking.parameters[line.name].detach()[~mask].any()


# ------------------------------------------------------------------------------ what the rules read


def adam_score(state: dict[str, torch.Tensor]) -> np.ndarray:
    return state["exp_avg"].numpy() / (state["exp_avg_sq"].sqrt().numpy() + np.float32(1e-3))


@pytest.mark.parametrize(
    ("optimizer", "score"),
    [
        (sgd, lambda state: state["momentum_buffer"].numpy()),
        (lambda m: torch.optim.Adam(m.parameters(), lr=1e-2, eps=1e-3), adam_score),
        (lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, eps=1e-3), adam_score),
    ],
)
def test_momentum_is_the_optimizers_and_never_reset(optimizer, score) -> None:
    run = Trained(optimizer=optimizer)
    run.steps(4)
    before = copy.deepcopy(run.optimizer.state_dict())
    masks = [m.numpy().copy() for m in run.masking.masks.values()]
    weights = [p.detach().numpy().copy() for _, p in params(run)]
    scores = [score(run.optimizer.state[p]) for _, p in params(run)]
    expected = oracle_update(weights, masks, scores, 0.3)[0]
    run.masking.update(0.3)
    for mask, theirs in zip(run.masking.masks.values(), expected, strict=True):
        assert np.array_equal(mask.numpy(), theirs)
    torch.testing.assert_close(run.optimizer.state_dict(), before, rtol=0, atol=0)


def test_gradient_growth_takes_the_largest_gradients() -> None:
    run = Trained(method="rigl")
    run.steps(3)
    before = {n: m.clone() for n, m in run.masking.masks.items()}
    size = {n: p.detach().abs().clone() for n, p in params(run)}
    for line in run.masking.update(0.3):
        gradient = run.masking.parameters[line.name].grad.abs()
        kept = before[line.name] & ~pick(-size[line.name], before[line.name], line.pruned)
        grown = run.masking.masks[line.name] & ~kept
        assert grown.sum() == line.pruned == line.grown > 0
        assert gradient[grown].min() >= gradient[~kept & ~grown].max()


@pytest.mark.parametrize(
    ("schedule", "every", "formula"),
    [
        ("cosine", 0, lambda t: 0.3 * 0.5 * (1 + math.cos(math.pi * t))),
        ("linear", 0, lambda t: 0.3 * (1 - t)),
        ("constant", 0, lambda t: 0.3),
        ("cosine_floor", 0, lambda t: 0.005 + 0.295 * (1 + math.cos(math.pi * t)) / 2),
        # once per epoch of ten steps: the update at its end still has the rate of its beginning
        ("cosine", 10, lambda t: 0.15 * (1 + math.cos(math.pi * max(0, math.ceil(t * 3) - 1) / 3))),
    ],
)
def test_schedules(schedule, every, formula) -> None:
    model, options = small_model(), {"anneal_every_steps": every}
    kept = Masking(model, sgd(model), 1.0, 0.3, 30, schedule=schedule, options=options)
    for kept.steps in range(31 if every else 40):
        assert kept.current_rate == pytest.approx(formula(min(1, kept.steps / 30)), abs=1e-12)
    kept.total_steps = None
    assert kept.current_rate == 0.3
    kept.total_steps, kept.prune_rate = 30, 0.001  # never above what was asked for
    assert kept.current_rate <= 0.001


# ---------------------------------------------------------------------------------- states, copies


@pytest.mark.parametrize("method", SPARSE)
def test_state_dict_continues_identically(method):
    whole = Trained(method=method, total_steps=20)
    whole.steps(5)
    whole.masking.update()
    parts = (whole.model, whole.optimizer, whole.masking)
    state = copy.deepcopy([part.state_dict() for part in parts])
    other = Trained(seed=99, method=method, total_steps=20)
    for part, saved in zip((other.model, other.optimizer, other.masking), state, strict=True):
        part.load_state_dict(saved)
    other.data.set_state(whole.data.get_state())
    for run in (whole, other):
        run.steps(5)
        run.masking.update()
        run.steps(1)
    assert same(whole.bits(), other.bits())
    assert whole.masking.current_rate == other.masking.current_rate < 0.3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda run: pickle.loads(pickle.dumps(run))])
@pytest.mark.parametrize("method", ["set", "sparse_momentum", "deepr"])
def test_a_whole_copy_goes_its_own_way(method: str, copied) -> None:
    one = Trained(method=method)
    one.steps(2)
    one.masking.update()
    two, before = copied(one), one.bits()
    two.steps(3)
    two.masking.update()
    assert same(one.bits(), before)
    one.steps(3)
    one.masking.update()
    assert same(one.bits(), two.bits()) and one.masking.steps == two.masking.steps == 5


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
            b.grad.copy_(a.grad)
            theirs = two.optimizer.state[b]["momentum_buffer"]
            theirs.copy_(one.optimizer.state[a]["momentum_buffer"])
    two.masking.load_state_dict(one.masking.state_dict())
    old = list(two.masking.masks.values())
    for run in (one, two):
        run.masking.rule_state["threshold"] = 0.05  # DSR's
        if method == "deepr":  # push weights over zero, so that some are re-wired
            flipped = -0.5 * run.masking.rule_state["sign/0.weight"] * run.masking.masks["0.weight"]
            run.masking.parameters["0.weight"].data.copy_(flipped)
        run.masking.update(0.4)
        rules.deepr_step(run.masking) if method == "deepr" else None
    assert same([p for _, p in params(one)], [p for _, p in params(two)])
    assert same(list(one.masking.masks.values()), list(two.masking.masks.values()))
    assert method in ("snip", "static") or not same(list(two.masking.masks.values()), old)


# ------------------------------------------------------------------------------------------- counts


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(20, 300), min_size=1, max_size=6),
    st.lists(
        st.tuples(st.floats(0, 1), st.lists(st.floats(0.01, 1), min_size=6, max_size=6)),
        min_size=1,
        max_size=30,
    ),
)
def test_counts_stay_within_one_of_their_quotas_over_time(actives, updates):
    """Any rates and shares: pruned always, grown until a layer would have to grow less than
    nothing or is full; the budget is exact in every update.
    """
    state: dict[str, float] = {}
    sizes = [100 * n for n in actives]
    budget, capped = sum(actives), False
    cumulated = {what: [0.0] * len(actives) for what in ("pruned", "grown")}
    for rate, weights in updates:
        shares = [w / sum(weights[: len(actives)]) for w in weights[: len(actives)]]
        layers = []
        for i, active in enumerate(actives):
            mask = torch.arange(sizes[i]) < active
            weight = nn.Parameter(torch.ones(sizes[i]))
            layers.append(Layer(str(i), weight, mask, mask, None, None, active, share=shares[i]))
        survivors = prune_smallest(layers, [rate] * len(layers), state)
        for i, layer in enumerate(layers):
            layer.pruned = layer.active - int(survivors[i].sum())
            cumulated["pruned"][i] += rate * layer.active - layer.pruned
        grown = share_out(layers, state)
        assert sum(grown) == sum(layer.pruned for layer in layers)
        for i, layer in enumerate(layers):
            quota = shares[i] * sum(grown)
            # A quota beyond the room, or one so small that the debt of earlier roundings exceeds it
            capped |= quota >= layer.numel - layer.active + layer.pruned
            capped |= quota + cumulated["grown"][i] < 0
            cumulated["grown"][i] += quota - grown[i]
            actives[i] += grown[i] - layer.pruned
        assert sum(actives) == budget
        assert max(map(abs, cumulated["pruned"])) <= 0.5 + 1e-6
        assert capped or max(map(abs, cumulated["grown"])) < 1 + 1e-6


# ---------------------------------------------------------------------------------------- selection


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
def test_pick_takes_the_largest_and_the_earliest(seed, size):
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.integers(-3, 4, size).astype(np.float32))
    candidates = torch.from_numpy(rng.random(size) < 0.6)
    k = int(rng.integers(0, int(candidates.sum()) + 1))
    order = sorted(np.flatnonzero(candidates.numpy()), key=lambda j: (-float(values[j]), j))
    expected = torch.zeros(size, dtype=torch.bool)
    expected[order[:k]] = True
    for given_values in (values, values.double(), values.bfloat16()):
        found = pick(given_values, candidates, k)
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=f"{size + 1}"):
        pick(values, candidates, size + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_inactive_weights_become_zero_whatever_they_were(dtype) -> None:
    mask, bits = torch.rand(4, 6, generator=seeded(0)) < 0.5, {}
    for fresh in (lambda: torch.empty(4, 6, dtype=dtype), lambda: torch.empty(6, 4, dtype=dtype).T):
        for bad in (1.0, -2.0, math.inf, math.nan):
            mask.logical_not_()  # in place, and another memory layout in between: both are noticed
            by_bits, by_mask = fresh().fill_(bad), fresh().fill_(bad)
            clear_by_bits({"w": by_bits}, {"w": mask}, bits)
            clear_outside(by_mask, mask)
            expected = torch.where(mask, torch.tensor(bad, dtype=dtype), 0)
            for found in (by_bits, by_mask):
                torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------- masks at the start


def test_layer_densities_at_the_start() -> None:
    parameters = maskable_parameters(build_model("lenet5", generator=seeded(0)))
    for init in ("uniform", "erk", "half_output"):
        for density in (0.01, 0.05, 0.123, 0.5, 0.9, 1.0):
            counts = initial_counts(parameters, density, init)
            assert sum(counts.values()) == round(density * 430_500)
    counts = initial_counts(parameters, 0.05, "uniform")
    assert all(abs(c - 0.05 * parameters[n].numel()) < 1 for n, c in counts.items())
    counts = initial_counts(parameters, 0.05, "erk")
    ideal = {n: sum(p.shape) / p.numel() for n, p in parameters.items()}
    scales = {n: counts[n] / parameters[n].numel() / ideal[n] for n in counts}
    open_layers = [s for n, s in scales.items() if counts[n] < parameters[n].numel()]
    assert max(open_layers) / min(open_layers) < 1.02
    full = [s for n, s in scales.items() if counts[n] == parameters[n].numel()]
    assert full and max(full) < min(open_layers) * 1.01  # only what the cap cuts off
    parameters = maskable_parameters(build_model("lenet300-100", generator=seeded(0)))
    first, second, last = initial_counts(parameters, 0.02, "half_output").values()
    assert abs(last - 500) <= 1 and first / 235_200 == pytest.approx(second / 30_000, rel=0.01)


@pytest.mark.parametrize("init", ["uniform_drawn", "erk_drawn"])
def test_drawn_masks_have_their_density_in_expectation(init):
    model = build_model("lenet5", generator=seeded(0))
    counts = initial_counts(maskable_parameters(model), 0.01, init.removesuffix("_drawn"))
    drawn = []
    for seed in range(20):
        model = build_model("lenet5", generator=seeded(0))
        kept = Masking(model, sgd(model), density=0.01, init=init, generator=seeded(seed))
        drawn.append(list(kept.active().values()))
    found = np.array(drawn)
    assert (found.min(0) > 0).all() and (found.std(0) > 0).all()
    expected = np.array([counts[n] for n in kept.masks])
    assert (abs(found.mean(0) - expected) < 4 * np.sqrt(expected / 20) + 0.2).all()


def test_snip_against_gradients_taken_by_hand():
    model = small_model()
    x, y = torch.randn(8, 2, 4, 4, generator=seeded(0)), torch.arange(8) % 4

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(model(x), y)

    parameters = maskable_parameters(model)
    twin = copy.deepcopy(model)
    nn.functional.cross_entropy(twin(x), y).backward()
    theirs = [p for n, p in twin.named_parameters() if n in parameters]
    score = torch.cat([(p.grad * p.detach()).abs().reshape(-1) for p in theirs]).numpy()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    before = {n: b.clone() for n, b in model.named_buffers()}
    masks = snip_masks(model, parameters, 0.1, loss)
    flat = np.concatenate([masks[n].numpy().reshape(-1) for n in parameters])
    assert flat.sum() == round(0.1 * flat.size)
    assert score[flat].min() > score[~flat].max()
    assert all((p.grad == 7).all() for p in model.parameters())
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    with pytest.raises(DivergenceError, match="nan"):
        snip_masks(model, parameters, 0.1, lambda: loss() * math.nan)


# -------------------------------------------------------------------------- rules of other methods


def test_redistribution_rules_by_hand():
    weights = [np.arange(1, 11.0).reshape(2, 5), np.arange(2, 42, 2.0).reshape(4, 5)]
    masks = [np.ones((2, 5), bool), np.zeros((4, 5), bool)]
    masks[0][0] = False  # 5 of 10 active: 6..10
    masks[1][1:3] = True  # 10 of 20 active: 12..30
    momenta = [np.full((2, 5), 3.0), np.full((4, 5), 1.0)]
    # Rate 0.4 removes 2 of 5 and 4 of 10: six weights to share out.
    grown = {
        "momentum": [5, 1],  # 3 : 1 is 4.5 : 1.5, a tie that the first layer wins
        "momentum_after": [5, 1],
        "magnitude": [2, 4],  # mean 8 : 21
        "nonzeros": [2, 4],  # survivors 3 : 6
        "layer_size": [2, 4],  # 10 : 20
        "none": [2, 4],
        "inactive": [2, 4],  # 7 : 14
    }
    assert set(grown) == set(REDISTRIBUTION)
    for rule, expected in grown.items():
        report = made(weights, masks, momenta, redistribution=rule)[1].update(0.4)
        assert [line.pruned for line in report] == [2, 4]
        assert [line.grown for line in report] == expected, rule


def test_their_set_prunes_one_more_and_grows_elsewhere():
    """Constant fraction of DSR's authors' code: int(fraction * active) + 1, never the same ones."""
    rng = np.random.default_rng(4)
    weights = [rng.normal(size=(20, 20)), rng.normal(size=(6, 6))]
    masks = [rng.random((20, 20)) < 0.3, rng.random((6, 6)) < 0.9]
    momenta = [np.ones((20, 20)), np.ones((6, 6))]
    rules = {"prune": "magnitude_and_one", "redistribution": "none", "growth": "random_elsewhere"}
    _, kept = made(weights, masks, momenta, **rules)
    for line, before in zip(kept.update(0.1), masks, strict=True):
        after = kept.masks[line.name].numpy()
        assert line.pruned == line.grown == math.floor(0.1 * before.sum()) + 1
        regrown = line.pruned - int((before & ~after).sum())
        assert regrown == max(0, line.grown - int((~before).sum()))


def test_random_growth_is_uniform_over_the_inactive():
    counts, times = torch.zeros(40), 300
    generator = seeded(11)
    for _ in range(times):
        model = Net((5, 8))
        mask = {"w0.weight": (torch.arange(40) < 20).view(5, 8)}
        kept = Masking(model, sgd(model), method="set", generator=generator, masks=mask)
        kept.advance()
        model.w0.weight.data = torch.arange(1, 41.0).view(5, 8)
        kept.update(0.5)  # the ten smallest go; ten of the thirty without a weight grow
        assert kept.masks["w0.weight"].view(-1)[10:20].all()
        counts += kept.masks["w0.weight"].view(-1)
    grown = torch.cat([counts[:10], counts[20:]]).numpy()
    assert grown.sum() == 10 * times
    assert scipy_stats.chisquare(grown).pvalue > 1e-3


@pytest.mark.parametrize(
    ("threshold", "pruned", "after"),
    [
        (0.0105, 10, 0.021),  # fewer than 18: doubles
        (0.0175, 17, 0.035),
        (0.0185, 18, 0.0185),  # within a tenth of 20: stays
        (0.0225, 22, 0.0225),
        (0.0235, 23, 0.01175),  # more than 22: halves
        (None, 0, 0.002),  # it starts at 0.001: |w| = 0.001 isn't below
    ],
)
def test_dsr_threshold_adapts(threshold, pruned, after):
    weights = [np.arange(1, 101).reshape(10, 10) / 1000, np.ones((10, 10))]
    masks = [np.ones((10, 10), bool), np.zeros((10, 10), bool)]
    masks[1].flat[:20] = True
    _, kept = made(weights, masks, [np.ones((10, 10))] * 2, method="dsr")
    kept.rule_state |= {} if threshold is None else {"threshold": threshold}
    report = kept.update(1 / 6)  # of 120
    assert [line.pruned for line in report] == [pruned, 0]
    assert kept.rule_state["threshold"] == after
    # Each layer grows by what it has left: 100 - pruned of 120 - pruned.
    assert abs(report[0].grown - pruned * (100 - pruned) / (120 - pruned)) <= 1


def test_deepr_keeps_signs_and_rewires_at_once():
    run = Trained(method="deepr", density=0.2)
    run.steps(1)
    signs = {n: run.masking.rule_state[f"sign/{n}"].clone() for n, _ in params(run)}
    born = 0
    for _ in range(30):
        before = dict(run.masking.masks)  # not even DeepR writes into a mask: no copies needed
        run.steps(1)
        for name, p in params(run):
            mask, weight = run.masking.masks[name], p.detach()
            assert torch.equal(run.masking.rule_state[f"sign/{name}"], signs[name])
            assert not (weight * signs[name] < 0).any() and not weight[~mask].any()
            new = mask & ~before[name]
            born += int(new.sum())
            assert not weight[new].any()
            assert not run.optimizer.state[p]["momentum_buffer"][new].any()
    assert born > 20
    assert {abs(s) for n in signs for s in signs[n].unique().tolist()} == {1}


def test_deepr_step_by_hand() -> None:
    """lr * l1 is taken off towards zero, with noise; a weight that crosses goes, another wakes at
    zero, uniformly over the dormant ones of both layers.
    """
    model, options = Net((200, 200), (100, 200)), {"l1": 0.1, "temperature": 0.01}
    optimizer = sgd(model, lr=0.5)
    kept = Masking(model, optimizer, 0.5, method="deepr", generator=seeded(0), options=options)
    before = torch.cat([mask.view(-1) for mask in kept.masks.values()])
    for name, parameter in kept.parameters.items():
        parameter.data = 10.0 * kept.masks[name]
    rules.deepr_step(kept)
    moved = torch.cat([p.detach().view(-1) for p in kept.parameters.values()])[before] - 10
    assert float(moved.mean()) == pytest.approx(-0.5 * 0.1, abs=0.004)
    assert float(moved.std()) == pytest.approx(math.sqrt(2 * 0.5 * 0.01), rel=0.03)
    crossed = before & (torch.rand(60_000, generator=seeded(1)) < 0.1)
    for parameter, here in zip(
        kept.parameters.values(), crossed.split([40_000, 20_000]), strict=True
    ):
        parameter.data[here.view_as(parameter)] = -1.0  # the signs are +
    rules.deepr_step(kept)
    after = torch.cat([mask.view(-1) for mask in kept.masks.values()])
    weight = torch.cat([p.detach().view(-1) for p in kept.parameters.values()])
    dormant = ~before | crossed
    assert after.sum() == before.sum() and (after | dormant).all()
    assert not weight[dormant].any() and weight[~dormant].all()
    woken, room = ((mask.view(20, -1).sum(1) / 1.0).numpy() for mask in (after & dormant, dormant))
    assert scipy_stats.chisquare(woken, room * (woken.sum() / room.sum())).pvalue > 1e-3


# --------------------------------------- variants, each against NumPy and what the code is known by


def shares_of(momenta, masks) -> np.ndarray:
    """Mean |momentum| (float32) where the masks are true, normalised."""
    pairs = zip(momenta, masks, strict=True)
    means = [abs(m.astype(np.float32)[k]).mean(dtype=float) if k.any() else 0.0 for m, k in pairs]
    return np.array(means) / np.sum(means)


def smallest_gone(weight: np.ndarray, mask: np.ndarray, number: int) -> np.ndarray:
    """The mask without so many smallest |weight|, which are distinct but for the sign."""
    size = np.where(mask, np.abs(weight.astype(np.float32)), np.inf).ravel()
    kept = mask.copy().ravel()
    kept[np.argsort(size, kind="stable")[:number]] = False
    return kept.reshape(mask.shape)


def test_importance_before_and_after_pruning_differ() -> None:
    """One layer's large momentum sits on the weights that go."""
    weight = np.arange(1, 21.0).reshape(4, 5)
    masks = [weight <= 10] * 2
    momenta = [np.where(weight <= 5, 9.0, 1.0), np.full((4, 5), 2.0)]  # mean 5 before, 1 after
    for rule, grown in (("momentum", [7, 3]), ("momentum_after", [3, 7])):  # 5 : 2 and 1 : 2
        _, kept = made([weight] * 2, masks, momenta, prune="magnitude_plain", redistribution=rule)
        assert [line.grown for line in kept.update(0.5)] == grown


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
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(10, 10)), rng.normal(size=(10, 10))]
    masks = [np.ones((10, 10), bool), rng.random((10, 10)) < 0.3]
    masks[0][0, :5] = False  # 5 % inactive
    for high, expected in ((5.0, pruned), (0.01, 48)):  # important, or not
        momenta = [np.full((10, 10), high), np.full((10, 10), 0.1)]
        report = made(weights, masks, momenta, **rules)[1].update(0.5)
        assert [line.pruned for line in report] == [expected, math.ceil(0.5 * masks[1].sum())]


@pytest.mark.parametrize("seed", range(12))
def test_feedback_over_several_updates(seed: int) -> None:
    """The regrowth of the official code, with every past deficit kept in a list."""
    rng = np.random.default_rng(seed)
    density = float(rng.choice([0.3, 0.6, 0.9]))
    weights, masks, momenta = random_case(rng, [(20, 20), (10, 10), (5, 8)], density, coarse=False)
    _, kept = made(weights, masks, momenta, prune="magnitude_up", options={"feedback": 1.0})
    budget, correction, deficits = sum(int(m.sum()) for m in masks), 0.0, []
    for _ in range(6):
        before = np.array(list(kept.active().values()))
        zeros = np.array([m.size for m in masks]) - before
        share = shares_of(momenta, [m.numpy() for m in kept.masks.values()])
        inactive = zeros / (zeros + before)
        rate = np.where((inactive < 0.2) & (share > 1 / 3), np.minimum(0.3, inactive), 0.3)
        pruned = np.ceil(np.round(rate * before, 6)).astype(int)
        most = 0.99 * (zeros + pruned)
        wanted = np.ceil(share * max(0.0, pruned.sum() + correction))
        for _ in range(1000):
            residual = np.clip(wanted - most, 0, None).sum()
            wanted = np.minimum(wanted, most)
            if residual == 0:
                break
            wanted = wanted + residual / 3
        wanted = np.minimum(wanted, most)
        report = kept.update(0.3)
        kept.advance()
        assert [line.pruned for line in report] == pruned.tolist()
        assert [line.grown for line in report] == np.floor(wanted).astype(int).tolist()
        deficits.append(budget - sum(kept.active().values()))
        correction = 0.25 * correction + 0.75 * deficits[-1] + np.mean(deficits)
        for i, (name, parameter) in enumerate(kept.parameters.items()):  # as after an epoch
            momenta[i] = rng.normal(size=momenta[i].shape) * (i + 1)
            new = torch.from_numpy(rng.normal(size=momenta[i].shape).astype(np.float32))
            parameter.data = new * kept.masks[name]
            buffer = torch.from_numpy(momenta[i].astype(np.float32))
            kept.optimizer.state[parameter]["momentum_buffer"] = buffer
    assert any(deficits)  # else nothing was steered


def test_a_layer_is_never_quite_filled_nor_left_empty_by_feedback() -> None:
    weights = [np.ones((10, 20)), np.ones((1, 2)), np.ones((30, 30))]
    masks = [np.arange(200).reshape(10, 20) < 150, np.array([[True, False]])]
    masks.append(np.ones((30, 30), bool))
    momenta = [np.full((10, 20), 99.0), np.full((1, 2), 1e-9), np.full((30, 30), 0.01)]
    _, kept = made(weights, masks, momenta, prune="magnitude_plain", options={"feedback": 1.0})
    report = kept.update(0.5)
    # The first layer wants nearly all 526 and takes 99 % of its 125 places, the second one weight;
    # the third takes what is left as far as it can.
    assert [line.pruned for line in report] == [75, 1, 450]
    assert [line.grown for line in report] == [123, 1, 402]


@pytest.mark.parametrize("seed", range(10))
def test_regrown_weights_keep_their_value_where_asked(seed: int) -> None:
    weights, masks, momenta = case_of(seed, 0.7)
    weights = [np.where(w == 0, 1.0, w) for w in weights]
    usual, keeping = (
        made(weights, masks, momenta, options={"keep_regrown": on})[1] for on in (0, 1)
    )
    regrown = 0
    assert usual.update(0.5) == keeping.update(0.5)
    for name, weight, mask in zip(usual.masks, weights, masks, strict=True):
        new = mask & keeping.masks[name].numpy()
        value = np.where(new, weight, 0).astype(np.float32)
        assert np.array_equal(keeping.parameters[name].detach().numpy(), value)
        regrown += int((new & (usual.parameters[name].detach().numpy() == 0)).sum())
    assert regrown  # else the test compares nothing


@pytest.mark.parametrize("seed", range(10))
def test_growth_may_choose_active_weights_again(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights, masks, momenta = case_of(seed, 0.6)
    for momentum, mask in zip(momenta, masks, strict=True):
        momentum *= rng.random(momentum.shape) < 0.1  # most have none
        mask.flat[0], momentum.flat[0] = False, 0.5  # one inactive weight has
    rules = {"prune": "magnitude_plain", "redistribution": "none", "options": {"grow_anywhere": 1}}
    _, kept = made(weights, masks, momenta, **rules)
    lost = 0
    for line, weight, mask, momentum in zip(kept.update(0.5), weights, masks, momenta, strict=True):
        number = math.ceil(0.5 * mask.sum())
        survivors = smallest_gone(weight, mask, number)
        score = np.where(survivors, 0, np.abs(momentum.astype(np.float32))).ravel()
        grown = survivors.copy().ravel()
        grown[np.argsort(-score, kind="stable")[:number]] = True
        new = kept.masks[line.name].numpy()
        assert np.array_equal(new, grown.reshape(mask.shape))
        assert line.active_after == new.sum() == line.active_before - line.pruned + line.grown
        lost += number - line.grown
    assert lost > 0


def test_momentum_can_be_reset_after_an_update():
    case = random_case(np.random.default_rng(5), [(8, 9), (5, 7)], 0.4, coarse=False)
    reset, plain = (made(*case, options=o)[1] for o in ({"reset_momentum": 1.0}, {}))
    assert reset.update(0.3) == plain.update(0.3)
    for name, mask in reset.masks.items():
        assert torch.equal(mask, plain.masks[name])
        new, old = (
            k.optimizer.state[k.parameters[name]]["momentum_buffer"] for k in (reset, plain)
        )
        assert torch.equal(new[mask], old[mask])
        assert torch.allclose(new[~mask].double(), old[mask].double().mean(), atol=1e-7)


# --------------------------------------------------------------------------------------- registries


NO_SENSE = {
    "prune": [
        lambda layers, rate, state: [~layer.mask for layer in layers],  # no subset
        lambda layers, rate, state: [layer.mask.float() for layer in layers],
        lambda layers, rate, state: [layer.mask[:1] for layer in layers],
    ],
    "redistribution": [lambda layer: math.nan, lambda layer: -1.0],
    "growth": [lambda layer: layer.weight / 0, lambda layer: layer.weight[:1]],
}


@pytest.mark.parametrize(("kind", "rule"), [(k, r) for k, rules in NO_SENSE.items() for r in rules])
def test_rules_without_sense_are_named(kind, rule) -> None:
    registry = {"prune": PRUNE, "redistribution": REDISTRIBUTION, "growth": GROWTH}[kind]
    registry.register("mine")(rule)
    try:
        run = Trained(**{kind: "mine"})
        run.steps(1)
        with pytest.raises(ValueError, match="'mine'"):
            run.masking.update()
    finally:
        del registry["mine"]
