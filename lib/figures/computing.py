"""Whether the way of computing a run changes its error."""

from __future__ import annotations

import math

import pandas as pd

from lib.claims.computing import EXPERIMENT, MARGINS, WAYS, computed, differences, spread
from lib.figures.gallery import figure, table
from lib.figures.plots import LOOKS, Plot, dots, finish, panels, zero_line
from lib.figures.tables import Table, difference
from lib.results.reading import (
    NoRuns,
    Runs,
    Source,
    interval_text,
    load,
    model_name,
    p_text,
    sentence,
    summarise,
)
from lib.stats import holm, t_interval


def minus_masked(source: Source) -> pd.DataFrame:
    """Error of each seed minus that computed by masked dense layers in float32: model, way, seed,
    difference (points), of seeds that learned in both. NoRuns where no seed was computed twice.
    """
    runs, parts = load(EXPERIMENT, source).needed(), []
    for model in dict.fromkeys(run.model for run in runs.planned):
        here = runs.where(model=model).learned()
        base = computed(here, "masked").by_seed()
        for way in list(WAYS)[1:]:
            off = (computed(here, way).by_seed() - base).dropna()
            parts.append(
                pd.DataFrame({"model": model, "way": way, "seed": off.index, "difference": off})
            )
    rows = pd.concat(parts, ignore_index=True)
    if rows.empty:
        raise NoRuns(f"{EXPERIMENT} ({source.profile}): no seed was computed in two ways")
    return rows


def _by_torch(runs: Runs) -> str:
    lost = len(runs.where(**WAYS["sparse"]).rows) - len(computed(runs, "sparse").rows)
    return f"{lost} runs that asked for the kernels were computed by torch: left out." * bool(lost)


@figure("computing", EXPERIMENT)
def computing(source: Source) -> Plot:
    """Does the way of computing matter? Test error of the same seeds over the non-zero weights
    alone, and in bfloat16, minus that of masked dense layers in float32, in points.
    """
    runs, rows = load(EXPERIMENT, source), minus_masked(source)
    models = list(dict.fromkeys(rows["model"]))
    order = {way: LOOKS[way].label.replace(", ", "\n") for way in list(WAYS)[1:]}
    plot, axes = panels([model_name(model) for model in models], height=1.5, sharey=True)
    for ax, model in zip(axes, models, strict=True):
        mine = rows[rows["model"] == model]
        margin = MARGINS[runs.where(model=model).planned[0].dataset]
        ax.axvspan(-margin, margin, color="#DDCC77", alpha=0.45, lw=0, zorder=1,
                   label="no difference in practice")  # fmt: skip
        zero_line(ax)
        dots(ax, summarise(mine, ["way"], "difference"), mine, "way", order, value="difference")
        ax.set_xlabel("points")
    how = (
        "Sparse momentum. Mean with paired Student-t 95 % interval over the seeds (dots) that "
        "learned in both; equal in practice where the interval lies inside the margin."
    )
    return finish(plot, runs, how, _by_torch(runs))


@table("computing", EXPERIMENT)
def computing_table(source: Source) -> Table:
    """Test error of each way, and its difference to masked dense float32, per network."""
    runs, models = load(EXPERIMENT, source), dict.fromkeys(minus_masked(source)["model"])
    lines, tests = [], []
    for model in models:
        here = runs.where(model=model)
        for way in WAYS:
            errors = computed(here, way).learned().by_seed()
            pair = None if way == "masked" else differences(here, way).get(model)
            mean = interval_text(*t_interval(errors)[:3]) if len(errors) else "–"
            lines.append(
                {
                    "network": model_name(model),
                    "computed as": LOOKS[way].label,
                    "test error (%)": mean,
                    "difference (points)": difference(pair) if pair else "–",
                    "p (Holm)": "",
                    "n": str(pair.n if pair else len(errors)),
                }
            )
            tests.append(pair.p_t if pair else math.nan)
    for line, p in zip(lines, holm(tests), strict=True):
        line["p (Holm)"] = p_text(p)
    spreads = "; ".join(f"{model_name(model)} {spread(runs, model):.2f}" for model in models)
    note = (
        "Means with 95 % intervals over the seeds that learned; differences paired by seed, p of "
        "the paired t-tests adjusted over the table. Equal in practice: an interval inside "
        f"{MARGINS['mnist']:g} points on MNIST, {MARGINS['cifar10']:g} points on CIFAR-10. "
        f"Standard deviation over the seeds, masked dense float32, in points: {spreads}."
    )
    caption = "The same runs computed in three ways"
    return Table.of(lines, caption, note, _by_torch(runs), sentence(runs.scale()))
