"""Figure, table and conclusion of the experiment `official_readings`.  Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from lib.claims.effects import drained
from lib.experiments import READINGS
from lib.figures.plots import (
    PALETTE,
    PUBLISHED_ALPHA,
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
    p_text,
    published_rows,
    range_text,
    sentence,
)
from lib.stats import (
    Interval,
    PairedDifference,
    holm,
    paired_difference,
    t_interval,
    value_difference,
)

NAMES = {
    "ours": "ours",
    "feedback": "number of weights steered by feedback",
    "keep": "regrown weights keep their value",
    "anywhere": "growth can choose active weights again",
    "floor": "prune rate falls to 0.005",
    "official": "these four: the official code",
    "per_epoch": "prune rate falls per epoch",
    "after": "importance measured after pruning",
    "plain": "no exception for nearly dense layers",
    "layer_size": "no redistribution: by layer size",
}
WHAT = (
    "The official code differs from ours in the first four readings and does all of them; the "
    "next three are readings of the paper's words that it does not follow; the last, a part of the "
    "ablation, is there for scale."
)
LEVEL = 0.05  # of the adjusted p-values that are called a difference
# File of the official code -> our table with the values of sparse momentum, and the line's style.
_PUBLISHED = {
    "MNIST figure": ("mnist_sparse_summary", (0, (4, 2))),
    "compression figure": ("mnist_lenet300-100", (0, (1, 1.5))),
}
JUDGED = "MNIST figure"  # the published curve that the verdicts on MNIST refer to


@dataclass(frozen=True)
class Reading:
    """One reading at one share of weights: its error (%), and its difference to ours, paired by
    seed (points; None of ours itself), with p adjusted by Holm over the readings at that share.

    `weights`: least and most active weights after any epoch, relative to the number asked for.
    """

    name: str
    density: float
    errors: pd.Series
    diverged: int
    difference: PairedDifference | None
    by_seed: pd.Series
    weights: tuple[float, float]
    p_holm: float = math.nan

    @property
    def moves(self) -> bool:
        """Whether it is shown to move the error; errors are multiples of 0.01, so that two seeds
        can agree by chance.
        """
        return self.difference is not None and self.difference.n > 2 and self.p_holm < LEVEL


def compared(runs: Runs) -> list[Reading]:
    """Every reading with a finished run, by share of weights, in the order of READINGS.

    Raises NoRuns if there is no share at which a seed has finished ours and another reading.
    """
    curves = runs.curves()
    found: list[Reading] = []
    for density in sorted({run.density for run in runs.planned}):
        here: list[Reading] = []
        ours = runs.by_seed(density=density, **READINGS["ours"])
        for name, fields in READINGS.items():
            cell = runs.where(density=density, **fields)
            if cell.rows.empty and cell.diverged.empty:
                continue
            errors = cell.by_seed()
            held = curves.loc[curves["run_id"].isin(cell.rows["run_id"]), "density"] / density
            here.append(
                Reading(
                    name,
                    density,
                    errors,
                    len(cell.diverged),
                    None if name == "ours" else paired_difference(errors, ours),
                    (errors - ours).dropna(),
                    (float(held.min()), float(held.max())) if len(held) else (math.nan, math.nan),
                )
            )
        p = holm(math.nan if one.difference is None else one.difference.p_t for one in here)
        found += [
            Reading(**{**vars(one), "p_holm": value}) for one, value in zip(here, p, strict=True)
        ]
    if not any(one.difference is not None and one.difference.n for one in found):
        raise NoRuns(
            f"{runs.experiment} ({runs.profile}): no seed has finished ours and another reading"
        )
    return found


def published_errors(density: float) -> dict[str, tuple[float, float]]:
    """Figure of the paper -> sparse momentum's error in % and its standard error at this share."""
    found = {}
    for name, (source, _) in _PUBLISHED.items():
        rows = published_rows(
            source, model="lenet300-100", method="sparse_momentum", density=density
        )
        row = rows.iloc[0]
        found[name] = (float(row["test_error_pct"]), float(row["standard_error"]))
    return found


def conclusions(source: Source) -> list[str]:
    """One sentence for each share of weights: does a reading explain the difference to the paper?

    A reading moves the error where its paired difference to ours, over three seeds or more, has
    p < 0.05 after Holm. It explains the difference of ours to the published value where that
    difference is there (its Welch interval leaves out zero), the reading moves the error towards
    the published value, and its own interval holds zero. A reduced run is not compared with a
    published value.
    """
    runs = load("official_readings", source).needed()
    every = compared(runs)
    said = []
    for density in sorted({one.density for one in every}):
        here = [one for one in every if one.density == density]
        text = f"{100 * density:g} % of the weights: {_moved(here)}"
        if not runs.reduced():
            text += f"; {_explained(here, published_errors(density))}"
        said.append(text + ".")
    return said


def _moved(here: list[Reading]) -> str:
    moves = [one for one in here if one.moves]
    tested = sum(one.difference is not None and one.difference.n > 2 for one in here)
    if not tested:
        return "too few seeds to test a reading"
    start = f"of {len(NAMES) - 1} readings {tested} are tested, and"
    if not moves:
        return f"{start} none is shown to move the error"
    listed = ", ".join(
        f"“{NAMES[one.name]}” by {_points(one.difference.interval)}"
        for one in moves
        if one.difference is not None
    )
    return f"{start} these move the error (points): {listed}"


def _explained(here: list[Reading], published: dict[str, tuple[float, float]]) -> str:
    ours = next((one for one in here if one.name == "ours"), None)
    if ours is None or len(ours.errors) < 2:
        return "too few seeds of ours to compare with the published value"
    off = {name: value_difference(ours.errors, *both) for name, both in published.items()}
    others = ", ".join(
        f"{_points(off[name])} against the {value:.2f} of the {name}"
        for name, (value, _) in published.items()
        if name != JUDGED
    )
    mine = off[JUDGED]
    start = f"ours minus published {published[JUDGED][0]:.2f} is {_points(mine)} ({others})"
    if mine.low <= 0 <= mine.high:
        return f"{start}, so that no difference is shown that would have to be explained"
    explaining = []
    for one in here:
        if one.difference is None or not one.moves or one.difference.mean * mine.mean > 0:
            continue
        left = value_difference(one.errors, *published[JUDGED])
        how = "explains it" if left.low <= 0 <= left.high else "goes that way"
        explaining.append(f"“{NAMES[one.name]}” {how} (left: {_points(left)})")
    return f"{start}; {', '.join(explaining) or 'no reading is shown to explain it'}"


def _points(one: Interval) -> str:
    return interval_text(one.mean, one.low, one.high, sign=True)


# ------------------------------------------------------------------------------------------ figure


def _draw(ax: Axes, here: list[Reading], rows: dict[str, int], published: bool) -> list[int]:
    """Differences at one share of weights, one line per reading; n of each.

    The axis is that of the readings, unless the part of the ablation lies near: what is beyond it
    is printed as a number with an arrow.
    """
    colour = PALETTE["sparse_momentum"]
    ax.axvline(0, color="0.35", lw=0.9, zorder=1.6)
    shown = [one for one in here if one.difference is not None and one.difference.n]
    reach = [0.0]
    for one in shown:
        pair, y = one.difference, rows[one.name]
        assert pair is not None
        ax.plot(
            one.by_seed,
            [y + 0.24] * len(one.by_seed),
            ".",
            color=colour,
            ms=4.4,
            alpha=0.5,
            mew=0,
            zorder=2.4,
        )
        if math.isfinite(pair.low):
            ax.errorbar(
                pair.mean,
                y,
                xerr=[[pair.mean - pair.low], [pair.high - pair.mean]],
                fmt="none",
                ecolor=colour,
                elinewidth=1.1,
                capsize=2.2,
                capthick=1.1,
                zorder=2.6,
            )
        filled = colour if one.moves else "white"
        ax.plot(pair.mean, y, "o", color=colour, mfc=filled, zorder=3)
        if one.name != "layer_size":
            reach += [*one.by_seed, *((pair.low, pair.high) if pair.n > 2 else ())]
    ours = next((one for one in here if one.name == "ours"), None)
    title = f"{100 * here[0].density:g} % of the weights"
    if ours is not None and len(ours.errors):
        mean = t_interval(ours.errors).mean
        title += f"\nours: {mean:.2f} %"
        if published:
            for name, (value, _) in published_errors(here[0].density).items():
                reach.append(value - mean)
                ax.axvline(
                    value - mean,
                    color="#555555",
                    lw=1.0,
                    ls=_PUBLISHED[name][1],
                    alpha=PUBLISHED_ALPHA + 0.2,
                    zorder=1.7,
                )
    ax.set_title(title)
    ax.grid(False, axis="y")
    ax.grid(True, axis="x")
    span = max(reach) - min(reach)
    part = [at for one in shown if one.name == "layer_size" for at in one.by_seed]
    if part and min(reach) - span < min(part) and max(part) < max(reach) + span:
        reach += part
    room = 0.09 * (max(reach) - min(reach) or 1.0)
    low, high = min(reach) - room, max(reach) + room
    ax.set_xlim(low, high)
    for one in here:
        texts = [f"{one.diverged} diverged"] if one.diverged else []
        above = one.difference is not None and one.by_seed.max() > high
        if one.difference is not None and (above or one.by_seed.min() < low):
            text = interval_text(one.difference.mean, math.nan, math.nan, sign=True)
            texts.append(f"{text} ▸" if above else f"◂ {text}")
        if texts:
            ax.text(
                0.99 if above or one.diverged else 0.01,
                rows.get(one.name, -0.5),
                ", ".join(texts),
                transform=ax.get_yaxis_transform(),
                fontsize=6.3,
                ha="right" if above or one.diverged else "left",
                va="center",
                color=colour,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.8},
                zorder=4,
            )
    return [one.difference.n for one in shown if one.difference is not None]


@figure("official_readings", experiment="official_readings")
def official_readings(source: Source) -> Plot:
    """Test error of each reading of the algorithm minus ours, and the published value."""
    runs = load("official_readings", source).needed()
    every = compared(runs)
    shares = sorted({one.density for one in every})
    shown = [name for name in READINGS if name != "ours"]
    rows = {name: i for i, name in enumerate(shown)}
    plot, axes = new_plot(1, len(shares), size=(2.9 + 1.9 * len(shares), 3.7), sharey=True)
    counts: list[int] = []
    for ax, density in zip(axes[0], shares, strict=True):
        here = [one for one in every if one.density == density]
        counts += _draw(ax, here, rows, published=not runs.reduced())
        ax.axhspan(-0.5, rows["official"] + 0.5, color=PALETTE["sparse_momentum"], alpha=0.06, lw=0)
        ax.axhline(rows["layer_size"] - 0.5, color="0.8", lw=0.7)
        ax.set_xlabel("test error minus ours (points)")
    axes[0, 0].set_yticks(range(len(shown)), [NAMES[name] for name in shown])
    axes[0, 0].set_ylim(len(shown) - 0.5, -0.5)
    for ax in axes.flat:
        ax.tick_params(axis="y", length=0)
    colour = PALETTE["sparse_momentum"]
    handles = [
        Line2D([], [], color=colour, marker="o", ls="none", mfc="white",
               label=f"mean ({n_text(counts)}) with paired 95 % interval, dots: seeds"),
        Line2D([], [], color=colour, marker="o", ls="none", label="p < 0.05 after Holm"),
    ]  # fmt: skip
    if not runs.reduced():
        handles += [
            Line2D([], [], color="#555555", lw=1.0, ls=style,
                   label=f"published minus ours ({name})")
            for name, (_, style) in _PUBLISHED.items()
        ]  # fmt: skip
    legend_below(plot, handles, columns=2)
    stamp(
        plot,
        runs,
        f"LeNet-300-100 on MNIST. Below zero: lower error than ours. {WHAT} Holm over the readings "
        f"at one share of weights. An arrow: beyond the axis, with the mean. {drained(runs)}",
    )
    return plot


# ------------------------------------------------------------------------------------------- table


@table("official_readings", experiment="official_readings")
def official_readings_table(source: Source) -> Table:
    """Each reading's error, its difference to ours paired by seed, and the weights it had."""
    runs = load("official_readings", source).needed()
    lines = []
    for one in compared(runs):
        pair = one.difference
        n = len(one.errors) if pair is None else pair.n
        low, high = (f"{100 * share:.1f}" for share in one.weights)
        lines.append(
            {
                "reading": NAMES[one.name],
                "weights (%)": f"{100 * one.density:g}",
                "test error (%)": f"{one.errors.mean():.2f}" if len(one.errors) else "–",
                "difference to ours (points)": "ours"
                if pair is None
                else interval_text(pair.mean, math.nan, math.nan, sign=True),
                "95 % interval": "–"
                if pair is None
                else range_text(pair.low, pair.high, sign=True),
                "n": f"{n}" + (f" ({one.diverged} diverged)" if one.diverged else ""),
                "p": p_text(math.nan if pair is None else pair.p_t),
                "p (Holm)": p_text(one.p_holm),
                "active weights (% of those asked for)": low if low == high else f"{low} to {high}",
            }
        )
    printed = "; ".join(
        f"{100 * density:g} %: "
        + ", ".join(f"{value:.2f} ± {error:.2f} ({name})" for name, (value, error) in both.items())
        for density in sorted({run.density for run in runs.planned})
        for both in [published_errors(density)]
    )
    note = (
        f"{WHAT} Paired t-test over shared seeds, p adjusted by Holm over the readings at one "
        "share of weights. Active weights: least and most after any epoch of any seed. Published "
        f"error of sparse momentum, 100 epochs (two files of the official code): {printed}. "
        f"{' '.join(conclusions(source))} {drained(runs)} {sentence(runs.scale())}"
    )
    return Table(pd.DataFrame(lines), "Readings of the algorithm against ours", note)
