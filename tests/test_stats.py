"""Intervals, tests and the verdict rule, against hand-computed and published values."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lib.results.published import published
from lib.stats import (
    Interval,
    Verdict,
    fisher,
    holm,
    levene,
    n_needed,
    p_reproduced,
    paired_difference,
    sensitivity,
    share_difference,
    t_interval,
    trend,
    value_difference,
    verdict,
    widened,
    wilcoxon,
    wilson,
)

errors = st.floats(0, 100, allow_nan=False)


def by_seed(*values: float, first: int = 0) -> pd.Series:
    return pd.Series(values, index=range(first, first + len(values)), dtype=float)


# ------------------------------------------------------------------------------------- intervals


def test_t_interval_by_hand() -> None:
    # 1, 2, 3, 4, 5: mean 3, sd sqrt(2.5), t(0.975, 4) = 2.776445 from the printed tables
    half = 2.7764451 * math.sqrt(2.5 / 5)
    interval = t_interval([1, 2, 3, 4, 5])
    assert interval == pytest.approx((3, 3 - half, 3 + half, 5, math.sqrt(2.5)), rel=1e-7)
    # two values, 90 %: t(0.95, 1) = 6.313752
    assert t_interval([1.0, 2.0], level=0.9)[:3] == pytest.approx(
        (1.5, 1.5 - 6.3137515 / 2, 1.5 + 6.3137515 / 2), rel=1e-7
    )


def test_one_value_has_no_interval() -> None:
    mean, low, high, n, sd = t_interval([1.5])
    assert (mean, n) == (1.5, 1) and all(map(math.isnan, (low, high, sd)))


@pytest.mark.parametrize(
    ("values", "level", "message"),
    [
        ([], 0.95, "at least one value"),
        ([1.0, math.nan], 0.95, "1 of 2 that are not finite"),
        ([math.inf], 0.95, "not finite"),
        ([1.0, 2.0], 95, r"the level must lie in \(0, 1\)"),
        ([[1.0], [2.0]], 0.95, "flat list"),
    ],
)
def test_t_interval_refuses(values: list[Any], level: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        t_interval(values, level)


@given(st.lists(errors, min_size=2, max_size=12), errors, st.floats(0.1, 10))
def test_t_interval_moves_and_stretches_with_the_values(
    values: list[float], shift: float, scale: float
) -> None:
    interval = t_interval(values)
    moved = t_interval([scale * v + shift for v in values])
    for name in ("mean", "low", "high"):
        expected = scale * getattr(interval, name) + shift
        assert getattr(moved, name) == pytest.approx(expected, abs=1e-6)
    assert interval.low <= interval.mean <= interval.high
    assert t_interval(values, 0.99).high >= interval.high


def test_t_interval_covers_the_mean_as_often_as_it_says() -> None:
    samples = np.random.default_rng(0).normal(3.0, 2.0, size=(4000, 5))
    covered = [i.low < 3.0 < i.high for i in map(t_interval, samples)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.012)


# ---------------------------------------------------------------------------- paired differences


def test_paired_difference_by_hand() -> None:
    # differences -1, -2, -3 at seeds 1, 2, 3: mean -2, sd 1, t = -2 sqrt(3), t(0.975, 2) = 4.302653
    a, b = by_seed(9, 1, 2, 3), by_seed(2, 4, 6, 8, first=1)
    difference = paired_difference(a, b)
    assert (difference.n, difference.mean, difference.sd) == (3, -2, 1)
    assert difference.seeds == (1, 2, 3) and difference.left_out == (0, 4)
    assert difference.high == pytest.approx(-2 + 4.3026527 / math.sqrt(3), rel=1e-7)
    # with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2)
    t = 2 * math.sqrt(3)
    assert difference.p_t == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert difference.interval == Interval(-2, difference.low, difference.high, 3, 1)


def test_seeds_are_matched_by_number_not_by_place() -> None:
    a = pd.Series([1.0, 2.0, 5.0], index=[2, 0, 1])
    b = pd.Series([2.5, 5.5, 1.5], index=[0, 1, 2])
    assert paired_difference(a, b).mean == -0.5
    assert paired_difference(a, b).p_t == 0.0  # no spread at all


def test_diverged_and_missing_seeds_are_named() -> None:
    difference = paired_difference(by_seed(1, math.nan, 3), by_seed(1, 2, 4, 5))
    assert difference.seeds == (0, 2) and difference.left_out == (1, 3)


@pytest.mark.parametrize("n", [0, 1])
def test_below_two_seeds_nothing_is_tested(n: int) -> None:
    difference = paired_difference(by_seed(*[1.0] * n), by_seed(*[2.0] * n))
    assert difference.n == n
    for name in ("low", "high", "sd", "p_t"):
        assert math.isnan(getattr(difference, name))
    assert verdict("lower", difference.interval, margin=0.1) is Verdict.INCONCLUSIVE


def test_a_seed_that_comes_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="seed 3 comes twice in b"):
        paired_difference(by_seed(1.0), pd.Series([1.0, 2.0], index=[3, 3]))


@given(st.lists(st.tuples(errors, errors), min_size=2, max_size=10))
def test_the_difference_changes_sign_with_the_sides(pairs: list[tuple[float, float]]) -> None:
    a, b = (by_seed(*side) for side in zip(*pairs, strict=True))
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert one.mean == -other.mean and one.low == pytest.approx(-other.high, abs=1e-9)
    assert one.p_t == other.p_t


# ----------------------------------------------------------------------------- published values


def test_value_difference_by_hand() -> None:
    # ours 1, 3: mean 2, variance of the mean 1; published 1.5 with standard error 0.75
    se = math.sqrt(1 + 0.75**2)
    unknown_n = value_difference([1.0, 3.0], 1.5, 0.75)
    assert unknown_n.mean == 0.5
    assert unknown_n.high - 0.5 == pytest.approx(12.7062047 * se)  # t(0.975, 1)
    known_n = value_difference([1.0, 3.0], 1.5, 0.75, paper_n=2)
    df = se**4 / (1 + 0.75**4)
    assert 1 < df < 2 and 4.30 * se < known_n.high - 0.5 < 12.71 * se
    # the same data as two samples: Welch's test as scipy makes it
    from scipy import stats

    theirs = [0.75, 2.25]  # mean 1.5, standard error 0.75
    welch = stats.ttest_ind([1.0, 3.0], theirs, equal_var=False).confidence_interval()
    assert (known_n.low, known_n.high) == pytest.approx((welch.low, welch.high))


def test_value_difference_without_a_spread_has_no_interval() -> None:
    for interval in (
        value_difference([1.0], 1.5, 0.1),
        value_difference([1.0, 2.0], 1.5, math.nan),
    ):
        assert math.isnan(interval.low) and not math.isnan(interval.mean)
    with pytest.raises(ValueError, match="not negative"):
        value_difference([1.0, 2.0], 1.5, -0.1)
    with pytest.raises(ValueError, match="2 runs or more"):
        value_difference([1.0, 2.0], 1.5, 0.1, paper_n=1)


# -------------------------------------------------------------------------------- several tests


def test_holm_by_hand() -> None:
    # sorted .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04, made monotone
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
    with_gap = holm([0.01, math.nan, 0.02])
    assert with_gap[0] == 0.02 and math.isnan(with_gap[1]) and with_gap[2] == 0.02
    with pytest.raises(ValueError, match=r"a p-value lies in \[0, 1\], got 1\.2"):
        holm([1.2])


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_keeps_the_order_and_never_lowers_a_p_value(p: list[float]) -> None:
    adjusted = holm(p)
    assert all(low <= high <= 1 for low, high in zip(p, adjusted, strict=True))
    for i, j in itertools.permutations(range(len(p)), 2):
        if p[i] < p[j]:
            assert adjusted[i] <= adjusted[j]
    # Bonferroni on the smallest is where it starts
    if p:
        assert min(adjusted) == pytest.approx(min(1, len(p) * min(p)))


# ---------------------------------------------------------------------------------------- trend


def test_trend_by_hand() -> None:
    # x 1..4, y 1 3 2 4: slope 0.8, residual sum of squares 1.8, se = sqrt(0.9 / 5)
    line = trend([1, 2, 3, 4], [1, 3, 2, 4])
    half = 4.3026527 * math.sqrt(0.9 / 5)
    assert (line.slope, line.low, line.high) == pytest.approx((0.8, 0.8 - half, 0.8 + half))
    assert line.intercept == pytest.approx(0.5) and line.n == 4
    assert line.rho == pytest.approx(0.8)


def test_weighted_trend_agrees_with_repeated_points() -> None:
    x, y = [1.0, 2.0, 4.0, 8.0], [0.2, 0.1, 0.9, 1.4]
    repeats = [1, 4, 9, 1]  # weight 1 / se^2
    weighted = trend(x, y, [1.0, 0.5, 1 / 3, 1.0])
    repeated = trend(np.repeat(x, repeats), np.repeat(y, repeats))
    assert weighted.slope == pytest.approx(repeated.slope)
    assert weighted.intercept == pytest.approx(repeated.intercept)
    # the same residual sum, but 2 degrees of freedom instead of 13
    wide, narrow = weighted.high - weighted.slope, repeated.high - repeated.slope
    assert wide / narrow == pytest.approx(4.3026527 / 2.1603687 * math.sqrt(13 / 2))


def test_trend_at_its_limits() -> None:
    assert math.isnan(trend([1, 2], [1, 2]).p) and trend([1, 2], [1, 3]).slope == 2
    flat = trend([1, 2, 3], [5, 5, 5])
    assert (flat.slope, flat.p) == (0, 1) and math.isnan(flat.rho)
    with pytest.raises(ValueError, match="two different x"):
        trend([2, 2, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="differ in length"):
        trend([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="must be positive"):
        trend([1, 2, 3], [1, 2, 3], [1, 0, 1])


# ----------------------------------------------------------------------------------- sensitivity


def published_curves(method: str) -> dict[str, pd.Series]:
    table = published("sensitivity_momentum")
    table = table[(table["method"] == method) & (table["momentum"] < 0.99)]
    return {
        str(model): curve.set_index("momentum")["test_error_pct"]
        for model, curve in table.groupby("model")
    }


def test_the_papers_sensitivity_analysis_on_its_own_numbers() -> None:
    result = sensitivity(published_curves("sparse_momentum"), published_curves("dense"), 0.9)
    assert result.n == 12
    assert result.levene.statistic == pytest.approx(0.0102, abs=5e-5)
    assert result.levene.p == pytest.approx(0.92, abs=5e-3)
    assert result.wilcoxon == (27.0, 1.0)
    assert 0.2 < result.sd_a < result.sd_b < 0.6


def test_sensitivity_refuses_curves_that_do_not_match() -> None:
    sparse, dense = published_curves("sparse_momentum"), published_curves("dense")
    with pytest.raises(ValueError, match="same models"):
        sensitivity({"vgg16-d": sparse["vgg16-d"]}, dense, 0.9)
    with pytest.raises(ValueError, match="settings of a"):
        sensitivity(sparse | {"vgg16-d": sparse["vgg16-d"].drop(0.5)}, dense, 0.9)
    with pytest.raises(ValueError, match=r"no point at the reference 0\.85"):
        sensitivity(sparse, dense, 0.85)


def test_levene_and_wilcoxon_by_hand() -> None:
    # distances from the medians 1 0 1 and 3 0 3; group means 2/3, 2; W = 4 * (8/3) / (20/3)
    assert levene([1, 2, 3], [-1, 2, 5]).statistic == pytest.approx(1.6)
    # ranks of 1 2 3 4 with signs - + + +: the smaller rank sum is 1; 2 * 2 patterns of 2^4
    assert wilcoxon([2, 4, 6, 8], [3, 2, 3, 4]) == (1.0, 4 / 16)
    assert wilcoxon([1.0, 2.0], [1.0, 2.0]) == (0.0, 1.0)
    assert wilcoxon([0.1 + 0.2, 5.0, 6.0], [0.3, 1.0, 1.0]) == wilcoxon([4.0, 5.0])
    with pytest.raises(ValueError, match="differ in number: 2 and 1"):
        wilcoxon([1.0, 2.0], [1.0])


# --------------------------------------------------------------------------------------- verdict

YES, NO, OPEN = Verdict.REPRODUCED, Verdict.NOT_REPRODUCED, Verdict.INCONCLUSIVE


def interval(low: float, high: float) -> Interval:
    return Interval((low + high) / 2, low, high, 5, 1.0)


@pytest.mark.parametrize(
    ("low", "high", "lower", "match", "value"),
    [  # margin 0.2
        (-0.9, -0.5, YES, YES, NO),
        (-0.9, -0.1, YES, YES, OPEN),
        (-0.15, -0.1, YES, YES, YES),
        (-0.15, 0.1, NO, YES, YES),
        (-0.9, 0.1, OPEN, YES, OPEN),
        (-0.9, 0.9, OPEN, OPEN, OPEN),
        (-0.1, 0.9, OPEN, OPEN, OPEN),
        (0.1, 0.15, NO, YES, YES),
        (0.1, 0.9, NO, OPEN, OPEN),
        (0.5, 0.9, NO, NO, NO),
        (math.nan, math.nan, OPEN, OPEN, OPEN),
    ],
)
def test_the_verdict_rule(
    low: float, high: float, lower: Verdict, match: Verdict, value: Verdict
) -> None:
    assert verdict("lower", interval(low, high), 0.2) is lower
    assert verdict("match", interval(low, high), 0.2) is match
    assert verdict("value", interval(low, high), 0.2) is value


def test_a_reduced_run_says_nothing_about_a_value() -> None:
    for profile in ("smoke", "quick"):
        good = interval(-0.01, 0.01)
        assert verdict("value", good, 0.2, profile) is Verdict.NOT_COMPARABLE
        assert verdict("match", good, 0.2, profile) is Verdict.REPRODUCED


def test_verdict_refuses_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="unknown kind of claim 'better'"):
        verdict("better", interval(0, 1), 0.2)  # type: ignore[arg-type]
    for margin in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="margin must be"):
            verdict("lower", interval(0, 1), margin)
    with pytest.raises(ValueError, match="upside down"):
        verdict("lower", interval(1, 0), 0.2)


@given(st.floats(-5, 5), st.floats(0, 5), st.floats(0, 2))
def test_a_narrower_interval_never_turns_a_verdict_round(
    middle: float, half: float, margin: float
) -> None:
    for claim in ("match", "value"):
        wide = verdict(claim, interval(middle - half, middle + half), margin)
        narrow = verdict(claim, interval(middle - half / 2, middle + half / 2), margin)
        assert wide is OPEN or narrow is wide
    # a worse A never helps A
    order = [NO, OPEN, YES]
    here = verdict("match", interval(middle - half, middle + half), margin)
    worse = verdict("match", interval(middle + 1 - half, middle + 1 + half), margin)
    assert order.index(worse) <= order.index(here)


def test_at_least_and_same_by_hand() -> None:
    assert verdict("at_least", interval(-0.1, 9), 0.2) is Verdict.REPRODUCED
    assert verdict("at_least", interval(-0.1, 9), 0.2, "quick") is Verdict.NOT_COMPARABLE
    assert verdict("at_least", interval(-9, -0.3), 0.2) is Verdict.NOT_REPRODUCED
    assert verdict("at_least", interval(-0.3, 9), 0.2) is Verdict.INCONCLUSIVE
    assert verdict("same", interval(-0.1, 0.1), 0.2, "quick") is Verdict.REPRODUCED
    assert verdict("same", interval(-0.4, -0.3), 0.2, "quick") is Verdict.NOT_REPRODUCED
    assert verdict("same", interval(0.1, 0.3), 0.2, "quick") is Verdict.INCONCLUSIVE


@pytest.mark.parametrize("claim", ["lower", "match", "at_least", "same", "value"])
@given(values=st.lists(st.floats(-2, 2), min_size=3, max_size=6), margin=st.floats(0.1, 1))
@settings(max_examples=60)
def test_the_p_value_is_the_one_behind_the_verdict(
    claim: Any, values: list[float], margin: float
) -> None:
    one = t_interval(values)
    p = p_reproduced(claim, one, margin)
    if abs(p - 0.05) > 1e-9:
        assert (p < 0.05) is (verdict(claim, one, margin) is Verdict.REPRODUCED)


RANGE = Interval(0.0, -1.0, 1.0, 3, math.nan)  # of repeats: no standard deviation


def test_p_reproduced_by_hand() -> None:
    # differences -1, -2, -3: t = -2 / (1 / sqrt(3)) = -3.464, two-sided p = 0.0742
    assert p_reproduced("lower", t_interval([-1, -2, -3]), 0.1) == pytest.approx(0.07418, abs=1e-5)
    assert math.isnan(p_reproduced("lower", RANGE, 0.1))


def test_n_needed_is_the_first_that_decides() -> None:
    one = Interval(-0.1, -0.3, 0.1, 4, 0.1257)
    needed = n_needed("lower", one, 0.05)
    assert needed is not None
    for n, decides in ((needed - 1, False), (needed, True)):
        half = float(stats.t.ppf(0.975, n - 1)) * one.sd / math.sqrt(n)
        again = Interval(one.mean, one.mean - half, one.mean + half, n, one.sd)
        assert (verdict("lower", again, 0.05) is not Verdict.INCONCLUSIVE) is decides
    assert n_needed("lower", RANGE, 0.05) is None
    assert n_needed("match", Interval(0.05, 0, 0.1, 4, 1.0), 0.05) is None  # on the bound


def test_an_extreme_of_several_has_a_wider_interval() -> None:
    one = t_interval([1.0, 2.0, 3.0, 4.0])
    wide = widened(one, 5)
    half = float(stats.t.ppf(0.995, 3)) * one.sd / 2  # 1 - 0.05 / 5 / 2
    assert (wide.low, wide.high) == pytest.approx((2.5 - half, 2.5 + half))
    assert widened(one, 1) == one and widened(RANGE, 5) is RANGE


# ---------------------------------------------------------------------------------------- shares


def test_wilson_by_hand_and_published() -> None:
    # Newcombe 1998, table I: 81 of 263 has 0.2553 to 0.3662, 0 of 20 has 0 to 0.1611
    assert wilson(81, 263)[2:] == pytest.approx((81 / 263, 0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20)[3:] == pytest.approx((0, 0.1611), abs=5e-5)
    z = 1.959964
    centre, half = (7 + z**2 / 2) / (10 + z**2), z / (10 + z**2) * math.sqrt(2.1 + z**2 / 4)
    assert wilson(7, 10)[3:] == pytest.approx((centre - half, centre + half), abs=1e-6)
    assert math.isnan(wilson(0, 0).share)
    with pytest.raises(ValueError, match="0 <= k <= n"):
        wilson(3, 2)


def test_difference_of_shares_as_published() -> None:
    # Newcombe 1998 (interval estimation for the difference), table II, method 10: 56/70 - 48/80
    found = share_difference(wilson(56, 70), wilson(48, 80))
    assert found[:3] == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    # ... and 10/10 - 0/10: 0.6075 to 1
    assert share_difference(wilson(10, 10), wilson(0, 10))[1:3] == pytest.approx(
        (0.6075, 1.0), abs=5e-5
    )


def test_fisher_by_hand() -> None:
    # tea: 3 of 4 against 1 of 4: (16 + 1 + 16 + 1) / 70
    assert fisher(wilson(3, 4), wilson(1, 4)) == pytest.approx(34 / 70)
    assert math.isnan(fisher(wilson(0, 0), wilson(1, 4)))
