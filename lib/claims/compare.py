"""The measures that most claims use: differences paired by seed, values, and the mean reduction.
Imports no torch.

Seeds that did not learn are in no mean (`lib.claims.learning`): where a run of either side failed,
the comparison is that of the logarithms of the errors, of seeds that learned in both, and says how
many learned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lib.claims.claim import NAN, Found, Measure, PaperValue, Part, corrected
from lib.claims.learning import all_learned, learning, less_often
from lib.config import Run
from lib.results.reading import NoRuns, Runs, Source, Where, load, model_name, planned_runs, select
from lib.stats import Interval, holm, paired_difference, t_interval, value_difference

NOTHING = Interval(NAN, NAN, NAN, 0, NAN)
Pair = tuple[str, Where, Where]  # name of the part, A, B


def shared_cells(experiment: str, profile: str, over: str, *sides: Where) -> list[Any]:
    """The values of `over` that are planned for all sides."""
    runs = planned_runs(experiment, profile)
    values = [{getattr(run, over) for run in select(runs, **side)} for side in sides]
    return sorted(set.intersection(*values))


def mean_by_seed(runs: Runs, over: str, log: bool = False) -> pd.Series:
    """Test error (or 100 times its logarithm) by seed; with `over` the mean over all its planned
    values, NaN where one lacks.
    """
    values = sorted({getattr(run, over) for run in runs.planned}) if over else []
    cells = [runs.by_seed(**{over: at}) for at in values] if over else [runs.by_seed()]
    if not cells:
        return pd.Series(dtype=float)
    table = pd.concat(cells, axis=1)
    return (table.map(lambda error: 100 * math.log(error)) if log else table).mean(
        axis=1, skipna=False
    )


def compared(
    name: str, a: Runs, b: Runs, over: str, margin: float, counts: bool = True
) -> Part | None:
    """A minus B in points, or as log-ratio in % where a run failed; None where no seed has both."""
    good, both = a.learned(), b.learned()
    failed = not all_learned(a, b)
    right = mean_by_seed(both, over)
    pair = paired_difference(mean_by_seed(good, over), right)
    said = [learning(a, b)]
    if pair.n == 0:
        if not failed or not (len(a.rows) and len(b.rows)):
            return None
        return Part(name, NOTHING, NOTHING, f"no seed learned in both; {said[0]}", counts)
    if pair.left_out and over and counts:
        said.append(f"not whole: seeds {', '.join(map(str, pair.left_out))}")
    interval, unit, limit = pair.interval, "", None
    if failed:
        log_a, log_b = (mean_by_seed(side, over, log=True) for side in (good, both))
        said.append(f"{pair.mean:+.2f} points among them")
        interval, unit = paired_difference(log_a, log_b).interval, "% (log-ratio)"
        limit = 100 * margin / float(right[list(pair.seeds)].mean())
    if rarer := less_often(a, b):
        said.append("the first learned less often")
    note = "; ".join(filter(None, said))
    return Part(name, interval, interval, note, counts, limit, unit, rarer)


@dataclass(frozen=True)
class Pairs(Measure):
    """Test error of A minus that of B in percentage points, paired by seed; one part per pair.

    With `over` (a field of Run) the mean over its values that are planned for both; a seed counts
    when it has them all, so that a partly finished grid doesn't mix shares. Each value alone is
    listed too. `paper_network`: said where ours is another one (reduced profiles).
    """

    experiment: str
    pairs: Sequence[Pair]
    over: str = ""
    paper_network: str = ""

    def cells(self, profile: str, part: str) -> list[Any] | None:
        """The values of `over` planned for all sides."""
        for name, *sides in self.pairs:
            if self.over and name == part:
                return shared_cells(self.experiment, profile, self.over, *sides)
        return None

    def measure(self, source: Source, papers: Mapping[str, PaperValue], margin: float) -> Found:
        """The differences, and with `over` what each of its values says alone."""
        every = load(self.experiment, source)
        planned: dict[Run, None] = {}
        parts, missing = [], []
        for name, *wheres in self.pairs:
            a, b = (every.where(**where) for where in wheres)
            if not (a.planned and b.planned):
                missing.append(f"{name} (not planned)".strip())
                continue
            if self.over:
                cells = self.cells(source.profile, name) or []
                a, b = a.where(**{self.over: cells}), b.where(**{self.over: cells})
                alone = [(at, *(s.where(**{self.over: at}) for s in (a, b))) for at in cells]
                labels = [
                    f"{name} {f'{100 * at:g} %' if self.over == 'density' else at}".strip()
                    for at in cells
                ]
                rows = [
                    compared(label, left, right, "", margin, counts=False)
                    for label, (_, left, right) in zip(labels, alone, strict=True)
                ]
            else:
                rows = []
            one = compared(name, a, b, self.over, margin)
            parts += [part for part in (one, *rows) if part]
            planned |= dict.fromkeys((*a.planned, *b.planned))
            if one is None:
                missing.append(name)
        runs = every.only(planned)
        note = ""
        if not any(part.counts for part in parts):
            runs.needed()
            if not parts:
                raise NoRuns(
                    f"{self.experiment} ({source.profile}): no seed has finished both sides"
                )
        models = {run.model for run in planned}
        if self.paper_network and models - {self.paper_network}:
            names = ", ".join(map(model_name, models))
            note = f"ours is {names}, the paper's {model_name(self.paper_network)}"
        return Found(tuple(parts), runs, tuple(missing), note)


def against(a: Where, others: Mapping[str, Where]) -> tuple[Pair, ...]:
    """A against each of the others, by name."""
    return tuple((name, a, other) for name, other in others.items())


def differences(a: Runs, b: Runs, over: str) -> pd.DataFrame:
    """A minus B (points of test error) at each value of `over` that both have, paired by seed, of
    seeds that learned in both.

    Columns: `over`, mean, low, high (95 %), n, p (paired t-test), p_holm (adjusted over the rows),
    one_sided (every seed's difference has the sign of the mean).
    """
    a, b = a.learned(), b.learned()
    found = []
    for at in sorted(set(a.rows[over]) & set(b.rows[over])):
        pair = paired_difference(a.by_seed(**{over: at}), b.by_seed(**{over: at}))
        if pair.n:
            found.append((at, *pair.interval[:4], pair.p_t, pair.one_sided))
    table = pd.DataFrame(found, columns=[over, "mean", "low", "high", "n", "p", "one_sided"])
    table["p_holm"] = holm(table["p"])
    return table


def _off(shown: Interval, paper: PaperValue | None) -> Interval:
    """Ours minus the paper's, where only ours has a spread."""
    value = paper.value if paper else 0.0
    return shown._replace(mean=shown.mean - value, low=shown.low - value, high=shown.high - value)


@dataclass(frozen=True)
class Level(Measure):
    """Test error in per cent of each side, against the paper's value with its standard error.

    Where the paper printed none, the interval is that of our seeds alone. Only seeds that learned.
    `points`: published errors (%) of another method by side; then what decides is the point minus
    ours, at the paper's scale only.
    """

    experiment: str
    sides: Mapping[str, Where]
    points: Mapping[str, float] | None = None

    def measure(self, source: Source, papers: Mapping[str, PaperValue], margin: float) -> Found:
        """Ours minus the paper's (Welch), and our mean with its own interval."""
        every = load(self.experiment, source)
        if self.points and every.planned and every.reduced():
            raise NoRuns(
                f"{self.experiment} ({source.profile}): a published error is compared with runs at "
                "the paper's scale only"
            )
        planned: list[Run] = []
        parts, missing = [], []
        for name, where in self.sides.items():
            runs = every.where(**where)
            failed = learning(runs)
            planned += runs.planned
            errors = runs.learned().by_seed()
            if errors.empty:
                if failed:
                    parts.append(Part(name, NOTHING, NOTHING, failed))
                else:
                    missing.append(name)
                continue
            ours = t_interval(errors)
            if self.points:
                point = self.points[name]
                said = f"{point:g} % published against {ours.mean:.2f} %"
                low, high = point - ours.high, point - ours.low
                off = shown = ours._replace(mean=point - ours.mean, low=low, high=high)
            else:
                paper, shown, said = papers[name], ours, papers[name].note
                welch = value_difference(errors, paper.value, paper.standard_error, paper.n)
                off = _off(ours, paper) if math.isnan(paper.standard_error) else welch
            parts.append(Part(name, off, shown, "; ".join(filter(None, (said, failed)))))
        runs = every.only(planned)
        if not parts:
            runs.needed()
        return Found(tuple(parts), runs, tuple(missing))


@dataclass(frozen=True)
class Reduction(Measure):
    """Relative reduction of the test error by A against others, in per cent of theirs: per seed
    the mean over the others and over the values of `over` of 100 (1 - A / other).

    The paper prints no standard error for its number, so that the interval is that of our seeds.
    `curves`: published table with the same methods, of which the same is computed beside it (slips
    corrected from `raw`); `network`: the published one.
    """

    experiment: str
    a: Where
    others: Mapping[str, Where]
    over: str
    curves: str
    raw: str
    network: str

    def cells(self, profile: str, part: str) -> list[Any] | None:
        """The values of `over` planned for all sides."""
        return shared_cells(self.experiment, profile, self.over, self.a, *self.others.values())

    def measure(self, source: Source, papers: Mapping[str, PaperValue], margin: float) -> Found:
        """Ours minus the paper's, and ours; against each of the others alone in the list."""
        every = load(self.experiment, source)
        cells = {self.over: self.cells(source.profile, "") or []}
        a = every.where(**self.a, **cells)
        sides = {name: every.where(**other, **cells) for name, other in self.others.items()}
        runs = every.only(run for side in (a, *sides.values()) for run in side.planned)
        runs.needed()
        ours = self._wide(a)
        tables = {name: 100 * (1 - ours / self._wide(side)) for name, side in sides.items()}
        whole = len(cells[self.over])
        listed = []
        for name, table in tables.items():
            values = table[table.notna().sum(axis=1) == whole].mean(axis=1)
            if len(values):
                shown = t_interval(values)
                listed.append(Part(name, _off(shown, papers.get("")), shown, counts=False))
        every_one = pd.concat(tables.values(), axis=1)
        by_seed = every_one[every_one.notna().sum(axis=1) == whole * len(tables)].mean(axis=1)
        if by_seed.empty and not listed:
            raise NoRuns(
                f"{self.experiment} ({source.profile}): no seed has finished and learned in both "
                "sides at every share"
            )
        said = [learning(a, *sides.values()), self._published(cells[self.over])]
        models = {run.model for run in runs.planned} - {self.network}
        if models:
            names = ", ".join(map(model_name, models))
            said.append(f"ours is {names}, the paper's {model_name(self.network)}")
        if by_seed.empty:
            return Found(tuple(listed), runs, ("all of them",), "; ".join(filter(None, said)))
        shown = t_interval(by_seed)
        rarer = less_often(a, *sides.values())
        one = Part("", _off(shown, papers.get("")), shown, less_often=rarer)
        return Found((one, *listed), runs, note="; ".join(filter(None, said)))

    def _wide(self, runs: Runs) -> pd.DataFrame:
        rows = runs.learned().rows
        return rows.pivot(index="seed", columns=self.over, values="test_error_pct")

    def _published(self, cells: Iterable[Any]) -> str:
        """The same from the published curves, slips corrected."""
        curves = {}
        for name, side in {"": self.a, **self.others}.items():
            where = {**side, "model": self.network}
            curves[name] = corrected(self.curves, where, self.raw)[0].set_index(self.over)[
                "test_error_pct"
            ]
        mine = curves.pop("")
        kept = [at for at in cells if all(at in c.index for c in (mine, *curves.values()))]
        if not kept:
            return ""
        by_other = {
            name: round(float(np.mean([100 * (1 - mine[at] / curve[at]) for at in kept])), 1) + 0.0
            for name, curve in curves.items()
        }
        listed = ", ".join(f"{value:.1f} against {name}" for name, value in by_other.items())
        mean = float(np.mean(list(by_other.values())))
        return f"the published curves give {mean:.1f} % ({listed})".replace("-", "−")


@dataclass(frozen=True)
class NotTrained(Measure):
    """A claim that no experiment here speaks to: says why."""

    experiment: str
    why: str

    def measure(self, source: Source, papers: Mapping[str, PaperValue], margin: float) -> Found:
        """Always NoRuns."""
        raise NoRuns(f"{self.experiment} ({source.profile}): {self.why}")
