"""What one part of sparse momentum contributes, how that changes with the size of the network, and
how much a setting moves the error: what figures and claims both compute.  Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from lib.results.reading import Runs, Where
from lib.stats import (
    Interval,
    PairedDifference,
    Sensitivity,
    Trend,
    holm,
    paired_difference,
    sensitivity,
    trend,
)

NAN = math.nan
Key = TypeVar("Key")


def rules(redistribution: str, growth: str) -> Where:
    """Sparse momentum with these rules, as a selection of runs."""
    return {"method": "sparse_momentum", "redistribution": redistribution, "growth": growth}


FULL = rules("momentum", "momentum")
# What is left when a part is taken away. "none": each layer regrows as much as it lost, as the
# official code did in July 2019; since August 2019 its "none" shares by layer size ("layer_size").
WITHOUT = {"redistribution": rules("none", "momentum"), "growth": rules("momentum", "random")}

# The paper leaves momentum 0.99 out of its test: neither kind of network trains well there.
MOMENTA = (0.5, 0.95)
REFERENCE = {"prune_rate": 0.2, "momentum": 0.9}
# The ranges that are called safe, and all that the official files cover.
NARROW = {"prune_rate": (0.2, 0.5), "momentum": (0.7, 0.9)}
WHOLE = {"prune_rate": (0.2, 0.7), "momentum": MOMENTA}


def untrained(runs: Runs) -> str:
    """How many runs did not learn; a difference between two of them means nothing."""
    count = len(runs.rows) - len(runs.learned().rows)
    return f"{count} of {len(runs.rows)} runs did not learn (at chance at the end)" * bool(count)


# Redistributions that mean to leave each layer its share of the weights (from uniform densities).
_KEEPING = {"nonzeros": "non-zeros", "layer_size": "layer size"}
_DRAINED = 0.5  # of its weights are left, or fewer


def drained(runs: Runs) -> str:
    """Which layers lost half of their weights or more where the redistribution means to keep them,
    with the active weights at the first and at the last recorded epoch; "" for none.
    """
    table = runs.layers()
    found: dict[str, None] = {}
    for run in runs.planned:
        if run.redistribution not in _KEEPING:
            continue
        mine = table[table["run_id"] == run.run_id].sort_values("epoch")
        for layer, rows in mine.groupby("layer", sort=False):
            first, last = int(rows["active"].iloc[0]), int(rows["active"].iloc[-1])
            if last <= _DRAINED * first:
                rule = f"{_KEEPING[run.redistribution]} at {100 * run.density:g} %"
                found[f"{rule} {layer} from {first} to {last}"] = None
    if not found:
        return ""
    return f"Layers that lost half of their weights or more: {', '.join(found)} active weights."


# ------------------------------------------------------------------------------ effect against size


@dataclass(frozen=True)
class Family:
    """Networks that differ in one thing only: `sizes` maps each to its depth or width."""

    name: str
    axis: str
    sizes: dict[str, int]


@dataclass(frozen=True)
class Scaling:
    """The benefit of a part of sparse momentum (points of test error that are lost without it) in
    each network of a family, and how it changes with the size.

    `cells`: model, size, mean, low, high, n, p, p_holm, in order of size. `slope`: points per
    doubling of the size, mean and interval of the slopes of the single seeds, `p` its t-test.
    `line`: least squares through the means (a test over networks instead of seeds) with the rank
    correlation; None for fewer than three sizes. `by_seed`: [seeds, models]. `unlearned`: networks
    that are in none of these, as no seed learned in both, with the part and without.
    """

    cells: pd.DataFrame
    slope: Interval
    p: float
    line: Trend | None
    by_seed: pd.DataFrame
    unlearned: list[str]


def families(models: Iterable[str]) -> list[Family]:
    """The families among these networks: MLPs by depth, with and without batch norm, WRNs by depth
    and by width.

    WRNs are compared at the width (depth) that has most of them, the smaller of equals.
    """
    names = list(dict.fromkeys(models))
    mlps: dict[str, dict[str, int]] = {"mlp": {}, "mlpbn": {}}
    for model in names:
        if hit := re.fullmatch(r"(mlp|mlpbn)-\d+x(\d+)", model):
            mlps[hit[1]][model] = int(hit[2])
    wrns = {
        m: (int(hit[1]), int(hit[2])) for m in names if (hit := re.fullmatch(r"wrn-(\d+)-(\d+)", m))
    }
    found = [
        Family("MLPs", "hidden layers", mlps["mlp"]),
        Family("BN-MLPs", "hidden layers, batch norm", mlps["mlpbn"]),
    ]
    for name, axis, this, other in (
        ("WRN-d-{}", "depth (layers)", 0, 1),
        ("WRN-{}-k", "width (factor)", 1, 0),
    ):
        groups: dict[int, dict[str, int]] = {}
        for model, size in wrns.items():
            groups.setdefault(size[other], {})[model] = size[this]
        if groups:
            most = min(groups, key=lambda at: (-len(groups[at]), at))
            if not any(groups[most].keys() <= family.sizes.keys() for family in found):
                found.append(Family(name.format(most), axis, groups[most]))
    return [
        Family(f.name, f.axis, dict(sorted(f.sizes.items(), key=lambda item: item[1])))
        for f in found
        if f.sizes
    ]


def scaling(runs: Runs, family: Family, part: str) -> Scaling:
    """The benefit of `part` ("redistribution" or "growth") across a family, paired by seed.

    Only seeds that learned, with the part and without, are compared; a seed counts for the slope
    when it has every network of the family that has any pair.
    """
    columns: dict[str, pd.Series] = {}
    lines, unlearned = [], []
    learned = runs.learned()
    for model, size in family.sizes.items():
        without = learned.by_seed(model=model, **WITHOUT[part])
        full = learned.by_seed(model=model, **FULL)
        pair = paired_difference(without, full)
        if not pair.n:
            sides = [runs.where(model=model, **where) for where in (WITHOUT[part], FULL)]
            done = all(len(side.rows) + len(side.diverged) for side in sides)
            if done and not all(len(side.learned().rows) for side in sides):
                unlearned.append(model)
        else:
            columns[model] = (without - full).dropna()
            lines.append((model, size, pair.mean, pair.low, pair.high, pair.n, pair.p_t))
    cells = pd.DataFrame(lines, columns=["model", "size", "mean", "low", "high", "n", "p"])
    cells["p_holm"] = holm(cells["p"])
    by_seed = pd.DataFrame(columns)
    nothing = Interval(NAN, NAN, NAN, 0, NAN)
    whole = by_seed.dropna()
    if len(cells) < 2 or whole.empty:
        return Scaling(cells, nothing, NAN, None, by_seed, unlearned)
    x = np.log2(cells["size"].to_numpy(float))
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    slopes = pd.Series(whole.to_numpy(float) @ weights, index=whole.index)
    tested = paired_difference(slopes, slopes * 0)
    line = trend(x, cells["mean"]) if len(cells) > 2 else None
    return Scaling(cells, tested.interval, tested.p_t, line, by_seed, unlearned)


# ------------------------------------------------------------------------------ effect of a setting


def shifts(curves: pd.DataFrame, reference: float) -> dict[float, PairedDifference]:
    """Error at each setting minus that at the reference, paired by seed.

    `curves`: error in %, [seeds, settings]. Raises ValueError without the reference.
    """
    if reference not in curves:
        raise ValueError(f"no runs at the reference {reference:g}, only at {list(curves)}")
    settings = [float(str(at)) for at in curves]
    return {
        at: paired_difference(curves[at], curves[reference]) for at in settings if at != reference
    }


def curves_by_seed(runs: Runs, over: str) -> pd.DataFrame:
    """Test error in %, [seeds, settings of `over`]; the runs must be one cell per setting."""
    rows = runs.rows
    if rows.duplicated(["seed", over]).any():
        raise ValueError(f"{runs.experiment}: several runs of one seed at one {over}; select more")
    return rows.pivot(index="seed", columns=over, values="test_error_pct").sort_index(axis=1)


def decisive(pairs: Mapping[Key, PairedDifference], margin: float) -> tuple[Key, Interval]:
    """The setting (or network) that decides whether all differences are within the margin, and the
    absolute value of its difference as an interval.

    If some interval lies wholly beyond the margin on either side, the one farthest out; else the
    one that reaches farthest from zero. So all of them are inside the margin if this one is.
    """
    sized = {at: _positive(pair.interval) for at, pair in pairs.items() if pair.n}
    if not sized:
        raise ValueError("no seed has both the reference and another setting")
    beyond = {at: one for at, one in sized.items() if one.low > margin}
    if beyond:
        at = max(beyond, key=lambda key: beyond[key].low)
    else:
        unknown = [key for key, one in sized.items() if math.isnan(one.high)]
        at = (
            unknown[0]
            if unknown
            else max(sized, key=lambda key: max(-sized[key].low, sized[key].high))
        )
    return at, sized[at]


def _positive(one: Interval) -> Interval:
    """An interval whose mean is not negative: mirrored where it was."""
    return one if not one.mean < 0 else one._replace(mean=-one.mean, low=-one.high, high=-one.low)


def mean_shift(curves: pd.DataFrame, reference: float) -> pd.Series:
    """Mean over the other settings of |error - error at the reference|, by row (seed); points.

    NaN for a row that lacks a setting.
    """
    others = curves.drop(columns=reference)
    return others.sub(curves[reference], axis=0).abs().mean(axis=1, skipna=False)


def within(settings: Iterable[Any], low: float, high: float) -> list[float]:
    """The settings in [low, high]."""
    return [float(at) for at in settings if low <= at <= high]


def compare_curves(
    a: Mapping[str, pd.Series], b: Mapping[str, pd.Series], reference: float
) -> tuple[Sensitivity, Sequence[str]] | None:
    """The paper's Levene and Wilcoxon tests on the networks and settings that a and b both have,
    and these networks; None where no network has the reference and another setting in both.
    """
    left, right = {}, {}
    for model in a:
        if model not in b:
            continue
        shared = sorted(set(a[model].index) & set(b[model].index))
        if reference in shared and len(shared) > 1:
            left[model], right[model] = a[model].loc[shared], b[model].loc[shared]
    if not left:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):  # curves without any spread: no test
        return sensitivity(left, right, reference), list(left)
