"""What redistribution and growth contribute, and how that changes with depth and width."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from lib.claims.effects import FULL, WITHOUT, Scaling, families, rules, scaling
from lib.figures.gallery import figure, table
from lib.figures.plots import LOOKS, Plot, effect, finish, heat_map, panels
from lib.figures.tables import INITS, Table, difference, groups, records
from lib.results.reading import (
    NoRuns,
    Runs,
    Source,
    interval_text,
    load,
    model_name,
    p_text,
    sentence,
)
from lib.stats import holm, paired_difference

# From most to least informed.
REDISTRIBUTIONS = {
    "momentum": "momentum",
    "magnitude": "magnitude",
    "nonzeros": "non-zeros",
    "layer_size": "layer size",
    "none": "none",
}
GROWTHS = ("momentum", "random", "gradient")
WHICH_NONE = (
    "“None”: each layer regrows as many weights as it lost, as in the official code of July 2019, "
    "the paper's first version; “layer size”: what the official code calls none since August 2019."
)
_LIMIT = {"mnist": 0.5, "cifar10": 2.0}  # points: the ends of the colour scale


# ------------------------------------------------------------------------------------- ablations


def variants(source: Source) -> pd.DataFrame:
    """Each planned variant against full sparse momentum in the same network, paired by seed, of
    seeds that learned in both.

    Columns: dataset, model, density, redistribution, growth, error (mean, %), mean, low, high, n,
    p, p_holm (of the difference, in points; Holm over the variants of a network; full itself: mean
    0), learned, done (runs). NoRuns where no variant is done.
    """
    runs = load("ablations", source).needed()
    found: list[dict[str, Any]] = []
    for model, density in dict.fromkeys((run.model, run.density) for run in runs.planned):
        here = runs.where(model=model, density=density)
        full = here.learned().by_seed(**FULL)
        lines: list[dict[str, Any]] = []
        for redistribution in REDISTRIBUTIONS:
            for growth in GROWTHS:
                cell = here.where(**rules(redistribution, growth))
                if not cell.planned:
                    continue
                errors, outcomes = cell.learned().by_seed(), cell.outcomes()
                pair = paired_difference(errors, full)
                is_full = rules(redistribution, growth) == FULL
                lines.append(
                    {
                        "dataset": cell.planned[0].dataset,
                        "model": model,
                        "density": density,
                        "redistribution": redistribution,
                        "growth": growth,
                        "error": errors.mean(),
                        **{name: getattr(pair, name) for name in ("mean", "low", "high", "n")},
                        "p": math.nan if is_full else pair.p_t,
                        "learned": int(outcomes["learned"].sum()),
                        "done": len(outcomes),
                    }
                )
        for line, p in zip(lines, holm(line["p"] for line in lines), strict=True):
            line["p_holm"] = p
        if any(line["done"] for line in lines):
            found += lines
    if not any(line["n"] for line in found):
        raise NoRuns(f"ablations ({source.profile}): no seed has finished full and another variant")
    return pd.DataFrame(found)


def _cell_text(row: Any) -> str:
    """Two lines: the difference and half its interval; of full its error."""
    if not row["n"]:
        return f"0 of {row['done']}\nlearned" if row["done"] else "no runs"
    lost = f"\n{row['learned']} of {row['done']}" if row["learned"] < row["done"] else ""
    if rules(row["redistribution"], row["growth"]) == FULL:
        return f"full:\n{row['error']:.2f} %{lost}"
    star = " *" if row["p_holm"] < 0.05 else ""
    half = row["high"] - row["mean"]
    spread = "" if math.isnan(half) else f"\n± {half:.2f}"
    return f"{row['mean']:+.2f}{star}{spread}{lost}".replace("-", "−")


@figure("ablations", "ablations")
def ablations(source: Source) -> Plot:
    """What each rule of redistribution (down) and growth (across) does: test error minus that of
    full sparse momentum, in percentage points; red is worse.
    """
    runs, cells = load("ablations", source), variants(source)
    networks = groups(cells, ["model", "density"])
    titles = [f"{model_name(model)}, {100 * share:g} %" for (model, share), _ in networks]
    plot, axes = panels(titles, across=2, height=3.0)
    beyond = []
    for ax, title, (_, part) in zip(axes, titles, networks, strict=True):
        part = part.assign(text=[_cell_text(row) for row in part.to_dict("records")])
        grids = [
            part.pivot(index="redistribution", columns="growth", values=column).reindex(
                index=[name for name in REDISTRIBUTIONS if name in set(part["redistribution"])],
                columns=[name for name in GROWTHS if name in set(part["growth"])],
            )
            for column in ("mean", "text")
        ]
        texts = grids[1].fillna("")
        for grid in (grids[0], texts):
            grid.index = [REDISTRIBUTIONS[name] for name in grid.index]
        limit = _LIMIT[part["dataset"].iloc[0]]
        found = heat_map(ax, grids[0], texts, limit, "points")
        ax.set_xlabel("growth")
        ax.tick_params(labelsize=8)
        beyond += [f"{title}: {', '.join(found)}"] if found else []
    how = (
        "Mean difference ± half the paired Student-t 95 % interval over shared seeds that learned "
        "in both; * p < 0.05 after Holm within a network; “k of n”: the seeds that learned."
    )
    cut = f"Beyond the colour scale (dashed frame): {'; '.join(beyond)}." if beyond else ""
    return finish(plot, runs, how, WHICH_NONE, cut)


@table("ablations", "ablations")
def ablations_table(source: Source) -> Table:
    """Each variant's error and its difference to full sparse momentum, paired by seed."""
    lines = [
        {
            "network": model_name(row["model"]),
            "weights (%)": f"{100 * row['density']:g}",
            "redistribution": REDISTRIBUTIONS[row["redistribution"]],
            "growth": row["growth"],
            "test error (%)": interval_text(row["error"], math.nan, math.nan),
            "difference to full (points)": "full"
            if rules(row["redistribution"], row["growth"]) == FULL
            else interval_text(row["mean"], row["low"], row["high"], sign=True),
            "n": str(row["n"]),
            "learned": f"{row['learned']} of {row['done']}",
            "p": p_text(row["p"]),
            "p (Holm)": p_text(row["p_holm"]),
        }
        for row in variants(source).to_dict("records")
        if row["done"]
    ]
    note = (
        "Percentage points of test error [95 % interval], positive: worse than full sparse "
        "momentum; paired t-test over shared seeds that learned in both, p adjusted by Holm over "
        "the variants of each network."
    )
    scale = sentence(load("ablations", source).scale())
    return Table.of(lines, "What redistribution and growth contribute", note, WHICH_NONE, scale)


# --------------------------------------------------------------------------------- depth and width


def _scalings(source: Source) -> list[tuple[str, str, str, str, Scaling]]:
    """(part, family, its axis, initial densities, benefits); NoRuns where no seed has a pair."""
    runs = load("depth_scaling", source).needed()
    found = []
    for part in WITHOUT:
        for family in families(run.model for run in runs.planned):
            for init in ("uniform", "erk"):
                here = runs.where(model=list(family.sizes), init=init)
                one = scaling(here, family, part)
                if len(one.cells) or one.unlearned:
                    found.append((part, family.name, family.axis, init, one))
    if not found:
        raise NoRuns(f"depth_scaling ({source.profile}): no seed has finished two variants")
    return found


def benefits(source: Source) -> pd.DataFrame:
    """The benefit of a part (test error without it minus with it, points) of each seed that
    learned in both: part, family, init, model, size, seed, benefit.
    """
    parts = []
    for part, family, _, init, one in _scalings(source):
        by_seed: Any = one.by_seed.rename_axis(index="seed", columns="model").stack()
        sizes = dict(zip(one.cells["model"], one.cells["size"], strict=True))
        rows = (
            by_seed.dropna()
            .rename("benefit")
            .reset_index()
            .assign(part=part, family=family, init=init)
        )
        parts.append(rows.assign(size=rows["model"].map(sizes)))
    return pd.concat(parts, ignore_index=True)


@figure("depth_scaling", "depth_scaling")
def depth_scaling(source: Source) -> Plot:
    """Does what momentum redistribution and momentum growth contribute change with the size of the
    network? Test error without the part minus with it, in points: above zero it helps.
    """
    runs, found, rows = load("depth_scaling", source), _scalings(source), benefits(source)
    order = list(dict.fromkeys(family for _, family, *_ in found))
    shown = sorted({(part, family, axis) for part, family, axis, *_ in found},
                   key=lambda one: (order.index(one[1]), list(WITHOUT).index(one[0])))  # fmt: skip
    plot, axes = panels([f"{family}: {part}" for part, family, _ in shown], across=2, height=2.1)
    unlearned = []
    for ax, (part, family, axis) in zip(axes, shown, strict=True):
        mine = {i: one for p, f, _, i, one in found if (p, f) == (part, family)}
        seeds = rows[(rows["part"] == part) & (rows["family"] == family)]
        if len(seeds):
            effect(ax, seeds, "size", "benefit", "init", {i: s.slope.mean for i, s in mine.items()})
        for init, one in mine.items():
            names = ", ".join(map(model_name, one.unlearned))
            unlearned += [f"{names} ({LOOKS[init].label}, {part})"] if names else []
        ax.set_xlabel(axis)
        ax.set_ylabel("points")
    how = (
        "Mean with paired Student-t 95 % interval over the seeds (dots) that learned with the part "
        "and without; dashed: the mean of the lines through the seeds. Redistribution: against "
        "none; growth: against random growth."
    )
    lost = f"No seed learned in both: {'; '.join(unlearned)}." if unlearned else ""
    return finish(plot, runs, how, WHICH_NONE.partition("; ")[0] + ".", lost)


@table("depth_scaling", "depth_scaling")
def depth_scaling_table(source: Source) -> Table:
    """The benefit in each network of each family, paired by seed, and the error beside it."""
    runs = load("depth_scaling", source).needed()
    lines = []
    for part, family, _, init, one in _scalings(source):
        for row in records(one.cells):
            sides = [
                runs.where(model=row.model, init=init, **side) for side in (FULL, WITHOUT[part])
            ]
            dense = runs.where(model=row.model, method="dense")
            full, without, control = (_mean(side) for side in (*sides, dense))
            lines.append(
                {
                    "benefit of": f"momentum {part}",
                    "family": family,
                    "start": INITS[init],
                    "network": model_name(row.model),
                    "dense: error (%)": control,
                    "full: error (%)": full,
                    "without: error (%)": without,
                    "benefit (points)": difference(row),
                    "n": str(row.n),
                    "p": p_text(row.p),
                    "p (Holm)": p_text(row.p_holm),
                }
            )
        for model in one.unlearned:
            control = _mean(runs.where(model=model, method="dense"))
            lines.append(
                {
                    "benefit of": f"momentum {part}",
                    "family": family,
                    "start": INITS[init],
                    "network": f"{model_name(model)}: no seed learned in both",
                    "dense: error (%)": control,
                }
            )
    note = (
        "Benefit: test error without the part minus with it [95 % interval], paired t-test over "
        "the seeds that learned in both, p adjusted by Holm within a family."
    )
    caption = "Benefit of momentum redistribution and momentum growth by network"
    return Table.of(lines, caption, note, WHICH_NONE, sentence(runs.scale()))


def _mean(runs: Runs) -> str:
    """Mean error of the seeds that learned, and how many did where not all."""
    share, errors = runs.outcomes(), runs.errors()["test_error_pct"]
    if share.empty:
        return "–"
    some = f" ({len(errors)} of {len(share)} learned)" if len(errors) < len(share) else ""
    return (f"{errors.mean():.2f}" if len(errors) else "–") + some


@table("depth_scaling_trends", "depth_scaling")
def depth_scaling_trends(source: Source) -> Table:
    """Does the benefit grow with depth or width? With all networks and without each end."""
    runs = load("depth_scaling", source).needed()
    lines = []
    every = {family.name: family for family in families(run.model for run in runs.planned)}
    for part, name, _, init, one in _scalings(source):
        models = list(one.cells["model"])
        ends = [None, models[0], models[-1]] if len(models) > 2 else [None]
        for end in ends if len(models) > 1 else []:
            sizes = {m: s for m, s in every[name].sizes.items() if m != end}
            family = type(every[name])(name, every[name].axis, sizes)
            here = runs.where(model=list(sizes), init=init)
            seen = one if end is None else scaling(here, family, part)
            lines.append(
                {
                    "benefit of": f"momentum {part}",
                    "family": name,
                    "start": INITS[init],
                    "networks": f"{len(seen.cells)}"
                    + (f", without {model_name(end)}" if end else ""),
                    "slope (points per doubling)": difference(seen.slope),
                    "n (seeds)": str(seen.slope.n),
                    "p": p_text(seen.p),
                    "Spearman's ρ": f"{seen.line.rho:+.2f}".replace("-", "−")
                    if seen.line and math.isfinite(seen.line.rho)
                    else "–",
                }
            )
    if not lines:
        raise NoRuns(f"depth_scaling ({source.profile}): no family has two networks that are done")
    note = (
        "Slope: of the benefit against log2 of depth or width, fitted to each seed that learned in "
        "every network; p: t-test of these slopes, unadjusted. A trend that an end decides is "
        "none. ρ: rank correlation of the means over the networks."
    )
    caption = "Does the benefit grow with depth and width?"
    return Table.of(lines, caption, note, sentence(runs.scale()))
