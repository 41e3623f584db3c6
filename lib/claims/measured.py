"""Measures of class specialisation and of speed-ups.  Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from lib.claims.claim import NAN, Found, Measure, PaperValue, Part
from lib.claims.learning import learning
from lib.results import clock, measured
from lib.results.reading import (
    NoRuns,
    Source,
    load,
    model_name,
    planned_runs,
)
from lib.stats import Interval, paired_difference, t_interval

# Name -> our networks, of which the first that a profile plans is taken (reduced: narrower ones).
NETWORKS = {"AlexNet-s": ("alexnet-s",), "VGG16-D": ("vgg16-d",), "WRN": ("wrn-28-2", "wrn-10-1")}
_SIDES = ["dense", "sparse_momentum"]


@dataclass(frozen=True)
class Specialisation(Measure):
    """Class specialisation of sparse momentum minus that of dense, paired by seed, in points; one
    part per network.
    """

    weighting: str
    experiment: str = "features"

    def measure(self, source: Source, papers: Mapping[str, PaperValue], margin: float) -> Found:
        """The paired differences, and the two means."""
        planned = {run.model for run in planned_runs(self.experiment, source.profile)}
        every = load(self.experiment, source, method=_SIDES)
        parts, missing = [], []
        for name, models in NETWORKS.items():
            model = next((one for one in models if one in planned), models[0])
            runs = every.where(model=model)
            try:
                found = measured.specialisation(runs.learned()).set_index("seed")
            except NoRuns:
                missing.append(name)
                continue
            dense, sparse = (
                100 * found.loc[found["method"] == method, self.weighting] for method in _SIDES
            )
            pair = paired_difference(sparse, dense)
            if pair.n == 0:
                missing.append(name)
                continue
            note = [f"{sparse.mean():.2f} % against {dense.mean():.2f} %", learning(runs)]
            if model != models[0]:
                note.append(f"ours is {model_name(model)}, the paper's {model_name(models[0])}")
            said = "; ".join(filter(None, note))
            parts.append(Part(name, pair.interval, pair.interval, said))
        if not parts:
            every.needed()
            raise NoRuns(f"{self.experiment} ({source.profile}): no seed has both networks")
        return Found(tuple(parts), every, tuple(missing))


@dataclass(frozen=True)
class PublishedSpecialisation:
    """Sparse minus dense in the official feature data of a model, in percentage points."""

    model: str
    weighting: str
    says: str = ""

    def read(self, only: Iterable[Any] | None = None) -> PaperValue:
        """The difference; one network each, so that there is no standard error."""
        means = measured.official_means(self.model)
        return PaperValue(
            means["sparse_momentum"][self.weighting] - means["dense"][self.weighting],
            note="the density of the official networks is not recorded",
        )


@dataclass(frozen=True)
class Estimate(Measure):
    """The least or the largest speed-up over the networks that sparse momentum trained, per seed;
    in times faster than dense.  A seed counts when every network has it.

    `kind`: "full" (sparse convolution) or "channel" (dense convolution); `models`: only these.
    """

    which: Literal["min", "max"]
    kind: str = "full"
    models: tuple[str, ...] = ()
    above: float = 0.0  # what ours is held against where the paper has no number
    experiment: str = "speedups"

    def measure(self, source: Source, papers: Mapping[str, PaperValue], margin: float) -> Found:
        """Ours minus the paper's, and ours; the dense networks' own estimates in the note."""
        only = {"model": list(self.models)} if self.models else {}
        runs = load(self.experiment, source, method=_SIDES, **only)
        found = measured.speedups(runs)
        ours = found[found["method"] == "sparse_momentum"]
        wide = ours.pivot(index="seed", columns=["model", "density"], values=self.kind)
        planned = {(run.model, run.density) for run in runs.planned if run.method != "dense"}
        whole = wide[np.isfinite(wide).all(axis=1)]
        if whole.empty or len(wide.columns) < len(planned):
            raise NoRuns(
                f"{self.experiment} ({source.profile}): no seed has finished all {len(planned)} "
                "networks"
            )
        shown = t_interval(getattr(whole, self.which)(axis=1))
        off = papers[""].value if papers else self.above
        decides = shown._replace(mean=shown.mean - off, low=shown.low - off, high=shown.high - off)
        dense = found.loc[found["method"] == "dense", self.kind]
        shares = ", ".join(f"{100 * share:g}" for share in sorted({d for _, d in planned}))
        note = f"at {shares} % of the weights"
        if len(dense):
            note += (
                f"; the dense networks get {dense.min():.2f} to {dense.max():.2f} by the same "
                "formula, for zeros of the activations alone"
            )
        return Found((Part("", decides, shown, note),), runs)


@dataclass(frozen=True)
class OnTheClock(Measure):
    """Time of a forward pass without the empty channels against the dense network's, in per cent
    more (negative: less), per seed the mean over the networks that sparse momentum trained.
    """

    experiment: str = "speedups"

    def measure(self, source: Source, papers: Mapping[str, PaperValue], margin: float) -> Found:
        """The mean over networks, and how many channels could be taken out."""
        runs = load(self.experiment, source, method="sparse_momentum")
        found = measured.speedups(runs)
        more = pd.Series(100 * (1 / found["removed"] - 1)).groupby(found["seed"])
        shown = t_interval(more.mean()[more.size() == more.size().max()])
        share = 100 * found["removed_channels"].mean()
        note = f"{share:.1f} % of the hidden channels could be removed"
        return Found((Part("", shown, shown, note),), runs)


@dataclass(frozen=True)
class SparseKernels(Measure):
    """Whole training steps over the non-zero weights alone, with masks that sparse momentum moved,
    against torch's dense fp32 (results/bench/kernels.csv). Repeats of a clock are no seeds: what is
    given is their range, not an interval.

    `which`: "least", the network that gains least at `density`, as per cent of the dense time;
    "largest", the one that gains most, in times faster, minus the paper's.
    """

    which: Literal["least", "largest"]
    density: float = 0.05  # that of VGG in the paper's table
    experiment: str = "speedups"

    def measure(self, source: Source, papers: Mapping[str, PaperValue], margin: float) -> Found:
        """The extreme, and every network in the note."""
        found = clock.whole_steps(source.root)
        here = found[np.isclose(found["density"], self.density) & (found["threads"] == clock.ALL)]
        if here.empty:
            raise NoRuns(f"speedups: no training step was timed at {100 * self.density:g} %")
        rows = here.to_dict("records")
        extreme = min if self.which == "least" else max
        row = extreme(rows, key=lambda r: float(r["training"]))
        value, low, high = (float(row[f"training{end}"]) for end in ("", "_low", "_high"))
        count = int(row["n"])
        if self.which == "least":
            value, low, high = (100 * (1 / end - 1) for end in (value, high, low))
            decides = shown = Interval(value, low, high, count, NAN)
        else:
            shown = Interval(value, low, high, count, NAN)
            theirs = papers[""].value if papers else NAN
            decides = Interval(theirs - value, theirs - high, theirs - low, count, NAN)
        each = ", ".join(f"{model_name(r['model'])} {r['training']:.2f} ×" for r in rows)
        note = f"whole training steps at {100 * self.density:g} % of the weights: {each}"
        runs = load(self.experiment, source)
        scale = f"clock of {row['machine']}; range of {count} repeats"
        whose = str(row["machine"]).split(" (avx")[0]
        unit = f"{'%' if self.which == 'least' else '×'} (range of {count} repeats on {whose})"
        return Found((Part("", decides, shown, note, unit=unit),), runs, scale=scale)
