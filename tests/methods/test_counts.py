"""How many weights: exact in every update, within one of the quotas over time."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import Masking
from lib.masking import (
    leave_no_layer_empty,
    share_out,
)
from lib.methods.counts import allocate, rounded, whole
from tests.support.masked import (
    Net,
    give_momentum,
    made,
    oracle_fill,
    seeded,
    sgd,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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
        masking.step()
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
        kept.advance(), other.advance()
        assert kept.update() == other.update()
