"""Figures and tables of the experiments `ablations` and `depth_scaling`.  Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from lib.claims.effects import FULL, Family, Scaling, drained, families, rules, scaling, untrained
from lib.figures.plots import (
    PALETTE,
    Plot,
    Table,
    draw_ours,
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
    model_name,
    p_text,
    range_text,
    sentence,
)
from lib.stats import holm, paired_difference, t_interval

_TREND = (0, (5, 2))

# From most to least informed.
REDISTRIBUTION_NAMES = {
    "momentum": "momentum",
    "magnitude": "magnitude",
    "nonzeros": "non-zeros",
    "layer_size": "layer size",
    "none": "none",
}
GROWTH_NAMES = {"momentum": "momentum", "random": "random", "gradient": "gradient"}
WHICH_NONE = (
    "“None”: each layer regrows as many weights as it lost, as in the official code of July 2019, "
    "the paper's first version; “layer size”: what the official code calls none since August 2019."
)
PARTS = {
    "redistribution": "momentum redistribution instead of none",
    "growth": "momentum growth instead of random growth",
}


def _untrained(runs: Runs) -> str:
    said = untrained(runs)
    return f" {said}: their differences mean nothing." if said else ""


def _drained(runs: Runs) -> str:
    said = drained(runs)
    return f" {said}" if said else ""


# --------------------------------------------------------------------------------- 02: ablations


def _variants(runs: Runs) -> pd.DataFrame:
    """Each planned variant against full sparse momentum in the same network, paired by seed.

    Columns: model, redistribution, growth, error (mean, %), mean, low, high, n (of the difference;
    of full itself its seeds), p, p_holm (adjusted over the variants of a network), diverged.
    """
    found: list[dict[str, Any]] = []
    for model in dict.fromkeys(run.model for run in runs.planned):
        here = runs.where(model=model)
        full = here.by_seed(**FULL)
        lines: list[dict[str, Any]] = []
        for redistribution in REDISTRIBUTION_NAMES:
            for growth in GROWTH_NAMES:
                cell = here.where(**rules(redistribution, growth))
                if not cell.planned:
                    continue
                errors = cell.by_seed()
                is_full = rules(redistribution, growth) == FULL
                pair = paired_difference(errors, full)
                lines.append(
                    {
                        "model": model,
                        "redistribution": redistribution,
                        "growth": growth,
                        "full": is_full,
                        "error": t_interval(errors) if len(errors) else None,
                        "mean": math.nan if is_full else pair.mean,
                        "low": math.nan if is_full else pair.low,
                        "high": math.nan if is_full else pair.high,
                        "n": len(errors) if is_full else pair.n,
                        "p": math.nan if is_full else pair.p_t,
                        "diverged": len(cell.diverged),
                    }
                )
        for line, p in zip(lines, holm(line["p"] for line in lines), strict=True):
            line["p_holm"] = p
        if any(line["error"] is not None for line in lines):
            found += lines
    if not found:
        raise NoRuns(f"{runs.experiment} ({runs.profile}): no variant is done")
    return pd.DataFrame(found)


def _cell_text(row: Mapping[Any, Any]) -> str:
    """The lines of one cell of the heat map."""
    n = f"n = {row['n']}" + (f", {row['diverged']} diverged" if row["diverged"] else "")
    if row["full"]:
        error = row["error"]
        return f"full\n{error.mean:.2f} %\n{n}" if error else "full\nno runs"
    if not row["n"]:
        return f"{row['diverged']} diverged" if row["diverged"] else "no runs"
    lines = [interval_text(row["mean"], math.nan, math.nan, sign=True)]
    if not math.isnan(row["low"]):
        lines.append(range_text(row["low"], row["high"], sign=True))
    if row["p_holm"] < 0.05:
        lines[0] += " *"
    return "\n".join([*lines, n])


_FAR = 10.0  # points; larger differences have the last colour, where there are smaller ones


def _heat_map(ax: Axes, cells: pd.DataFrame, density: float) -> None:
    model = cells["model"].iloc[0]
    down = [name for name in REDISTRIBUTION_NAMES if name in set(cells["redistribution"])]
    across = [name for name in GROWTH_NAMES if name in set(cells["growth"])]
    at = {(row["redistribution"], row["growth"]): row for row in cells.to_dict("records")}
    values = np.full((len(down), len(across)), np.nan)  # [redistribution, growth]
    for i, redistribution in enumerate(down):
        for j, growth in enumerate(across):
            if (redistribution, growth) in at:
                row = at[(redistribution, growth)]
                values[i, j] = 0.0 if row["full"] else row["mean"]
    sizes = np.abs(values[np.isfinite(values)])
    # A rule that keeps a network from learning must not take the colour of all others.
    near = sizes[sizes <= _FAR]
    largest = float(near.max(initial=0.0) or sizes.max(initial=0.0)) or 1.0
    norm = Normalize(-largest, largest)
    ax.set_facecolor("#EEEEEE")
    image = ax.imshow(values, cmap="RdBu_r", norm=norm, aspect="auto")
    for i, redistribution in enumerate(down):
        for j, growth in enumerate(across):
            if (redistribution, growth) not in at:
                ax.text(j, i, "not planned", ha="center", va="center", fontsize=6, color="0.35")
                continue
            row = at[(redistribution, growth)]
            strong = abs(values[i, j]) > 0.55 * largest
            ax.text(
                j,
                i,
                _cell_text(row),
                ha="center",
                va="center",
                fontsize=6.4,
                linespacing=1.25,
                color="white" if strong else "black",
            )
    ax.set_xticks(range(len(across)), [GROWTH_NAMES[name] for name in across])
    ax.set_yticks(range(len(down)), [REDISTRIBUTION_NAMES[name] for name in down])
    ax.tick_params(length=0)
    ax.grid(False)
    for side in ax.spines.values():
        side.set_visible(False)
    ax.set_xticks(np.arange(1, len(across)) - 0.5, minor=True)
    ax.set_yticks(np.arange(1, len(down)) - 0.5, minor=True)
    ax.tick_params(which="minor", length=0)
    ax.grid(True, which="minor", axis="both", color="white", linewidth=1.5)
    ax.set_title(f"{model_name(model)}, {100 * density:g} % of the weights")
    ax.set_xlabel("growth")
    beyond = "both" if sizes.max(initial=0.0) > largest else "neither"
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.05, pad=0.02, extend=beyond)
    bar.locator = MaxNLocator(5)
    bar.update_ticks()
    bar.ax.yaxis.set_major_formatter(
        FuncFormatter(lambda v, _: "0" if abs(v) < 1e-9 else f"{v:+g}".replace("-", "−"))
    )
    bar.outline.set_visible(False)
    bar.ax.set_title("points", fontsize=6.5, fontweight="normal", loc="left")
    bar.ax.tick_params(labelsize=6.5)


@figure("ablations", experiment="ablations")
def ablations(source: Source) -> Plot:
    """Heat map of test error minus that of full sparse momentum; one panel per network."""
    runs = load("ablations", source).needed()
    cells = _variants(runs)
    models = list(dict.fromkeys(cells["model"]))
    across = 2 if len(models) in (2, 4) else min(3, len(models))
    down = -(-len(models) // across)
    wide = {m: cells.loc[cells["model"] == m, "growth"].nunique() for m in models}
    columns = [max(wide[m] for m in models[i::across]) for i in range(across)]
    width = max(4.6, sum(0.86 * count + 1.25 for count in columns))
    plot, axes = new_plot(
        down, across, size=(width, 3.3 * down + 0.7), width_ratios=[c + 0.6 for c in columns]
    )
    for ax in axes.flat[len(models) :]:
        ax.set_visible(False)
    for ax, model in zip(axes.flat, models, strict=False):
        density = next(run.density for run in runs.planned if run.model == model)
        _heat_map(ax, cells[cells["model"] == model], density)
    for ax in axes[:, 0]:
        ax.set_ylabel("redistribution")
    stamp(
        plot,
        runs,
        "Test error minus that of full sparse momentum in percentage points (red: worse), with the "
        "paired 95 % interval over shared seeds; * p < 0.05 after Holm within the network. "
        f"{WHICH_NONE}{_untrained(runs)}{_drained(runs)}",
    )
    return plot


@table("ablations", experiment="ablations")
def ablations_table(source: Source) -> Table:
    """Each variant's error and its difference to full sparse momentum, paired by seed."""
    runs = load("ablations", source).needed()
    lines = []
    for row in _variants(runs).to_dict("records"):
        if row["error"] is None:
            continue
        lines.append(
            {
                "network": model_name(row["model"]),
                "redistribution": REDISTRIBUTION_NAMES[row["redistribution"]],
                "growth": GROWTH_NAMES[row["growth"]],
                "test error (%)": f"{row['error'].mean:.2f}",
                "difference to full (points)": "full"
                if row["full"]
                else interval_text(row["mean"], math.nan, math.nan, sign=True),
                "95 % interval": range_text(row["low"], row["high"], sign=True),
                "n": f"{row['n']}" + (f" ({row['diverged']} diverged)" if row["diverged"] else ""),
                "p": p_text(row["p"]),
                "p (Holm)": p_text(row["p_holm"]),
            }
        )
    note = (
        "Percentage points of test error, positive: worse than full sparse momentum (momentum "
        "redistribution and growth); paired t-test over shared seeds, p adjusted by Holm over the "
        f"variants of each network. {WHICH_NONE}{_untrained(runs)}{_drained(runs)} "
        f"{sentence(runs.scale())}"
    )
    return Table(pd.DataFrame(lines), "What redistribution and growth contribute", note)


# ------------------------------------------------------------------------------ 03: depth scaling


def _families(runs: Runs) -> list[tuple[Family, dict[str, Scaling]]]:
    """Each family with at least one pair that is done, and its benefits by part."""
    found = []
    for family in families(run.model for run in runs.planned):
        benefits = {part: scaling(runs, family, part) for part in PARTS}
        if any(len(one.cells) or one.unlearned for one in benefits.values()):
            found.append((family, benefits))
    if not found:
        raise NoRuns(f"{runs.experiment} ({runs.profile}): no seed has finished two variants")
    return found


_UNLEARNED = [
    Line2D([], [], color="0.45", marker="x", ls="none", label="no run learned: not in the lines")
]


def _slope_text(one: Scaling) -> str:
    if len(one.cells) < 2:
        return "one size only: no trend" if len(one.cells) else "no run learned"
    slope = one.slope
    if slope.n == 0:
        return "no seed has finished every size"
    said = interval_text(slope.mean, slope.low, slope.high, sign=True)
    test = "" if math.isnan(one.p) else f", p {_p_short(one.p)}"
    return f"{said} per doubling{test}"


def _p_short(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def _draw_scaling(ax: Axes, family: Family, one: Scaling) -> list[int]:
    """Benefit against size with the trend line; n of the points."""
    sizes = list(family.sizes.values())
    ax.set_xscale("log", base=2)
    ax.axhline(0, color="0.35", lw=0.8, zorder=1.6)
    colour = PALETTE["sparse_momentum"]
    if len(one.cells):
        draw_ours(
            ax,
            one.cells["size"].tolist(),
            [one.by_seed[model].dropna().tolist() for model in one.cells["model"]],
            method="sparse_momentum",
            line=False,
            dots=False,
        )
        for size, model in zip(one.cells["size"], one.cells["model"], strict=True):
            seeds = one.by_seed[model].dropna()  # beside the bar, which would hide them
            ax.plot([size * 1.06] * len(seeds), seeds, ".", color=colour, ms=3, alpha=0.6, mew=0)
    if one.slope.n and math.isfinite(one.slope.mean):
        x = np.log2(one.cells["size"].to_numpy(float))
        middle = float(one.by_seed.dropna().to_numpy(float).mean())
        ax.plot(
            one.cells["size"],
            middle + one.slope.mean * (x - x.mean()),
            color=colour,
            lw=1.1,
            ls=_TREND,
            alpha=0.8,
            zorder=2.3,
        )
    ax.plot(
        [family.sizes[model] for model in one.unlearned],
        [0.0] * len(one.unlearned),
        "x",
        color="0.45",
        ms=4.5,
        zorder=2.2,
    )
    margin = 1.25
    ax.set_xlim(min(sizes) / margin, max(sizes) * margin)
    ax.xaxis.set_major_locator(FixedLocator(sizes))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.margins(y=0.12)
    return one.cells["n"].tolist()


@figure("depth_scaling", experiment="depth_scaling")
def depth_scaling(source: Source) -> Plot:
    """Benefit of momentum redistribution and of momentum growth against depth and width."""
    runs = load("depth_scaling", source).needed()
    found = _families(runs)
    plot, axes = new_plot(len(PARTS), len(found), size=(max(4.2, 2.75 * len(found)), 5.0))
    counts: list[int] = []
    for column, (family, benefits) in zip(axes.T, found, strict=True):
        for ax, (part, one) in zip(column, benefits.items(), strict=True):
            counts += _draw_scaling(ax, family, one)
            ax.set_title(f"{family.name}: {part}", pad=15)
            ax.text(0, 1.02, _slope_text(one), transform=ax.transAxes, fontsize=6.8, va="bottom")
        column[-1].set_xlabel(family.axis)
    for ax in axes[:, 0]:
        ax.set_ylabel("benefit (points of test error)")
    legend_below(
        plot,
        [
            Line2D(
                [],
                [],
                color=PALETTE["sparse_momentum"],
                marker="o",
                ls="none",
                label=f"mean ({n_text(counts)}) with paired 95 % interval, dots: seeds",
            ),
            Line2D(
                [],
                [],
                color=PALETTE["sparse_momentum"],
                ls=_TREND,
                lw=1.1,
                label="mean of the lines through the seeds",
            ),
            *(_UNLEARNED if any(one.unlearned for _, b in found for one in b.values()) else []),
        ],
        columns=2 if len(found) > 2 else 1,
    )
    stamp(
        plot,
        runs,
        "Benefit: test error without the part minus with it, above zero it helps. Redistribution: "
        f"against none, growth: against random growth. {WHICH_NONE.partition('; ')[0]}."
        f"{_untrained(runs)}",
    )
    return plot


def _full_error(runs: Runs, model: str) -> float:
    return float(runs.by_seed(model=model, **FULL).mean())


@table("depth_scaling", experiment="depth_scaling")
def depth_scaling_table(source: Source) -> Table:
    """The benefit in each network of each family, paired by seed."""
    runs = load("depth_scaling", source).needed()
    lines = []
    for part, words in PARTS.items():
        for family, benefits in _families(runs):
            for row in benefits[part].cells.to_dict("records"):
                lines.append(
                    {
                        "benefit of": words,
                        "family": family.name,
                        "network": model_name(row["model"]),
                        "full: error (%)": f"{_full_error(runs, row['model']):.2f}",
                        "benefit (points)": interval_text(
                            row["mean"], math.nan, math.nan, sign=True
                        ),
                        "95 % interval": range_text(row["low"], row["high"], sign=True),
                        "n": str(row["n"]),
                        "p": p_text(row["p"]),
                        "p (Holm)": p_text(row["p_holm"]),
                    }
                )
            for model in benefits[part].unlearned:
                lines.append(
                    {
                        "benefit of": words,
                        "family": family.name,
                        "network": f"{model_name(model)}: not learned",
                        "full: error (%)": f"{_full_error(runs, model):.2f}",
                    }
                )
    note = (
        "Benefit: test error without the part minus with it, paired t-test over shared seeds, p "
        f"adjusted by Holm within a family. {WHICH_NONE}{_untrained(runs)} "
        f"{sentence(runs.scale())}"
    )
    caption = "Benefit of momentum redistribution and momentum growth by network"
    return Table(pd.DataFrame(lines).fillna("–"), caption, note)


@table("depth_scaling_trends", experiment="depth_scaling")
def depth_scaling_trends(source: Source) -> Table:
    """Does the benefit grow with depth or width? Two tests for each family."""
    runs = load("depth_scaling", source).needed()
    lines = []
    for part, words in PARTS.items():
        for family, benefits in _families(runs):
            one = benefits[part]
            if len(one.cells) + len(one.unlearned) < 2:
                continue
            slope, line = one.slope, one.line
            lines.append(
                {
                    "benefit of": words,
                    "family": family.name,
                    "networks": str(len(one.cells)),
                    "slope (points per doubling)": interval_text(
                        slope.mean, math.nan, math.nan, sign=True
                    ),
                    "95 % interval": range_text(slope.low, slope.high, sign=True),
                    "n (seeds)": str(slope.n),
                    "p": p_text(one.p),
                    "p over networks": p_text(line.p) if line else "–",
                    "Spearman's ρ": f"{line.rho:+.2f}".replace("-", "−")
                    if line and math.isfinite(line.rho)
                    else "–",
                    "conclusion": _conclusion(one),
                }
            )
    if not lines:
        raise NoRuns(f"depth_scaling ({source.profile}): no family has two networks that are done")
    note = (
        "Slope: of the benefit against log2 of depth or width, fitted to each seed; p: t-test of "
        "these slopes, which says whether the trend holds for these networks. p over networks: "
        "of the straight line through the means, which takes the networks as the sample, and "
        "Spearman's rank correlation, which assumes no shape. Networks of which no run learned "
        "are in neither. Conclusions at p < 0.05, "
        f"unadjusted. {sentence(runs.scale())}"
    )
    return Table(pd.DataFrame(lines), "Does the benefit grow with depth and width?", note)


def _conclusion(one: Scaling) -> str:
    if len(one.cells) < 2:
        return "too few networks learned"
    if math.isnan(one.p):
        return "too few seeds"
    if one.p >= 0.05:
        return "no trend shown"
    return "grows" if one.slope.mean > 0 else "shrinks"
