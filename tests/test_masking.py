"""The algorithm against an independent oracle, its invariants, the other methods, bad input."""

from __future__ import annotations

import copy
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from torch import nn

from lib import Masking, build_model, masking
from lib.config import METHODS
from lib.masking import (
    GROWTH,
    PRUNE,
    REDISTRIBUTION,
    DivergenceError,
    allocate,
    initial_counts,
    leave_no_layer_empty,
    maskable_parameters,
    pick,
    rounded,
    share_out,
    whole,
)
from lib.methods import baselines

# A mean over thousands of weights is summed in another order in NumPy: shares agree to rounding,
# and exactly where the numbers are small multiples of a power of two, as they are made here.


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # threads only cost time on tensors this small
    yield
    torch.set_num_threads(before)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    """Some weights of given shapes, without a forward pass."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        for i, shape in enumerate(shapes):
            self.register_parameter(f"w{i}", nn.Parameter(torch.zeros(shape)))
        self.register_parameter("bias", nn.Parameter(torch.ones(3)))


def sgd(model: nn.Module, **kw) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **kw})


def give_momentum(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, value: torch.Tensor):
    optimizer.state[parameter]["momentum_buffer"] = value.clone()


def made(weights, masks, momenta, **kw) -> tuple[Net, Masking]:
    """A masking whose weights, masks and momentum are the given arrays."""
    model = Net(*(w.shape for w in weights))
    optimizer = sgd(model)
    kept = Masking(model, optimizer, density=1.0, generator=seeded(0), **kw)
    for i, (weight, mask, momentum) in enumerate(zip(weights, masks, momenta, strict=True)):
        parameter = getattr(model, f"w{i}")
        parameter.data = torch.from_numpy(np.where(mask, weight, 0).astype(np.float32))
        kept.masks[f"w{i}"] = torch.from_numpy(mask.copy())
        give_momentum(optimizer, parameter, torch.from_numpy(momentum.astype(np.float32)))
    return model, kept


def random_case(rng: np.random.Generator, shapes, density: float, coarse: bool):
    """Weights, masks (each with one active weight at least) and momenta; coarse: many ties."""
    weights, masks, momenta = [], [], []
    for shape in shapes:
        size = math.prod(shape)
        raw = rng.integers(-4, 5, shape) if coarse else rng.integers(-999, 1000, shape)
        weights.append(raw / 64)
        momenta.append(rng.integers(-3, 4, shape) / 8 if coarse else rng.normal(size=shape))
        mask = rng.random(shape) < density
        mask.reshape(-1)[rng.integers(size)] = True
        masks.append(mask)
    return weights, masks, momenta


# ---------------------------------------------------------------------------------- the oracle


def oracle_update(weights, masks, momenta, rate: float):
    """One cycle of sparse momentum, one weight at a time, in exact fractions where it matters."""
    layers = range(len(weights))
    means = []
    for i in layers:
        active = [
            abs(Fraction(float(np.float32(momenta[i].flat[j]))))
            for j in range(masks[i].size)
            if masks[i].flat[j]
        ]
        means.append(sum(active) / len(active))
    total = sum(means)
    share = [m / total if total else Fraction(0) for m in means]

    survivors, pruned = [], []
    for i in layers:
        size, active = masks[i].size, int(masks[i].sum())
        inactive_share = (size - active) / size
        own = rate
        if size - active < Fraction(1, 5) * size and share[i] > Fraction(1, len(weights)):
            own = min(rate, inactive_share)
        gone = min(active, math.floor(round(float(own) * active, 9) + 0.5))  # half a weight up
        order = sorted(
            (j for j in range(size) if masks[i].flat[j]),
            key=lambda j, i=i: (abs(float(np.float32(weights[i].flat[j]))), j),
        )
        kept = masks[i].copy()
        for j in order[:gone]:
            kept.flat[j] = False
        survivors.append(kept)
        pruned.append(gone)

    room = [int((~kept).sum()) for kept in survivors]
    counts = oracle_fill(sum(pruned), share, room)
    for i in layers:  # no layer is left empty
        if survivors[i].sum() + counts[i] == 0:
            best = max(
                (j for j in layers if counts[j] > 0),
                key=lambda j: (int(survivors[j].sum()) + counts[j], -j),
            )
            counts[best] -= 1
            counts[i] += 1

    after = []
    for i in layers:
        order = sorted(
            (j for j in range(masks[i].size) if not survivors[i].flat[j]),
            key=lambda j, i=i: (-abs(float(np.float32(momenta[i].flat[j]))), j),
        )
        new = survivors[i].copy()
        for j in order[: counts[i]]:
            new.flat[j] = True
        after.append(new)
    values = [np.where(s, w, 0).astype(np.float32) for s, w in zip(survivors, weights, strict=True)]
    return after, values, pruned, counts, share


def oracle_fill(total: int, share: list[Fraction], room: list[int]) -> list[int]:
    """Water level found by raising it from one full layer to the next; then largest remainders."""
    n = len(share)
    quota = [Fraction(0)] * n
    todo = [i for i in range(n) if room[i]]
    left = Fraction(total)
    while todo and left:
        w = {i: share[i] for i in todo}
        if not any(w.values()):
            w = {i: Fraction(room[i]) for i in todo}
        growing = [i for i in todo if w[i] > 0]
        level = left / sum(w[i] for i in growing)
        first = min(Fraction(room[i]) / w[i] for i in growing)
        if level < first:
            for i in growing:
                quota[i] = w[i] * level
            break
        tightest = [i for i in growing if Fraction(room[i]) / w[i] == first]
        for i in tightest:
            quota[i] = Fraction(room[i])
            left -= room[i]
        todo = [i for i in todo if i not in tightest]
    counts = [math.floor(q) for q in quota]
    rest = sorted(range(n), key=lambda i: (-(quota[i] - counts[i]), i))
    for i in rest[: total - sum(counts)]:
        counts[i] += 1
    return counts


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


# ---------------------------------------------------------------------------------- properties


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


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 1, allow_subnormal=True) | st.just(0.0), st.integers(0, 50)),
        min_size=1,
        max_size=8,
    ),
    st.floats(0, 1),
)
def test_allocate_is_exact_and_fair(pairs, part):
    shares, room = [p[0] for p in pairs], [p[1] for p in pairs]
    total = round(part * sum(room))
    counts = allocate(total, shares, room)
    assert sum(counts) == total
    assert all(0 <= c <= r for c, r in zip(counts, room, strict=True))
    exact = oracle_fill(total, [Fraction(s) for s in shares], room)
    assert all(abs(a - b) <= 1 for a, b in zip(counts, exact, strict=True))


def test_allocate_by_hand():
    assert allocate(10, [0.5, 0.3, 0.2], [100, 100, 100]) == [5, 3, 2]
    assert allocate(10, [0.5, 0.3, 0.2], [2, 100, 100]) == [2, 5, 3]  # 8 split 3 : 2
    assert allocate(10, [1.0, 0.0, 0.0], [4, 2, 6]) == [4, 2, 4]  # the rest by room 2 : 6
    assert allocate(2, [1, 1, 1], [9, 9, 9]) == [1, 1, 0]  # ties: the earlier layer
    assert allocate(0, [1.0], [0]) == [0]
    assert allocate(3, [5e-324, 5e-324], [100, 100]) == [2, 1]
    with pytest.raises(ValueError, match="cannot place 5 weights in 4 free positions"):
        allocate(5, [1, 1], [2, 2])
    with pytest.raises(ValueError, match=r"finite and not negative.*nan"):
        allocate(1, [math.nan], [2])


def test_no_layer_is_left_empty():
    assert leave_no_layer_empty([0, 4, 1], [0, 0, 9]) == [1, 4, 0]
    assert leave_no_layer_empty([0, 4, 0], [0, 0, 9]) == [1, 3, 0]
    weights = [np.ones((1, 2)), np.ones((8, 8))]
    masks = [np.array([[True, False]]), np.ones((8, 8), bool)]
    momenta = [np.zeros((1, 2)), np.ones((8, 8))]
    report = made(weights, masks, momenta)[1].update(1.0)
    assert [line.active_after for line in report] == [1, 64]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.sampled_from(["value", "smallness"]))
def test_pick_takes_the_largest_and_the_earliest(seed, size, score):
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.integers(-3, 4, size).astype(np.float32))
    candidates = torch.from_numpy(rng.random(size) < 0.6)
    k = int(rng.integers(0, int(candidates.sum()) + 1))
    ranked = -values.abs() if score == "smallness" else values
    order = sorted(np.flatnonzero(candidates.numpy()), key=lambda j: (-float(ranked[j]), j))
    expected = torch.zeros(size, dtype=torch.bool)
    expected[order[:k]] = True
    by_numpy = values.double()  # the compiled pass takes float32 only
    on_gpu = OnGPU(values)
    for given_values in (values, by_numpy, on_gpu):
        found = pick(given_values, candidates, k, score).as_subclass(torch.Tensor)
        assert torch.equal(found, expected)


class OnGPU(torch.Tensor):
    """A CPU tensor that says it is on a GPU, so that `pick` takes the branch without host syncs."""

    is_cpu = False
    device = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pick_refuses_more_than_there_are(dtype):
    with pytest.raises(ValueError, match="cannot pick 3 of 2 candidates"):
        pick(torch.zeros(4, dtype=dtype), torch.tensor([True, False, True, False]), 3)


# ------------------------------------------------------------------- rounding over many updates


class Counts:
    """What `share_out` reads of a layer."""

    def __init__(self, name: str, numel: int, active: int, share: float, pruned: int) -> None:
        self.name, self.numel, self.active = name, numel, active
        self.share, self.pruned = share, pruned


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(20, 3000), min_size=1, max_size=6),
    st.lists(
        st.tuples(st.floats(0, 1), st.lists(st.floats(0, 1), min_size=6, max_size=6)),
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
        shares = (
            [w / total for w in weights[: len(actives)]]
            if (total := sum(weights[: len(actives)]))
            else [1 / len(actives)] * len(actives)
        )
        layers = []
        for i, active in enumerate(actives):
            pruned = rounded(rate * active, active, f"pruned/{i}", state)
            cumulated["pruned"][i] += rate * active - pruned
            layers.append(Counts(str(i), sizes[i], active, shares[i], pruned))
        grown = share_out(layers, state)
        assert sum(grown) == sum(layer.pruned for layer in layers)
        quota = [share * sum(grown) for share in shares]
        room = [layer.numel - layer.active + layer.pruned for layer in layers]
        for i, layer in enumerate(layers):
            # A quota beyond the room, or one so small that the debt of earlier roundings exceeds it
            capped |= quota[i] >= room[i] or quota[i] + cumulated["grown"][i] < 0
            cumulated["grown"][i] += quota[i] - grown[i]
            actives[i] += grown[i] - layer.pruned
        assert sum(actives) == budget
        assert max(map(abs, cumulated["pruned"])) <= 0.5 + 1e-6
        assert capped or max(map(abs, cumulated["grown"])) < 1 + 1e-6


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 9), st.integers(0, 9)), min_size=1, max_size=8), st.data())
def test_whole_numbers_are_exact_within_their_bounds(pairs, data):
    wanted, room = [p[0] for p in pairs], [p[1] for p in pairs]
    total = data.draw(st.integers(0, sum(room)))
    counts = whole(total, wanted, room)
    assert sum(counts) == total
    assert all(0 <= n <= r for n, r in zip(counts, room, strict=True))


@pytest.mark.parametrize("rule", ["nonzeros", "none", "layer_size"])
@pytest.mark.parametrize("density", [0.01, 0.02, 0.05])
def test_no_small_layer_drains_by_rounding(rule, density):
    """A hundred updates of LeNet-300-100's layers, a quarter of the rows, at the paper's rates."""
    shapes = [(75, 784), (100, 75), (10, 100)]
    model = Net(*shapes)
    masking = Masking(
        model, sgd(model), density, 0.2, 100, redistribution=rule, generator=seeded(0)
    )
    rng = seeded(1)
    for parameter in masking.parameters.values():
        give_momentum(masking.optimizer, parameter, torch.randn(parameter.shape, generator=rng))
    start = masking.active()
    for _ in range(100):
        for parameter in masking.parameters.values():
            parameter.data.normal_(generator=rng)
        masking.step()
        masking.update()
        now = masking.active()
        # By layer size an equilibrium is reached that is the start: uniform densities.
        assert all(abs(now[n] - start[n]) <= max(2, 0.15 * start[n]) for n in start), now


def test_what_rounding_leaves_over_survives_a_checkpoint():
    def at_one_percent() -> tuple[Net, Masking]:
        model = Net((20, 50), (10, 30))
        masking = Masking(
            model, sgd(model), 0.03, 0.11, redistribution="layer_size", generator=seeded(0)
        )
        for p in masking.parameters.values():
            p.data.normal_(generator=seeded(5))
            give_momentum(masking.optimizer, p, torch.randn(p.shape, generator=seeded(6)))
        masking.apply()
        return model, masking

    model, kept = at_one_percent()
    kept.update()
    carried = {k: v for k, v in kept.rule_state.items() if k.startswith(("pruned/", "grown/"))}
    assert any(carried.values())
    other_model, other = at_one_percent()
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(kept.state_dict()))
    assert other.rule_state == kept.rule_state
    for _ in range(5):
        assert kept.update() == other.update()


# ------------------------------------------------------------------------------- starting masks


@pytest.mark.parametrize("init", ["uniform", "erk"])
@pytest.mark.parametrize("density", [0.01, 0.05, 0.123, 0.5, 0.9, 1.0])
def test_start_density_is_exact(init, density):
    model = build_model("lenet5", generator=seeded(0))
    kept = Masking(model, sgd(model), density=density, init=init, generator=seeded(1))
    assert sum(kept.active().values()) == round(density * 430_500)
    assert kept.weights_total == 430_500
    assert kept.density == round(density * 430_500) / 430_500
    for name, mask in kept.masks.items():
        assert mask.dtype == torch.bool
        assert not kept.parameters[name].detach()[~mask].any()


def test_uniform_and_erk_layer_densities():
    model = build_model("lenet5", generator=seeded(0))
    parameters = maskable_parameters(model)
    counts = initial_counts(parameters, 0.05, "uniform")
    assert all(abs(c - 0.05 * parameters[n].numel()) < 1 for n, c in counts.items())
    counts = initial_counts(parameters, 0.05, "erk")
    ideal = {n: sum(p.shape) / p.numel() for n, p in parameters.items()}
    scales = {n: counts[n] / parameters[n].numel() / ideal[n] for n in counts}
    open_layers = [s for n, s in scales.items() if counts[n] < parameters[n].numel()]
    assert max(open_layers) / min(open_layers) < 1.02
    full = [s for n, s in scales.items() if counts[n] == parameters[n].numel()]
    assert full and max(full) < min(open_layers) * 1.01  # only what the cap cuts off


def test_an_output_layer_can_start_half_dense():
    parameters = maskable_parameters(build_model("lenet300-100", generator=seeded(0)))
    for density in (0.01, 0.02, 0.05):
        *others, last = initial_counts(parameters, density, "half_output").values()
        assert sum(others) + last == round(density * 266_200) and abs(last - 500) <= 1
        first, second = (n / p.numel() for n, p in zip(others, parameters.values(), strict=False))
        assert first == pytest.approx(second, rel=0.01)


def test_start_masks_are_uniform_over_positions():
    counts = torch.zeros(20)
    for seed in range(400):
        model = Net((4, 5))
        counts += (
            Masking(model, sgd(model), density=0.25, generator=seeded(seed)).masks["w0"].reshape(-1)
        )
    assert scipy_stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("init", ["uniform_drawn", "erk_drawn"])
def test_drawn_masks_have_their_density_in_expectation(init):
    model = build_model("lenet5", generator=seeded(0))
    counts = initial_counts(maskable_parameters(model), 0.01, init.removesuffix("_drawn"))
    drawn = []
    for seed in range(20):
        kept = Masking(model, sgd(model), density=0.01, init=init, generator=seeded(seed))
        drawn.append(list(kept.active().values()))
    found = np.array(drawn)
    assert (found.min(0) > 0).all() and (found.std(0) > 0).all()
    expected = np.array([counts[n] for n in kept.masks])
    assert (abs(found.mean(0) - expected) < 4 * np.sqrt(expected / 20) + 0.2).all()


def test_a_layer_drawn_empty_gets_one_weight():
    model = Net((2, 2), (200, 200))
    for seed in range(30):
        kept = Masking(model, sgd(model), 0.15, init="uniform_drawn", generator=seeded(seed))
        assert kept.active()["w0"] >= 1
    with pytest.raises(ValueError, match="unknown init 'drawn'"):
        Masking(model, sgd(model), 0.1, init="drawn")


def test_their_set_prunes_one_more_and_grows_elsewhere():
    """Constant fraction of DSR's authors' code: int(fraction * active) + 1, never the same ones."""
    rng = np.random.default_rng(4)
    weights = [rng.normal(size=(20, 20)), rng.normal(size=(6, 6))]
    masks = [rng.random((20, 20)) < 0.3, rng.random((6, 6)) < 0.9]
    momenta = [np.ones((20, 20)), np.ones((6, 6))]
    rules = {"prune": "magnitude_and_one", "redistribution": "none", "growth": "random_elsewhere"}
    _, kept = made(weights, masks, momenta, **rules)
    report = kept.update(0.1)
    for line, before in zip(report, masks, strict=True):
        after = kept.masks[line.name].numpy()
        assert line.pruned == line.grown == math.floor(0.1 * before.sum()) + 1
        free = int((~before).sum())
        regrown = line.pruned - int((before & ~after).sum())
        assert regrown == max(0, line.grown - free)


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


# --------------------------------------------------------------------- methods on a small network


def small_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 12),
        nn.ReLU(),
        nn.Linear(12, 4),
    )


class Trained:
    """A small network in training on random data, with its masking."""

    def __init__(self, seed: int = 0, model: nn.Module | None = None, optimizer=None, **kw) -> None:
        self.model = model or small_model()
        self.optimizer = (optimizer or sgd)(self.model)
        kw = {"density": 0.2, "prune_rate": 0.3, **kw}
        self.masking = Masking(self.model, self.optimizer, generator=seeded(seed), **kw)
        self.data = seeded(7)

    def steps(self, n: int) -> None:
        for _ in range(n):
            x = torch.randn(8, 2, 4, 4, generator=self.data)
            y = torch.randint(0, 4, (8,), generator=self.data)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            self.masking.step()

    def bits(self) -> list[torch.Tensor]:
        return [
            *(p.detach().clone() for p in self.model.parameters()),
            *(m.clone() for m in self.masking.masks.values()),
        ]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


SPARSE = [name for name in METHODS if name not in ("dense", "small_dense")]


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


def test_no_redistribution_gives_each_layer_back_what_it_lost():
    run = Trained(redistribution="none")
    run.steps(3)
    for line in run.masking.update(0.4):
        assert line.pruned == line.grown > 0


def test_global_magnitude_prunes_the_smallest_of_all_layers():
    run = Trained(prune="global_magnitude", growth="random")
    run.steps(3)
    before = {n: m.clone() for n, m in run.masking.masks.items()}
    size = torch.cat(
        [run.masking.parameters[n].detach().abs()[m].reshape(-1) for n, m in before.items()]
    )
    count = math.floor(0.3 * len(size) + 0.5)
    limit = size.sort().values[count]
    below = {n: int((p.detach().abs()[before[n]] < limit).sum()) for n, p in params(run)}
    assert {line.name: line.pruned for line in run.masking.update(0.3)} == below


def params(run: Trained) -> list[tuple[str, nn.Parameter]]:
    return list(run.masking.parameters.items())


def test_gradient_growth_takes_the_largest_gradients():
    run = Trained(method="rigl")
    run.steps(3)
    before = {n: m.clone() for n, m in run.masking.masks.items()}
    gradient = {n: p.grad.abs().clone() for n, p in params(run)}
    size = {n: p.detach().abs().clone() for n, p in params(run)}
    report = run.masking.update(0.3)
    for line in report:
        kept = before[line.name] & ~pick(-size[line.name], before[line.name], line.pruned)
        grown = run.masking.masks[line.name] & ~kept
        assert grown.sum() == line.pruned == line.grown > 0
        rest = ~kept & ~grown
        assert gradient[line.name][grown].min() >= gradient[line.name][rest].max()


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


# -------------------------------------------------------------------------------- the baselines


def test_random_growth_is_uniform_over_the_inactive():
    counts, times = torch.zeros(40), 300
    generator = seeded(11)
    for _ in range(times):
        model = Net((5, 8))
        kept = Masking(model, sgd(model), density=0.5, method="set", generator=generator)
        mask = torch.zeros(40, dtype=torch.bool)
        mask[:20] = True
        kept.masks["w0"] = mask.view(5, 8)
        model.w0.data = torch.arange(1, 41.0).view(5, 8)
        kept.update(0.5)  # the ten smallest go; ten of the thirty without a weight grow
        assert kept.masks["w0"].view(-1)[10:20].all()
        counts += kept.masks["w0"].view(-1)
    grown = torch.cat([counts[:10], counts[20:]]).numpy()
    assert grown.sum() == 10 * times
    assert scipy_stats.chisquare(grown).pvalue > 1e-3


def test_dsr_threshold_adapts():
    weights = [np.arange(1, 101).reshape(10, 10) / 1000]
    masks, momenta = [np.ones((10, 10), bool)], [np.ones((10, 10))]

    def after(threshold: float) -> tuple[float, int]:
        _, kept = made(weights, masks, momenta, method="dsr")
        kept.rule_state["threshold"] = threshold
        report = kept.update(0.2)
        return kept.rule_state["threshold"], report[0].pruned

    assert after(0.0105) == (0.021, 10)  # fewer than 18: doubles
    assert after(0.0175) == (0.035, 17)
    assert after(0.0185) == (0.0185, 18)  # within a tenth of 20: stays
    assert after(0.0225) == (0.0225, 22)
    assert after(0.0235) == (0.01175, 23)  # more than 22: halves
    _, kept = made(weights, masks, momenta, method="dsr")
    assert kept.update(0.2)[0].pruned == 0  # it starts at 0.001: |w| = 0.001 isn't below
    assert kept.rule_state["threshold"] == 0.002


def test_dsr_redistributes_by_survivors():
    weights = [np.full((10, 10), 1.0), np.full((10, 10), 1.0)]
    weights[0].flat[:20] = 1e-4
    masks = [np.ones((10, 10), bool), np.zeros((10, 10), bool)]
    masks[1].flat[:20] = True
    masks[0].flat[90:] = False  # survivors 70 and 20
    _, kept = made(weights, masks, [np.ones((10, 10))] * 2, method="dsr")
    report = kept.update(0.2)
    assert [line.pruned for line in report] == [20, 0]
    assert [line.grown for line in report] == [16, 4]  # 20 * 70/90 = 15.6, 20 * 20/90 = 4.4


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
            assert not (weight * signs[name] < 0).any()
            assert not weight[~mask].any()
            new = mask & ~before[name]
            born += int(new.sum())
            assert not weight[new].any()
            assert not run.optimizer.state[p]["momentum_buffer"][new].any()
    assert born > 20
    assert {abs(s) for n in signs for s in signs[n].unique().tolist()} == {1}


def test_deepr_step_by_hand():
    """lr * l1 is taken off towards zero; a weight that crosses goes, another wakes at zero."""
    model = Net((2, 5))
    optimizer = sgd(model, lr=0.5)
    kept = Masking(
        model,
        optimizer,
        density=0.4,
        method="deepr",
        generator=seeded(0),
        options={"l1": 0.1, "temperature": 0.0},
    )
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, :4] = True
    kept.masks["w0"] = mask
    model.w0.data[0, :4] = torch.tensor([1.0, -1.0, 0.2, -0.2])
    kept.step()
    expected = torch.tensor([0.95, -0.95, 0.15, -0.15])
    torch.testing.assert_close(model.w0.detach()[0, :4], expected)
    model.w0.data[0, 2] = -0.3  # its sign is +
    kept.step()
    assert not kept.masks["w0"][0, 2] or model.w0[0, 2] == 0
    assert int(kept.masks["w0"].sum()) == 4
    torch.testing.assert_close(model.w0.detach()[0, [0, 1, 3]], torch.tensor([0.9, -0.9, -0.1]))


def test_deepr_noise_has_the_right_size():
    model = Net((200, 200))
    kept = Masking(
        model,
        sgd(model, lr=0.5),
        method="deepr",
        density=1.0,
        generator=seeded(0),
        options={"l1": 0.0, "temperature": 0.01},
    )
    model.w0.data.fill_(10.0)
    kept.step()
    noise = model.w0.detach() - 10
    assert float(noise.std()) == pytest.approx(math.sqrt(2 * 0.5 * 0.01), rel=0.03)
    assert abs(float(noise.mean())) < 0.003


def test_deepr_wakes_uniformly():
    counts = torch.zeros(30)
    generator = seeded(5)
    for _ in range(300):
        model = Net((2, 5), (4, 5))
        kept = Masking(model, sgd(model), density=1.0, method="deepr", generator=generator)
        for name in ("w0", "w1"):
            kept.masks[name] = torch.zeros_like(kept.masks[name])
        kept.rule_state = {
            f"sign/{n}": torch.ones_like(m, dtype=torch.int8) for n, m in kept.masks.items()
        }
        nothing = torch.empty(0, dtype=torch.int64)
        baselines._wake(kept, 6, [nothing, nothing])
        flat = torch.cat([m.reshape(-1) for m in kept.masks.values()])
        assert int(flat.sum()) == 6
        counts += flat
    assert scipy_stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_snip_against_gradients_taken_by_hand():
    model = small_model()
    x, y = torch.randn(8, 2, 4, 4, generator=seeded(0)), torch.arange(8) % 4

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(model(x), y)

    parameters = maskable_parameters(model)
    twin = copy.deepcopy(model)
    nn.functional.cross_entropy(twin(x), y).backward()
    score = np.concatenate(
        [
            np.abs(p.grad.numpy() * p.detach().numpy()).reshape(-1)
            for n, p in twin.named_parameters()
            if n in parameters
        ]
    )
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    before = {n: b.clone() for n, b in model.named_buffers()}
    masks = baselines.snip_masks(model, parameters, 0.1, loss)
    flat = np.concatenate([masks[n].numpy().reshape(-1) for n in parameters])
    assert flat.sum() == round(0.1 * flat.size)
    assert score[flat].min() > score[~flat].max()
    assert all((p.grad == 7).all() for p in model.parameters())
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    with pytest.raises(DivergenceError, match="SNIP"):
        baselines.snip_masks(model, parameters, 0.1, lambda: loss() * math.nan)


# ------------------------------------------------------------------- schedules, names, assigning


def test_a_copy_goes_its_own_way():
    """What a masking keeps between updates (lists of active weights) is never shared."""
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
    two.update(0.3)
    assert all(torch.equal(before[name], mask) for name, mask in one.masks.items())
    three = copy.deepcopy(one)
    assert one.update(0.3) == three.update(0.3)
    assert all(torch.equal(one.masks[name], mask) for name, mask in three.masks.items())
    assert any(not torch.equal(one.masks[name], mask) for name, mask in two.masks.items())


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


@pytest.mark.parametrize(
    ("keep", "gone"),
    [
        ((), set()),
        ("0.weight", {"0.weight"}),
        ("4", {"4.weight"}),
        (["0", "6.weight"], {"0.weight", "6.weight"}),
        ("[46].weight", {"4.weight", "6.weight"}),
    ],
)
def test_keep_dense(keep, gone):
    run = Trained(keep_dense=keep)
    assert set(run.masking.masks) == {"0.weight", "4.weight", "6.weight"} - gone
    sizes = {n: p.numel() for n, p in run.model.named_parameters() if p.dim() > 1 and n not in gone}
    assert sum(run.masking.active().values()) == round(0.2 * sum(sizes.values()))
    for name in gone:
        assert (dict(run.model.named_parameters())[name] != 0).all()


def test_biases_and_batch_norm_stay_dense():
    run = Trained(density=0.05)
    run.steps(3)
    run.masking.update()
    ones = [p for p in run.model.parameters() if p.dim() == 1]
    for p in ones:
        p.data.fill_(1.0)
    run.masking.step()
    run.masking.update()
    assert len(ones) == 5 and all((p == 1).all() for p in ones)


def test_masks_are_assignable_and_edits_count():
    run = Trained()
    run.steps(1)
    mask = torch.zeros(4, 12, dtype=torch.bool)
    mask[:, :3] = True
    run.masking.masks["6.weight"] = mask
    weight = run.masking.parameters["6.weight"].detach()
    weight.fill_(1.0)
    run.masking.step()
    assert torch.equal(weight, mask.float())
    run.masking.masks["6.weight"] = mask.clone()
    run.masking.step()
    run.masking.masks["6.weight"][0, 0] = False  # in place
    run.masking.step()
    assert weight[0, 0] == 0 and weight[1, 0] != 0
    new = {n: torch.rand(m.shape) < 0.5 for n, m in run.masking.masks.items()}
    run.masking.masks = new
    budget = sum(int(m.sum()) for m in new.values())
    run.steps(1)
    assert sum(line.active_after for line in run.masking.update()) == budget
    run.masking.masks.update({"6.weight": mask})
    assert run.masking.active()["6.weight"] == 12
    run.masking.update(0.0)
    assert not weight[:, 3:].any()


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


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"density": 0}, r"density must be in \(0, 1\], got 0"),
        ({"density": 1.5}, r"density must be in \(0, 1\], got 1.5"),
        ({"density": -0.1}, r"density must be in \(0, 1\], got -0.1"),
        ({"density": math.nan}, r"density must be in \(0, 1\], got nan"),
        ({"prune_rate": 1.1}, r"prune_rate must be in \[0, 1\], got 1.1"),
        ({"prune_rate": -1}, r"prune_rate must be in \[0, 1\], got -1"),
        ({"total_steps": 0}, "total_steps must be positive, got 0"),
        ({"method": "sparse_momentun"}, "unknown method 'sparse_momentun'.*'sparse_momentum'"),
        ({"prune": "magnitud"}, "unknown prune rule 'magnitud': did you mean 'magnitude'"),
        ({"redistribution": "moment"}, "unknown redistribution rule 'moment'.*'momentum'"),
        ({"growth": "randon"}, "unknown growth rule 'randon': did you mean 'random'"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin': did you mean 'cosine'"),
        ({"init": "erdos"}, "unknown init 'erdos'.*erk, erk_drawn, half_output, uniform"),
        ({"keep_dense": "layer9.*"}, "unknown keep_dense name 'layer9"),
        ({"keep_dense": "*"}, "no weight is left to mask"),
        ({"options": {"keep_regrow": 1.0}}, "unknown option 'keep_regrow'.*'keep_regrown'"),
        ({"density": 1e-9}, "density 1e-09 leaves 0.weight .108 weights. without"),
    ],
)
def test_bad_settings(kw, message):
    with pytest.raises(ValueError, match=message):
        Trained(**kw)


def test_optimizer_without_momentum():
    with pytest.raises(ValueError, match=r"0\.weight.*SGD runs with momentum=0.*Adam"):
        Trained(optimizer=lambda m: sgd(m, momentum=0))
    Trained(optimizer=lambda m: sgd(m, momentum=0), method="set")  # needs none
    model = small_model()
    with pytest.raises(ValueError, match=r"4.weight is masked but the optimizer doesn't hold it"):
        Masking(model, sgd(model[0]), density=0.5)


def test_update_before_the_first_step():
    with pytest.raises(ValueError, match=r"0.weight has no momentum in SGD yet.*optimizer.step"):
        Trained().masking.update()
    with pytest.raises(ValueError, match=r"0.weight has no gradient.*zero_grad"):
        Trained(method="rigl").masking.update()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite(bad):
    run = Trained()
    run.steps(2)
    run.optimizer.state[run.model[4].weight]["momentum_buffer"][0, 0] = bad
    with pytest.raises(DivergenceError, match=rf"4.weight.*momentum. is {bad} after 2 steps"):
        run.masking.update()
    run = Trained(method="rigl")
    run.steps(2)
    run.model[4].weight.grad[0, 0] = bad
    with pytest.raises(DivergenceError, match=rf"4.weight.*gradient. is {bad}"):
        run.masking.update()
    run = Trained(method="set")
    run.model[4].weight.data[run.masking.masks["4.weight"]] = bad
    with pytest.raises(ValueError, match=rf"4.weight.*weight. is {bad} after 0 steps"):
        run.masking.update()


def test_empty_layer():
    run = Trained()
    run.steps(1)
    run.masking.masks["6.weight"] = torch.zeros(4, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"6.weight has no active weight among 48"):
        run.masking.update()


def test_bad_masks():
    kept = Trained().masking
    with pytest.raises(ValueError, match=r"0.weight has shape \(2, 2\), its weight has \(6, 2, 3"):
        kept.masks["0.weight"] = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"6.weight must be of type torch.bool, got torch.float32"):
        kept.masks["6.weight"] = torch.ones(4, 12)
    with pytest.raises(ValueError, match=r"unknown masked parameter '6.weigth'.*'6.weight'"):
        kept.masks["6.weigth"] = torch.ones(4, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"masks are missing for 0.weight, 4.weight"):
        kept.masks = {"6.weight": torch.ones(4, 12, dtype=torch.bool)}
    for rate in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=rf"prune_rate must be in \[0, 1\], got {rate}"):
            kept.update(rate)


def test_a_copy_of_a_masking_is_its_own() -> None:
    """Also after an update, which keeps room for lists."""
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(8, 40)).square().sum().backward()
    optimizer.step()
    masking = Masking(model, optimizer, density=0.1)
    masking.update()
    other = copy.deepcopy(masking)
    before = masking.masks["weight"].clone()
    other.update(0.5)
    assert torch.equal(masking.masks["weight"], before)
    masking.update(0.5)
    assert torch.equal(masking.masks["weight"], other.masks["weight"])
    assert not torch.equal(masking.masks["weight"], before)
