"""What the prose of the report may quote: cells, differences and counts, each from the rows.

A template of lib/report/text writes `{{ main_results.error("set", 0.02) }}`; the names of the
experiments are `Cells`. A cell without rows raises NoRuns, and its sentence or paragraph is left
out. No value here is a mean over runs that learned and runs that did not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from lib import claims, experiments, paths
from lib.claims.effects import Family, families, scaling
from lib.claims.learning import collapsed
from lib.claims.networks import Closer
from lib.config import unknown
from lib.results import measured
from lib.results.clock import ALL, machine, whole_steps
from lib.results.reading import (
    METHOD_NAMES,
    NoRuns,
    Runs,
    Source,
    interval_text,
    load,
    published_rows,
)
from lib.stats import holm, paired_difference, t_interval, wilson

Side = str | Mapping[str, Any]  # a method, or fields of its runs

LEVEL = 0.05
ENOUGH_SEEDS = 6  # all on one side: a sign test's p is 2 / 2^6 = 0.03
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def scales(profile: str) -> tuple[str, ...]:
    """The profiles that an experiment may be shown at, the largest first: all, whichever was asked
    for, but smoke, which proves that the code runs and is never mixed in.

    Raises ValueError for an unknown profile.
    """
    if profile not in experiments.PROFILES:
        raise ValueError(unknown("profile", profile, experiments.PROFILES))
    return ("smoke",) if profile == "smoke" else ("paper", "hours", "quick")


def scale_name(profile: str) -> str:
    """How a profile is called in texts."""
    return "the paper's scale" if profile == "paper" else f"the reduced scale {profile}"


@dataclass(frozen=True)
class Value:
    """A mean with its 95 % Student-t interval (NaN at n = 1), in % or points of test error."""

    mean: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    sign: bool = False

    def __str__(self) -> str:
        return interval_text(self.mean, math.nan, math.nan, sign=self.sign)

    @property
    def ci(self) -> str:
        """ "1.47 [1.40, 1.54]", "1.47 (one seed)"."""
        if self.n == 1:
            return f"{self} (one seed)"
        return interval_text(self.mean, self.low, self.high, sign=self.sign)

    @property
    def words(self) -> str:
        """A difference in words: "0.31 points less (95 % interval 0.20 to 0.42, n = 10)"."""
        if math.isnan(self.low):
            return f"{abs(self.mean):.2f} points {_side(self.mean)} (one seed, no test)"
        if self.low <= 0 <= self.high:
            return f"no more and no less, as far as this shows ({self.ci} points, n = {self.n})"
        low, high = sorted((abs(self.low), abs(self.high)))
        said = f"95 % interval {low:.2f} to {high:.2f}, n = {self.n}"
        return f"{abs(self.mean):.2f} points {_side(self.mean)} ({said})"


@dataclass(frozen=True)
class Count:
    """k of n with Wilson's 95 % interval of the share."""

    k: int
    n: int

    def __str__(self) -> str:
        return f"{self.k} of {self.n}"

    @property
    def ci(self) -> str:
        """ "3 of 20 (5 to 36 %)"."""
        share = wilson(self.k, self.n)
        return f"{self} ({100 * share.low:.0f} to {100 * share.high:.0f} %)"


@dataclass(frozen=True)
class Versus:
    """A against B at several shares of weights: where A errs less, more, or neither is shown.

    `less`, `more`: share -> difference in points, p < 0.05 by paired t-tests after Holm over the
    shares; `each`: not so, but all of ENOUGH_SEEDS or more seeds lie on one side, as where errors
    of one method scatter widely; `neither`: no difference shown; `single`: one shared seed;
    `unlearned`: some run of one of the two did not learn, which forbids means.
    """

    b: str
    less: dict[float, float] = field(default_factory=dict)
    more: dict[float, float] = field(default_factory=dict)
    each: dict[float, float] = field(default_factory=dict)
    neither: dict[float, float] = field(default_factory=dict)
    single: dict[float, float] = field(default_factory=dict)
    unlearned: tuple[float, ...] = ()

    def __str__(self) -> str:
        groups = (self.less, self.more, self.each, self.neither, self.single, self.unlearned)
        every = [share for group in groups for share in group]
        parts = [
            f"{word} than {self.b} at {percents(found, every)} (by {_sizes(found)})"
            for word, found in (("less", self.less), ("more", self.more))
            if found
        ]
        for share, mean in self.each.items():
            side = _side(mean) if parts else f"{_side(mean)} than {self.b}"
            parts.append(
                f"{side} in every seed at {percents([share])} (by {abs(mean):.2f} in the mean)"
            )
        if self.neither:
            at = f"no difference shown at {percents(self.neither, every)}"
            parts.append(at if parts else f"neither less nor more than {self.b}, as far as shown")
        if self.single:
            parts.append(f"one seed so far at {percents(self.single, every)}")
        if self.unlearned:
            parts.append(f"runs that did not learn at {percents(self.unlearned, every)}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Cells:
    """The runs of one experiment at the largest scale that has some; `wanted` narrows them.

    All parts of an experiment are read at one scale, so that none is set against another's; only
    data sets have scales of their own.
    """

    experiment: str
    profiles: tuple[str, ...]
    root: str | Path | None
    wanted: tuple[tuple[str, Any], ...] = ()
    seen: set[str] = field(default_factory=set, compare=False)

    def of(self, **wanted: Any) -> Cells:
        """The part with these fields."""
        more = (*self.wanted, *wanted.items())
        return Cells(self.experiment, self.profiles, self.root, more, self.seen)

    @functools.cached_property
    def profile(self) -> str:
        """The largest scale with a run of sparse momentum; "" for none.

        Runs of other methods alone say nothing about it. Images of the size of CIFAR-10 need
        networks that learn: quick has none there, so that it is no evidence.
        """
        dataset = {k: v for k, v in self.wanted if k == "dataset"}
        for profile in self.profiles:
            runs = load(self.experiment, Source(profile, self.root), **dataset)
            if profile == "quick" and {run.dataset for run in runs.planned} == {"cifar10"}:
                continue
            if (runs.rows["method"] == "sparse_momentum").any():
                return profile
        return ""

    def _at(self, profile: str) -> Runs:
        return load(self.experiment, Source(profile, self.root), **dict(self.wanted))

    @property
    def runs(self) -> Runs:
        """The runs themselves; NoRuns where no scale has any."""
        if not self.profile:
            raise NoRuns(f"{self.experiment}: no runs of sparse momentum at {self.profiles}")
        self.seen.add(self.profile)
        return self._at(self.profile)

    @property
    def full(self) -> Cells:
        """These, at the paper's scale only: what is set beside a published value must be."""
        if self.profile not in ("paper", ""):
            raise NoRuns(f"{self.experiment}: rows at {self.profile}, none at the paper's scale")
        return self

    @property
    def scale(self) -> str:
        """Where these rows come from, in words."""
        rows = self.runs.needed().rows
        epochs = " or ".join(map(str, sorted({int(n) for n in rows["epochs"]})))
        said = f"{scale_name(self.profile)}, {epochs} epochs, {self.n}"
        if cut := self.runs.cut_from():
            said = f"the paper's protocol cut to {epochs} of its {cut} epochs, {self.n}"
        cells = self.runs.cells()
        empty = list(cells.values()).count(0)
        return said + (f", {empty:,} of {len(cells):,} cells without runs" * bool(empty))

    @property
    def n(self) -> str:
        """Seeds of a cell, diverged ones too: "n = 10", "n = 3 to 10" where the cells differ."""
        seeds = (+self.runs.needed().cells()).values()
        low, high = min(seeds), max(seeds)
        return f"n = {low}" + (f" to {high}" if high > low else "")

    def _of(self, side: Side, density: float | None, more: Mapping[str, Any]) -> Runs:
        wanted: dict[str, Any] = {"method": side} if isinstance(side, str) else dict(side)
        if density is not None and wanted.get("method") != "dense":
            wanted["density"] = density
        return self.runs.where(**{**more, **wanted})

    def error(self, side: Side, density: float | None = None, **more: Any) -> Value:
        """Test error of a cell in %, over the seeds that learned."""
        learned = self._of(side, density, more).needed().learned()
        errors = learned.by_seed()
        if errors.empty:
            raise NoRuns(f"{self.experiment}: no run of {side} at {density} learned")
        return Value(*t_interval(errors)[:4])

    def learned(self, side: Side, density: float | None = None, **more: Any) -> Count:
        """How many of a cell's runs learned; NoRuns for fewer than three of them."""
        runs = self._of(side, density, more)
        found = Count(len(runs.learned().rows), len(runs.rows) + len(runs.diverged))
        if found.n < 3:
            raise NoRuns(f"{self.experiment}: {found.n} runs of {side} at {density} are no share")
        return found

    def collapsed(self, side: Side, density: float) -> Count:
        """How many of a cell's runs had learned, by their validation error, and lost it again."""
        runs = self._of(side, density, {}).needed()
        return Count(collapsed(runs), len(runs.rows) + len(runs.diverged))

    def loss(self, side: Side, density: float, epoch: int) -> Value:
        """Mean training loss of a cell over its epoch `epoch` (from 1), whatever came of the runs;
        NoRuns without such an epoch.
        """
        curves = self._of(side, density, {}).needed().curves()
        losses = curves.loc[curves["epoch"] == epoch].set_index("run_id")["train_loss"]
        if losses.empty:
            raise NoRuns(f"{self.experiment}: no run of {side} at {density} has epoch {epoch}")
        return Value(*t_interval(losses)[:4])

    def minus(self, a: Side, b: Side, density: float | None = None, **more: Any) -> Value:
        """Test error of A minus that of B in points, over shared seeds that learned in both."""
        one, other = (self._of(side, density, more).needed().learned() for side in (a, b))
        found = paired_difference(one.by_seed(), other.by_seed())
        if not found.n:
            raise NoRuns(f"{self.experiment}: {a} and {b} share no seed at {density}")
        return Value(found.mean, found.low, found.high, found.n, sign=True)

    def differs(self, a: str, others: Sequence[str], density: float) -> list[str]:
        """Those of these methods from which A's error in one cell is shown to differ: p < 0.05 by
        paired t-tests after Holm over them all; NoRuns where A shares no two seeds with one.
        """
        learned = {m: self._of(m, density, {}).learned().by_seed() for m in (a, *others)}
        found = {m: paired_difference(learned[a], learned[m]) for m in others}
        if few := [m for m, pair in found.items() if pair.n < 2]:
            raise NoRuns(f"{self.experiment}: {a} and {few[0]} share no two seeds at {density}")
        adjusted = holm(pair.p_t for pair in found.values())
        return [m for m, p in zip(others, adjusted, strict=True) if p < LEVEL]

    def versus(self, a: Side, b: Side, **more: Any) -> Versus:
        """A against B at every share of weights that both have."""
        one, other = (self._of(side, None, more).needed() for side in (a, b))
        shares = sorted(set(one.rows["density"]) & set(other.rows["density"]))
        bad = tuple(
            share
            for share in shares
            for side in ((one.where(density=share), other.where(density=share)),)
            if any(len(r.learned().rows) < len(r.rows) + len(r.diverged) for r in side)
        )
        table = claims.differences(one.learned(), other.learned(), "density")
        names = ("less", "more", "each", "neither", "single")
        groups: dict[str, dict[float, float]] = {name: {} for name in names}
        for row in table.to_dict("records"):
            if row["density"] in bad:
                continue
            if row["n"] < 2:
                name = "single"
            elif row["p_holm"] < LEVEL:
                name = "less" if row["mean"] < 0 else "more"
            else:
                name = "each" if row["one_sided"] and row["n"] >= ENOUGH_SEEDS else "neither"
            groups[name][row["density"]] = row["mean"]
        if not any(groups[name] for name in names if name != "single"):
            raise NoRuns(f"{self.experiment}: {a} and {b} share no two seeds that learned")
        name = b if isinstance(b, str) else str(b["method"])
        return Versus(METHOD_NAMES[name], **groups, unlearned=bad)


def closer(networks: Cells, method: str, way: str = "with batch norm") -> Value:
    """What `claims.networks.Closer` measures of one of its WAYS, in points: below zero that network
    explains the method's published curve better than the paper's does.
    """
    found = Closer(method).measure(Source(networks.full.runs.profile, networks.root), {}, 0.0)
    for part in found.parts:
        if part.name == way:
            return Value(*part.decides[:4], sign=True)
    raise NoRuns(f"{networks.experiment}: no seed of {method} has finished both networks")


def specialisation(features: Cells, a: str, b: str) -> Value:
    """Class specialisation of method A minus that of B, channels pooled, in points, over shared
    seeds that learned in both: below zero the features of A are the more general ones.
    """
    found = measured.specialisation(features.runs.learned()).set_index("seed")
    one, other = (100 * found.loc[found["method"] == side, measured.POOLED] for side in (a, b))
    pair = paired_difference(one, other)
    if not pair.n:
        raise NoRuns(f"{features.experiment}: {a} and {b} share no seed")
    return Value(pair.mean, pair.low, pair.high, pair.n, sign=True)


def p_learn(trainability: Cells, variant: str, density: float) -> float:
    """Fisher's p for as many seeds learning with a variant (of claims.learning) as from the paper's
    start, adjusted by Holm over all variants and shares of weights.
    """
    runs = trainability.runs
    table = claims.trainability(Source(runs.profile, trainability.root))
    row = table[(table["variant"] == variant) & (table["density"] == density)]
    if row.empty or not row["n"].item():
        raise NoRuns(f"{runs.experiment}: no runs of {variant} at {density}")
    return float(row["p_holm"].item())


@dataclass(frozen=True)
class Clock:
    """What `python -m lib bench` measured; whose machine it was is part of every sentence."""

    root: str | Path | None

    @functools.cached_property
    def steps(self) -> pd.DataFrame:
        """Whole steps on all threads, one row per network and share."""
        table = whole_steps(self.root)
        return table[table["threads"] == ALL]

    def faster(self, column: str, density: float) -> str:
        """ "1.8 to 2.2 times": over the networks at a share of weights."""
        found = self.steps.loc[self.steps["density"] == density, column].dropna()
        if found.empty:
            raise NoRuns(f"no {column} at {density} in results/bench/kernels.csv")
        return f"{found.min():.1f} to {found.max():.1f} times"

    def least(self, column: str, density: float) -> float:
        """The lowest of the networks."""
        return float(self.steps.loc[self.steps["density"] == density, column].min())

    def most(self, column: str, density: float) -> float:
        """The highest of the networks."""
        return float(self.steps.loc[self.steps["density"] == density, column].max())

    @property
    def machine(self) -> str:
        """Processor, software, commit and day of these rows."""
        return machine(self.steps)

    def value(self, what: str, setting: str) -> float:
        """One value of results/bench/speed.csv."""
        path = paths.results_dir("bench", self.root) / "speed.csv"
        if not path.exists():
            raise NoRuns("no results/bench/speed.csv; python -m lib bench")
        table = pd.read_csv(path)
        found = table[(table["what"] == what) & (table["setting"] == setting)]["value"]
        if found.empty:
            raise NoRuns(f"{path}: no {what!r} of {setting}; python -m lib bench")
        return float(found.iloc[0])


@dataclass(frozen=True)
class Depth:
    """The benefit of a part of sparse momentum in networks of one family ("mlpbn") that differ in
    depth only, from one start of the densities.
    """

    cells: Cells
    family: str
    init: str = "uniform"

    @property
    def scale(self) -> str:
        """Where these rows come from, in words."""
        return self._part().scale

    def slope(self, part: str) -> Value:
        """Points of benefit gained with each doubling of the depth: mean of the seeds' slopes."""
        return self._slope(part, 0)

    def without_one(self, part: str) -> Value:
        """The same without the network of one hidden layer."""
        return self._slope(part, 1)

    def _part(self) -> Cells:
        models = {run.model for run in self.cells.runs.planned}
        mine = sorted(m for m in models if m.startswith(f"{self.family}-"))
        return self.cells.of(model=mine, init=self.init)

    def _slope(self, part: str, above: int) -> Value:
        runs = self._part().runs
        for family in families(runs.rows["model"].unique()):
            sizes = {model: size for model, size in family.sizes.items() if size > above}
            found = scaling(runs, Family(family.name, family.axis, sizes), part).slope
            if found.n > 1:
                return Value(*found[:4], sign=True)
        raise NoRuns(f"depth_scaling: no slope of {self.family} from {self.init} densities")


def gap(table: str, a: str, b: str) -> str:
    """ "−0.08 to +0.02": range of the published differences between two methods, in points."""
    one, other = (
        published_rows(table, method=m).set_index("density")["test_error_pct"] for m in (a, b)
    )
    found = (one - other).dropna()
    return f"{found.min():+.2f} to {found.max():+.2f}".replace("-", "−")


def paper(table: str, column: str = "test_error_pct", **wanted: Any) -> float:
    """One published number."""
    rows = published_rows(table, **wanted)
    if len(rows) != 1:
        raise ValueError(f"{table}: {wanted} is {len(rows)} rows, expected one")
    return float(rows[column].iloc[0])


def percents(shares: Iterable[float], every: Iterable[float] = ()) -> str:
    """ "1, 2 and 5 %"; neighbours among `every` share as a range, "1 to 4 and 10 %"."""
    wanted, known = set(shares), sorted({*every, *shares})
    groups: list[list[float]] = [[]]
    for share in known:
        if share in wanted:
            groups[-1].append(share)
        elif groups[-1]:
            groups.append([])
    texts = []
    for group in groups:
        ends = [f"{100 * share:g}" for share in group]
        texts += [f"{ends[0]} to {ends[-1]}"] if every and len(ends) > 2 else ends
    return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1]))) + " %"


def _side(mean: float) -> str:
    return "less" if mean < 0 else "more"


def _sizes(found: Mapping[float, float]) -> str:
    sizes = sorted(abs(v) for v in found.values())
    first, last = (f"{size:.2f}" for size in (sizes[0], sizes[-1]))
    return f"{first} points" if first == last else f"{first} to {last} points"
