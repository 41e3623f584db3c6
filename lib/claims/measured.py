"""The claims on class specialisation and on speed-ups.  Imports no torch.

They belong to CLAIMS of lib/claims/verdicts.py, which says what a claim is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from lib.claims import verdicts as claims
from lib.claims.verdicts import Claim, Measured, PaperValue, Published
from lib.results import clock as kernel_rows
from lib.results import measured
from lib.results.measured import EQUAL, POOLED, WEIGHTINGS
from lib.results.reading import MODEL_NAMES, NoRuns, Runs, Source, load, model_name, planned_runs
from lib.stats import Interval, paired_difference, t_interval

# A third of what the official data show where the claim holds clearly (AlexNet-s, 1.7 points).
_SPECIALISATION_MARGIN = 0.5  # percentage points
_ESTIMATE_MARGIN = 0.5  # times faster: a tenth to a fifth of the published values
_CLOCK_MARGIN = 5.0  # per cent of the time; two clocks of one network differ by as much


@dataclass(frozen=True)
class Specialisation:
    """Class specialisation of sparse momentum minus that of dense, paired by seed, in points.

    `models`: the first that the profile plans is taken; reduced profiles have narrower networks.
    """

    models: tuple[str, ...]
    weighting: str
    experiment: str = "features"

    def cells(self, profile: str) -> list[Any] | None:
        """One cell: nothing is averaged over."""
        return None

    def measure(self, source: Source, paper: PaperValue | None) -> Measured:
        """The paired difference, and the two means."""
        planned = {run.model for run in planned_runs(self.experiment, source.profile)}
        model = next((name for name in self.models if name in planned), self.models[0])
        every = load(
            self.experiment,
            source,
            model=model,
            method=["dense", "sparse_momentum"],
        )
        found = measured.specialisation(every).set_index("seed")
        dense, sparse = (
            100 * found.loc[found["method"] == method, self.weighting]
            for method in ("dense", "sparse_momentum")
        )
        pair = paired_difference(sparse, dense)
        if pair.n == 0:
            raise NoRuns(
                f"{self.experiment} ({source.profile}): no seed of {model} has both networks"
            )
        detail = f"{sparse.mean():.2f} % against {dense.mean():.2f} %"
        if model != self.models[0]:
            detail += f"; ours is {model.upper()}, the paper's {MODEL_NAMES[self.models[0]]}"
        return Measured(pair.interval, pair.interval, every, detail)


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
class Estimate:
    """The least or the largest speed-up over the networks that sparse momentum trained, per seed;
    in times faster than dense.  A seed counts when every network has it.
    """

    which: Literal["min", "max"]
    kind: str = "full"
    experiment: str = "speedups"

    def cells(self, profile: str) -> list[Any] | None:
        """One cell: the extreme over networks is taken seed by seed."""
        return None

    def measure(self, source: Source, paper: PaperValue | None) -> Measured:
        """Ours minus the paper's, and ours; the dense networks' own estimates in the detail."""
        runs = load(self.experiment, source, method=["dense", "sparse_momentum"])
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
        off = paper.value if paper else 0.0
        decides = shown._replace(mean=shown.mean - off, low=shown.low - off, high=shown.high - off)
        dense = found.loc[found["method"] == "dense", self.kind]
        shares = ", ".join(f"{100 * share:g}" for share in sorted({d for _, d in planned}))
        detail = f"at {shares} % of the weights"
        if len(dense):
            detail += (
                f"; the dense networks get {dense.min():.2f} to {dense.max():.2f} by the same "
                "formula, for zeros of the activations alone"
            )
        return Measured(decides, shown, runs, detail)


@dataclass(frozen=True)
class OnTheClock:
    """Time of a forward pass without the empty channels against the dense network's, in per cent
    more (negative: less), per seed the mean over the networks that sparse momentum trained.
    """

    experiment: str = "speedups"

    def cells(self, profile: str) -> list[Any] | None:
        """One cell: the mean over networks is taken seed by seed."""
        return None

    def measure(self, source: Source, paper: PaperValue | None) -> Measured:
        """The mean over networks, and how many channels could be taken out."""
        runs = load(self.experiment, source, method="sparse_momentum")
        found = measured.speedups(runs)
        more = pd.Series(100 * (1 / found["removed"] - 1)).groupby(found["seed"])
        whole = more.mean()[more.size() == more.size().max()]
        shown = t_interval(whole)
        share = 100 * found["removed_channels"].mean()
        return Measured(
            shown, shown, runs, f"{share:.1f} % of the hidden channels could be removed"
        )


@dataclass(frozen=True)
class _Timed(Runs):
    """Runs whose scale is that of the benchmark: its machine in place of seeds and epochs."""

    machine: str = ""

    def scale(self) -> str:
        """Where and how often the clock was read."""
        return self.machine


@dataclass(frozen=True)
class SparseKernels:
    """Whole training steps over the non-zero weights alone, with masks that sparse momentum moved,
    against torch's dense fp32 (results/bench/kernels.csv); the interval is the range of repeats.

    `which`: "least", the network that gains least at `density`, as per cent of the dense time;
    "largest", the one that gains most, in times faster, minus the paper's.
    """

    which: Literal["least", "largest"]
    density: float = 0.05  # that of VGG in the paper's table
    experiment: str = "speedups"

    def cells(self, profile: str) -> list[Any] | None:
        """One cell: the extreme over networks is taken."""
        return None

    def measure(self, source: Source, paper: PaperValue | None) -> Measured:
        """The extreme, and every network in the detail."""
        found = kernel_rows.whole_steps(source.root)
        here = found[
            np.isclose(found["density"], self.density) & (found["threads"] == kernel_rows.ALL)
        ]
        if here.empty:
            raise NoRuns(f"speedups: no training step was timed at {100 * self.density:g} %")
        rows = here.to_dict("records")
        extreme = min if self.which == "least" else max
        row = extreme(rows, key=lambda r: float(r["training"]))
        ends = (row["training"], row["training_low"], row["training_high"])
        value, low, high = (float(end) for end in ends)
        count = int(row["n"])
        if self.which == "least":
            value, low, high = (100 * (1 / end - 1) for end in (value, high, low))
            decides = shown = Interval(value, low, high, count, math.nan)
        else:
            shown = Interval(value, low, high, count, math.nan)
            theirs = paper.value if paper else math.nan
            decides = Interval(theirs - value, theirs - high, theirs - low, count, math.nan)
        each = ", ".join(f"{model_name(r['model'])} {r['training']:.2f} ×" for r in rows)
        detail = f"whole training steps at {100 * self.density:g} % of the weights: {each}"
        base = load(self.experiment, source)
        machine = f"clock of {row['machine']}; interval: range of {count} repeats"
        fields = {name: getattr(base, name) for name in Runs.__dataclass_fields__}
        return Measured(decides, shown, _Timed(**fields, machine=machine), detail)


def _published(quantity: str, setting: str, says: str) -> Published:
    return Published(
        "headline_and_speedup_claims",
        {"dataset": "cifar10", "quantity": quantity, "setting": setting},
        column="value",
        says=says,
    )


_NETWORKS = {"AlexNet-s": ("alexnet-s",), "VGG16-D": ("vgg16-d",), "WRN": ("wrn-28-2", "wrn-10-1")}

_FEATURES = tuple(
    Claim(
        id=f"features_more_general_{models[0]}_{weighting}",
        statement=f"{name}: sparse features are more general (class specialisation, "
        f"{WEIGHTINGS[weighting]})",
        source="abstract, version 1 (not in version 2); official code, results/feature_data.tar.gz",
        kind="lower",
        margin=_SPECIALISATION_MARGIN,
        ours=Specialisation(models, weighting),
        paper=PublishedSpecialisation(models[0], weighting),
        notebook="06_features",
    )
    for name, models in _NETWORKS.items()
    for weighting in (POOLED, EQUAL)
)

_SPEEDUPS = (
    Claim(
        id="speedup_estimate_least",
        statement="CIFAR-10: least estimated speed-up of a network (sparse convolution)",
        source="the paper's table, as a review quotes it",
        kind="value",
        margin=_ESTIMATE_MARGIN,
        ours=Estimate("min"),
        paper=_published("speedup_min_x", "version 2 (table)", "{value:g} ×"),
        notebook="05_speedups",
        unit="×",
    ),
    Claim(
        id="speedup_estimate_largest",
        statement="CIFAR-10: largest estimated speed-up of a network (sparse convolution)",
        source="abstract, version 2",
        kind="value",
        margin=_ESTIMATE_MARGIN,
        ours=Estimate("max"),
        paper=_published("speedup_max_x", "version 2", "{value:g} ×"),
        notebook="05_speedups",
        unit="×",
    ),
    Claim(
        id="speedup_measured",
        statement="CIFAR-10: sparse networks take less time, measured: a forward pass without "
        "the empty channels against dense",
        source='abstract, version 2 ("faster training"; there an estimate)',
        kind="lower",
        margin=_CLOCK_MARGIN,
        ours=OnTheClock(),
        paper=_published("speedup_max_x", "version 2", "up to {value:g} × faster (estimate)"),
        notebook="05_speedups",
        unit="%",
    ),
    Claim(
        id="speedup_clock",
        statement="CIFAR-10: sparse training takes less time, measured: whole training steps with "
        "sparse kernels on the CPU against dense, 5 % of the weights, the network that gains least",
        source='abstract, version 2 ("faster training"; there an estimate)',
        kind="lower",
        margin=_CLOCK_MARGIN,
        ours=SparseKernels("least"),
        paper=_published("speedup_min_x", "version 2 (table)", "{value:g} × faster (estimate)"),
        notebook="05_speedups",
        unit="%",
    ),
    Claim(
        id="speedup_clock_up_to",
        statement="CIFAR-10: training is up to 5.61 × faster on the clock too (whole training "
        "steps with sparse kernels on the CPU, the network that gains most)",
        source="abstract, version 2",
        kind="match",
        margin=_ESTIMATE_MARGIN,
        ours=SparseKernels("largest"),
        paper=_published("speedup_max_x", "version 2", "{value:g} × (estimate)"),
        notebook="05_speedups",
        unit="×",
    ),
)

claims.add(*_SPEEDUPS, *_FEATURES)
