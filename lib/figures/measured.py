"""Figures and tables of the experiments `speedups` and `features`.  Imports no torch."""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from lib.figures.plots import (
    PALETTE,
    PUBLISHED_ALPHA,
    Plot,
    Table,
    draw_ours,
    figure,
    legend_below,
    method_label,
    new_plot,
    percent_axis,
    stamp,
    table,
)
from lib.results import measured
from lib.results.reading import (
    METHOD_NAMES,
    MODEL_NAMES,
    NoRuns,
    Runs,
    Source,
    interval_text,
    load,
    published_rows,
    sentence,
    summarise,
)
from lib.stats import paired_difference

_KIND_MARKERS = {"full": "o", "channel": "s", "removed": "D"}
_KIND_LINES: dict[str, Any] = {"full": "-", "channel": (0, (4, 2)), "removed": (0, (1, 1.5))}


def model_name(model: str) -> str:
    """Display name of a network, also of the families (wrn-10-1, mlp-100x3)."""
    return MODEL_NAMES.get(model, model.upper())


def _models(found: pd.DataFrame) -> list[str]:
    """In the order of MODEL_NAMES, others behind."""
    known = list(MODEL_NAMES)
    return sorted(set(found["model"]), key=lambda m: (known.index(m) if m in known else 99, m))


def _of_kinds(value: float, low: float, high: float) -> str:
    return interval_text(value, low, high, 2 if value < 10 else 1)


# ------------------------------------------------------------------------------ 05: speed-ups


def published_range() -> tuple[float, float]:
    """The least and the largest estimated speed-up of the paper's table (version 2)."""
    rows = published_rows("headline_and_speedup_claims", dataset="cifar10")
    rows = rows[rows["setting"].str.startswith("version 2")]
    values = dict(zip(rows["quantity"], rows["value"], strict=True))
    return float(values["speedup_min_x"]), float(values["speedup_max_x"])


@figure("speedups_by_weights", experiment="speedups")
def speedups_by_weights(source: Source) -> Plot:
    """The paper's two estimates and the measured speed-up against the weights, per network."""
    runs = load("speedups", source).needed()
    found = measured.speedups(runs)
    names = _models(found)
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    size = (max(5.2, 1.9 * columns + 0.6), 2.5 * rows + 0.9)
    plot, axes = new_plot(rows, columns, size=size, sharey=True)
    low, high = published_range()
    values = found[list(measured.SPEEDUPS)].to_numpy().ravel()
    values = values[np.isfinite(values)]
    for ax, model in zip(axes.flat, names, strict=False):
        part = found[found["model"] == model]
        _speedup_panel(ax, part, min(0.8, values.min() / 1.1), max(high, values.max()) * 1.2)
        ax.axhspan(low, high, color=PALETTE["sparse_momentum"], alpha=0.1, lw=0, zorder=1)
        ax.set_title(model_name(model))
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    for row in axes:
        row[0].set_ylabel("times faster than dense")
    methods = [m for m in METHOD_NAMES if m in set(found["method"])]
    handles: list[Any] = [
        Line2D(
            [], [], color="#444444", marker=_KIND_MARKERS[kind], ls=_KIND_LINES[kind], label=name
        )
        for kind, name in measured.SPEEDUPS.items()
    ]
    counts = found.groupby(["model", "method", "density"])["seed"].size()
    for method in methods:
        each = counts.xs(method, level="method")
        label = method_label(method, [int(n) for n in each])
        handles.append(Patch(color=PALETTE[method], label=label))
    handles.append(
        Patch(
            color=PALETTE["sparse_momentum"],
            alpha=0.15,
            label=f"published estimates ({low:g} to {high:g})",
        )
    )
    legend_below(plot, handles, columns=2 if columns < 3 else 3)
    stamp(
        plot,
        runs,
        "Estimates: forward pass of the convolutions during training, no overhead, zeros made by "
        "ReLU and dropout credited (so the dense network at 100 % has one too). Measured: a "
        "forward pass of the whole finished network after its empty channels were taken out. Mean "
        "of the seeds (dots) with Student-t 95 % interval; marks of one share of weights stand "
        "beside each other.",
    )
    return plot


def _speedup_panel(ax: Axes, part: pd.DataFrame, low: float, high: float) -> None:
    percent_axis(ax, part["density"])
    shares = 100 * part["density"]
    ax.set_xlim(shares.min() / 1.4, shares.max() * 1.4)
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    ticks = [t for t in (0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500) if low <= t <= high]
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.axhline(1, color="#444444", lw=0.7, zorder=1.2)
    methods = [m for m in METHOD_NAMES if m in set(part["method"])]
    for i, method in enumerate(methods):
        rows = part[part["method"] == method]
        densities = sorted(set(rows["density"]))
        for k, kind in enumerate(measured.SPEEDUPS):
            # Beside each other: the methods, and a step further the three kinds of each.
            dodge = 1 + 0.05 * (i - (len(methods) - 1) / 2) + 0.16 * (k - 1)
            values = [
                [v for v in rows.loc[rows["density"] == share, kind] if math.isfinite(v)]
                for share in densities
            ]
            known = [(s, v) for s, v in zip(densities, values, strict=True) if v]
            if not known:
                continue
            drawn = draw_ours(
                ax,
                [100 * share * dodge for share, _ in known],
                [v for _, v in known],
                method=method,
                marker=_KIND_MARKERS[kind],
                label="",
            )
            drawn.set_linestyle(_KIND_LINES[kind])


@table("speedups_by_weights", experiment="speedups")
def speedups_table(source: Source) -> Table:
    """Estimates, the measured speed-up, and what could be taken out, per network and method."""
    runs = load("speedups", source).needed()
    found = measured.speedups(runs)
    lines = []
    for model in _models(found):
        for _, method, density in measured.cells(found[found["model"] == model]):
            key = {"model": model, "method": method, "density": density}
            cell = found[(found[list(key)] == pd.Series(key)).all(axis=1)]
            line = {
                "network": model_name(model),
                "method": METHOD_NAMES[method],
                "weights (%)": f"{100 * density:g}",
            }
            for kind, name in measured.SPEEDUPS.items():
                finite = cell[np.isfinite(cell[kind])]
                row = summarise(finite, ["model"], kind)
                text = "–" if row.empty else _of_kinds(*row.iloc[0][["mean", "low", "high"]])
                line[f"{name} (×)"] = text
            line["channels taken out (%)"] = f"{100 * cell['removed_channels'].mean():.1f}"
            line["weights taken out (%)"] = f"{100 * cell['removed_weights'].mean():.1f}"
            line["n"] = str(len(cell))
            lines.append(line)
    low, high = published_range()
    note = (
        f"Times faster than dense, mean with 95 % interval over seeds. The paper's table ranges "
        f"from {low:g} to {high:g} (estimated, sparse convolution, at the weights that reach the "
        "dense network's accuracy, which are not known to us). Largest difference between the "
        f"outputs before and after channels were taken out: {found['difference'].max():.1g} of "
        f"the largest logit. {sentence(runs.scale())}"
    )
    return Table(pd.DataFrame(lines), "Speed-ups, estimated and measured", note)


# ------------------------------------------------------------------------------- 06: features

_PAIR = ("dense", "sparse_momentum")
_MARK = "#B00000"  # of means, on the histograms of both


def _feature_runs(source: Source) -> Runs:
    return load("features", source, method=list(_PAIR)).needed()


@figure("features_histograms", experiment="features")
def features_histograms(source: Source) -> Plot:
    """Back-to-back histograms of the class specialisation, dense left and sparse right."""
    runs = _feature_runs(source)
    found = measured.histograms(runs)
    layers = measured.feature_layers(runs)
    depths = {m: 1 + int(layers.loc[layers["model"] == m, "index"].max()) for m in _models(layers)}
    columns = min(8, max(depths.values()))
    panels: list[tuple[str, int] | None] = []  # each network starts on a row of its own
    for model, depth in depths.items():
        panels += [(model, i) for i in range(depth)]
        panels += [None] * (-len(panels) % columns)
    rows = len(panels) // columns
    size = (max(5.2, 1.15 * columns + 0.5), 1.55 * rows + 0.9)
    plot, axes = new_plot(rows, columns, size=size, sharey=True)
    centres = (measured.BIN_EDGES[1:] + measured.BIN_EDGES[:-1]) / 2
    height = float(np.diff(measured.BIN_EDGES)[0])
    means = layers.groupby(["model", "index", "method"])["mean"].mean()
    for k, (ax, panel) in enumerate(zip(axes.flat, panels, strict=True)):
        if panel is None:
            ax.set_visible(False)
            continue
        model, i = panel
        below = panels[k + columns] if k + columns < len(panels) else None
        if below is None:
            ax.set_xlabel("% of channels")
        published = measured.official_specialisation(model)
        official = {
            (row["layer_index"], row["method"]): float(row["mean"])
            for row in published.to_dict("records")
        }
        widest = 0.0
        for method, side in zip(_PAIR, (-1, 1), strict=True):
            shares = 100 * found.get((model, method, i), np.zeros(len(centres)))
            widest = max(widest, float(shares.max()))
            some = shares > 0
            ax.barh(centres[some], side * shares[some], height, color=PALETTE[method], lw=0)
        ax.set_xlim(-1.15 * widest or -1, 1.15 * widest or 1)
        for method, side in zip(_PAIR, (-1, 1), strict=True):
            if (model, i, method) in means.index:
                at = float(means[model, i, method])
                ax.plot(0.9 * side * widest, at, "o", color=_MARK, ms=3, mec="white", mew=0.4)
            if (i, method) in official:
                at = official[i, method]
                ax.plot(0.9 * side * widest, at, "o", mfc="white", mec=_MARK, ms=3.6, mew=0.9)
        ax.set_ylim(0.08, 0.52)
        ax.axvline(0, color="white", lw=0.6)
        ax.set_title(f"{model_name(model)}, {i + 1}", fontsize=7)
        ax.xaxis.set_major_locator(MaxNLocator(2, symmetric=True))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):g}"))
    for row in axes:
        row[0].set_ylabel("class specialisation")
    seeds = runs.rows.groupby(["model", "method"])["seed"].nunique()
    handles: list[Any] = [
        Patch(
            color=PALETTE[method],
            label=method_label(method, [int(n) for n in seeds.xs(method, level="method")])
            + (", left" if method == "dense" else ", right"),
        )
        for method in _PAIR
        if method in set(runs.rows["method"])
    ]
    for fill, label in ((_MARK, "mean of the layer"), ("white", "the same, official feature data")):
        handles.append(
            Line2D([], [], ls="none", marker="o", color=_MARK, mfc=fill, ms=3.6, label=label)
        )
    legend_below(plot, handles, columns=2 if columns < 7 else 4)
    stamp(
        plot,
        runs,
        "One panel per layer, in the order of the forward pass. Class specialisation: share of a "
        "channel's activation that comes from its strongest class; 0.1 is perfectly general. "
        "Channels of all seeds together; channels above 0.51 are counted but not shown.",
    )
    return plot


def _sides(found: pd.DataFrame, model: str, kind: str) -> list[pd.Series]:
    """Sparse and dense by seed, in per cent."""
    part = found[found["model"] == model].set_index("seed")
    return [100 * part.loc[part["method"] == method, kind] for method in reversed(_PAIR)]


@figure("features_means", experiment="features")
def features_means(source: Source) -> Plot:
    """Sparse minus dense class specialisation, channels pooled and layers weighted equally."""
    runs = _feature_runs(source)
    found = measured.specialisation(runs)
    names = _models(found)
    plot, axes = new_plot(1, 1, size=(5.6, 1.6 + 0.55 * len(names)))
    ax = axes[0][0]
    colour = PALETTE["sparse_momentum"]
    markers = {measured.POOLED: "o", measured.EQUAL: "s"}
    labels = []
    for i, model in enumerate(names):
        official = measured.official_means(model)
        counts = 0
        for j, kind in enumerate(measured.WEIGHTINGS):
            y = i + 0.22 * (2 * j - 1)
            sparse, dense = _sides(found, model, kind)
            pair = paired_difference(sparse, dense)
            counts = pair.n
            if pair.n:
                seeds = (sparse - dense).dropna()
                below = [y + 0.11] * len(seeds)  # on the line they would not be seen
                ax.plot(seeds, below, ".", color=colour, ms=4, alpha=0.6, mew=0)
                if not math.isnan(pair.low):
                    ax.plot([pair.low, pair.high], [y, y], color=colour, lw=1.6)
                ax.plot(pair.mean, y, markers[kind], color=colour, zorder=3)
            if set(_PAIR) <= set(official):
                theirs = official["sparse_momentum"][kind] - official["dense"][kind]
                ax.plot(
                    theirs,
                    y,
                    markers[kind],
                    color=colour,
                    mfc="white",
                    alpha=PUBLISHED_ALPHA,
                    zorder=2.9,
                )
        labels.append(f"{model_name(model)}\nn = {counts}")
    ax.axvline(0, color="#444444", lw=0.8, zorder=1.5)
    ax.set_yticks(range(len(names)), labels)
    ax.set_ylim(len(names) - 0.45, -0.55)
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", visible=True)
    ax.set_xlabel("sparse − dense class specialisation (percentage points)")
    ax.set_title("Left of 0: channels of the sparse network are more general")
    handles: list[Any] = [
        Line2D([], [], color=colour, marker=markers[kind], lw=1.6, label=name)
        for kind, name in measured.WEIGHTINGS.items()
    ]
    handles.append(
        Line2D([], [], color="#555555", marker="o", mfc="white", ls="none", label="official data")
    )
    legend_below(plot, handles, columns=3)
    stamp(
        plot,
        runs,
        "Mean of the differences over the seeds (dots below) with the paired Student-t 95 % "
        "interval; the official data are one network each, at densities that were not recorded.",
    )
    return plot


@table("features_means", experiment="features")
def features_table(source: Source) -> Table:
    """Mean class specialisation, dense and sparse, under both weightings, beside the official."""
    runs = _feature_runs(source)
    found = measured.specialisation(runs)
    layers = measured.feature_layers(runs)
    kept = layers.groupby(["model", "method", "seed"])["kept"].sum()
    lines = []
    for model in _models(found):
        official = measured.official_means(model)
        for kind, name in measured.WEIGHTINGS.items():
            sparse, dense = _sides(found, model, kind)
            pair = paired_difference(sparse, dense)
            line = {"network": model_name(model), "weighting": name}
            for method in _PAIR:
                mine = found[(found["model"] == model) & (found["method"] == method)][kind]
                mean = 100 * mine.mean() if len(mine) else math.nan
                line[f"{METHOD_NAMES[method]} (%)"] = interval_text(mean, math.nan, math.nan)
            line["sparse − dense (points)"] = interval_text(
                pair.mean, pair.low, pair.high, sign=True
            )
            line["n"] = str(pair.n)
            line["official: dense, sparse (%)"] = (
                ", ".join(f"{official[m][kind]:.2f}" for m in _PAIR)
                if set(_PAIR) <= set(official)
                else "–"
            )
            lines.append(line)
    means: dict[Any, float] = kept.groupby(["model", "method"]).mean().to_dict()
    channels = "; ".join(
        f"{model_name(model)} {METHOD_NAMES[method].lower()} {value:.0f}"
        for (model, method), value in means.items()
    )
    note = (
        "Share of a channel's activation that comes from its strongest class; 10 % is perfectly "
        "general. Channels that make up the last 5 % of a layer's activation are left out; kept "
        f"on average: {channels}. {sentence(runs.scale())}"
    )
    return Table(pd.DataFrame(lines), "Class specialisation, dense against sparse", note)


@figure("features_layer_densities", experiment="features")
def features_layer_densities(source: Source) -> Plot:
    """Where the weights go: the density of each layer over the training, a heat map per network."""
    runs = load("features", source, method="sparse_momentum").needed()
    found = measured.layer_densities(runs)
    if found.empty:
        raise NoRuns(f"features ({source.profile}): no rows beside {runs.csv} on the layers")
    names = _models(found)
    counts = [found.loc[found["model"] == m, "layer"].nunique() for m in names]
    tallest = max(counts)
    size = (max(5.4, 2.9 * len(names) + 0.9), min(7.0, 0.16 * tallest + 2.2))
    plot, axes = new_plot(1, len(names), size=size)
    floor = max(1e-4, float(found.loc[found["density"] > 0, "density"].min()))
    scale = mpl.colors.LogNorm(floor, 1)
    drawn: Any = None
    for ax, model in zip(axes[0], names, strict=True):
        part = found[found["model"] == model]
        layers = list(dict.fromkeys(part["layer"]))
        grid = part.pivot(index="layer", columns="epoch", values="density").loc[layers]
        drawn = ax.imshow(grid.clip(lower=floor), aspect="auto", norm=scale, interpolation="none")
        ax.set_xticks(range(grid.shape[1]), [str(e) for e in grid.columns])
        step = max(1, len(layers) // 26)
        shown = range(0, len(layers), step)
        texts = [layers[i].removesuffix(".weight") for i in shown]
        ax.set_yticks(list(shown), texts, fontsize=6)
        ax.grid(visible=False)
        ax.set_xlabel("after epoch")
        ax.set_title(f"{model_name(model)} (n = {runs.where(model=model).rows['seed'].nunique()})")
    bar = plot.colorbar(drawn, ax=axes[0].tolist(), shrink=0.85)
    ticks = [t for t in (1e-4, 1e-3, 0.003, 0.01, 0.03, 0.1, 0.3, 1) if t >= floor]
    bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    bar.set_label("active weights of the layer (%)")
    stamp(
        plot,
        runs,
        "Sparse momentum, mean over the seeds, layers in the order of the forward pass. All "
        "layers start at the same density.",
    )
    return plot
