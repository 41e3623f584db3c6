"""Intervals, paired tests and the rule behind every verdict.  Imports no torch.

Errors are percentages (0 to 100) and differences percentage points throughout; "95 %" stands for
the `level` that a function takes.  Values must be finite: a diverged run has no error and must be
left out, and reported, by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

NAN, INF = math.nan, math.inf


class Interval(NamedTuple):
    """A mean with its two-sided Student-t interval, n values and their standard deviation."""

    mean: float
    low: float
    high: float
    n: int
    sd: float


@dataclass(frozen=True)
class PairedDifference:
    """Difference a - b over the seeds that both have."""

    mean: float
    low: float
    high: float
    n: int
    sd: float
    p_t: float  # paired t-test, two-sided
    seeds: tuple[int, ...]
    left_out: tuple[int, ...]  # seeds that one side lacks or where it diverged
    one_sided: bool  # every seed's difference has the sign of the mean

    @property
    def interval(self) -> Interval:
        """Mean difference and interval, as `verdict` takes it."""
        return Interval(self.mean, self.low, self.high, self.n, self.sd)


@dataclass(frozen=True)
class Trend:
    """Straight line through an effect y against depth (or log width) x, and its rank correlation.

    The slope is in units of y per unit of x.
    """

    slope: float
    low: float
    high: float
    p: float
    intercept: float
    rho: float  # Spearman
    p_rho: float
    n: int


class Outcome(NamedTuple):
    """Statistic and two-sided p-value of a test."""

    statistic: float
    p: float


@dataclass(frozen=True)
class Sensitivity:
    """The paper's comparison of two groups of curves, centred at the reference setting."""

    levene: Outcome
    wilcoxon: Outcome
    n: int  # points per group
    sd_a: float  # spread of the centred points, percentage points
    sd_b: float


class Verdict(StrEnum):
    """What the runs say about a claim; `verdict` states the rule."""

    REPRODUCED = "reproduced"
    NOT_REPRODUCED = "not reproduced"
    INCONCLUSIVE = "inconclusive"
    NOT_COMPARABLE = "not comparable"


def t_interval(values: Iterable[float], level: float = 0.95) -> Interval:
    """Mean of the values and mean -+ t * sd / sqrt(n), t the Student quantile with n - 1 degrees.

    sd is the sample standard deviation (n - 1).  One value has no spread: interval and sd are NaN.
    Raises ValueError without values, for a value that is not finite, or a level outside (0, 1).
    """
    x = _finite("values", values)
    _check_level(level)
    if x.size == 0:
        raise ValueError("t_interval needs at least one value, got none.")
    mean = float(x.mean())
    if x.size == 1:
        return Interval(mean, NAN, NAN, 1, NAN)
    sd = float(x.std(ddof=1))
    half = _t_quantile(level, x.size - 1) * sd / math.sqrt(x.size)
    return Interval(mean, mean - half, mean + half, int(x.size), sd)


def paired_difference(a: pd.Series, b: pd.Series, level: float = 0.95) -> PairedDifference:
    """Difference a - b, both indexed by seed, over the seeds that both have with a finite value.

    Below two shared seeds everything that needs a spread is NaN.  Raises ValueError if a seed comes
    twice on one side.
    """
    for side, series in (("a", a), ("b", b)):
        twice = series.index[series.index.duplicated()]
        if len(twice):
            raise ValueError(f"seed {twice[0]} comes twice in {side}; pass one run per seed.")
    every = a.index.union(b.index)
    difference = a.astype(float).reindex(every) - b.astype(float).reindex(every)
    good = np.isfinite(difference.to_numpy())
    seeds, left_out = (tuple(int(s) for s in every[keep]) for keep in (good, ~good))
    d = difference.to_numpy()[good]
    if d.size == 0:
        return PairedDifference(NAN, NAN, NAN, 0, NAN, NAN, seeds, left_out, False)
    mean, low, high, n, sd = t_interval(d, level)
    p_t = NAN if n < 2 else _p_of_t(mean, sd / math.sqrt(n), n - 1)
    one_sided = bool((d < 0).all() or (d > 0).all())
    return PairedDifference(mean, low, high, n, sd, p_t, seeds, left_out, one_sided)


def value_difference(
    ours: Iterable[float],
    paper: float,
    paper_standard_error: float,
    paper_n: int | None = None,
    level: float = 0.95,
) -> Interval:
    """Ours minus a published mean, with Welch's interval from the published standard error.

    Degrees of freedom by Welch and Satterthwaite when the published n is known; if not (the paper
    states none for its tables) those of our side alone, n - 1, the least they can be as long as the
    paper has no fewer runs than we have.  NaN interval for fewer than two values or without
    a published standard error.  n is ours, sd the standard error of the difference times sqrt(n).
    """
    mean, _, _, n, sd = t_interval(ours, level)
    difference = mean - paper
    if n < 2 or not math.isfinite(paper_standard_error):
        return Interval(difference, NAN, NAN, n, NAN)
    if paper_standard_error < 0:
        raise ValueError(f"a standard error is not negative, got {paper_standard_error}.")
    mine, theirs = sd**2 / n, paper_standard_error**2
    se = math.sqrt(mine + theirs)
    df = float(n - 1)
    if paper_n is not None and se > 0:
        if paper_n < 2:
            raise ValueError(f"a published standard error needs 2 runs or more, got {paper_n}.")
        df = (mine + theirs) ** 2 / (mine**2 / (n - 1) + theirs**2 / (paper_n - 1))
    half = _t_quantile(level, df) * se
    return Interval(difference, difference - half, difference + half, n, se * math.sqrt(n))


def holm(p_values: Iterable[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979).

    NaN (a test that could not be made) stays NaN and does not count.  Raises ValueError for a
    p-value outside [0, 1].
    """
    p = [float(value) for value in p_values]
    for value in p:
        if not math.isnan(value) and not 0 <= value <= 1:
            raise ValueError(f"a p-value lies in [0, 1], got {value}.")
    order = sorted((i for i in range(len(p)) if not math.isnan(p[i])), key=p.__getitem__)
    adjusted, largest = [NAN] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def trend(
    x: Iterable[float],
    y: Iterable[float],
    standard_errors: Iterable[float] | None = None,
    level: float = 0.95,
) -> Trend:
    """Does y rise with x?  Least-squares slope with t interval and p, and Spearman's rho.

    With `standard_errors` of y the points weigh 1 / se^2; the scale of the errors is still
    estimated from the residuals (n - 2 degrees of freedom), so that errors that are too small do
    not make a trend.  Below three points interval and p-values are NaN.  Raises ValueError for
    lengths that differ, values that are not finite, a constant x, or se <= 0.
    """
    xs, ys = _finite("x", x), _finite("y", y)
    w = np.ones_like(xs)
    if standard_errors is not None:
        se = _finite("standard errors", standard_errors)
        if (se <= 0).any():
            raise ValueError(f"standard errors must be positive to weigh by, got {se.min()}.")
        w = 1 / se**2
    if not xs.size == ys.size == w.size:
        raise ValueError(f"x, y and standard errors differ in length: {xs.size, ys.size, w.size}.")
    _check_level(level)
    if xs.size == 0 or np.ptp(xs) == 0:
        raise ValueError(f"a trend needs two different x, got {sorted(set(xs.tolist()))}.")
    n = int(xs.size)
    w = w / w.sum()
    x_mean, y_mean = float(w @ xs), float(w @ ys)
    sxx = float(w @ (xs - x_mean) ** 2)
    slope = float(w @ ((xs - x_mean) * (ys - y_mean))) / sxx
    intercept = y_mean - slope * x_mean
    if n < 3:
        return Trend(slope, NAN, NAN, NAN, intercept, NAN, NAN, n)
    residual = ys - intercept - slope * xs
    se_slope = math.sqrt(float(w @ residual**2) / (n - 2) / sxx)
    half = _t_quantile(level, n - 2) * se_slope
    rho = p_rho = NAN
    if np.ptp(ys) > 0:
        spearman = stats.spearmanr(xs, ys)
        rho, p_rho = float(spearman.statistic), float(spearman.pvalue)
    p = _p_of_t(slope, se_slope, n - 2)
    return Trend(slope, slope - half, slope + half, p, intercept, rho, p_rho, n)


def levene(
    a: Iterable[float], b: Iterable[float], center: Literal["median", "mean"] = "median"
) -> Outcome:
    """Levene's test that a and b have equal spread (about the median: Brown and Forsythe)."""
    result = stats.levene(_finite("a", a), _finite("b", b), center=center)
    return Outcome(float(result.statistic), float(result.pvalue))


def wilcoxon(a: Iterable[float], b: Iterable[float] | None = None) -> Outcome:
    """Wilcoxon's signed-rank test that a - b (or a alone) is symmetric about zero; zeros dropped.

    Exact for up to 50 differences without ties (with ties up to 13).  Nothing but zeros: p = 1.
    """
    d = _finite("a", a)
    if b is not None:
        other = _finite("b", b)
        if other.size != d.size:
            raise ValueError(f"paired values differ in number: {d.size} and {other.size}.")
        d = d - other
    d = np.round(d, 10)  # so that float noise makes neither a zero nor a tie differ
    if not d.any():
        return Outcome(0.0, 1.0)
    result = stats.wilcoxon(d)
    return Outcome(float(result.statistic), float(result.pvalue))


def sensitivity(
    a: Mapping[str, pd.Series], b: Mapping[str, pd.Series], reference: float
) -> Sensitivity:
    """Is method a more sensitive to a hyper-parameter than method b?  The paper's test (section 5).

    `a` and `b` map a model to its mean errors, indexed by the setting.  Each curve is centred at
    its value at `reference`, the models are pooled, and the centred points of a and b compared by
    Levene's test about the median (spread) and Wilcoxon's test (level).  The paper takes momentum
    0.5 to 0.95 (0.99 left out), reference 0.9, models VGG16-D and AlexNet-s, a sparse and b dense.
    Raises ValueError if models or settings differ or the reference is none of the settings.
    """
    if set(a) != set(b) or not a:
        raise ValueError(f"a and b need the same models, got {sorted(a)} and {sorted(b)}.")
    points: dict[str, list[float]] = {"a": [], "b": []}
    for model in a:
        if sorted(a[model].index) != sorted(b[model].index):
            raise ValueError(
                f"{model}: settings of a {sorted(a[model].index)} and of b "
                f"{sorted(b[model].index)} differ; compare the settings that both have."
            )
        if reference not in a[model].index:
            raise ValueError(f"{model}: no point at the reference {reference}.")
        for side, curves in (("a", a), ("b", b)):
            curve = curves[model].astype(float).sort_index()
            points[side] += (curve - float(curve[reference])).tolist()
    pa, pb = _finite("a", points["a"]), _finite("b", points["b"])
    return Sensitivity(
        levene(pa, pb), wilcoxon(pa, pb), int(pa.size), float(pa.std(ddof=1)), float(pb.std(ddof=1))
    )


# Where an interval of a difference must lie whole for "reproduced", and for "not reproduced", by
# kind of claim; m is the margin.
_REGIONS: dict[str, tuple[Callable[[float], list[tuple[float, float]]], ...]] = {
    "lower": (lambda m: [(-INF, 0)], lambda m: [(0, INF), (-m, m)]),
    "match": (lambda m: [(-INF, m)], lambda m: [(m, INF)]),
    "at_least": (lambda m: [(-m, INF)], lambda m: [(-INF, -m)]),
    "same": (lambda m: [(-m, m)], lambda m: [(m, INF), (-INF, -m)]),
    "value": (lambda m: [(-m, m)], lambda m: [(m, INF), (-INF, -m)]),
}
Kind = Literal["lower", "match", "at_least", "same", "value"]


def verdict(claim: Kind, interval: Interval, margin: float, profile: str = "paper") -> Verdict:
    """The verdict on one claim, by this rule.

    The interval is the two-sided 95 % Student-t interval of a difference, the margin m (percentage
    points of error, >= 0) is stated with the claim and is what counts as no difference in practice.
    Without an interval (fewer than two shared seeds) every claim is INCONCLUSIVE.

    "lower": A has lower error than B; the difference is A - B, paired by seed.
        REPRODUCED       the interval lies wholly below zero
        NOT REPRODUCED   it lies wholly above zero, or wholly inside (-m, m)
    "match": A is as good as B; the difference is A - B, paired by seed.
        REPRODUCED       nothing in the interval is worse than +m
        NOT REPRODUCED   it lies wholly above +m
    "at_least": a gain of that size or a larger one; the difference is ours - the paper's.
        NOT COMPARABLE   the profile is not `paper`: a reduced run says nothing about the number
        REPRODUCED       nothing in the interval is less than -m
        NOT REPRODUCED   it lies wholly below -m
    "same": A and B differ by less than m, either way.
        REPRODUCED       the interval lies inside (-m, m)
        NOT REPRODUCED   it lies wholly outside [-m, m]
    "value": the error is the one in the paper; the difference is ours - the paper's, with the
    paper's own standard error (`value_difference`). As "same", but NOT COMPARABLE where the profile
    is not `paper`.

    INCONCLUSIVE otherwise, at this n: the interval straddles a bound. Raises ValueError for an
    unknown kind of claim, a margin that is negative or not finite, or an interval with low > high.
    """
    low, high = interval.low, interval.high
    good, bad = _regions(claim, margin)
    if low > high:
        raise ValueError(f"the interval [{low}, {high}] is upside down.")
    if claim in ("value", "at_least") and profile != "paper":
        return Verdict.NOT_COMPARABLE
    if math.isnan(low) or math.isnan(high):
        return Verdict.INCONCLUSIVE
    if any(bottom < low and high < top for bottom, top in good):
        return Verdict.REPRODUCED
    if any(bottom < low and high < top for bottom, top in bad):
        return Verdict.NOT_REPRODUCED
    return Verdict.INCONCLUSIVE


def p_reproduced(claim: Kind, interval: Interval, margin: float) -> float:
    """Two-sided p of the t-test behind REPRODUCED: below 0.05 if and only if the 95 % interval with
    n - 1 degrees of freedom lies where it must (two bounds: the larger of their p).

    NaN where the interval is no Student-t interval (no standard deviation).
    """
    if not interval.sd >= 0 or interval.n < 2:
        return NAN
    se = interval.sd / math.sqrt(interval.n)
    (bottom, top), *_ = _regions(claim, margin)[0]
    inner = min(interval.mean - bottom, top - interval.mean)  # to the nearest bound
    if se == 0 or math.isinf(inner):
        return 0.0 if inner > 0 else 1.0
    return float(min(1.0, 2 * stats.t.sf(inner / se, interval.n - 1)))


def n_needed(claim: Kind, interval: Interval, margin: float) -> int | None:
    """The least number of seeds at which the 95 % interval would decide, with the same mean and
    standard deviation; None where 10,000 do not or the standard deviation is not known.
    """
    if not interval.sd >= 0:
        return None
    good, bad = _regions(claim, margin)
    room = max(min(interval.mean - low, high - interval.mean) for low, high in (*good, *bad))
    n = np.arange(2, 10_001)
    half = stats.t.ppf(0.975, n - 1) * interval.sd / np.sqrt(n)
    enough = n[half < room]
    return int(enough[0]) if len(enough) else None


def widened(interval: Interval, tests: int, level: float = 0.95) -> Interval:
    """The interval of one of `tests` settings, at the level 1 - (1 - level) / tests (Bonferroni):
    what an extreme that was picked out of them is tested by.

    An interval without a standard deviation comes back as it is.
    """
    if tests < 2 or not interval.sd >= 0 or math.isnan(interval.low):
        return interval
    wide = _t_quantile(1 - (1 - level) / tests, interval.n - 1)
    factor = wide / _t_quantile(level, interval.n - 1)
    mean, low, high = interval[:3]
    return interval._replace(low=mean - factor * (mean - low), high=mean + factor * (high - mean))


class Share(NamedTuple):
    """k of n with Wilson's interval; share, low and high from 0 to 1 (NaN at n = 0)."""

    k: int
    n: int
    share: float
    low: float
    high: float


def wilson(k: int, n: int, level: float = 0.95) -> Share:
    """The share k / n with Wilson's score interval (Wilson 1927), without continuity correction.

    Raises ValueError unless 0 <= k <= n.
    """
    _check_level(level)
    if not 0 <= k <= n:
        raise ValueError(f"a share needs 0 <= k <= n, got {k} of {n}.")
    if n == 0:
        return Share(0, 0, NAN, NAN, NAN)
    found = stats.binomtest(k, n).proportion_ci(level, method="wilson")
    return Share(k, n, k / n, float(found.low), float(found.high))


def share_difference(a: Share, b: Share) -> Interval:
    """Difference a - b of two independent shares with Newcombe's hybrid score interval (Newcombe
    1998, method 10); n is the smaller of the two, sd unknown.
    """
    mean = a.share - b.share
    low = mean - math.hypot(a.share - a.low, b.high - b.share)
    high = mean + math.hypot(a.high - a.share, b.share - b.low)
    return Interval(mean, low, high, min(a.n, b.n), NAN)


def fisher(a: Share, b: Share) -> float:
    """Two-sided p of Fisher's exact test that the two shares are one; NaN where one has no runs."""
    if not (a.n and b.n):
        return NAN
    table = np.array([[a.k, a.n - a.k], [b.k, b.n - b.k]])
    return float(stats.fisher_exact(table).pvalue)


def _regions(claim: Kind, margin: float) -> list[list[tuple[float, float]]]:
    if claim not in _REGIONS:
        known = ", ".join(map(repr, _REGIONS))
        raise ValueError(f"unknown kind of claim {claim!r}; known are {known}.")
    if not (math.isfinite(margin) and margin >= 0):
        raise ValueError(f"the margin must be a number >= 0 in percentage points, got {margin}.")
    return [of(margin) for of in _REGIONS[claim]]


def _t_quantile(level: float, df: float) -> float:
    return float(stats.t.ppf((1 + level) / 2, df))


def _p_of_t(estimate: float, standard_error: float, df: float) -> float:
    """Two-sided p of estimate / standard_error; without any spread 1 at zero and 0 elsewhere."""
    if standard_error == 0:
        return 1.0 if estimate == 0 else 0.0
    return float(2 * stats.t.sf(abs(estimate) / standard_error, df))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"the level must lie in (0, 1), for instance 0.95, got {level}.")


def _finite(what: str, values: Iterable[float]) -> np.ndarray:
    """Values as float64 of shape [n]; raises ValueError if one is not finite."""
    x = np.asarray(values if isinstance(values, (np.ndarray, Sequence)) else list(values), float)
    if x.ndim != 1:
        raise ValueError(f"{what} must be a flat list of numbers, got shape {x.shape}.")
    bad = x[~np.isfinite(x)]
    if bad.size:
        raise ValueError(
            f"{what} hold {bad.size} of {x.size} that are not finite (first: {bad[0]}); leave out "
            "diverged runs and say so."
        )
    return x
