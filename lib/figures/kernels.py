"""Figures and tables of the sparse kernels on the clock, from results/bench/kernels.csv; part of
the experiment `speedups`.  Imports no torch.

The rows are of whole networks and of one machine, the same at every profile; error bars are the
range of the repeats, not an interval over seeds.
"""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from lib import experiments
from lib.figures.measured import published_range
from lib.figures.plots import (
    PALETTE,
    PUBLISHED_ALPHA,
    Plot,
    Table,
    figure,
    legend_below,
    new_plot,
    percent_axis,
    stamp,
    table,
)
from lib.results import clock as kernel_rows
from lib.results import measured
from lib.results.clock import ALL, ALL_LAYERS, ONE, PARTS, SIDES
from lib.results.reading import NoRuns, Source, interval_text, load, model_name

_SPARSE, _DENSE = PALETTE["sparse_momentum"], PALETTE["dense"]
_BF16 = PALETTE["snip"]
_GREY = "#888888"
# Column of kernel_rows.whole_steps -> label, colour, marker, line.
_LINES: dict[str, tuple[str, str, str, Any]] = {
    "training": ("sparse, whole training step", _SPARSE, "o", "-"),
    "inference": ("sparse, inference", _SPARSE, "s", (0, (4, 2))),
    "bf16": ("dense bf16, whole training step", _BF16, "o", "-"),
    "bf16_inference": ("dense bf16, inference", _BF16, "s", (0, (4, 2))),
}
_ALONE: dict[str, Any] = {"color": "#44AA99", "marker": "^", "lw": 1.0, "ls": "-"}
_PART_COLOURS = dict(
    zip(
        PARTS,
        ("#000000", _SPARSE, "#E69F00", "#009E73", "#CC79A7", "#BBBBBB", "#56B4E9"),
        strict=True,
    )
)


def _where(rows: pd.DataFrame) -> str:
    """The machine of the rows, and how often each number was measured."""
    counts = sorted({int(n) for n in rows["n"]})
    said = "–".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
    return f"n = {said} repeats in turn. Machine: {kernel_rows.machine(rows)}."


def _in_seconds_of(steps: pd.DataFrame) -> str:
    said = {
        ALL: "All threads: seconds on the clock.",
        ONE: "One thread: seconds of the processor, which a shared machine does not stretch.",
    }
    return " ".join(said[t] for t in (ALL, ONE) if t in set(steps["threads"]))


def _batches(rows: pd.DataFrame) -> str:
    pairs = rows.drop_duplicates("model")[["model", "batch"]].to_dict("records")
    return ", ".join(f"{model_name(str(p['model']))} {int(p['batch'])}" for p in pairs)


def _times_axis(ax: Axes, low: float, high: float) -> None:
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    ticks = [t for t in (0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100) if low <= t <= high]
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.axhline(1, color="#444444", lw=0.7, zorder=1.2)


def _planned(source: Source) -> None:
    """NoRuns at a profile without speed-ups; the rows of the clock are the same at all others."""
    if source.profile not in experiments.EXPERIMENTS["speedups"].blocks:
        raise NoRuns(f"speedups ({source.profile}): no such runs in this profile")


def _estimates(source: Source) -> pd.DataFrame:
    """Our estimates by the paper's formula (sparse convolution): model, density, full; empty where
    no network has been measured.
    """
    try:
        runs = load("speedups", source, method="sparse_momentum").needed()
        found = measured.speedups(runs)
    except NoRuns:
        return pd.DataFrame(columns=["model", "density", "full"])
    found = found[np.isfinite(found["full"])]
    return found.groupby(["model", "density"], as_index=False)["full"].mean()


@figure("speedups_clock", experiment="speedups")
def speedups_clock(source: Source) -> Plot:
    """Whole training steps and inference on the clock against the weights, per network, beside the
    paper's estimates and dense bf16.
    """
    every = kernel_rows.whole_steps(source.root)
    found, alone = (every[every["threads"] == t] for t in (ALL, ONE))
    if found.empty:
        found, alone = alone, found
    names = list(dict.fromkeys(every["model"]))
    _planned(source)
    estimates = _estimates(source)
    low, high = published_range()
    values = found[[c + s for c in _LINES for s in ("_low", "_high")]].to_numpy(float).ravel()
    shown = estimates.loc[estimates["model"].isin(names), "full"].tolist()
    values = np.concatenate([values[np.isfinite(values)], [low, high, 1.0, *shown]])
    values = np.concatenate([values, alone["training"].to_numpy(float)])
    plot, axes = new_plot(1, len(names), size=(max(5.2, 2.3 * len(names) + 0.6), 3.5), sharey=True)
    for ax, model in zip(axes[0], names, strict=True):
        rows = found[found["model"] == model]
        ours = estimates[estimates["model"] == model].sort_values("density")
        percent_axis(ax, every["density"])
        shares = 100 * every["density"]
        ax.set_xlim(shares.min() / 1.4, shares.max() * 1.4)
        _times_axis(ax, values.min() / 1.15, values.max() * 1.2)
        ax.axhspan(low, high, color=_SPARSE, alpha=0.1, lw=0, zorder=1)
        x = 100 * rows["density"]
        ax.fill_between(x, rows["inside"], rows["outside"], color=_SPARSE, alpha=0.25, lw=0)
        for column, (_, colour, marker, line) in _LINES.items():
            y = rows[column]
            spread = [y - rows[f"{column}_low"], rows[f"{column}_high"] - y]
            ax.errorbar(
                x, y, yerr=spread, color=colour, marker=marker, ls=line, elinewidth=0.9, zorder=3
            )
        one = alone[alone["model"] == model]
        ax.plot(100 * one["density"], one["training"], zorder=2.5, **_ALONE)
        if len(ours):
            ax.plot(
                100 * ours["density"],
                ours["full"],
                color=_SPARSE,
                marker="D",
                mfc="white",
                lw=0.9,
                ls=(0, (1, 1.5)),
                alpha=PUBLISHED_ALPHA,
                zorder=2,
            )
        batch = int(every.loc[every["model"] == model, "batch"].iloc[0])
        ax.set_title(f"{model_name(model)}, batch {batch}")
    axes[0][0].set_ylabel("times faster than dense fp32")
    handles: list[Any] = [
        Line2D([], [], color=colour, marker=marker, ls=line, label=label)
        for column, (label, colour, marker, line) in _LINES.items()
        if found[column].notna().any()
    ]
    handles.append(Patch(color=_SPARSE, alpha=0.25, label="sparse, inside to outside the window"))
    if len(alone):
        handles.append(Line2D([], [], label="sparse, whole training step, one thread", **_ALONE))
    if shown:
        handles.append(
            Line2D(
                [],
                [],
                color=_SPARSE,
                marker="D",
                mfc="white",
                lw=0.9,
                ls=(0, (1, 1.5)),
                alpha=PUBLISHED_ALPHA,
                label="estimate by the paper's formula, ours",
            )
        )
    handles.append(
        Patch(color=_SPARSE, alpha=0.1, label=f"paper's estimates ({low:g} to {high:g})")
    )
    legend_below(plot, handles, columns=3)
    stamp(
        plot,
        [],
        "Measured: forward, backward, optimizer and masks of a mini-batch of CIFAR-10; masks moved "
        "by sparse momentum; each layer runs the faster way, dense is torch's fp32 in its faster "
        "memory format. Whole: 153 of 352 steps lie in the dense window. Bars: range of the "
        f"repeats. {_in_seconds_of(every)} {_where(every)}",
    )
    return plot


@figure("speedups_breakdown", experiment="speedups")
def speedups_breakdown(source: Source) -> Plot:
    """Where the time of a training step goes, dense and sparse, per network."""
    _planned(source)
    found = kernel_rows.parts(source.root)
    names = list(dict.fromkeys(found["model"]))
    plot, axes = new_plot(1, 1, size=(7.2, 1.5 + 0.62 * len(names)))
    ax = axes[0][0]
    ticks, labels = [], []
    for i, model in enumerate(names):
        part = found[found["model"] == model].set_index(["side", "part"])["value"]
        whole = {side: float(part[side].sum()) for side in SIDES}
        for j, side in enumerate(SIDES):
            y, left = i + 0.4 * j - 0.2, 0.0
            for name in PARTS:
                width = 100 * float(part.get((side, name), 0.0)) / whole["dense"]
                width = max(0.0, width)  # a difference of two times can come out below zero
                ax.barh(y, width, 0.34, left=left, color=_PART_COLOURS[name], lw=0)
                left += width
            text = f" {whole[side]:.2f} s"
            if side == "sparse":
                text += f", {whole['dense'] / whole['sparse']:.2f}×"
            ax.text(left, y, text, va="center", fontsize=7)
            ticks.append(y)
            labels.append(f"{model_name(model)}, {side}")
    ax.set_yticks(ticks, labels)
    ax.set_ylim(len(names) - 0.45, -0.55)
    ax.set_xlim(0, 118)
    ax.xaxis.set_major_locator(FixedLocator([0, 20, 40, 60, 80, 100]))
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", visible=True)
    ax.set_xlabel("time of a training step (% of the dense one)")
    used = [name for name in PARTS if name in set(found["part"])]
    legend_below(plot, [Patch(color=_PART_COLOURS[n], label=n) for n in used], columns=3)
    waits = kernel_rows.calibrations(source.root)
    asked = ", ".join(f"{model_name(m)} {waits[m]:.0f} s" for m in names if m in waits)
    stamp(
        plot,
        [],
        f"{100 * found['density'].iloc[0]:g} % of the weights; batch: {_batches(found)}. Steps "
        "outside the dense window, which adds its extra in 153 of 352 steps. Under the profiler, "
        "dense and sparse in turn; medians. Finding out the faster way of each layer, once per "
        f"machine, is not in it: {asked}. {_where(found)}",
    )
    return plot


@figure("speedups_layers", experiment="speedups")
def speedups_layers(source: Source) -> Plot:
    """Each convolution of VGG16-D on the clock, one line per share of weights."""
    _planned(source)
    found = kernel_rows.layer_ratios(source.root)
    rows = kernel_rows.kernel_rows(source.root, "sparse_layers")
    each = found.drop(index=ALL_LAYERS, errors="ignore")
    plot, axes = new_plot(1, 1, size=(7.0, 3.4))
    ax = axes[0][0]
    values = found.to_numpy(float)
    _times_axis(ax, min(0.9, np.nanmin(values)) / 1.1, np.nanmax(values) * 1.2)
    at = np.arange(len(each))
    handles = []
    shares = [float(v) for v in found.columns.tolist()]
    colours = mpl.colormaps["cividis"](np.linspace(0, 0.88, len(shares)))
    for colour, share in zip(colours, shares, strict=True):
        label = f"{100 * share:g} % of the weights"
        if ALL_LAYERS in found.index:
            ax.plot(len(each) + 0.2, found.at[ALL_LAYERS, share], "D", color=colour)
            label += f" (all: {float(str(found.at[ALL_LAYERS, share])):.1f}×)"
        handles += ax.plot(at, each[share], marker="o", color=colour, label=label)
    names = [str(name).replace(" at ", "\n") for name in each.index.tolist()]
    if ALL_LAYERS in found.index:
        at, names = np.append(at, len(each) + 0.2), [*names, "all"]
    ax.set_xticks(at, names, fontsize=6.5)
    ax.set_xlabel("input-output channels of the convolution, side of its input")
    ax.set_ylabel("times faster than dense fp32")
    legend_below(plot, handles, columns=3)
    stamp(
        plot,
        [],
        "VGG16-D's 3 × 3 convolutions, forward and backward, uniform random masks, batch 128, "
        "best of the repeats in turn with torch's dense fp32 in its faster memory format. All: "
        "sums of seconds, each layer as often as the network has it. Below 1 a layer runs dense in "
        f"training. Machine: {kernel_rows.machine(rows)}.",
    )
    return plot


def _times(row: Any, column: str) -> str:
    value, low, high = (float(row[column + end]) for end in ("", "_low", "_high"))
    return "–" if math.isnan(value) else interval_text(value, low, high)


@table("speedups_kernels", experiment="speedups")
def kernels_table(source: Source) -> Table:
    """Whole steps on the clock, sparse against dense, per network and share of weights."""
    _planned(source)
    found = kernel_rows.whole_steps(source.root)
    lines = [
        {
            "network": model_name(str(row["model"])),
            "batch": f"{row['batch']}",
            "threads": str(row["threads"]),
            "weights (%)": f"{100 * row['density']:g}",
            "FLOPs left (%)": f"{row['flops']:.1f}",
            "layers run sparse": f"{row['sparse_layers']:.0f} of {row['layers']}"
            if row["layers"]
            else "–",
            "dense (s)": _seconds(row["dense_s"]),
            "sparse (s)": _seconds(row["sparse_s"]),
            "training (×)": _times(row, "training"),
            "outside window (×)": _times(row, "outside"),
            "inside window (×)": _times(row, "inside"),
            "inference (×)": _times(row, "inference"),
            "dense bf16 over sparse (×)": _times(row, "bf16_over_sparse"),
            "n": str(row["n"]),
        }
        for row in found.to_dict("records")
    ]
    note = (
        "Times faster than torch's dense fp32 in its faster memory format, median [range of the "
        "repeats]; ratios within one repeat, seconds of a whole training step. Masks moved by "
        "sparse momentum on CIFAR-10, the dense window counted as 153 of 352 steps. FLOPs left: "
        "of the dense forward pass, by the masks. Dense bf16 over sparse: above 1, sparse fp32 is "
        f"faster than dense bf16. {_in_seconds_of(found)} {_where(found)}"
    )
    return Table(pd.DataFrame(lines), "Sparse training on the clock", note)


def _seconds(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}" if value < 1 else f"{value:.2f}"


@table("speedups_layers", experiment="speedups")
def layers_table(source: Source) -> Table:
    """Each convolution of VGG16-D on the clock, one column per share of weights."""
    _planned(source)
    found = kernel_rows.layer_ratios(source.root)
    rows = kernel_rows.kernel_rows(source.root, "sparse_layers")
    lines = []
    for name, values in found.iterrows():
        line = {"convolution": str(name)}
        for share, value in values.items():
            line[f"{100 * float(str(share)):g} %"] = "–" if math.isnan(value) else f"{value:.2f}"
        lines.append(line)
    note = (
        "Times faster than torch's dense fp32, forward and backward, uniform random masks, batch "
        f"128. Below 1 the layer runs dense in training. Machine: {kernel_rows.machine(rows)}."
    )
    return Table(pd.DataFrame(lines), "VGG16-D's convolutions by share of weights", note)


@table("speedups_breakdown", experiment="speedups")
def breakdown_table(source: Source) -> Table:
    """Seconds of a training step by part, dense and sparse, per network."""
    _planned(source)
    found = kernel_rows.parts(source.root)
    columns = [(m, side) for m in dict.fromkeys(found["model"]) for side in SIDES]
    cells = found.set_index(["model", "side", "part"])["value"]
    lines = []
    for name in (*PARTS, "together"):
        line = {"part": name}
        for model, side in columns:
            whole = float(cells[model, side].sum())
            value = whole if name == "together" else float(cells.get((model, side, name), 0.0))
            line[f"{model_name(model)}, {side}"] = (
                f"{1000 * value:.0f} ({100 * value / whole:.0f} %)"
            )
        lines.append(line)
    waits = kernel_rows.calibrations(source.root)
    asked = ", ".join(f"{model_name(m)} {value:.0f} s" for m, value in waits.items())
    note = (
        f"Milliseconds (share) at {100 * found['density'].iloc[0]:g} % of the weights, under the "
        f"profiler, medians; batch: {_batches(found)}. Calibration, once per machine: {asked}. "
        f"{_where(found)}"
    )
    return Table(pd.DataFrame(lines), "Where the time of a training step goes", note)


@table("speedups_window", experiment="speedups")
def window_table(source: Source) -> Table:
    """What momentum gathered in the last K mini-batches alone grows differently, and its FLOPs."""
    _planned(source)
    found = kernel_rows.window_counts(source.root)
    flops = kernel_rows.window_flops(source.root)
    rows = kernel_rows.kernel_rows(source.root, "window")
    lines = []
    for (model, window), part in found.groupby(["model", "window"], sort=False):
        line = {"network": model_name(str(model)), "K": str(window)}
        for row in part.to_dict("records"):
            line[f"update {row['update']}"] = f"{row['differing']} of {row['grown']:,}"
        line["all"] = f"{part['differing'].sum()} of {part['grown'].sum():,}"
        for name, key in (("training FLOPs (%)", window), ("full tracking (%)", 0)):
            known = flops.get((str(model), int(str(key))))
            line[name] = "–" if known is None else f"{known:.1f}"
        lines.append(line)
    steps = {
        str(row["model"]): int(row["value"])
        for row in rows[rows["what"] == "mini-batches between updates"].to_dict("records")
    }
    said = ", ".join(f"{model_name(m)} {n}" for m, n in steps.items())
    note = (
        "Grown positions that differ from those by the whole momentum, in one training by full "
        "tracking, where both choose from the same weights and gradients at every update; "
        "momentum 0.9, so that 0.9^K is 1e-2, 1e-4 and 1e-7. Training FLOPs relative to dense: "
        "forward, input gradient and weight gradient, that of inactive weights counted in the "
        f"steps that compute it. Mini-batches between updates: {said}. Networks, batches and "
        f"weights: {', '.join(dict.fromkeys(rows['setting']))}."
    )
    return Table(pd.DataFrame(lines), "The dense window against full tracking", note)
