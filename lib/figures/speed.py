"""Speed-ups: the paper's estimates and what empty channels save, per run; and training over the
non-zero weights on the clock, from results/bench/kernels.csv: of whole networks and one machine,
so that no profile changes them. Bars of the clock are the range of the repeats, not an interval.
"""

from __future__ import annotations

import math
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from lib.figures.gallery import BENCH, figure, table
from lib.figures.plots import (
    BLUE,
    PALETTE,
    Plot,
    curves,
    finish,
    log_axis,
    panels,
    stacked,
    value_axis,
    weights_axis,
    zero_line,
)
from lib.figures.tables import Table, groups, records
from lib.results import clock, measured
from lib.results.clock import ALL, ALL_LAYERS, ONE, PARTS, SIDES
from lib.results.reading import (
    METHOD_NAMES,
    Source,
    interval_text,
    load,
    model_name,
    published_rows,
    sentence,
    summarise,
)


def published_range() -> tuple[float, float]:
    """The least and the largest estimated speed-up of the paper's table (version 2)."""
    rows = published_rows("headline_and_speedup_claims", dataset="cifar10")
    rows = rows[rows["setting"].str.startswith("version 2")]
    values = dict(zip(rows["quantity"], rows["value"], strict=True))
    return float(values["speedup_min_x"]), float(values["speedup_max_x"])


def _estimates_band(ax: Axes) -> None:
    low, high = published_range()
    ax.axhspan(low, high, color=BLUE, alpha=0.1, lw=0, zorder=1,
               label=f"the paper's estimates ({low:g} to {high:g})")  # fmt: skip


# -------------------------------------------------------------------------- estimates and channels


def speedups(source: Source) -> pd.DataFrame:
    """Times faster than dense, one row per run and kind: model, method, density, weights (%), seed,
    kind ("full", "channel": the paper's estimates; "removed": measured without the empty channels),
    times. A quantity that is zero (infinitely faster) is left out.
    """
    wide = measured.speedups(load("speedups", source).needed())
    keys = ["model", "method", "density", "seed"]
    long = wide.melt(keys, list(measured.SPEEDUPS), var_name="kind", value_name="times")
    long = long.assign(weights=100 * long["density"])
    return long[np.isfinite(long["times"])].reset_index(drop=True)


@figure("speedups_by_weights", "speedups")
def speedups_by_weights(source: Source) -> Plot:
    """How much faster sparse networks could be by the paper's two estimates, and how much faster a
    forward pass is whose empty channels were taken out, against the share of weights.
    """
    runs = load("speedups", source, method="sparse_momentum").needed()
    rows = speedups(source)
    sparse = rows[rows["method"] == "sparse_momentum"]
    models = list(dict.fromkeys(sparse["model"]))
    plot, axes = panels([model_name(model) for model in models], height=2.4, sharey=True)
    for ax, model in zip(axes, models, strict=True):
        mine = sparse[sparse["model"] == model]
        _estimates_band(ax)
        zero_line(ax, 1, vertical=False)
        curves(ax, mine, "weights", "times", by="kind", spread=0.04)
        weights_axis(ax, mine["density"])
        ax.set_ylabel("times faster")
    log_axis(axes[0], unit="×")
    how = (
        "Sparse momentum. Estimates: forward pass of the convolutions during training, no "
        "overhead, zeros made by ReLU and dropout credited. Measured: a forward pass of the "
        "whole finished network. Mean of the seeds (dots) with Student-t 95 % interval."
    )
    return finish(plot, runs, how)


@table("speedups_by_weights", "speedups")
def speedups_table(source: Source) -> Table:
    """Estimates, the measured speed-up, and what could be taken out, per network and method."""
    runs, rows = load("speedups", source).needed(), speedups(source)
    wide = measured.speedups(runs)
    lines = []
    for key, cell in groups(wide, ["model", "method", "density"]):
        mine = rows.merge(cell[["model", "method", "density"]].drop_duplicates())
        line = {
            "network": model_name(key[0]),
            "method": METHOD_NAMES[key[1]],
            "weights (%)": f"{100 * key[2]:g}",
        }
        for row in records(summarise(mine, ["kind"], "times")):
            digits = 2 if row.mean < 10 else 1
            text = interval_text(row.mean, row.low, row.high, digits)
            line[f"{measured.SPEEDUPS[row.kind]} (×)"] = text
        line["channels taken out (%)"] = f"{100 * cell['removed_channels'].mean():.1f}"
        line["weights taken out (%)"] = f"{100 * cell['removed_weights'].mean():.1f}"
        lines.append(line | {"n": str(len(cell))})
    low, high = published_range()
    note = (
        "Times faster than dense, mean with 95 % interval over seeds. The paper's table ranges "
        f"from {low:g} to {high:g} (estimated, sparse convolution, at the weights that reach the "
        "dense network's accuracy, which are not known to us). Largest difference between the "
        f"outputs before and after channels were taken out: {wide['difference'].max():.1g} of "
        "the largest logit."
    )
    caption = "Speed-ups, estimated and measured"
    return Table.of(lines, caption, note, sentence(runs.scale()))


# ------------------------------------------------------------------------------------ on the clock

# Column of clock.whole_steps -> label, colour, marker, line.
_LINES: dict[str, tuple[str, str, str, Any]] = {
    "training": ("sparse, training step", BLUE, "o", "-"),
    "inference": ("sparse, inference", BLUE, "s", (0, (4, 2))),
    "bf16": ("dense bf16, training step", PALETTE["snip"], "o", "-"),
    "bf16_inference": ("dense bf16, inference", PALETTE["snip"], "s", (0, (4, 2))),
}
_PART_COLOURS = dict(
    zip(
        PARTS,
        ("#000000", BLUE, "#E69F00", "#009E73", "#CC79A7", "#BBBBBB", "#56B4E9"),
        strict=True,
    )
)
_SECONDS = (
    "All threads: seconds on the clock. One thread: seconds of the processor, which a shared "
    "machine does not stretch."
)


def _repeats(rows: pd.DataFrame) -> str:
    """How often each number was measured, and on which machine."""
    counts = sorted({int(n) for n in rows["n"]})
    said = "–".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
    repeats = "repeat" if said == "1" else "repeats in turn"
    return f"{said} {repeats}. Machine: {clock.machine(rows)}."


def _batches(rows: pd.DataFrame) -> str:
    pairs = records(rows.drop_duplicates("model")[["model", "batch"]])
    return "Batch: " + ", ".join(f"{model_name(str(p.model))} {int(p.batch)}" for p in pairs) + "."


@figure("speedups_clock", "speedups", place=BENCH)
def speedups_clock(source: Source) -> Plot:
    """Whole training steps and inference on the clock against the share of weights, in times faster
    than torch's dense fp32, beside dense bf16 and the paper's estimates.
    """
    every = clock.whole_steps(source.root)
    found, alone = (every[every["threads"] == threads] for threads in (ALL, ONE))
    if found.empty:
        found, alone = alone, found
    models = list(dict.fromkeys(every["model"]))
    plot, axes = panels([model_name(m) for m in models], across=3, height=2.7, sharey=True)
    for ax, model in zip(axes, models, strict=True):
        rows, one = (part[part["model"] == model] for part in (found, alone))
        x = 100 * rows["density"]
        _estimates_band(ax)
        zero_line(ax, 1, vertical=False)
        ax.fill_between(x, rows["inside"], rows["outside"], color=BLUE, alpha=0.25, lw=0,
                        label="inside to outside the dense window")  # fmt: skip
        for column, (label, colour, marker, line) in _LINES.items():
            y = rows[column]
            spread = [y - rows[f"{column}_low"], rows[f"{column}_high"] - y]
            ax.errorbar(x, y, spread, color=colour, marker=marker, ls=line, elinewidth=0.9,
                        label=label if y.notna().any() else None, zorder=3)  # fmt: skip
        if len(one):
            ax.plot(100 * one["density"], one["training"], "^-", color="#44AA99", lw=1.0,
                    label="sparse, training step, one thread")  # fmt: skip
        weights_axis(ax, every["density"])
    log_axis(axes[0], unit="×")
    axes[0].set_ylabel("times faster")
    how = (
        "Forward, backward, optimizer and masks of a mini-batch of CIFAR-10; masks moved by sparse "
        "momentum; each layer runs the faster way, dense is torch's fp32 in its faster memory "
        "format. 153 of 352 steps lie in the dense window. Bars: range of the repeats."
    )
    return finish(plot, _repeats(every), how, _batches(every), _SECONDS)


def step_parts(source: Source) -> pd.DataFrame:
    """Time of a training step in % of the dense one: one row per network and side, one column per
    part of the step.
    """
    found = clock.parts(source.root)
    wide = found.pivot(index=["model", "side"], columns="part", values="value").fillna(0.0)
    order = [(model, side) for model in dict.fromkeys(found["model"]) for side in SIDES]
    wide = wide.reindex(order)[[part for part in PARTS if part in wide]]
    dense = wide.loc[[row for row in order if row[1] == "dense"]].droplevel("side").sum(axis=1)
    return 100 * wide.div(dense, axis=0, level="model")


@figure("speedups_breakdown", "speedups", place=BENCH)
def speedups_breakdown(source: Source) -> Plot:
    """Where the time of a training step goes, dense and sparse, per network."""
    found, shares = clock.parts(source.root), step_parts(source)
    seconds = found.groupby(["model", "side"])["value"].sum()
    ends = []
    for model, side in shares.index:
        text = f"{seconds[model, side]:.2f} s"
        if side == "sparse":
            text += f", {seconds[model, 'dense'] / seconds[model, side]:.2f}×"
        ends.append(text)
    plot, (ax,) = panels([""], height=0.9 + 0.3 * len(shares))
    names = [f"{model_name(model)}, {side}" for model, side in shares.index]
    stacked(ax, shares.set_axis(names), _PART_COLOURS, ends)
    ax.set_xlim(0, 125)
    value_axis(ax, range(0, 101, 20))
    ax.set_xlabel("time of a training step (% of the dense one)")
    how = (
        f"{100 * found['density'].iloc[0]:g} % of the weights. Steps outside the dense window, "
        "which adds its extra in 153 of 352 steps. Under the profiler, dense and sparse in turn; "
        "medians. Finding out the faster way of each layer, once per machine, is not in it: "
        f"{_calibrations(source)}."
    )
    return finish(plot, _repeats(found), how, _batches(found))


def _calibrations(source: Source) -> str:
    waits = clock.calibrations(source.root)
    return ", ".join(f"{model_name(model)} {value:.0f} s" for model, value in waits.items())


@figure("speedups_layers", "speedups", place=BENCH)
def speedups_layers(source: Source) -> Plot:
    """Each convolution of VGG16-D on the clock, forward and backward, in times faster than dense,
    one line per share of weights.
    """
    found = clock.layer_ratios(source.root)
    plot, (ax,) = panels([""], height=3.0)
    names = [str(name).replace(" at ", "\n") for name in found.index]
    names = [name if name != ALL_LAYERS else "all" for name in names]
    colours = mpl.colormaps["cividis"](np.linspace(0, 0.88, len(found.columns)))
    for colour, share in zip(colours, found.columns.astype(float), strict=True):
        ax.plot(range(len(names)), found[share], "o-", color=colour, label=f"{100 * share:g} %")
    zero_line(ax, 1, vertical=False)
    log_axis(ax, unit="×")
    ax.set_xticks(range(len(names)), names, rotation=60, fontsize=8)
    ax.set_xlabel("input-output channels, side of the input")
    ax.set_ylabel("times faster")
    how = (
        "Uniform random masks, batch 128, best of the repeats in turn with torch's dense fp32 in "
        "its faster memory format. All: sums of seconds, each layer as often as the network has "
        "it. Below 1 a layer runs dense in training."
    )
    return finish(plot, _repeats(clock.kernel_rows(source.root, "sparse_layers")), how)


def _times(row: Any, column: str) -> str:
    value, low, high = (float(row[column + end]) for end in ("", "_low", "_high"))
    return interval_text(value, low, high)


def _seconds(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}" if value < 1 else f"{value:.2f}"


@table("speedups_kernels", "speedups", place=BENCH)
def kernels_table(source: Source) -> Table:
    """Whole steps on the clock, sparse against dense, per network and share of weights."""
    found = clock.whole_steps(source.root)
    times = {
        "training (×)": "training",
        "outside window (×)": "outside",
        "inside window (×)": "inside",
        "inference (×)": "inference",
        "dense bf16 over sparse (×)": "bf16_over_sparse",
    }
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
            **{title: _times(row, column) for title, column in times.items()},
            "n": str(row["n"]),
        }
        for row in found.to_dict("records")
    ]
    note = (
        "Times faster than torch's dense fp32 in its faster memory format, median [range of the "
        "repeats]; ratios within one repeat, seconds of a whole training step. Masks moved by "
        "sparse momentum on CIFAR-10, the dense window counted as 153 of 352 steps. FLOPs left: "
        "of the dense forward pass, by the masks. Dense bf16 over sparse: above 1, sparse fp32 is "
        "faster than dense bf16."
    )
    return Table.of(lines, "Sparse training on the clock", note, _SECONDS, _repeats(found))


@table("speedups_window", "speedups", place=BENCH)
def window_table(source: Source) -> Table:
    """What momentum gathered in the last K mini-batches alone grows differently, and its FLOPs."""
    found, flops = clock.window_counts(source.root), clock.window_flops(source.root)
    rows = clock.kernel_rows(source.root, "window")
    lines = []
    for (model, window), part in groups(found, ["model", "window"]):
        line = {"network": model_name(model), "K": str(window)}
        for row in records(part):
            line[f"update {row.update}"] = f"{row.differing} of {row.grown:,}"
        line["all"] = f"{part['differing'].sum()} of {part['grown'].sum():,}"
        for name, key in (("training FLOPs (%)", window), ("full tracking (%)", 0)):
            known = flops.get((model, int(key)), math.nan)
            line[name] = "–" if math.isnan(known) else f"{known:.1f}"
        lines.append(line)
    steps = rows[rows["what"] == "mini-batches between updates"]
    between = ", ".join(f"{model_name(str(r.model))} {int(r.value)}" for r in records(steps))
    note = (
        "Grown positions that differ from those by the whole momentum, in one training by full "
        "tracking, where both choose from the same weights and gradients at every update; "
        "momentum 0.9, so that 0.9^K is 1e-2, 1e-4 and 1e-7. Training FLOPs relative to dense: "
        "forward, input gradient and weight gradient, that of inactive weights counted in the "
        f"steps that compute it. Mini-batches between updates: {between}. Networks, batches and "
        f"weights: {', '.join(dict.fromkeys(rows['setting']))}."
    )
    caption = "The dense window against full tracking"
    return Table.of(lines, caption, note, _repeats(rows))
