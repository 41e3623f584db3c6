"""The small vocabulary of the figures; the rest is seaborn and matplotlib in the notebook's cell.

The same on every figure: the mean with its Student-t 95 % interval, each seed a dot, colour and
mark by LOOKS, one legend below the panels, and the scale of the runs in the last line, so that a
reduced run is never taken for the paper's.  Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from IPython.display import Markdown, display
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lib import paths
from lib.results.rows import scale
from lib.results.stats import Interval, t_interval

# Where figures are saved; None, as in a notebook opened by hand: nowhere.
FOLDER: Path | None = None
DRAW = True  # False: only what cells say is asked for, as of `python -m lib verdict`
WIDTH = 6.3  # inches: 16 cm, the text of the report
STYLE = Path(__file__).with_name("style.mplstyle")


class Look(NamedTuple):
    """How a method, or a variant of one, is drawn in every figure."""

    label: str
    colour: str
    marker: str


# Colour-blind safe (after Okabe and Ito 2008), the mark as second key; in the order of legends.
LOOKS = {
    "dense": Look("Dense", "#000000", "d"),
    "sparse_momentum": Look("Sparse momentum", "#0072B2", "o"),
    "dsr": Look("DSR", "#E69F00", "s"),
    "set": Look("SET", "#009E73", "^"),
    "deepr": Look("DeepR", "#CC79A7", "D"),
    "rigl": Look("RigL", "#56B4E9", "v"),
    "snip": Look("SNIP", "#D55E00", "P"),
    "static": Look("Static mask", "#666666", "X"),
    "small_dense": Look("Dense, as many weights", "#AA4499", "h"),
    "set_code": Look("SET as in its code", "#44AA99", "<"),
    "dsr_code": Look("DSR as in its code", "#999933", "p"),
    "layers_left_dense": Look("Layers left dense, at their real share", "#CC79A7", "s"),
    "cosine": Look("cosine decay", "#0072B2", "o"),
    "linear": Look("linear decay", "#882255", "s"),
    "full": Look("estimate, sparse convolution", "#0072B2", "o"),
    "channel": Look("estimate, dense convolution", "#E69F00", "s"),
    "uniform": Look("same density in every layer", "#0072B2", "o"),
    "erk": Look("denser small layers (ERK)", "#882255", "s"),
}
BLUE = LOOKS["sparse_momentum"].colour
# Blue is better, red is worse; the ends stay light enough for black text.
DIVERGING = LinearSegmentedColormap.from_list("diverging", ["#4393C3", "#F7F7F7", "#E58368"])


NETWORKS = {
    "lenet300-100": "LeNet-300-100",
    "lenet5": "LeNet-5",
    "alexnet": "AlexNet",
    "vgg16": "VGG16",
    "wrn": "WRN",
    "mlpbn": "BN-MLP",
    "mlp": "MLP",
}


def network(model: str) -> str:
    """The name of a model as the paper writes it: "vgg16-d" is VGG16-D."""
    known = next((name for name in NETWORKS if model.startswith(name)), model)
    rest = model.removeprefix(known)
    return NETWORKS.get(known, known) + (rest.upper() if known == "vgg16" else rest)


@contextmanager
def figure(
    name: str,
    rows: pd.DataFrame,
    caption: str,
    titles: Iterable[str] = ("",),
    across: int = 2,
    height: float = 2.6,
    **grid: Any,
) -> Iterator[list[Axes]]:
    """Axes to draw on, one per title, `across` in a row, each row `height` inches.

    At the end the figure gets one legend and the scale of `rows` and shows itself with its caption.
    With FOLDER it is saved as <profile>/<name>.png and .pdf, equal bytes for equal figures.
    Without a title there is nothing to draw, which it says.
    """
    titles = list(titles)
    if not titles:
        yield []
        display(Markdown(f"*{caption}* No runs yet."))
        return
    across, down = min(across, len(titles)), -(-len(titles) // across)
    with mpl.rc_context(fname=STYLE):
        plot = Figure(figsize=(WIDTH, height * down + 0.22), layout="constrained")
        canvas = FigureCanvasAgg(plot)
        halves = plot.subfigures(2, 1, squeeze=False, height_ratios=[height * down, 0.22], hspace=0)
        body, foot = halves.flat
        axes = list(body.subplots(down, across, squeeze=False, **grid).flat)
        for ax, title in zip(axes, titles, strict=False):
            ax.set_title(title)
        for ax in axes[len(titles) :]:
            ax.set_axis_off()
        yield axes[: len(titles)]
        if rows.empty:
            display(Markdown(f"*{caption}* No runs yet."))
            return
        handles: dict[str, object] = {}  # by label, so that each stands once
        for ax in axes:
            handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        if handles:
            columns = max(1, min(len(handles), int(96 / (7 + max(map(len, handles))))))
            body.legend(handles.values(), handles, loc="outside lower left", ncols=columns)
        timed = "machine" in rows  # by a clock: no profile, no seeds
        profile = "bench" if timed else rows.profile.iloc[0]
        said = f"Clock of {rows.machine.iloc[0].split(';')[0]}." if timed else scale(rows)
        colour = "0.3" if timed or profile == "paper" else "#B00000"  # a reduced scale
        foot.text(0.01, 0.5, said, fontsize=7.5, va="center", color=colour)
        png = BytesIO()
        if DRAW:
            canvas.print_png(png, metadata={"Software": None})  # savefig would lay it out twice
        if FOLDER:
            paths.write(FOLDER / profile / f"{name}.png", png.getvalue())
            plot.set_layout_engine("none")  # keep what the layout of the PNG has found
            unset = dict.fromkeys(("CreationDate", "Creator", "Producer"))
            FigureCanvasPdf(plot).print_pdf(pdf := BytesIO(), metadata=unset)
            paths.write(FOLDER / profile / f"{name}.pdf", pdf.getvalue())
    about = {"figure": f"{profile}/{name}", "caption": caption, "image/png": {"width": 640}}
    display({"image/png": png.getvalue(), "text/plain": name}, raw=True, metadata=about)
    display(Markdown(caption), metadata={"caption": True})


def value_axis(ax: Axes, values: Iterable[float], log: int = 0) -> None:
    """A tick at each value that was run; `log`: the base of a logarithmic axis."""
    ticks = sorted(set(values))
    if log:
        ax.set_xscale("log", base=log)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def error_axis(ax: Axes, errors: Iterable[float]) -> None:
    """A logarithmic axis over these errors (%), with plain numbers."""
    low, high = min(errors), max(errors)
    near = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0)
    far = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
    ticks = [at for at in (far if high > 15 * low else near) if low / 1.1 < at < high * 1.1]
    ax.set(yscale="log", ylim=(low / 1.1, high * 1.1))
    ax.set_yticks(ticks, [f"{at:g}" for at in ticks])
    ax.minorticks_off()


def curves(
    ax: Axes,
    rows: pd.DataFrame,
    x: str,
    y: str,
    by: str = "method",
    spread: float = 0.0,
    line: bool = True,
) -> None:
    """Mean and interval of y at each x, each row (a seed) a dot; one curve per key of LOOKS. With a
    column `learned` only those that did, and where not all did a hollow mark with "2/10".

    `spread` moves the curves apart by this share of x.  An interval that reaches zero is left out
    on a logarithmic axis.
    """
    keys = [key for key in LOOKS if key in set(rows[by])]
    for i, key in enumerate(keys):
        look, mine = LOOKS[key], rows[rows[by] == key]
        moved = 1 + spread * (i - (len(keys) - 1) / 2)
        for _, part in mine.groupby(x) if "learned" in rows else ():
            if (k := part.learned.sum()) and k < len(part):  # the survivors, hollow and counted
                place = (moved * part[x].iloc[0], part[y][part.learned].mean())
                ax.plot(*place, marker=look.marker, mfc="white", color=look.colour, zorder=5)
                ax.annotate(f"{k}/{len(part)}", place, (3, 3), textcoords="offset points",
                            fontsize=7, color=look.colour)  # fmt: skip
        mine = (mine[mine.learned] if "learned" in rows else mine).dropna(subset=[y])
        if mine.empty:
            continue
        ax.plot(mine[x] * moved, mine[y], ls="none", marker="o", ms=2.6, mew=0, alpha=0.35,
                color=look.colour, zorder=2)  # fmt: skip
        cells = {at: t_interval(part) for at, part in mine.groupby(x)[y]}
        at, means = moved * np.array(list(cells)), [one.mean for one in cells.values()]
        ax.plot(at, means, ls="-" if line else "none", marker=look.marker, color=look.colour,
                label=look.label, zorder=4)  # fmt: skip
        ends = np.array([one[1:3] for one in cells.values()])
        if ax.get_yscale() == "log":
            ends[ends[:, 0] <= 0] = np.nan
        ax.vlines(at, *ends.T, color=look.colour, lw=1.3, zorder=3)


def printed(ax: Axes, rows: pd.DataFrame, x: str, y: str, by: str = "method") -> None:
    """Published points, open and dashed, with 1.96 standard errors where one was printed; rows
    with no key of LOOKS are left out.
    """
    for key in [key for key in LOOKS if key in set(rows[by])]:
        mine = rows[rows[by] == key].sort_values(x)
        look, ends = LOOKS[key], 1.96 * mine.standard_error.fillna(0)
        ax.errorbar(mine[x], mine[y], ends, ls=":", lw=1, marker=look.marker, mfc="white",
                    color=look.colour, alpha=0.75, elinewidth=0.8, zorder=1.5)  # fmt: skip


def dots(
    ax: Axes,
    values: Mapping[str, Iterable[float]],
    filled: Iterable[str] = (),
    limits: tuple[float, float] | None = None,
    colour: str = BLUE,
) -> None:
    """A row per name, from above: mean, interval and each seed; full marks for names in `filled`.

    A mean outside `limits` is an arrow at the edge with its number.
    """
    ax.axvline(0, color="0.3", lw=0.8, zorder=1)
    for y, (name, seeds) in enumerate(values.items()):
        seeds, one = np.asarray(list(seeds), float), t_interval(seeds)
        if not one.n:
            continue
        face = colour if name in filled else "white"
        if limits and not limits[0] <= one.mean <= limits[1]:
            right = one.mean > limits[1]
            edge, mark, side = (limits[1], ">", "right") if right else (limits[0], "<", "left")
            ax.plot(edge, y, mark, color=colour, mfc=face, ms=6, clip_on=False, zorder=4)
            ax.annotate(f"{one:+}", (edge, y), (-7 if right else 7, 0), fontsize=7.5, color=colour,
                        textcoords="offset points", ha=side, va="center",
                        bbox={"fc": "white", "ec": "none", "pad": 0.5})  # fmt: skip
            continue
        below = np.full(len(seeds), y + 0.27)
        ax.plot(seeds, below, "o", ms=2.2, mew=0, alpha=0.4, color=colour)
        ax.hlines(y, one.low, one.high, color=colour, lw=1.3, zorder=3)
        ax.plot(one.mean, y, "o", color=colour, mfc=face, zorder=4)
    ax.set_yticks(range(len(values)), list(values))
    ax.set_ylim(len(values) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    if limits:
        ax.set_xlim(*limits)


def heat_map(
    ax: Axes,
    effects: pd.DataFrame,
    texts: pd.DataFrame,
    limit: float,
    colours: str | Colormap = DIVERGING,
) -> bool:
    """Cells coloured by the mean of their Interval within ±limit, with their text; what lies
    beyond is hatched.  Returns whether something does; None is an empty cell.
    """
    means = effects.map(lambda one: one.mean if isinstance(one, Interval) else np.nan)
    beyond = means.abs().to_numpy() > limit
    ax.pcolormesh(means, cmap=colours, vmin=-limit, vmax=limit, ec="white", lw=2)
    for (row, column), outside in np.ndenumerate(beyond):
        if outside:
            inner = Rectangle((column + 0.03, row + 0.03), 0.94, 0.94, fc="none", ec="white")
            inner.set(lw=0, hatch="////", alpha=0.45)
            ax.add_patch(inner)
        if isinstance(text := texts.iat[row, column], str):
            at = (column + 0.5, row + 0.5)
            ax.text(*at, text, ha="center", va="center", fontsize=8, linespacing=1.2)
    ax.set_xticks(np.arange(effects.shape[1]) + 0.5, list(effects.columns))
    ax.set_yticks(np.arange(effects.shape[0]) + 0.5, list(effects.index))
    ax.set(xlim=(0, effects.shape[1]), ylim=(effects.shape[0], 0))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.grid(visible=False)
    return bool(beyond.any())


def colour_bar(
    axes: list[Axes], limit: float, label: str, beyond: bool, colours: str | Colormap = DIVERGING
) -> None:
    """One bar for all of these heat maps, with arrows where a cell lies beyond it."""
    if not axes:
        return
    shown = mpl.cm.ScalarMappable(Normalize(-limit, limit), colours)
    ends = "both" if beyond else "neither"
    bar = axes[0].figure.colorbar(shown, ax=axes, label=label, extend=ends, aspect=25, pad=0.02)
    bar.ax.yaxis.set_major_formatter("{x:+.1f}")
    bar.outline.set_visible(False)
