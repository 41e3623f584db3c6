"""The claims on what redistribution and growth contribute, on depth and on hyper-parameters.

They belong to CLAIMS of lib/claims/verdicts.py, which says what a claim is.  The paper's ablation
numbers are in no public source, so that most of these claims have an order or a sign, but no value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lib.claims import effects
from lib.claims import verdicts as claims
from lib.claims.effects import FULL, MOMENTA, REFERENCE, WITHOUT, rules
from lib.claims.verdicts import Claim, Difference, Level, Measured, PaperValue, Published
from lib.experiments import KEPT_DENSE, READINGS
from lib.results.reading import NoRuns, Runs, Source, Where, load, published_rows
from lib.stats import PairedDifference, paired_difference

NAN = math.nan
_CODE = "official code, results/sensivity_*.csv of 2019-07-29"

# Points. What counts as no difference: ten of MNIST's test images, and on CIFAR-10 half a point,
# the size of the differences by which the paper's table ranks methods.
_MARGIN = {"mnist": 0.1, "cifar10": 0.5}
# A hyper-parameter may move the error on MNIST by as much as the weights that are left out cost at
# 5 % (published: 1.53 against 1.34 % dense).
MARGIN_SETTING = {"mnist": 0.2, "cifar10": 0.5}
_DOUBLINGS = 3  # of depth (1 to 8 hidden layers) or width (1 to 8) that the paper profile covers


@dataclass(frozen=True)
class Worst:
    """Test error of each of `others` minus that of A; A is the worst if all are below zero.

    The difference that decides is the one wholly above zero if there is one (the farthest), else
    the one that reaches highest, so that all lie below zero if this one does. With `over` the mean
    over its values planned for all sides, as in `Difference`.
    """

    experiment: str
    a: Where
    others: dict[str, Where]
    over: str = ""

    def cells(self, profile: str) -> list[Any] | None:
        """The values of `over` planned for all sides."""
        if not self.over:
            return None
        return claims.shared_cells(
            self.experiment, profile, self.over, self.a, *self.others.values()
        )

    def measure(self, source: Source, paper: PaperValue | None) -> Measured:
        """The difference that decides; the others in the detail."""
        every = load(self.experiment, source)
        cells = {self.over: self.cells(source.profile)} if self.over else {}
        a = every.where(**self.a, **cells)
        sides = {name: every.where(**where, **cells) for name, where in self.others.items()}
        mine = claims.mean_by_seed(a, self.over)
        pairs = {
            name: paired_difference(claims.mean_by_seed(side, self.over), mine)
            for name, side in sides.items()
        }
        missing = [name for name, pair in pairs.items() if pair.n == 0]
        if missing:
            a.needed()
            sides[missing[0]].needed()
            raise NoRuns(f"{self.experiment} ({source.profile}): no seed has finished {missing[0]}")
        name = _highest(pairs)
        listed = ", ".join(f"{other} {pair.mean:+.2f}" for other, pair in pairs.items())
        runs = every.only(run for side in (a, *sides.values()) for run in side.planned)
        one = pairs[name].interval
        detail = f"decided by {name}; {listed}".replace("-", "−")
        return Measured(one, one, runs, _with_untrained(detail, runs))


def _with_untrained(detail: str, runs: Runs) -> str:
    return "; ".join(filter(None, (detail, effects.untrained(runs))))


def _highest(pairs: dict[str, PairedDifference]) -> str:
    above = {name: pair for name, pair in pairs.items() if pair.low > 0}
    if above:
        return max(above, key=lambda name: above[name].low)
    unknown = [name for name, pair in pairs.items() if math.isnan(pair.high)]
    return unknown[0] if unknown else max(pairs, key=lambda name: pairs[name].high)


@dataclass(frozen=True)
class Growing:
    """How the difference full minus without `part` changes per doubling of depth or width: the
    mean of the slopes of the seeds. Below zero the benefit of the part grows.

    `family`: how the family's axis begins (lib/claims/effects.py, `families`); the first such is
    taken.
    """

    experiment: str
    part: str
    dataset: str
    family: str

    def cells(self, profile: str) -> list[Any] | None:
        """Nothing is averaged over."""
        return None

    def measure(self, source: Source, paper: PaperValue | None) -> Measured:
        """The slope with its interval over seeds; the benefits in the detail."""
        every = load(self.experiment, source, dataset=self.dataset)
        found = [
            family
            for family in effects.families(run.model for run in every.planned)
            if family.axis.startswith(self.family) and len(family.sizes) > 1
        ]
        if not found:
            raise NoRuns(
                f"{self.experiment} ({source.profile}): fewer than two networks to compare"
            )
        models = list(found[0].sizes)
        runs = every.only(
            run
            for where in (FULL, WITHOUT[self.part])
            for run in every.where(model=models, **where).planned
        )
        runs.needed()
        seen = effects.scaling(runs, found[0], self.part)
        if seen.slope.n == 0 and not seen.unlearned:
            raise NoRuns(f"{self.experiment} ({source.profile}): no seed has finished two networks")
        slope = seen.slope
        falling = slope._replace(mean=-slope.mean, low=-slope.high, high=-slope.low)
        benefits = ", ".join(
            f"{row['mean']:+.2f} at {row['size']}" for row in seen.cells.to_dict("records")
        )
        detail = f"benefit {benefits or 'unknown'} {found[0].axis}".replace("-", "−")
        if seen.unlearned:
            sizes = ", ".join(str(found[0].sizes[model]) for model in seen.unlearned)
            detail += f"; at {sizes} nothing learned: not in the slope"
        if missing := len(models) - len(seen.cells) - len(seen.unlearned):
            detail += f"; {missing} networks missing"
        return Measured(falling, falling, runs, _with_untrained(detail, runs))


@dataclass(frozen=True)
class Moved:
    """The largest difference in error between a setting of `over` and its reference value, in
    absolute value: the setting that decides is chosen by `effects.decisive`.
    """

    experiment: str
    a: Where
    over: str
    margin: float

    def cells(self, profile: str) -> list[Any] | None:
        """The planned settings."""
        return claims.shared_cells(self.experiment, profile, self.over, self.a)

    def measure(self, source: Source, paper: PaperValue | None) -> Measured:
        """The difference at the setting that decides."""
        runs = load(self.experiment, source, **self.a).needed()
        curves, reference = effects.curves_by_seed(runs, self.over), REFERENCE[self.over]
        if reference not in curves or len(curves.columns) < 2:
            raise NoRuns(
                f"{self.experiment} ({source.profile}): no setting beside {reference:g} is done"
            )
        pairs = {at: pair for at, pair in effects.shifts(curves, reference).items() if pair.n}
        if not pairs:
            raise NoRuns(f"{self.experiment} ({source.profile}): no seed has finished two settings")
        at, one = effects.decisive(pairs, self.margin)
        listed = ", ".join(f"{pair.mean:+.2f} at {key:g}" for key, pair in pairs.items())
        detail = f"decided by {at:g}; against {reference:g}: {listed}".replace("-", "−")
        return Measured(one, one, runs, _with_untrained(detail, runs))


@dataclass(frozen=True)
class MoreSensitive:
    """Mean absolute change of the error between momentum 0.9 and the other values in the paper's
    range: of sparse momentum minus that of the dense network, seed by seed.
    """

    experiment: str
    a: Where

    def cells(self, profile: str) -> list[Any] | None:
        """The planned momenta in the range."""
        cells = claims.shared_cells(
            self.experiment, profile, "momentum", *(self._side(m) for m in _SPARSE_AND_DENSE)
        )
        return effects.within(cells, *MOMENTA)

    def _side(self, method: str) -> Where:
        return {**self.a, "method": method, "prune_rate": 0.2, "schedule": "cosine"}

    def measure(self, source: Source, paper: PaperValue | None) -> Measured:
        """Sparse minus dense, and both in the detail."""
        every = load(self.experiment, source)
        cells = self.cells(source.profile) or []
        sides = [every.where(**self._side(m), momentum=cells) for m in _SPARSE_AND_DENSE]
        means = []
        for side in sides:
            curves = effects.curves_by_seed(side.needed(), "momentum")
            if set(curves) != set(cells) or len(cells) < 2:
                raise NoRuns(
                    f"{self.experiment} ({source.profile}): momenta {cells} are not all done"
                )
            means.append(effects.mean_shift(curves, REFERENCE["momentum"]))
        sparse, dense = means
        pair = paired_difference(sparse, dense)
        if pair.n == 0:
            raise NoRuns(f"{self.experiment} ({source.profile}): no seed has finished all momenta")
        runs = every.only(run for side in sides for run in side.planned)
        detail = f"sparse {sparse.mean():.2f}, dense {dense.mean():.2f} points"
        return Measured(pair.interval, pair.interval, runs, _with_untrained(detail, runs))


_SPARSE_AND_DENSE = ("sparse_momentum", "dense")


@dataclass(frozen=True)
class PublishedShift:
    """What `Moved` (`what` "largest") or `MoreSensitive` ("sparse minus dense") find in the
    published curves of one network, at the settings that we have too.
    """

    table: str
    model: str
    over: str
    what: str
    says: str = ""

    def read(self, only: Iterable[Any] | None = None) -> PaperValue:
        """The value in points; NaN if none of our settings beside the reference is published."""
        reference = REFERENCE[self.over]

        def curve(method: str) -> pd.Series:
            rows = published_rows(self.table, model=self.model, method=method)
            if self.over == "prune_rate":
                rows = rows[rows["schedule"] == "cosine"]
            found = rows.set_index(self.over)["test_error_pct"]
            return found if only is None else found[found.index.isin([*only])]

        def moved(method: str) -> pd.Series:
            values = curve(method)
            if reference not in values.index:
                return pd.Series(dtype=float)
            return (values - values[reference]).drop(reference).abs()

        if self.what == "largest":
            value = moved("sparse_momentum").max()
        else:
            value = moved("sparse_momentum").mean() - moved("dense").mean()
        return PaperValue(float(value), note="published: over the same settings")


# ------------------------------------------------------------------------------------- ablations

_ABLATIONS = "02_ablations"
_NOTES = "abstract, version 2, and public notes on the paper; no numbers are public"


@dataclass(frozen=True)
class _Networks:
    """The networks a claim is about: on the data set, all of them or one."""

    name: str
    dataset: str
    model: str = ""

    @property
    def ident(self) -> str:
        return self.model or self.dataset

    @property
    def over(self) -> str:
        """What their claims are the mean over."""
        return "" if self.model else "model"

    def on(self, where: Where) -> Where:
        only = {"model": self.model} if self.model else {}
        return {**where, "dataset": self.dataset, **only}


_ON_MNIST = _Networks("MNIST networks", "mnist")
_ON_CIFAR10 = _Networks("CIFAR-10 networks", "cifar10")
# LeNet-5 costs many times as much: at the paper's scale the claims on both networks wait for it.
_ON_LENET = _Networks("LeNet-300-100", "mnist", "lenet300-100")


def _helps(part: str, networks: _Networks, without: Where, name: str, ident: str) -> Claim:
    return Claim(
        id=f"ablation_{ident}_{networks.ident}",
        statement=f"{networks.name}: momentum {part} has lower error than {name}",
        source=_NOTES,
        kind="lower",
        margin=_MARGIN[networks.dataset],
        ours=Difference("ablations", networks.on(FULL), networks.on(without), over=networks.over),
        paper=None,
        notebook=_ABLATIONS,
    )


def _random_growth_suffices(networks: _Networks) -> Claim:
    return Claim(
        id=f"ablation_random_growth_suffices_{networks.ident}",
        statement=f"{networks.name} (small): with momentum redistribution, random growth is as "
        "good",
        source=_NOTES,
        kind="match",
        margin=_MARGIN[networks.dataset],
        ours=Difference(
            "ablations", networks.on(WITHOUT["growth"]), networks.on(FULL), over=networks.over
        ),
        paper=None,
        notebook=_ABLATIONS,
    )


def _random_without_is_worst(networks: _Networks) -> Claim:
    return Claim(
        id=f"ablation_worst_{networks.ident}",
        statement=f"{networks.name}: random growth without redistribution is the worst of "
        "the four variants",
        source=_NOTES,
        kind="lower",
        margin=_MARGIN[networks.dataset],
        ours=Worst(
            "ablations",
            networks.on(rules("none", "random")),
            {
                "full": networks.on(FULL),
                "no redistribution": networks.on(WITHOUT["redistribution"]),
                "random growth": networks.on(WITHOUT["growth"]),
            },
            over=networks.over,
        ),
        paper=None,
        notebook=_ABLATIONS,
    )


_NONE = "none (each layer regrows what it lost, code of July 2019)"
_SIZE = "sharing by layer size (called none in the code since August 2019)"

_ABLATION = (
    _helps("redistribution", _ON_MNIST, WITHOUT["redistribution"], _NONE, "redistribution"),
    _helps("redistribution", _ON_LENET, WITHOUT["redistribution"], _NONE, "redistribution"),
    _helps("redistribution", _ON_CIFAR10, WITHOUT["redistribution"], _NONE, "redistribution"),
    _helps("redistribution", _ON_MNIST, rules("layer_size", "momentum"), _SIZE, "layer_size"),
    _helps("redistribution", _ON_LENET, rules("layer_size", "momentum"), _SIZE, "layer_size"),
    _helps("growth", _ON_CIFAR10, WITHOUT["growth"], "random growth", "growth"),
    _random_growth_suffices(_ON_MNIST),
    _random_growth_suffices(_ON_LENET),
    _random_without_is_worst(_ON_MNIST),
    _random_without_is_worst(_ON_LENET),
    _random_without_is_worst(_ON_CIFAR10),
)


# The published curve with the algorithm of the official code: does it explain a difference of ours?
_READINGS = tuple(
    Claim(
        id=f"official_readings_error_{density:g}",
        statement=f"MNIST: error with {100 * density:g} % of the weights, computed as the official "
        "code does (its readings together)",
        source="MNIST figure (official code, results/MNIST_sparse_summary.csv)",
        kind="value",
        margin=MARGIN_SETTING["mnist"],  # as large as between the two published files
        ours=Level("official_readings", {**READINGS["official"], "density": density}),
        paper=Published(
            "mnist_sparse_summary",
            {
                "dataset": "mnist",
                "model": "lenet300-100",
                "method": "sparse_momentum",
                "density": density,
            },
        ),
        notebook=_ABLATIONS,
        unit="%",
    )
    for density in (0.01, 0.02, 0.05)
)


# --------------------------------------------------------------------------------- depth and width


def _grows(part: str, dataset: str, family: str, networks: str, size: str) -> Claim:
    return Claim(
        id=f"scaling_{part}_{dataset}_{size}{'_batch_norm' if 'batch norm' in family else ''}",
        statement=f"{networks}: the benefit of momentum {part} grows with {size} "
        "(change of full minus without, per doubling)",
        source="abstract, version 2; no numbers are public",
        kind="lower",
        margin=round(_MARGIN[dataset] / _DOUBLINGS, 3),
        ours=Growing("depth_scaling", part, dataset, family),
        paper=None,
        notebook="03_depth_scaling",
    )


_SCALING = tuple(
    _grows(part, *family)
    for part in WITHOUT
    for family in (
        ("mnist", "hidden", "MLPs on MNIST", "depth"),
        ("mnist", "hidden layers, batch norm", "MLPs with batch norm on MNIST", "depth"),
        ("cifar10", "depth", "WRNs on CIFAR-10", "depth"),
        ("cifar10", "width", "WRNs on CIFAR-10", "width"),
    )
)


# ------------------------------------------------------------------------------------ sensitivity

_LENET: Where = {"dataset": "mnist", "model": "lenet300-100"}
_OTHER_NETS = {"alexnet-s": "AlexNet-s on CIFAR-10", "vgg16-d": "VGG16-D on CIFAR-10"}


def _insensitive(over: str, model: str) -> Claim:
    dataset = "mnist" if model == _LENET["model"] else "cifar10"
    where: Where = {"dataset": dataset, "model": model, "method": "sparse_momentum"}
    fixed = {"momentum": 0.9} if over == "prune_rate" else {"prune_rate": 0.2}
    name = _OTHER_NETS.get(model, "LeNet-300-100 on MNIST")
    what = "prune rate" if over == "prune_rate" else "momentum"
    margin = MARGIN_SETTING[dataset]
    if over == "momentum":  # the paper's range, without 0.99
        fixed["momentum"] = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95]  # type: ignore[assignment]
    published = PublishedShift(f"sensitivity_{over}", model, over, "largest")
    return Claim(
        id=f"insensitive_{over}_{model}",
        statement=f"{name}: no {what} moves the error away from that at {REFERENCE[over]:g}",
        source=_CODE if model in _OTHER_NETS else "abstract, version 2",
        kind="match",
        margin=margin,
        ours=Moved("sensitivity", {**where, **fixed, "schedule": "cosine"}, over, margin),
        paper=published if model in _OTHER_NETS else None,
        notebook="04_sensitivity",
    )


def _no_more_than_dense(model: str) -> Claim:
    dataset = "mnist" if model == _LENET["model"] else "cifar10"
    return Claim(
        id=f"momentum_no_more_than_dense_{model}",
        statement=f"{_OTHER_NETS.get(model, 'LeNet-300-100 on MNIST')}: sparse training is no more "
        "sensitive to momentum than dense",
        source=_CODE if model in _OTHER_NETS else "abstract, version 2",
        kind="match",
        margin=MARGIN_SETTING[dataset],
        ours=MoreSensitive("sensitivity", {"dataset": dataset, "model": model}),
        paper=PublishedShift("sensitivity_momentum", model, "momentum", "sparse minus dense")
        if model in _OTHER_NETS
        else None,
        notebook="04_sensitivity",
    )


_NETS = ("lenet300-100", *_OTHER_NETS)
_SENSITIVITY = (
    *(_insensitive(over, model) for over in REFERENCE for model in _NETS),
    *(_no_more_than_dense(model) for model in _NETS),
)


# ------------------------------------------------------------------------------------ dense layers

_DENSE_LAYERS = (
    Claim(
        id="dense_layers_lower_error",
        statement="Layers left dense by mistake (July 2019) lowered the error at a nominal 10 % of "
        "the weights",
        source='official code, change log of version 1.0: without them results "slightly degraded"',
        kind="lower",
        margin=_MARGIN["cifar10"],
        ours=Difference(
            "dense_layers",
            {
                "method": "sparse_momentum",
                "density": 0.1,
                "keep_dense": list(dict.fromkeys(old.layers for old in KEPT_DENSE.values())),
            },
            {"method": "sparse_momentum", "density": 0.1, "keep_dense": ()},
            over="model",
        ),
        paper=None,
        notebook="07_dense_layers",
    ),
)

claims.add(*_ABLATION, *_READINGS, *_SCALING, *_SENSITIVITY, *_DENSE_LAYERS)
