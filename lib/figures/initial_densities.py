"""Figure and table of the experiment `initial_densities`.  Imports no torch."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lib import claims
from lib.figures.plots import (
    PALETTE,
    Plot,
    Table,
    figure,
    legend_below,
    mnist_published,
    n_text,
    new_plot,
    stamp,
    table,
)
from lib.results.reading import (
    CHANCE,
    METHOD_NAMES,
    Runs,
    Source,
    interval_text,
    load,
    p_text,
    published_text,
    sentence,
    summarise,
)

INIT_NAMES = {"uniform": "the same density in each layer", "erk": "denser small layers (ERK)"}
_MARKS = {"uniform": "o", "erk": "s"}
_OFFSET = {"uniform": -0.16, "erk": 0.16}
ERK = (
    "ERK: the density of a layer is proportional to (inputs + outputs) / (inputs x outputs), as in "
    "RigL, with the same number of weights in all."
)
WHAT = (
    f"{ERK} The published runs of SET, DSR and DeepR are of "
    "another code base, whose initial densities are not at hand."
)


@figure("initial_densities", experiment="initial_densities")
def initial_densities(source: Source) -> Plot:
    """Test error of each method from uniform and from ERK densities, beside the published one."""
    runs = load("initial_densities", source).where(model="lenet300-100").needed()
    shares = sorted(set(runs.rows["density"]))
    methods = list(dict.fromkeys(run.method for run in runs.planned))
    plot, axes = new_plot(1, len(shares), size=(2.0 + 2.3 * len(shares), 3.6), sharey=True)
    theirs, counts = mnist_published(), []
    for ax, density in zip(axes[0], shares, strict=True):
        counts += _draw(ax, runs.where(density=density), methods)
        for y, method in enumerate(methods):
            known = theirs[(theirs["method"] == method) & (theirs["density"] == density)]
            ax.plot(known["test_error_pct"], [y] * len(known), "|", color="black", ms=11, mew=1.1)
        ax.set_title(f"{100 * density:g} % of the weights")
        ax.set_xlabel("test error (%)")
        ax.grid(True, axis="x")
        ax.grid(False, axis="y")
        ax.tick_params(axis="y", length=0)
    axes[0, 0].set_yticks(range(len(methods)), [METHOD_NAMES[m] for m in methods])
    axes[0, 0].set_ylim(len(methods) - 0.5, -0.5)
    handles = [_key(name) for name in _MARKS]
    handles.append(Line2D([], [], color="black", marker="|", ls="none", ms=9, label="published"))
    legend_below(plot, handles, columns=3)
    stamp(
        plot,
        runs,
        f"LeNet-300-100 on MNIST. Mean of the seeds (dots) with Student-t 95 % interval "
        f"({n_text(counts)}), cut at half the mean and at 100 % on the logarithmic scale. {WHAT}",
    )
    return plot


@figure("initial_densities_lenet5", experiment="initial_densities")
def initial_densities_lenet5(source: Source) -> Plot:
    """LeNet-5 trained by sparse momentum: each seed's test error from both kinds of densities."""
    runs = load("initial_densities", source).where(model="lenet5")
    if len(runs.diverged) == 0:
        runs.needed()
    shares = sorted({run.density for run in runs.planned})
    plot, axes = new_plot(size=(6.4, 3.4))
    ax, colour = axes[0, 0], PALETTE["sparse_momentum"]
    ax.set_yscale("log")
    for name, mark in _MARKS.items():
        face = colour if name == "uniform" else "white"
        for x, density in enumerate(shares):
            here = runs.where(init=name, density=density)
            at = x + 1.3 * _OFFSET[name]
            known, lost = len(here.rows), len(here.diverged)
            done = known + lost
            spread = [at + 0.06 * (k - (done - 1) / 2) for k in range(done)]
            errors = here.rows.sort_values("seed")["test_error_pct"]
            ax.plot(spread[:known], errors, mark, color=colour, mfc=face, ls="none", zorder=3)
            ax.plot(spread[known:], [97.0] * lost, "x", color="black", ms=7, mew=1.4)
            ax.annotate(
                f"{len(here.learned().rows)} of {done}" if done else "–",
                (at, 1.0),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=8,
            )
    ax.axhline(CHANCE, color="0.5", ls=":", lw=1)
    ax.set_ylim(top=125)
    ax.set_xlim(-0.5, len(shares) - 0.5)
    ax.set_xticks(range(len(shares)), [f"{100 * share:g}" for share in shares])
    ax.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("weights (%)")
    ax.set_ylabel("test error (%, log scale)")
    handles = [_key(name) for name in _MARKS]
    handles.append(Line2D([], [], color="0.5", ls=":", label="above: not learned"))
    handles.append(Line2D([], [], color="black", marker="x", ls="none", label="diverged"))
    legend_below(plot, handles, columns=2)
    stamp(
        plot,
        runs,
        "LeNet-5 on MNIST, sparse momentum: a dot for each seed; above, how many of the seeds "
        "learned. The weights are drawn as for a dense network; with few of them in each layer the "
        f"signal fades from layer to layer until nothing is left to learn from. {ERK}",
    )
    return plot


def _key(name: str) -> Line2D:
    face = "0.3" if name == "uniform" else "white"
    return Line2D(
        [], [], color="0.3", marker=_MARKS[name], mfc=face, ls="none", label=INIT_NAMES[name]
    )


def _draw(ax: Axes, here: Runs, methods: list[str]) -> list[int]:
    """The means of both kinds of densities at one share of weights; n of each."""
    ax.set_xscale("log")
    counts = []
    for cell in summarise(here.rows, ["method", "init"]).to_dict("records"):
        method, init = cell["method"], cell["init"]
        y, colour = methods.index(method) + _OFFSET[init], PALETTE[method]
        rows = here.rows[(here.rows["method"] == method) & (here.rows["init"] == init)]
        ax.plot(
            rows["test_error_pct"], [y] * len(rows), ".", color=colour, ms=4.4, alpha=0.5, mew=0
        )
        if cell["n"] > 1:
            low = max(cell["low"], 0.5 * cell["mean"])  # the scale has no zero
            ax.plot([low, min(cell["high"], 100.0)], [y, y], color=colour, lw=1.1)
        face = colour if init == "uniform" else "white"
        ax.plot(cell["mean"], y, _MARKS[init], color=colour, mfc=face, zorder=3)
        counts.append(int(cell["n"]))
    ax.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    return counts


@table("initial_densities", experiment="initial_densities")
def initial_densities_table(source: Source) -> Table:
    """Each method's error from uniform and from ERK densities, and the difference seed by seed."""
    runs = load("initial_densities", source).where(model="lenet300-100").needed()
    theirs = mnist_published().set_index(["method", "density"])
    lines = []
    for method in dict.fromkeys(run.method for run in runs.planned):
        side = {init: runs.where(method=method, init=init) for init in INIT_NAMES}
        pairs = {
            row["density"]: row
            for row in claims.differences(side["erk"], side["uniform"], "density").to_dict(
                "records"
            )
        }
        for density in sorted({run.density for run in runs.planned}):
            line = {"method": METHOD_NAMES[method], "weights (%)": f"{100 * density:g}"}
            for init in INIT_NAMES:
                cells = summarise(side[init].where(density=density).rows, ["method"])
                cell = cells.iloc[0] if len(cells) else None
                line[f"{init} (%)"] = (
                    "–" if cell is None else interval_text(cell["mean"], cell["low"], cell["high"])
                )
            pair = pairs.get(density)
            key: Any = (method, density)
            line["ERK − uniform (points)"] = (
                interval_text(pair["mean"], pair["low"], pair["high"], sign=True) if pair else "–"
            )
            line["n"] = f"{int(pair['n'])}" if pair else "0"
            line["p (Holm)"] = p_text(pair["p_holm"]) if pair else "–"
            line["published (%)"] = published_text(theirs.loc[key]) if key in theirs.index else "–"
            lines.append(line)
    frame = pd.DataFrame(lines).rename(columns={"erk (%)": "ERK (%)"})
    note = (
        "Mean [95 % interval] of the test error; differences paired by seed, p of the paired "
        "t-test adjusted by Holm over the shares of each method; published: mean ± standard error. "
        f"{WHAT} {sentence(runs.scale())}"
    )
    return Table(frame, "LeNet-300-100: initial densities of the layers", note)
