"""The vocabulary of the figures: curves, dots with intervals, heat maps, effects, bars of time.

A figure is a data step, which returns a tidy DataFrame, and calls of this vocabulary between
`panels` and `finish`. The same on every figure: mean with the Student-t 95 % interval, each seed a
dot, published values open and dashed, colour and marker by method (LOOKS), and the scale of the
runs in the last line, so that a reduced run is never taken for the paper's. What else there is to
know is the figure's caption, which stands beside it, not in it.  Imports no torch.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from lib.results.reading import METHOD_NAMES, Runs, sentence, summarise
from lib.stats import t_interval

STYLE = Path(__file__).with_name("style.mplstyle")
WIDTH = 6.3  # inches: 16 cm
_LINE = 0.15  # inches of one line below the panels
_SMALL = 7.5  # points: the smallest text
_DASHED: Any = (0, (3, 2))
_PUBLISHED_ALPHA = 0.6


class Look(NamedTuple):
    """How one method, or one variant of a method, is drawn in every figure."""

    label: str
    colour: str
    marker: str


# Colour-blind safe (after Okabe and Ito 2008; darker static and small dense), marker as second key.
_METHODS = {
    "dense": ("#000000", "d"),
    "sparse_momentum": ("#0072B2", "o"),
    "dsr": ("#E69F00", "s"),
    "set": ("#009E73", "^"),
    "deepr": ("#CC79A7", "D"),
    "rigl": ("#56B4E9", "v"),
    "snip": ("#D55E00", "P"),
    "static": ("#666666", "X"),
    "small_dense": ("#661100", "p"),
}
LOOKS = {key: Look(name, *_METHODS[key]) for key, name in METHOD_NAMES.items()}
PALETTE = {key: look.colour for key, look in LOOKS.items()}
MARKERS = {key: look.marker for key, look in LOOKS.items()}
BLUE, PURPLE, GREEN, GREY = PALETTE["sparse_momentum"], "#882255", "#117733", "#777777"
# Variants of one method: colours that no method has, but for the first.
LOOKS |= {
    "set_code": Look("SET, its authors' training", "#44AA99", "<"),
    "dsr_code": Look("DSR, its authors' training", "#999933", "p"),
    "uniform": Look("same density in every layer", BLUE, "o"),
    "erk": Look("denser small layers (ERK)", PURPLE, "s"),
    "cosine": Look("Sparse momentum, cosine decay", BLUE, "o"),
    "linear": Look("Sparse momentum, linear decay", PURPLE, "s"),
    "layers_left_dense": Look("Layers left dense, at their real share", PURPLE, "s"),
    "masked": Look("masked dense, float32", "#444444", "d"),
    "sparse": Look("non-zeros only, float32", GREEN, "o"),
    "bf16": Look("masked dense, bfloat16", PURPLE, "s"),
    "pooled": Look("channels pooled", BLUE, "o"),
    "equal": Look("layers weighted equally", PURPLE, "s"),
    "full": Look("estimate, sparse convolution", BLUE, "o"),
    "channel": Look("estimate, dense convolution", PURPLE, "s"),
    "removed": Look("measured, empty channels removed", GREEN, "D"),
}


class Plot(Figure):
    """A figure with its caption; a notebook shows both."""

    caption = ""

    def _ipython_display_(self) -> None:
        from IPython.display import Image, Markdown, display

        display(Image(self.content("png")), Markdown(self.caption))

    def content(self, kind: str) -> bytes:
        """The file as pdf, png or svg. Equal figures give equal bytes: no time, no version."""
        unset = {
            "pdf": ("CreationDate", "Creator", "Producer"),
            "svg": ("Date", "Creator"),
            "png": ("Software",),
        }[kind]
        buffer = io.BytesIO()
        with mpl.rc_context({"svg.hashsalt": self.caption}, fname=STYLE):
            self.savefig(buffer, format=kind, metadata=dict.fromkeys(unset))
        return buffer.getvalue()


# ------------------------------------------------------------------------------- panels and frame


def panels(
    titles: Sequence[str], across: int = 2, height: float = 2.5, width: float = WIDTH, **grid: Any
) -> tuple[Plot, list[Axes]]:
    """A figure with one panel per title, `across` in a row; height of a row and width in inches.

    Not made by pyplot: nothing global is left behind, and it works without a display.
    """
    across = min(across, len(titles))
    down = -(-len(titles) // across)
    plot = Plot(figsize=(width, height * down), layout="constrained")
    FigureCanvasAgg(plot)
    axes = list(plot.subplots(down, across, squeeze=False, **grid).flat)
    for ax, title in zip(axes, titles, strict=False):
        ax.set_title(title)
    for ax in axes[len(titles) :]:
        ax.set_axis_off()
    return plot, axes[: len(titles)]


def finish(plot: Plot, runs: Runs | str, *caption: str) -> Plot:
    """The figure with one legend of all panels and the scale of the runs (or that sentence) below
    them; `caption`: what is needed to read it.
    """
    scale = runs if isinstance(runs, str) else sentence(runs.scale())
    reduced = isinstance(runs, Runs) and runs.reduced()
    plot.caption = " ".join([*filter(None, caption), scale])
    handles: dict[str, Any] = {look.label: None for look in LOOKS.values()}
    for ax in plot.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles[label] = handles.get(label) or handle
    seen = {label for label, handle in handles.items() if handle}
    for label in seen:  # a curve that another panel has of ours explains the published one too
        handles.pop(f"{label}, published", None)
    handles = {label: handle for label, handle in handles.items() if handle}
    width, height = plot.get_size_inches()
    lines = textwrap.wrap(scale, int(width * 17))
    columns = _columns(list(handles), width)
    legend = 0.19 * -(-len(handles) // columns) + 0.08 if handles else 0.0
    room = _LINE * len(lines) + 0.05
    plot.set_size_inches(width, height + legend + room)
    height += legend + room
    for i, line in enumerate(lines):
        plot.text(
            0.01,
            (room - _LINE * (i + 0.8)) / height,
            line,
            fontsize=_SMALL,
            color="#B00000" if reduced else "#404040",
        )
    if handles:
        plot.legend(
            handles=list(handles.values()),
            labels=list(handles),
            loc="lower left",
            bbox_to_anchor=(0, room / height),
            ncols=columns,
            borderaxespad=0.1,
        ).set_in_layout(False)
    below = (legend + room) / height
    engine: Any = plot.get_layout_engine()
    engine.set(rect=(0, below, 1, 1 - below))
    return plot


def _columns(labels: Sequence[str], width: float) -> int:
    """The most columns of a legend (filled downwards) that fit into the width in inches."""
    for columns in range(len(labels), 1, -1):
        parts = np.array_split(np.char.str_len(labels), columns)  # as matplotlib fills them
        if sum(4.9 * part.max() + 38 for part in parts) < 72 * width:
            return columns
    return 1


def log_axis(ax: Axes, which: str = "y", unit: str = "") -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    axis = ax.yaxis if which == "y" else ax.xaxis
    (ax.set_yscale if which == "y" else ax.set_xscale)("log")
    low, high = sorted(axis.get_view_interval())
    some = (1.0, 2.0, 5.0) if high / low > 4 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.set_major_locator(LogLocator(10, some))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{unit}"))
    axis.set_minor_formatter(NullFormatter())


def value_axis(ax: Axes, values: Iterable[float], log: bool = False, base: int = 10) -> None:
    """A horizontal axis with a tick at each value that was run or published."""
    ticks = sorted({round(float(value), 6) for value in values})
    if log:
        ax.set_xscale("log", base=base)
        ax.set_xlim(ticks[0] / 1.25, ticks[-1] * 1.25)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def weights_axis(ax: Axes, shares: Iterable[float]) -> None:
    """The horizontal axis of shares of weights (0 to 1) in per cent, logarithmic."""
    ax.set_xlabel("weights (% of dense)")
    shown = sorted(100 * share for share in set(shares))
    if not shown:  # no network learned
        return
    apart = (shown[-1] / shown[0]) ** 0.085
    kept: list[float] = []
    for share in shown:  # a tick each, as far as their numbers don't run into each other
        if not kept or share > apart * kept[-1]:
            kept.append(share)
    value_axis(ax, shown, log=True)
    ax.xaxis.set_major_locator(FixedLocator(kept))


def zero_line(ax: Axes, at: float = 0.0, vertical: bool = True) -> None:
    """Where nothing differs."""
    (ax.axvline if vertical else ax.axhline)(at, color="0.3", lw=0.8, zorder=1.5)


# ------------------------------------------------------------------------------------------ curves


def curves(
    ax: Axes,
    rows: pd.DataFrame,
    x: str,
    y: str = "test_error_pct",
    by: str = "method",
    theirs: pd.DataFrame | None = None,
    level: str = "",
    limits: tuple[float, float] | None = None,
    line: bool = True,
    spread: float = 0.0,
    log: bool = False,
) -> list[str]:
    """The mean of the seeds at each x, joined; their interval as a bar; each seed a dot.

    `by`: the column with keys of LOOKS. `theirs`: published values, columns `by`, x, y and
    standard_error. `level`: the key that is a horizontal line. `spread`: curves are moved apart by
    this share of x. Means of ours outside `limits` are arrows at the edge; what they are is
    returned, for the caption. `log`: a logarithmic scale of what was observed; an interval that is
    wider than that, or reaches zero, is not drawn, and returned.
    """
    keys = [key for key in LOOKS if key in set(rows[by]) and key != level]
    shift = {key: 1 + spread * (i - (len(keys) - 1) / 2) for i, key in enumerate(keys)}
    own = rows[rows[by].isin(keys)]
    own = own.assign(x=own[x] * own[by].map(shift))
    cells = summarise(own, [by, x, "x"], y)
    inside = cells["mean"].between(*limits) if limits else cells["mean"].notna()
    every = [*own[y], *rows.loc[rows[by] == level, y], *(theirs[y] if theirs is not None else ())]
    ends = (min(every), max(every)) if log and every else (-math.inf, math.inf)
    wide = (cells["low"] < ends[0]) & ((cells["high"] > ends[1]) | (log & (cells["low"] <= 0)))
    for key in keys:  # not by seaborn's lineplot: on a logarithmic axis its mean is the geometric
        look, mine = LOOKS[key], cells[(cells[by] == key) & inside].sort_values("x")
        ax.plot(mine["x"], mine["mean"], ls="-" if line else "none", color=look.colour,
                marker=look.marker, label=look.label, zorder=3)  # fmt: skip
        bars = mine[mine["n"].gt(1) & ~wide[mine.index]]
        half = [bars["mean"] - bars["low"], bars["high"] - bars["mean"]]
        ax.errorbar(bars["x"], bars["mean"], half, fmt="none", ecolor=look.colour, elinewidth=1.1)
    if len(own):
        palette = {key: LOOKS[key].colour for key in keys}
        sns.scatterplot(own, x="x", y=y, hue=by, hue_order=keys, palette=palette, s=9, alpha=0.45,
                        linewidth=0, legend=False, ax=ax, zorder=2.4)  # fmt: skip
    ax.set(xlabel="", ylabel="")
    flat = rows.loc[rows[by] == level, y]
    if len(flat):
        look, (mean, low, high, *_) = LOOKS[level], t_interval(flat)
        ax.axhspan(low, high, color=look.colour, alpha=0.13, lw=0, zorder=1.2)
        ax.axhline(mean, color=look.colour, lw=1.1, label=look.label, zorder=1.8)
    if theirs is not None and len(theirs):
        _published(ax, theirs, x, y, by, level, limits)
        for key in [key for key in LOOKS if key in set(theirs[by]) - set(rows[by])]:
            ax.plot([], [], ls=_DASHED, lw=0.9, marker=LOOKS[key].marker, mfc="white",
                    color=LOOKS[key].colour, label=f"{LOOKS[key].label}, published")  # fmt: skip
    outside = list(cells.loc[~inside, [by, x, "mean"]].itertuples(index=False, name=None))
    if limits:
        ax.set_ylim(*limits)
        _arrows(ax, outside)
    if log and every:
        ax.set_ylim(ends[0] / 1.15, ends[1] * 1.15)
        log_axis(ax)
    return [
        *(f"{LOOKS[key].label} at {at:g}: {value:.3g}" for key, at, value in outside),
        *(
            f"{LOOKS[r[by]].label} at {r[x]:g}: "
            + f"{r['low']:.3g} to {r['high']:.3g}".replace("-", "−")
            for r in cells[wide].to_dict("records")
        ),
    ]


def _published(
    ax: Axes,
    theirs: pd.DataFrame,
    x: str,
    y: str,
    by: str,
    level: str,
    limits: tuple[float, float] | None,
) -> None:
    """Published values: open marks, dashed and lighter, with 1.96 standard errors."""
    drawn = False
    for key in [key for key in LOOKS if key in set(theirs[by])]:
        look, part = LOOKS[key], theirs[theirs[by] == key].sort_values(x)
        style: dict[str, Any] = {"color": look.colour, "alpha": _PUBLISHED_ALPHA, "lw": 0.9}
        if key == level:
            ax.axhline(float(part[y].iloc[0]), ls=_DASHED, zorder=1.7, **style)
            continue
        part = part[part[y].between(*limits)] if limits else part
        error = 1.96 * part.get("standard_error", pd.Series(math.nan, part.index))
        ax.errorbar(part[x], part[y], error, marker=look.marker, mfc="white", ls=_DASHED,
                    elinewidth=0.7, zorder=2.2, **style)  # fmt: skip
        drawn = True
    if drawn:
        ax.plot([], [], ls=_DASHED, lw=0.9, marker="o", mfc="white", color="#555555",
                label="published (± 1.96 s.e.)")  # fmt: skip


def _arrows(ax: Axes, outside: Sequence[tuple[str, float, float]]) -> None:
    """Arrows at the edge of a panel, those at one x above each other."""
    seen: dict[tuple[float, bool], int] = {}
    for key, at, value in outside:
        above = value > max(ax.get_ylim())
        rank = seen[at, above] = seen.get((at, above), -1) + 1
        y = 0.985 - 0.045 * rank if above else 0.015 + 0.045 * rank
        ax.plot(at, y, "^" if above else "v", color=LOOKS[key].colour, ms=4.5, zorder=4,
                clip_on=False, transform=ax.get_xaxis_transform())  # fmt: skip


# ------------------------------------------------------------------------------------------- dots


def dots(
    ax: Axes,
    cells: pd.DataFrame,
    seeds: pd.DataFrame,
    row: str,
    order: Mapping[str, str],
    by: str = "",
    value: str = "value",
    look: str = "sparse_momentum",
    limits: tuple[float, float] | None = None,
) -> list[str]:
    """Rows of dots: the mean of each cell with its interval, and each seed a dot below it.

    `cells` has `row` (a key of `order`, which has the texts of the rows), mean, low, high and,
    where two kinds stand in a row, `by` (a key of LOOKS); `seeds` the same keys and `value`. A
    column `filled` says which marks are filled. Cells outside `limits` are arrows, and returned.
    """
    kinds = [key for key in LOOKS if key in set(cells[by])] if by else [look]
    places = list(order)
    outside = []
    for line in cells.to_dict("records"):
        kind = line[by] if by else look
        mark = LOOKS[kind]
        offset = 0.36 * (kinds.index(kind) - (len(kinds) - 1) / 2)
        y = places.index(line[row]) + offset
        mine = seeds[seeds[row] == line[row]]
        mine = mine[mine[by] == kind] if by else mine
        kept = mine[value].between(*limits) if limits else mine[value].notna()
        below = [y + (0.13 if len(kinds) > 1 else 0.24)] * int(kept.sum())
        ax.plot(mine.loc[kept, value], below, ".", color=mark.colour, ms=4.5, alpha=0.5, mew=0)
        if limits and not limits[0] <= line["mean"] <= limits[1]:
            above = line["mean"] > limits[1]
            outside.append(f"{order[line[row]]}: {line['mean']:+.2f}".replace("-", "−"))
            ax.plot(0.99 if above else 0.01, y, ">" if above else "<", color=mark.colour, ms=5,
                    transform=ax.get_yaxis_transform(), clip_on=False)  # fmt: skip
            continue
        ax.plot([line["low"], line["high"]], [y, y], color=mark.colour, lw=1.3, zorder=2.6)
        face = mark.colour if line.get("filled", True) else "white"
        ax.plot(line["mean"], y, mark.marker, color=mark.colour, mfc=face, zorder=3)
    if by:
        for kind in kinds:
            mark = LOOKS[kind]
            ax.plot([], [], mark.marker, color=mark.colour, label=mark.label)
    ax.set_yticks(range(len(places)), list(order.values()))
    ax.set_ylim(len(places) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.grid(True, axis="x")
    if limits:
        ax.set_xlim(*limits)
    return outside


def limits_of(*values: Iterable[float], margin: float = 0.08) -> tuple[float, float]:
    """The range of the finite values, with a margin."""
    found = [v for some in values for v in some if math.isfinite(v)]
    room = margin * (max(found) - min(found) or 1.0)
    return min(found) - room, max(found) + room


# --------------------------------------------------------------------------------------- heat maps


def heat_map(
    ax: Axes,
    values: pd.DataFrame,
    texts: pd.DataFrame,
    limit: float,
    unit: str,
) -> list[str]:
    """Differences as colours about zero with a text in each cell, shape [down, across].

    Beyond -+ `limit` a cell has the last colour and a frame; its place is returned, for the
    caption. Empty texts are cells that were not planned.
    """
    beyond = values.abs() > limit
    sns.heatmap(
        values.astype(float), annot=texts, fmt="", cmap="RdBu_r", center=0, vmin=-limit,
        vmax=limit, linewidths=1.5, annot_kws={"fontsize": 8, "linespacing": 1.15}, ax=ax,
        cbar_kws={"extend": "both" if beyond.any(axis=None) else "neither", "pad": 0.02},
    )  # fmt: skip
    for i, j in np.argwhere(values.isna().to_numpy()):  # where seaborn writes nothing
        ax.text(j + 0.5, i + 0.5, texts.iloc[i, j], ha="center", va="center", fontsize=8)
    bar = ax.collections[0].colorbar
    if bar is not None:
        bar.ax.set_title(unit, fontsize=8, fontweight="normal", loc="left")
        bar.ax.yaxis.set_major_formatter(
            FuncFormatter(lambda v, _: f"{v:+g}".replace("-", "−") if abs(v) > 1e-9 else "0")
        )
        bar.ax.tick_params(labelsize=8)
    ax.set_facecolor("#EEEEEE")
    ax.tick_params(length=0)
    ax.set(xlabel="", ylabel="")
    for axis in ("x", "y"):
        ax.tick_params(axis=axis, rotation=0)
    found = []
    for i, j in np.argwhere(beyond.to_numpy()):
        ax.add_patch(mpl.patches.Rectangle((j + 0.04, i + 0.04), 0.92, 0.92, fill=False,
                                           ec="black", lw=1.4, ls=(0, (2, 1.5))))  # fmt: skip
        found.append(f"{values.index[i]}/{values.columns[j]}")
    return found


# ---------------------------------------------------------------------------------------- effects


def effect(
    ax: Axes, seeds: pd.DataFrame, x: str, y: str, by: str, slopes: Mapping[str, float]
) -> None:
    """An effect against size on a scale of doublings: mean with interval, each seed a dot, and the
    straight line of this slope (per doubling; NaN: none) through the means, dashed.
    """
    zero_line(ax, vertical=False)
    curves(ax, seeds, x, y, by, line=False, spread=0.07)
    for key, slope in slopes.items():
        means = seeds[seeds[by] == key].groupby(x)[y].mean()
        if math.isfinite(slope) and len(means) > 1:
            log = np.log2(means.index.to_numpy(float))
            ends = means.mean() + slope * (log - log.mean())
            ax.plot(means.index, ends, ls=(0, (5, 2)), lw=1.1, color=LOOKS[key].colour, alpha=0.8)
    value_axis(ax, seeds[x], log=True, base=2)


# -------------------------------------------------------------------------------------------- bars


def stacked(ax: Axes, parts: pd.DataFrame, colours: Mapping[str, str], ends: Sequence[str]) -> None:
    """Horizontal bars, one per row of `parts` and stacked over its columns, with a text behind."""
    left = np.zeros(len(parts))
    for name, widths in parts.clip(lower=0).items():  # a difference of two times can be below zero
        ax.barh(range(len(parts)), widths, 0.8, left=left, color=colours[str(name)], lw=0,
                label=str(name))  # fmt: skip
        left += widths.to_numpy()
    for y, (end, text) in enumerate(zip(left, ends, strict=True)):
        ax.text(end, y, f" {text}", va="center", fontsize=8)
    ax.set_yticks(range(len(parts)), [str(name) for name in parts.index])
    ax.set_ylim(len(parts) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(False, axis="y")
    ax.grid(True, axis="x")
