"""Every figure and table, drawn from the saved CSVs.  Imports no torch.

A figure is a function (source) -> Plot under `@figure(name)`, a table a function
-> Table under `@table(name)`.  It raises `NoRuns` (Runs.needed) when there is nothing to draw.
`draw_all` saves all of them; a notebook shows one by calling the function.

The same on every figure: mean with the Student-t 95 % interval, each seed a dot, n in the legend,
colour and marker by method, published values open, dashed and lighter, and the scale of the runs
in the last line (`stamp`), so that a reduced run is never taken for the paper's.
"""

from __future__ import annotations

import functools
import io
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from lib import claims, paths
from lib.config import unknown
from lib.results.reading import (
    METHOD_NAMES,
    NoRuns,
    Runs,
    Source,
    interval_text,
    load,
    p_text,
    published_rows,
    published_text,
    range_text,
    sentence,
    summarise,
)

STYLE = Path(__file__).with_name("style.mplstyle")

# Colour-blind safe (after Okabe and Ito 2008; darker static and small dense), marker as second key.
PALETTE = {
    "dense": "#000000",
    "sparse_momentum": "#0072B2",
    "dsr": "#E69F00",
    "set": "#009E73",
    "deepr": "#CC79A7",
    "rigl": "#56B4E9",
    "snip": "#D55E00",
    "static": "#666666",
    "small_dense": "#661100",
}
MARKERS = {
    "dense": "_",
    "sparse_momentum": "o",
    "dsr": "s",
    "set": "^",
    "deepr": "D",
    "rigl": "v",
    "snip": "P",
    "static": "X",
    "small_dense": "p",
}
PUBLISHED_ALPHA = 0.55
STAMP_LINE, LEGEND_LINE = 0.125, 0.175  # inches


class Plot(Figure):
    """A figure that shows itself in a notebook, in the style of the files."""

    legend_lines = 0

    def _repr_png_(self) -> bytes:
        return _bytes(self, "png")


@dataclass(frozen=True, repr=False)
class Table:
    """A table of texts: one caption, one row per line, and a note below (scale, how to read)."""

    frame: pd.DataFrame
    caption: str
    note: str = ""

    def markdown(self) -> str:
        """GitHub Markdown; numbers to the right."""
        head = [_cell_markdown(name) for name in self.frame.columns]
        rule = ["---:" if _numeric(self.frame[c]) else "---" for c in self.frame.columns]
        body = [[_cell_markdown(v) for v in row] for row in self.frame.itertuples(index=False)]
        lines = ["| " + " | ".join(row) + " |" for row in (head, rule, *body)]
        parts = [f"**{self.caption}**", "\n".join(lines)]
        if self.note:
            parts.append(self.note)
        return "\n\n".join(parts) + "\n"

    def latex(self) -> str:
        """A table environment; needs the LaTeX package booktabs."""
        align = "".join("r" if _numeric(self.frame[c]) else "l" for c in self.frame.columns)
        rows = [
            " & ".join(_cell_latex(v) for v in row) + r" \\"
            for row in self.frame.itertuples(index=False)
        ]
        head = " & ".join(_cell_latex(name) for name in self.frame.columns) + r" \\"
        note = [r"\par\smallskip\footnotesize " + _cell_latex(self.note)] if self.note else []
        return "\n".join(
            [
                r"\begin{table}",
                r"\centering",
                rf"\caption{{{_cell_latex(self.caption)}}}",
                rf"\begin{{tabular}}{{{align}}}",
                r"\toprule",
                head,
                r"\midrule",
                *rows,
                r"\bottomrule",
                r"\end{tabular}",
                *note,
                r"\end{table}",
                "",
            ]
        )

    def __repr__(self) -> str:
        return f"Table({self.caption!r}, {len(self.frame)} rows)"

    def _repr_markdown_(self) -> str:
        return self.markdown()


@dataclass(frozen=True)
class Entry:
    """A registered figure or table: called with a `Source` it is made in our style, whoever calls.

    `experiment`: whose rows it shows; empty for what is about all of them.
    """

    name: str
    experiment: str
    make: Callable[..., Any]

    def __call__(self, source: Source, **more: Any) -> Any:
        """The Plot or Table; NoRuns where there is nothing to show."""
        with mpl.rc_context(fname=STYLE):
            return self.make(source, **more)

    @property
    def caption(self) -> str:
        """What it shows, in one line."""
        return " ".join((self.make.__doc__ or "").split())


FIGURES: dict[str, Entry] = {}
TABLES: dict[str, Entry] = {}


def figure(name: str, experiment: str = "") -> Callable[[Callable[..., Plot]], Entry]:
    """Register a function (Source) -> Plot."""
    return functools.partial(_register, FIGURES, name, experiment)


def table(name: str, experiment: str = "") -> Callable[[Callable[..., Table]], Entry]:
    """Register a function (Source) -> Table."""
    return functools.partial(_register, TABLES, name, experiment)


def _register(
    into: dict[str, Entry], name: str, experiment: str, make: Callable[..., Any]
) -> Entry:
    into[name] = Entry(name, experiment, make)
    return into[name]


@dataclass(frozen=True)
class Absent:
    """In place of a figure or table that has no runs: the reason, shown in a notebook."""

    reason: str

    def _repr_markdown_(self) -> str:
        return f"**Nothing to show yet.** {self.reason}."


def show(
    name: str, source: Source, kind: Literal["figure", "table"] | None = None, **more: Any
) -> Plot | Table | Absent:
    """The figure or table of this name, or why there is none yet, so that a notebook goes on.

    Without `kind` the figure, where there is one, else the table. Raises ValueError for a name
    that is neither.
    """
    known = {"figure": FIGURES, "table": TABLES}.get(kind or "", {**TABLES, **FIGURES})
    if name not in known:
        raise ValueError(unknown(kind or "figure or table", name, known))
    try:
        made: Plot | Table = known[name](source, **more)
    except NoRuns as reason:
        return Absent(str(reason))
    return made


# ------------------------------------------------------------------------------------------- save


def output_dir(source: Source) -> Path:
    """figures/<profile>; for results elsewhere <root>/<profile>/figures beside them."""
    if source.root is None:
        return paths.figures_dir() / paths.results_dir(source.profile).name
    return paths.results_dir(source.profile, source.root) / "figures"


def draw_all(
    source: Source,
    only: Iterable[str] = (),
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Draw and save every figure (PDF, PNG) and table (Markdown, LaTeX); the files written.

    What has no runs yet is skipped with one line. Equal rows give equal bytes: no time, no path in
    a file. Raises ValueError for an unknown profile or name, ResultsError for a damaged CSV.
    """
    names = set(only)
    if names - set(FIGURES) - set(TABLES):
        known = ", ".join(sorted({*FIGURES, *TABLES}))
        raise ValueError(
            f"no figure or table {sorted(names - set(FIGURES) - set(TABLES))}: {known}"
        )
    jobs = [
        (kind, name, source)
        for kind, registry in (("figure", FIGURES), ("table", TABLES))
        for name in registry
        if not names or name in names
    ]
    written: list[Path] = []
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        for paths_of, skipped in pool.map(_draw_one, *zip(*jobs, strict=True)):
            written += paths_of
            if skipped:
                say(skipped)
    return written


def _draw_one(kind: str, name: str, source: Source) -> tuple[list[Path], str]:
    """In a process of its own: the files of one figure or table, or the line that says why not."""
    make = FIGURES[name] if kind == "figure" else TABLES[name]
    try:
        made = make(source)
    except NoRuns as reason:
        return [], f"skipped {kind} {name}: {reason}"
    return save(made, output_dir(source) / name), ""


def save(made: Plot | Table, stem: Path) -> list[Path]:
    """Write a figure as `stem`.pdf and .png or a table as .md and .tex, each in one step."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(made, Table):
        contents = {"md": made.markdown().encode(), "tex": made.latex().encode()}
    else:
        contents = {kind: _bytes(made, kind) for kind in ("pdf", "png")}
    written = []
    for kind, content in contents.items():
        path = stem.with_name(f"{stem.name}.{kind}")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)
        written.append(path)
    return written


def _bytes(plot: Figure, kind: str) -> bytes:
    metadata = {"pdf": {"CreationDate": None, "Creator": None, "Producer": None}}.get(
        kind, {"Software": None}
    )
    buffer = io.BytesIO()
    with mpl.rc_context(fname=STYLE):
        plot.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


# ------------------------------------------------------------------------------ shared by figures


def new_plot(
    rows: int = 1, columns: int = 1, size: tuple[float, float] | None = None, **grid: Any
) -> tuple[Plot, np.ndarray]:
    """A figure (size in inches) and its axes as an array of shape [rows, columns].

    No pyplot: nothing global is left behind, and it works without a display.
    """
    plot = Plot(figsize=size)
    FigureCanvasAgg(plot)
    return plot, plot.subplots(rows, columns, squeeze=False, **grid)


def legend_below(plot: Plot, handles: Sequence[Any], columns: int = 4) -> None:
    """One legend under all panels, so that none lies over data; `stamp` goes below it."""
    legend = plot.legend(
        handles=list(handles),
        loc="lower left",
        bbox_to_anchor=(0, 0),
        ncols=columns,
        borderaxespad=0.2,
    )
    legend.set_in_layout(False)
    plot.legend_lines = -(-len(handles) // columns)


def stamp(plot: Plot, runs: Runs | Sequence[Runs], extra: str = "") -> None:
    """The scale of the runs, below `extra` (how to read the figure), as last lines of the figure.

    To be called last: it makes room for itself and for the legend of `legend_below`.
    """
    every = [runs] if isinstance(runs, Runs) else list(runs)
    scales = " ".join(dict.fromkeys(sentence(one.scale()) for one in every))
    reduced = any(one.reduced() for one in every)
    width, height = plot.get_size_inches()
    lines = [
        (line, "#B00000" if reduced and text is scales else "#404040")
        for text in (extra, scales)
        for line in textwrap.wrap(text, int(width * 20))
    ]
    room = (STAMP_LINE * len(lines) + 0.06) / height
    for i, (line, colour) in enumerate(lines):
        y = room - STAMP_LINE * (i + 0.8) / height
        plot.text(0.01, y, line, fontsize=6.3, color=colour, ha="left", va="baseline")
    for legend in plot.legends:
        legend.set_bbox_to_anchor((0, room), plot.transFigure)
    room += (LEGEND_LINE * plot.legend_lines + 0.08 * bool(plot.legend_lines)) / height
    engine = plot.get_layout_engine()
    if not isinstance(engine, ConstrainedLayoutEngine):
        raise ValueError("stamp makes room in a figure of `new_plot`, with constrained layout")
    engine.set(rect=(0, room, 1, 1 - room))


def n_text(counts: Iterable[int]) -> str:
    """ "n = 10", or "n = 1–3" where the cells differ."""
    values = sorted(set(counts))
    if not values:
        return "n = 0"
    return f"n = {values[0]}" + (f"–{values[-1]}" if len(values) > 1 else "")


def method_label(method: str, counts: Iterable[int] = ()) -> str:
    """Display name of a method, with n where counts are given."""
    counts = list(counts)
    name = METHOD_NAMES[method]
    return f"{name} ({n_text(counts)})" if counts else name


def draw_ours(
    ax: Axes,
    x: Sequence[float],
    values: Sequence[Sequence[float]],
    *,
    method: str,
    colour: str | None = None,
    marker: str | None = None,
    label: str | None = None,
    line: bool = True,
    dots: bool = True,
) -> Line2D:
    """One curve: the mean at each x (joined), its 95 % interval as a bar, each seed as a dot.

    `values` holds the values of the seeds at each x. Colour and marker follow the method.
    """
    colour = colour or PALETTE[method]
    rows = pd.DataFrame({"x": np.repeat(x, [len(v) for v in values]), "y": np.concatenate(values)})
    cells = summarise(rows, ["x"], "y").sort_values("x")
    if dots:
        ax.plot(rows["x"], rows["y"], ".", color=colour, ms=4.4, alpha=0.45, mew=0, zorder=2.4)
    known = cells[cells["n"] > 1]
    if len(known):
        ax.errorbar(
            known["x"],
            known["mean"],
            yerr=[known["mean"] - known["low"], known["high"] - known["mean"]],
            fmt="none",
            ecolor=colour,
            elinewidth=1.1,
            capsize=2.2,
            capthick=1.1,
            zorder=2.6,
        )
    (drawn,) = ax.plot(
        cells["x"],
        cells["mean"],
        marker=marker or MARKERS[method],
        linestyle="-" if line else "none",
        color=colour,
        label=label if label is not None else method_label(method, cells["n"]),
        zorder=3 if method == "sparse_momentum" else 2.8,
    )
    return drawn


def draw_published(
    ax: Axes,
    x: Sequence[float],
    y: Sequence[float],
    standard_error: Sequence[float] | None = None,
    *,
    method: str,
    colour: str | None = None,
    marker: str | None = None,
    line: bool = True,
    label: str | None = None,
) -> Line2D:
    """Published values: open markers, dashed, lighter; -+ 1.96 standard errors where printed."""
    colour = colour or PALETTE[method]
    order = np.argsort(np.asarray(x, float), kind="stable")
    xs, ys = np.asarray(x, float)[order], np.asarray(y, float)[order]
    if standard_error is not None:
        se = np.asarray(standard_error, float)[order]
        has = np.isfinite(se)
        ax.errorbar(
            xs[has],
            ys[has],
            yerr=1.96 * se[has],
            fmt="none",
            ecolor=colour,
            elinewidth=0.7,
            alpha=PUBLISHED_ALPHA,
            zorder=2.1,
        )
    (drawn,) = ax.plot(
        xs,
        ys,
        marker=marker or MARKERS[method],
        linestyle=(0, (3, 2)) if line else "none",
        color=colour,
        alpha=PUBLISHED_ALPHA,
        lw=0.9,
        ms=4.2,
        mfc="white",
        mew=0.9,
        label=label,
        zorder=2.2,
    )
    return drawn


def draw_level(ax: Axes, values: Sequence[float], *, method: str = "dense") -> Line2D:
    """A horizontal line at the mean of the seeds with its 95 % interval as a band."""
    cell = summarise(pd.DataFrame({"one": 1, "y": list(values)}), ["one"], "y").iloc[0]
    if cell["n"] > 1:
        ax.axhspan(cell["low"], cell["high"], color=PALETTE[method], alpha=0.13, lw=0, zorder=1.5)
    return ax.axhline(
        cell["mean"],
        color=PALETTE[method],
        lw=1.1,
        label=method_label(method, [int(cell["n"])]),
        zorder=1.8,
    )


def published_key(marker: str = "o", label: str = "published (± 1.96 s.e.)") -> Line2D:
    """Legend entry that explains the open, dashed marks."""
    return Line2D(
        [],
        [],
        color="#555555",
        marker=marker,
        linestyle=(0, (3, 2)),
        mfc="white",
        lw=0.9,
        ms=4.2,
        mew=0.9,
        label=label,
    )


def draw_density_curves(
    ax: Axes, runs: Runs, theirs: pd.DataFrame, *, as_accuracy: bool, clip: bool = False
) -> list[Line2D]:
    """Test error (or accuracy) in % against the share of weights, ours and published; the handles.

    One curve per method, dense as a level. `theirs` has the columns method, density,
    test_error_pct, standard_error. With `clip` arrows mark the points outside the y limits, which
    must be set before, as must the x axis (`percent_axis`).
    """

    def value(errors: Any) -> list[float]:
        y = np.asarray(errors, float)
        return (100 - y if as_accuracy else y).tolist()

    handles = []
    sparse = [m for m in runs.methods if m != "dense"]
    dense = runs.rows.loc[runs.rows["method"] == "dense", "test_error_pct"]
    if len(dense):
        handles.append(draw_level(ax, value(dense)))
    for i, method in enumerate(sparse):
        dodge = 1 + 0.014 * (i - (len(sparse) - 1) / 2)
        rows = runs.rows[runs.rows["method"] == method]
        shares = sorted(set(rows["density"]))
        x = [100 * share * dodge for share in shares]
        y = [value(rows.loc[rows["density"] == share, "test_error_pct"]) for share in shares]
        handles.append(draw_ours(ax, x, y, method=method))
        if clip:
            mark_clipped(ax, x, [float(np.mean(v)) for v in y], method=method)
    for method in METHOD_NAMES:
        rows = theirs[theirs["method"] == method]
        x, published = (100 * rows["density"]).tolist(), value(rows["test_error_pct"])
        if method == "dense":
            for level in published:
                line = ax.axhline(level, color=PALETTE["dense"], lw=0.9, ls=(0, (3, 2)), zorder=1.7)
                line.set_alpha(PUBLISHED_ALPHA)
        elif len(rows):
            drawn = draw_published(ax, x, published, rows["standard_error"].tolist(), method=method)
            if method not in runs.methods:
                drawn.set_label(f"{METHOD_NAMES[method]} (published)")
                handles.append(drawn)
            if clip:
                mark_clipped(ax, x, published, method=method, published=True)
    return handles


def percent_axis(ax: Axes, shares: Iterable[float], log: bool = True) -> None:
    """Horizontal axis in per cent with a tick at each share (0 to 1) that was run or published."""
    ticks = sorted({round(100 * share, 6) for share in shares})
    if log:
        ax.set_xscale("log")
        ax.set_xlim(ticks[0] / 1.12, ticks[-1] * 1.12)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_xlabel("weights (% of dense)")


def accuracy_axis_by_log_error(ax: Axes, errors: Iterable[float]) -> None:
    """Vertical axis for errors in % that reads as accuracy: log of the error, downwards.

    Shows 98.7 % and 40 % legibly on one axis. Plot errors (not accuracies) on it.
    """
    found = [e for e in errors if math.isfinite(e)]
    low, high = min(found) / 1.15, max(found) * 1.15
    ax.set_yscale("log")
    ax.set_ylim(min(high, 100), low)
    ticks = [t for t in (0.5, 1, 1.5, 2, 3, 5, 10, 20, 40, 60, 90) if low <= t <= high]
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 - value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def mark_clipped(
    ax: Axes, x: Sequence[float], y: Sequence[float], *, method: str, published: bool = False
) -> int:
    """A small arrow at the edge for each point outside the y limits; how many there are.

    A window that leaves points out must say so, and show where they are. Arrows at nearly the same
    x are stacked. To be called after the limits and scales are set.
    """
    low, high = sorted(ax.get_ylim())
    out = 0
    taken: list[tuple[float, bool]] = ax.__dict__.setdefault("_clipped", [])
    for xi, yi in zip(x, y, strict=True):
        if low <= yi <= high:
            continue
        out += 1
        below = (yi < low) != ax.yaxis_inverted()
        at = ax.transAxes.inverted().transform(ax.transData.transform((xi, yi)))[0]
        level = sum(abs(at - other) < 0.05 and below == side for other, side in taken)
        taken.append((at, below))
        edge = 0.012 + 0.026 * level
        ax.plot(
            xi,
            edge if below else 1 - edge,
            marker="v" if below else "^",
            color=PALETTE[method],
            alpha=PUBLISHED_ALPHA if published else 1,
            mfc="white" if published else PALETTE[method],
            ms=3.8,
            mew=0.7,
            clip_on=False,
            transform=ax.get_xaxis_transform(),
            zorder=4,
        )
    return out


def _numeric(column: pd.Series) -> bool:
    texts = [str(v) for v in column if str(v) not in ("", "–")]
    return bool(texts) and all(t[0] in "+−-<0123456789" for t in texts)


def _cell_markdown(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


_LATEX = {
    "\\": r"\textbackslash{}",
    "%": r"\%",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "<": "$<$",
    ">": "$>$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "\n": " ",
}


def _cell_latex(value: Any) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in str(value))


# ------------------------------------------------------------------- 01: LeNet-300-100 on MNIST

_LENET = {"dataset": "mnist", "model": "lenet300-100"}
_RAW = "dsr_authors_raw_runs_wrn28-2_and_mnist"


def mnist_published() -> pd.DataFrame:
    """The curves of the paper's MNIST figure, static masks from the raw runs beside them."""
    curves = published_rows("mnist_sparse_summary", **_LENET)
    static = published_rows(_RAW, **_LENET, method="static")
    columns = ["method", "density", "test_error_pct", "standard_error", "suspect"]
    return pd.concat([curves[columns], static[columns]], ignore_index=True)


def _corrected(slips: pd.DataFrame) -> pd.DataFrame:
    """The raw runs behind published values that are probably slips (five each)."""
    return pd.concat(
        [
            published_rows(_RAW, **_LENET, method=row["method"], density=row["density"])
            for row in slips.to_dict("records")
        ],
        ignore_index=True,
    )


@figure("main_results_lenet300-100", experiment="main_results")
def main_results_lenet(source: Source) -> Plot:
    """Test accuracy against the share of weights: the paper's window, and everything."""
    runs = load("main_results", source, **_LENET).needed()
    theirs = mnist_published()
    slips = theirs[theirs["suspect"]]
    plot, axes = new_plot(1, 2, size=(7.4, 4.3))
    window, whole = axes[0]
    errors = runs.rows["test_error_pct"]
    # The paper's window, opened downwards where a reduced run of sparse momentum lies below it.
    lowest = 97.5
    own = errors[runs.rows["method"] == "sparse_momentum"]
    if runs.reduced() and len(own):
        lowest = min(lowest, math.floor(2 * (100 - own.max())) / 2)
    shares = {*runs.rows["density"], *theirs["density"]} - {1.0}
    for ax in (window, whole):
        percent_axis(ax, shares)
    window.set_ylim(lowest, 99)
    handles = draw_density_curves(window, runs, theirs, as_accuracy=True, clip=True)
    accuracy_axis_by_log_error(whole, [*errors, *theirs["test_error_pct"]])
    draw_density_curves(whole, runs, theirs, as_accuracy=False)
    for row in _corrected(slips).itertuples():
        x, error = 100 * float(str(row.density)), float(str(row.test_error_pct))
        star: dict[str, Any] = {"marker": "*", "ms": 8, "mec": "k", "mew": 0.5, "ls": "none"}
        label = f"published {row.label} at {x:g} %: raw runs"
        for ax, y in ((window, 100 - error), (whole, error)):
            (drawn,) = ax.plot(x, y, color=PALETTE[str(row.method)], label=label, zorder=4, **star)
        handles.append(drawn)
    window.set_ylabel("test accuracy (%)")
    whole.set_ylabel("test accuracy (%, log scale of the error)")
    window.set_title(
        "The paper's window"
        if lowest == 97.5
        else f"{lowest:g} to 99 % (the paper's figure: 97.5 to 99 %)"
    )
    whole.set_title("Everything")
    legend_below(plot, [*handles, published_key()])
    stamp(
        plot,
        runs,
        "LeNet-300-100 on MNIST. Filled: mean of the seeds (dots) with Student-t 95 % interval; "
        "open and dashed: published. Arrows at the edge: points below the window, on the right.",
    )
    return plot


@table("main_results_lenet300-100", experiment="main_results")
def main_results_lenet_table(source: Source) -> Table:
    """Test error of each method at each share of weights, ours beside the published."""
    runs = load("main_results", source, **_LENET).needed()
    theirs = mnist_published().set_index(["method", "density"])
    slips = theirs[theirs["suspect"]]
    lines = []
    for cell in summarise(runs.rows, ["method", "density"]).to_dict("records"):
        key = (cell["method"], cell["density"])
        known = key in theirs.index
        line = {
            "method": METHOD_NAMES[cell["method"]],
            "weights (%)": f"{100 * cell['density']:g}",
            "test error (%)": interval_text(cell["mean"], math.nan, math.nan),
            "95 % interval": range_text(cell["low"], cell["high"]),
            "n": str(cell["n"]),
            "published (%)": "–",
            "ours − published": "–",
        }
        if known:
            row = theirs.loc[key]
            line["published (%)"] = published_text(row) + (" *" if row["suspect"] else "")
            difference = cell["mean"] - row["test_error_pct"]
            line["ours − published"] = interval_text(difference, math.nan, math.nan, sign=True)
        lines.append(line)
    note = f"Published: mean ± standard error. {sentence(runs.scale())}"
    for row in _corrected(slips.reset_index()).itertuples():
        note += (
            f" * Probably a slip of the source for {METHOD_NAMES[str(row.method)]}: its raw runs "
            f"give {float(str(row.test_error_pct)):.2f}."
        )
    return Table(
        pd.DataFrame(lines), "LeNet-300-100 on MNIST: test error by share of weights", note
    )


@table("main_results_lenet300-100_differences", experiment="main_results")
def main_results_lenet_differences(source: Source) -> Table:
    """Sparse momentum minus each other method at each share of weights, paired by seed."""
    runs = load("main_results", source, **_LENET).needed()
    ours = runs.where(method="sparse_momentum").needed()
    lines = []
    for method in [m for m in runs.methods if m not in ("dense", "sparse_momentum")]:
        for row in claims.differences(ours, runs.where(method=method), "density").to_dict(
            "records"
        ):
            lines.append(
                {
                    "sparse momentum −": METHOD_NAMES[method],
                    "weights (%)": f"{100 * row['density']:g}",
                    "difference (points)": interval_text(
                        row["mean"], math.nan, math.nan, sign=True
                    ),
                    "95 % interval": range_text(row["low"], row["high"], sign=True),
                    "n": str(row["n"]),
                    "p": p_text(row["p"]),
                    "p (Holm)": p_text(row["p_holm"]),
                }
            )
    if not lines:
        raise NoRuns(f"main_results ({source.profile}): no seed has finished two methods")
    note = (
        "Percentage points of test error; paired t-test over shared seeds, p-values adjusted by "
        f"Holm over the shares of weights of each method. {sentence(runs.scale())}"
    )
    caption = "LeNet-300-100 on MNIST: sparse momentum against each method"
    return Table(pd.DataFrame(lines), caption, note)


# --------------------------------------------------------------------------------------- verdicts


@table("verdicts")
def verdicts(source: Source, notebook: str = "") -> Table:
    """Each claim of the paper with its verdict; only those of one notebook where it is named."""
    judged = claims.verdict_table(source, notebook)
    if (judged["verdict"] == claims.NO_RUNS).all():
        raise NoRuns(f"none of the claims has runs at profile {source.profile}")
    columns = {
        "claim": "claim",
        "paper": "paper",
        "ours": "ours [95 % interval]",
        "n": "n",
        "verdict": "verdict",
    }
    scales = [f"{s}." for s in claims.scales(source, judged)]
    return Table(
        judged[list(columns)].rename(columns=columns).astype(str),
        f"The paper's claims and what the runs of profile {source.profile} say"
        + ("" if source.profile == "paper" else " (reduced scale, not the paper's)"),
        " ".join([*scales, claims.RULE]),
    )
