"""Figure and table of the experiment `computing`.  Imports no torch."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lib.claims.computing import EXPERIMENT, MARGINS, WAY_NAMES, WAYS, computed, differences, spread
from lib.figures.plots import (
    Plot,
    Table,
    figure,
    legend_below,
    n_text,
    new_plot,
    stamp,
    table,
)
from lib.results.reading import (
    NoRuns,
    Runs,
    Source,
    interval_text,
    load,
    model_name,
    p_text,
    sentence,
)
from lib.stats import holm, t_interval

# Ways, not methods: colours that the palette of methods does not have.
_COLOURS = {"masked": "#444444", "sparse": "#117733", "bf16": "#882255"}
_MARKERS = {"masked": "_", "sparse": "o", "bf16": "s"}
_SEED = "#999999"
_MARGIN = "#DDCC77"


def _compared(source: Source) -> tuple[Runs, list[str]]:
    """The runs, and the networks that masked dense float32 and another way have computed."""
    runs = load(EXPERIMENT, source).needed()
    known = {model for way in list(WAYS)[1:] for model in differences(runs, way)}
    if not known:
        raise NoRuns(f"{EXPERIMENT} ({source.profile}): no seed was computed in two ways")
    return runs, [m for m in dict.fromkeys(r.model for r in runs.planned) if m in known]


def _by_torch(runs: Runs) -> str:
    lost = len(runs.where(**WAYS["sparse"]).rows) - len(computed(runs, "sparse").rows)
    return f" {lost} runs that asked for the kernels were computed by torch: left out." * bool(lost)


@figure("computing", experiment="computing")
def computing(source: Source) -> Plot:
    """Test error of the same seeds computed in three ways, and the differences to masked dense
    layers in float32 with the margin within which they count as none.
    """
    runs, models = _compared(source)
    plot, axes = new_plot(
        len(models), 2, size=(6.6, 1.75 * len(models) + 1.3), width_ratios=(1, 1.35)
    )
    for (left, right), model in zip(axes, models, strict=True):
        here = runs.where(model=model)
        density = here.planned[0].density
        _errors(left, here)
        left.set_title(f"{model_name(model)}, {100 * density:g} % of the weights")
        _differences(right, here, MARGINS[here.planned[0].dataset])
    axes[-1][1].set_xlabel("difference to masked float32 (points)")
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=_COLOURS[way], marker=_MARKERS[way], lw=1.4, label=name)
        for way, name in WAY_NAMES.items()
    ]
    handles[0] = Line2D(
        [], [], color=_COLOURS["masked"], marker="_", ls="none", ms=9, label=WAY_NAMES["masked"]
    )
    handles += [
        Line2D([], [], color=_SEED, marker=".", lw=0.7, label="one seed"),
        Patch(color=_MARGIN, alpha=0.45, lw=0, label="margin: no difference in practice"),
    ]
    legend_below(plot, handles, columns=3)
    stamp(
        plot,
        runs,
        "Sparse momentum. Left: each seed's test error, mean marked. Right: each seed's "
        "difference and their mean with the paired Student-t 95 % interval; equal in practice "
        f"where the interval lies inside the margin.{_by_torch(runs)}",
    )
    return plot


def _errors(ax: Axes, runs: Runs) -> None:
    """One line per seed over the ways, and the mean of each way."""
    errors = pd.DataFrame({way: computed(runs, way).by_seed() for way in WAYS})
    for values in errors.to_numpy():
        ax.plot(range(len(WAYS)), values, ".-", color=_SEED, lw=0.7, ms=4, zorder=2)
    for i, way in enumerate(WAYS):
        if errors[way].notna().any():
            mean = float(errors[way].mean())
            ax.plot(i, mean, _MARKERS["masked"], color=_COLOURS[way], ms=13, mew=1.8, zorder=3)
    ax.set_xticks(range(len(WAYS)), ["masked\nfloat32", "sparse\nfloat32", "masked\nbfloat16"])
    ax.set_xlim(-0.4, len(WAYS) - 0.6)
    ax.set_ylabel("test error (%)")


def _differences(ax: Axes, runs: Runs, margin: float) -> None:
    """Every seed's difference to masked dense float32, and the mean with its interval."""
    model = runs.planned[0].model
    base = computed(runs, "masked").by_seed()
    others = list(WAYS)[1:]
    counts = {}
    for i, way in enumerate(others):
        pair = differences(runs, way).get(model)
        counts[way] = pair.n if pair else 0
        if pair is None:
            continue
        seeds = (computed(runs, way).by_seed() - base).dropna()
        ax.plot(seeds, [i + 0.22] * len(seeds), ".", color=_SEED, ms=5, zorder=2)
        if not math.isnan(pair.low):
            ax.plot([pair.low, pair.high], [i, i], color=_COLOURS[way], lw=1.6, zorder=2.5)
        ax.plot(pair.mean, i, _MARKERS[way], color=_COLOURS[way], zorder=3)
    ax.axvspan(-margin, margin, color=_MARGIN, alpha=0.45, lw=0, zorder=1)
    ax.axvline(0, color="#444444", lw=0.8, zorder=1.5)
    ax.set_yticks(range(len(others)), [f"{WAY_NAMES[w]}\n{n_text([n])}" for w, n in counts.items()])
    ax.set_ylim(len(others) - 0.4, -0.5)
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", visible=True)
    ax.set_title(f"Margin {margin:g} points")


@table("computing", experiment="computing")
def computing_table(source: Source) -> Table:
    """Test error of each way, and its difference to masked dense float32, per network."""
    runs, models = _compared(source)
    lines = []
    tests = []
    for model in models:
        here = runs.where(model=model)
        for way, name in WAY_NAMES.items():
            errors = computed(here, way).by_seed()
            pair = None if way == "masked" else differences(here, way).get(model)
            mean = interval_text(*t_interval(errors)[:3]) if len(errors) else "–"
            difference = interval_text(pair.mean, pair.low, pair.high, sign=True) if pair else "–"
            line = {
                "network": model_name(model),
                "computed as": name,
                "test error (%)": mean,
                "difference (points)": difference,
                "p (Holm)": "",
                "n": str(pair.n if pair else len(errors)),
            }
            lines.append(line)
            tests.append(pair.p_t if pair else math.nan)
    for line, p in zip(lines, holm(tests), strict=True):
        line["p (Holm)"] = p_text(p)
    spreads = "; ".join(f"{model_name(m)} {spread(runs, m):.2f}" for m in models)
    margins = ", ".join(
        f"{margin:g} points on {name}"
        for name, margin in (("MNIST", MARGINS["mnist"]), ("CIFAR-10", MARGINS["cifar10"]))
    )
    note = (
        "Means with 95 % intervals over the seeds; differences are paired by seed, p of the "
        "paired t-tests adjusted over the table. "
        f"Equal in practice: an interval inside {margins}, as in the claims on dense level. "
        f"Standard deviation over the seeds, masked dense float32, in points: {spreads}."
        f"{_by_torch(runs)} {sentence(runs.scale())}"
    )
    return Table(pd.DataFrame(lines), "The same runs computed in three ways", note)
