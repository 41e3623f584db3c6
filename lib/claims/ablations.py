"""Measures of scaling with depth and width and of sensitivity to a setting.  Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lib.claims import effects
from lib.claims.claim import SETTING_MARGIN, Found, Measure, PaperValue, Part
from lib.claims.compare import NOTHING, Pairs, shared_cells
from lib.claims.effects import FULL, MOMENTA, REFERENCE, WITHOUT
from lib.claims.learning import learned_share, learning, share_text
from lib.results.reading import NoRuns, Runs, Source, Where, load, model_name, published_rows
from lib.stats import paired_difference

MARGIN_SETTING = SETTING_MARGIN  # the name that the figures use

_SETTINGS = {
    "prune_rate": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
    "momentum": (0.5, 0.6, 0.7, 0.8, 0.9, 0.95),  # the paper's range, without 0.99
}


@dataclass(frozen=True)
class Growing(Measure):
    """How the difference full minus without `part` changes per doubling of depth or width: the
    mean of the slopes of the seeds that learned. Below zero the benefit of the part grows.

    `families`: how their names begin (`effects.families`). Each family gives three parts: all its
    networks, and without each end, so that no trend rests on one network.
    """

    experiment: str
    part: str
    dataset: str
    families: tuple[str, ...]
    start: str = "uniform"  # initial densities of the layers

    def measure(self, source: Source, papers: Mapping[str, PaperValue], margin: float) -> Found:
        """The slopes with their intervals over seeds; the benefits in the notes."""
        every = load(self.experiment, source, dataset=self.dataset)
        every = every.only(
            run for run in every.planned if run.init == self.start or run.method == "dense"
        )
        found = [
            family
            for family in effects.families(run.model for run in every.planned)
            if family.name.startswith(self.families) and len(family.sizes) > 1
        ]
        if not found:
            raise NoRuns(
                f"{self.experiment} ({source.profile}): fewer than two networks are planned"
            )
        parts, missing = [], []
        models = [model for family in found for model in family.sizes]
        runs = every.only(
            run
            for where in (FULL, WITHOUT[self.part])
            for run in every.where(model=models, **where).planned
        )
        runs.needed()
        for family in found:
            parts += (mine := self._parts(every, family))
            if not mine:
                missing.append(family.name)
        if not parts:
            raise NoRuns(f"{self.experiment} ({source.profile}): no seed has finished two networks")
        return Found(tuple(parts), runs, tuple(missing), learning(runs))

    def _parts(self, every: Runs, family: effects.Family) -> list[Part]:
        whole = effects.scaling(every, family, self.part)
        if len(whole.cells) + len(whole.unlearned) < 2:
            return []
        benefits = ", ".join(
            f"{row['mean']:+.2f} at {row['size']}" for row in whole.cells.to_dict("records")
        )
        note = f"benefit {benefits or 'unknown'} {family.axis}".replace("-", "−")
        for model in whole.unlearned:
            dense = learned_share(every.where(model=model, method="dense"))
            note += f"; at {family.sizes[model]} nothing learned (dense: {share_text(dense)})"
        parts = [self._slope(family.name, whole, note)]
        kept = list(whole.cells["model"])
        if len(kept) < 3:
            return [*parts, *(Part(f"{family.name}, without an end", NOTHING, NOTHING),)]
        for end in (kept[0], kept[-1]):
            sizes = {model: family.sizes[model] for model in kept if model != end}
            fewer = dataclasses.replace(family, sizes=sizes)
            name = f"{family.name} without {family.sizes[end]}"
            parts.append(self._slope(name, effects.scaling(every, fewer, self.part)))
        return parts

    def _slope(self, name: str, seen: effects.Scaling, note: str = "") -> Part:
        slope = seen.slope
        falling = slope._replace(mean=-slope.mean, low=-slope.high, high=-slope.low)
        return Part(name, falling, falling, note)


def settings(over: str, models: Sequence[str], low: float, high: float) -> Pairs:
    """Error at each setting in [low, high] minus that at the reference, one part each."""
    fixed: Where = {"method": "sparse_momentum", "schedule": "cosine"}
    fixed |= {"momentum": 0.9} if over == "prune_rate" else {"prune_rate": 0.2}
    reference = REFERENCE[over]
    return Pairs(
        "sensitivity",
        [
            (
                f"{model_name(model)} at {at:g}",
                {**fixed, "model": model, over: at},
                {**fixed, "model": model, over: reference},
            )
            for model in models
            for at in _SETTINGS[over]
            if low <= at <= high and at != reference
        ],
    )


@dataclass(frozen=True)
class MoreSensitive(Measure):
    """Mean absolute change of the error between momentum 0.9 and the other values in the paper's
    range: of sparse momentum minus that of the dense network, seed by seed; one part per network.
    """

    dataset: str
    models: Sequence[str]
    experiment: str = "sensitivity"

    def measure(self, source: Source, papers: Mapping[str, PaperValue], margin: float) -> Found:
        """Sparse minus dense, both in the notes, and the paper's tests on our pooled means."""
        every = load(self.experiment, source, dataset=self.dataset)
        parts, missing, planned = [], [], []
        curves: dict[str, dict[str, pd.Series]] = {"sparse_momentum": {}, "dense": {}}
        for model in self.models:
            sides = {m: every.where(**self._side(model, m)) for m in curves}
            momenta = effects.within(
                shared_cells(
                    self.experiment,
                    source.profile,
                    "momentum",
                    *(self._side(model, m) for m in curves),
                ),
                *MOMENTA,
            )
            if not momenta:
                continue
            sides = {m: side.where(momentum=momenta) for m, side in sides.items()}
            planned += [run for side in sides.values() for run in side.planned]
            tables = {
                m: effects.curves_by_seed(side.learned(), "momentum") for m, side in sides.items()
            }
            if any(set(table) != set(momenta) for table in tables.values()) or len(momenta) < 2:
                missing.append(model_name(model))
                continue
            for m, table in tables.items():
                curves[m][model] = table.mean()
            sparse, dense = (effects.mean_shift(t, REFERENCE["momentum"]) for t in tables.values())
            pair = paired_difference(sparse, dense).interval
            note = f"sparse {sparse.mean():.2f}, dense {dense.mean():.2f} points"
            if failed := learning(*sides.values()):
                note += f"; {failed}"
            parts.append(Part(model_name(model), pair, pair, note))
        runs = every.only(planned)
        if not parts:
            runs.needed()
            raise NoRuns(f"{self.experiment} ({source.profile}): not all momenta are done")
        sparse_curves, dense_curves = curves.values()
        tested = effects.compare_curves(sparse_curves, dense_curves, REFERENCE["momentum"])
        said = ""
        if tested:
            said = (
                f"pooled over {len(tested[1])} networks: Levene p = {tested[0].levene.p:.2f}, "
                f"Wilcoxon p = {tested[0].wilcoxon.p:.2f}"
            )
        return Found(tuple(parts), runs, tuple(missing), said)

    def _side(self, model: str, method: str) -> Where:
        return {"model": model, "method": method, "prune_rate": 0.2, "schedule": "cosine"}


@dataclass(frozen=True)
class PublishedShift:
    """What the published sensitivity curves of these networks say in a range of `over`: the largest
    shift of sparse momentum, or its mean shift minus that of the dense network; in points.
    """

    over: str
    models: Sequence[str]
    low: float
    high: float
    minus_dense: bool = False
    says: str = ""

    def read(self, only: Iterable[Any] | None = None) -> PaperValue:
        """The value in points."""

        def moved(model: str, method: str) -> pd.Series:
            rows = published_rows(f"sensitivity_{self.over}", model=model, method=method)
            if self.over == "prune_rate":
                rows = rows[rows["schedule"] == "cosine"]
            curve = rows.set_index(self.over)["test_error_pct"]
            curve = curve[(curve.index >= self.low) & (curve.index <= self.high)]
            reference = REFERENCE[self.over]
            return (curve - curve[reference]).drop(reference).abs()

        if self.minus_dense:
            values = [
                moved(m, "sparse_momentum").mean() - moved(m, "dense").mean() for m in self.models
            ]
            return PaperValue(float(sum(values) / len(values)))
        return PaperValue(max(float(moved(m, "sparse_momentum").max()) for m in self.models))
