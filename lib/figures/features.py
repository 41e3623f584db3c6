"""Class specialisation of channels, dense against sparse, and where the weights go."""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from lib.figures.gallery import figure, table
from lib.figures.plots import LOOKS, PALETTE, Plot, dots, finish, panels, zero_line
from lib.figures.tables import Table, difference, groups
from lib.results import measured
from lib.results.reading import (
    METHOD_NAMES,
    NoRuns,
    Runs,
    Source,
    interval_text,
    load,
    model_name,
    sentence,
    summarise,
)
from lib.stats import paired_difference

_PAIR = ("dense", "sparse_momentum")
_MARK = "#B00000"  # of means, on the histograms of both


def _runs(source: Source) -> Runs:
    return load("features", source, method=list(_PAIR)).needed()


@figure("features_histograms", "features")
def features_histograms(source: Source) -> Plot:
    """Class specialisation of the channels of each layer, dense to the left and sparse to the
    right: the share of a channel's activation that comes from its strongest class (0.1: perfectly
    general).
    """
    runs = _runs(source)
    found, layers = measured.histograms(runs), measured.feature_layers(runs)
    means = layers.groupby(["model", "index", "method"])["mean"].mean()
    places = [(model, i) for model, part in groups(layers, "model")
              for i in sorted(set(part["index"]))]  # fmt: skip
    titles = [f"{model_name(model)}, {i + 1}" for model, i in places]
    plot, axes = panels(titles, across=4, height=1.6, sharey=True)
    edges = measured.BIN_EDGES
    centres, step = (edges[1:] + edges[:-1]) / 2, float(np.diff(edges)[0])
    for ax, (model, i) in zip(axes, places, strict=True):
        ax.set_title(ax.get_title(loc="left"), fontsize=8)
        sides = {m: 100 * found.get((model, m, i), np.zeros(len(centres))) for m in _PAIR}
        widest = max(float(shares.max()) for shares in sides.values()) or 1.0
        known = measured.official_specialisation(model)
        known = known[known["layer_index"] == i].set_index("method")["mean"]
        for (method, shares), side in zip(sides.items(), (-1, 1), strict=True):
            ax.barh(centres, side * shares, step, color=PALETTE[method], lw=0,
                    label=LOOKS[method].label)  # fmt: skip
            at: dict[str, Any] = {"ls": "none", "marker": "o", "mec": _MARK, "zorder": 3}
            ax.plot(0.8 * side * widest, means.get((model, i, method), math.nan), mfc=_MARK, ms=3.5,
                    label="mean of the layer", **at)  # fmt: skip
            ax.plot(0.8 * side * widest, known.get(method, math.nan), mfc="none", ms=5,
                    label="official feature data", **at)  # fmt: skip
        ax.set(xlim=(-1.15 * widest, 1.15 * widest), ylim=(0.08, 0.52))
        ax.xaxis.set_major_locator(MaxNLocator(2, symmetric=True))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):g}"))
    for ax in axes[-(len(axes) % 4 or 4) :]:
        ax.set_xlabel("% of channels")
    how = (
        "One panel per layer, in the order of the forward pass. Channels of all seeds together; "
        "channels above 0.51 are counted but not shown."
    )
    return finish(plot, runs, how)


def specialisation(source: Source) -> pd.DataFrame:
    """Sparse minus dense class specialisation of each seed in percentage points: model, weighting
    ("pooled", "equal"), seed, value.
    """
    wide = measured.specialisation(_runs(source))
    kinds = list(measured.WEIGHTINGS)
    long = wide.melt(["model", "method", "seed"], kinds, var_name="weighting")
    both = long.pivot(index=["model", "weighting", "seed"], columns="method", values="value")
    off = both.reindex(columns=list(_PAIR))
    return (100 * (off["sparse_momentum"] - off["dense"])).dropna().rename("value").reset_index()


@figure("features_means", "features")
def features_means(source: Source) -> Plot:
    """Sparse minus dense class specialisation in percentage points: left of 0 the channels of the
    sparse network are more general.
    """
    runs, rows = _runs(source), specialisation(source)
    order = {model: model_name(model) for model in dict.fromkeys(rows["model"])}
    plot, (ax,) = panels([""], height=0.8 + 0.75 * len(order))
    zero_line(ax)
    cells = summarise(rows, ["model", "weighting"], "value")
    dots(ax, cells, rows, "model", order, by="weighting")
    for i, model in enumerate(order):
        official = measured.official_means(model)
        for k, kind in enumerate(measured.WEIGHTINGS):
            if set(_PAIR) <= set(official):
                theirs = official["sparse_momentum"][kind] - official["dense"][kind]
                ax.plot(theirs, i + 0.36 * (k - 0.5), LOOKS[kind].marker, mfc="white",
                        color=LOOKS[kind].colour, label="official data (open)")  # fmt: skip
    ax.set_xlabel("percentage points")
    how = "Mean with paired Student-t 95 % interval over the seeds (dots)."
    return finish(plot, runs, how)


@table("features_means", "features")
def features_table(source: Source) -> Table:
    """Class specialisation of dense and sparse networks, and the official values."""
    runs = _runs(source)
    found = measured.specialisation(runs)
    lines = []
    for model, part in groups(found, "model"):
        official = measured.official_means(model)
        for kind, name in measured.WEIGHTINGS.items():
            sides = {m: 100 * part[part["method"] == m].set_index("seed")[kind] for m in _PAIR}
            pair = paired_difference(sides["sparse_momentum"], sides["dense"])
            line = {"network": model_name(model), "weighting": name}
            for method, values in sides.items():
                mean = values.mean() if len(values) else math.nan
                line[f"{METHOD_NAMES[method]} (%)"] = interval_text(mean, math.nan, math.nan)
            line["sparse − dense (points)"] = difference(pair)
            line["n"] = str(pair.n)
            if set(_PAIR) <= set(official):
                line["official: dense, sparse (%)"] = ", ".join(
                    f"{official[method][kind]:.2f}" for method in _PAIR
                )
            lines.append(line)
    kept = measured.feature_layers(runs).groupby(["model", "method", "seed"])["kept"].sum()
    channels = "; ".join(
        f"{model_name(model)} {METHOD_NAMES[method].lower()} {part['kept'].mean():.0f}"
        for (model, method), part in groups(kept.reset_index(), ["model", "method"])
    )
    note = (
        "Share of a channel's activation that comes from its strongest class; 10 % is perfectly "
        "general. Channels that make up the last 5 % of a layer's activation are left out; kept "
        f"on average: {channels}."
    )
    caption = "Class specialisation, dense against sparse"
    return Table.of(lines, caption, note, sentence(runs.scale()))


@figure("features_layer_densities", "features")
def features_layer_densities(source: Source) -> Plot:
    """Where sparse momentum moves the weights: the density of each layer in per cent over the
    training, layers in the order of the forward pass; all start at the same density.
    """
    runs = load("features", source, method="sparse_momentum").needed()
    found = measured.layer_densities(runs)
    if found.empty:
        raise NoRuns(f"features ({source.profile}): no rows beside {runs.csv} on the layers")
    models = list(dict.fromkeys(found["model"]))
    tallest = max(found.groupby("model")["layer"].nunique())
    plot, axes = panels(
        [model_name(model) for model in models], height=min(6.0, 0.17 * tallest + 1.2)
    )
    floor = max(1e-4, float(found.loc[found["density"] > 0, "density"].min()))
    ticks = [t for t in (1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, 0.3, 1) if t >= floor]
    for ax, model in zip(axes, models, strict=True):
        part = found[found["model"] == model]
        grid = part.pivot(index="layer", columns="epoch", values="density")
        grid = grid.loc[list(dict.fromkeys(part["layer"]))].clip(lower=floor)
        grid.index = [str(name).removesuffix(".weight") for name in grid.index]
        sns.heatmap(grid, norm=mpl.colors.LogNorm(floor, 1), cmap="cividis", ax=ax,
                    cbar_kws={"format": lambda v, _: f"{100 * v:g}", "pad": 0.02})  # fmt: skip
        bar = ax.collections[0].colorbar
        if bar is not None:
            bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
            bar.ax.yaxis.set_minor_locator(NullLocator())
            bar.ax.set_title("%", fontsize=8, fontweight="normal", loc="left")
        ax.tick_params(rotation=0, length=0)
        ax.set(xlabel="after epoch", ylabel="")
    return finish(plot, runs, "Sparse momentum, mean over the seeds.")
