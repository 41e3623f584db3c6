"""Which seeds of LeNet-5 learn at all: shares with Wilson's interval, and the error of those."""

from __future__ import annotations

from typing import Any

import pandas as pd

from lib.figures.gallery import figure, table
from lib.figures.mnist import ERK
from lib.figures.plots import Plot, dots, finish, log_axis, panels
from lib.figures.tables import Table, groups, share_text
from lib.results.reading import Runs, Source, interval_text, load, sentence
from lib.stats import t_interval, wilson

_START: dict[str, Any] = {"init": "uniform", "prune_rate": 0.2, "init_scale": "dense"}
# The paper's start, and what is changed, one thing at a time.
VARIANTS: dict[str, dict[str, Any]] = {
    "as in the paper": _START,
    "ERK densities": {**_START, "init": "erk"},
    "masks drawn per weight": {**_START, "init": "uniform_drawn"},
    "prune rate 0.5": {**_START, "prune_rate": 0.5},
    "scale by density": {**_START, "init_scale": "density"},
}


def _outcomes(runs: Runs, variants: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """The outcomes with their `cell` ("1 %, ERK densities"), by share of weights and variant."""
    parts = []
    for density in sorted({run.density for run in runs.planned}):
        for name, where in variants.items():
            part = runs.where(density=density, **where).outcomes()
            parts.append(part.assign(variant=name, cell=f"{100 * density:g} %, {name}"))
    return pd.concat([part for part in parts if len(part)])


def trainability(source: Source) -> pd.DataFrame:
    """One row per run of `trainability`: the columns of the store, weights (%), variant (a key of
    VARIANTS), cell, learned.
    """
    return _outcomes(load("trainability", source).needed(), VARIANTS)


def shares(rows: pd.DataFrame) -> pd.DataFrame:
    """How many runs of each cell learned: cell, k, n, and mean, low, high in per cent (Wilson)."""
    found = []
    for cell, learned in rows.groupby("cell", sort=False)["learned"]:
        share = wilson(int(learned.sum()), len(learned))
        scaled = {"mean": 100 * share.share, "low": 100 * share.low, "high": 100 * share.high}
        found.append({"cell": cell, "k": share.k, "n": share.n, **scaled})
    return pd.DataFrame(found)


def _draw(rows: pd.DataFrame, runs: Runs) -> Plot:
    """Left the share of seeds that learn, right the error of those."""
    found = shares(rows)
    order = {cell["cell"]: f"{cell['cell']}: {cell['k']} of {cell['n']}"
             for cell in found.to_dict("records")}  # fmt: skip
    plot, (left, right) = panels(
        ["Seeds that learn", "Error of those"], height=0.7 + 0.27 * len(order), sharey=True
    )
    dots(left, found, pd.DataFrame({"cell": [], "value": []}), "cell", order)
    left.set_xlim(-3, 103)
    left.set_xlabel("share of the seeds (%)")
    learned = rows[rows["learned"]]
    cells = [
        {"cell": cell, **t_interval(part)._asdict()}
        for cell, part in learned.groupby("cell", sort=False)["test_error_pct"]
    ]
    dots(right, pd.DataFrame(cells), learned, "cell", order, value="test_error_pct")
    low, high = learned["test_error_pct"].min(), learned["test_error_pct"].max()
    right.set_xlim(low / 1.15, high * 1.15)
    log_axis(right, "x")
    right.set_xlabel("test error (%, log scale)")
    how = (
        "Left: share of the seeds that learn, with Wilson's 95 % interval, and how many; a seed "
        "learned that neither diverged nor ended above 80 % error. Right: the errors of those "
        "(dots) and their mean with Student-t 95 % interval."
    )
    return finish(plot, runs, how, ERK)


@figure("trainability", "trainability")
def trainability_figure(source: Source) -> Plot:
    """What decides whether a very sparse LeNet-5 learns: how the paper starts it, and with one
    thing changed at a time.
    """
    return _draw(trainability(source), load("trainability", source))


@figure("initial_densities_lenet5", "initial_densities")
def initial_densities_lenet5(source: Source) -> Plot:
    """LeNet-5 trained by sparse momentum over the whole length, from uniform and ERK densities."""
    runs = load("initial_densities", source, model="lenet5")
    if runs.outcomes().empty:
        runs.needed()
    starts = {"uniform": {"init": "uniform"}, "ERK": {"init": "erk"}}
    return _draw(_outcomes(runs, starts), runs)


@table("trainability", "trainability")
def trainability_table(source: Source) -> Table:
    """The share of seeds that learn by variant and share of weights, and the error of those."""
    runs = load("trainability", source).needed()
    lines = []
    for (weights, variant), rows in groups(trainability(source), ["weights", "variant"]):
        learned = rows.loc[rows["learned"], "test_error_pct"]
        lines.append(
            {
                "weights (%)": f"{weights:g}",
                "start": variant,
                "learned [Wilson 95 %]": share_text(wilson(len(learned), len(rows))._asdict()),
                "error of those (%)": interval_text(*t_interval(learned)[:3])
                if len(learned)
                else "–",
            }
        )
    caption = "LeNet-5 on MNIST: what decides whether it learns"
    return Table.of(lines, caption, ERK, sentence(runs.scale()))
