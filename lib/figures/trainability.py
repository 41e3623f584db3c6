"""Which seeds of LeNet-5 learn at all: shares with Wilson's interval, and the error of those."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from lib.claims import learning
from lib.figures.gallery import figure, table
from lib.figures.mnist import ERK
from lib.figures.plots import Plot, dots, finish, log_axis, panels
from lib.figures.tables import Table, records
from lib.results.reading import Runs, Source, interval_text, load, p_text, sentence
from lib.stats import t_interval, wilson

_SHORT = {
    "as the paper starts it": "as in the paper",
    "initial scale corrected for density": "scale by density",
    "initial scale and half the learning rate": "scale, half the rate",
}
# The paper's start, and what is changed, one thing at a time.
VARIANTS = {_SHORT.get(name, name): where for name, where in learning.VARIANTS.items()}


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
    planned = {run.run_id: run for run in runs.planned}
    lost = {
        cell: learning.collapsed(runs.only(map(planned.__getitem__, ids)))
        for cell, ids in rows.groupby("cell")["run_id"]
    }
    order = {
        (cell := row["cell"]): f"{cell}: {row['k']} of {row['n']}"
        + f", {lost[cell]} collapsed" * bool(lost[cell])
        for row in found.to_dict("records")
    }
    plot, (left, right) = panels(
        ["Seeds that learn", "Error of those"], height=0.8 + 0.21 * len(order), sharey=True
    )
    dots(left, found, pd.DataFrame({"cell": [], "value": []}), "cell", order)
    left.set_xlim(-3, 103)
    left.set_xlabel("share of the seeds (%)")
    learned = rows[rows["learned"]]
    if len(learned):
        cells = pd.DataFrame(
            {"cell": cell, **t_interval(part)._asdict()}
            for cell, part in learned.groupby("cell", sort=False)["test_error_pct"]
        )
        low, high = learned["test_error_pct"].min(), learned["test_error_pct"].max()
        wide = (cells["low"] < low) & (cells["high"] > high)
        cells.loc[wide, ["low", "high"]] = math.nan
        dots(right, cells, learned, "cell", order, value="test_error_pct")
        right.set_xlim(low / 1.15, high * 1.15)
        log_axis(right, "x")
    right.set_xlabel("test error (%, log scale)")
    how = (
        "Left: share of the seeds that learn, with Wilson's 95 % interval, and how many; a seed "
        "learned that neither diverged nor ended at chance (section 3). Of the others some had "
        "learned and collapsed. Right: the errors of those "
        "(dots) and their mean with Student-t 95 % interval, where it is not wider than the panel."
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
    """The share of seeds that learn by share of weights and variant, and the error of those."""
    lines = [
        {
            "weights (%)": f"{100 * row.density:g}",
            "start": row.variant,
            "learned [Wilson 95 %]": learning.share_text(wilson(row.k, row.n)),
            "collapsed": row.collapsed,
            "more than as in the paper (points)": "–"
            if math.isnan(row.p)
            else interval_text(
                100 * row.difference, 100 * row.difference_low, 100 * row.difference_high, 0, True
            ),
            "p (Holm)": p_text(row.p_holm),
            "error of those (%)": row.error,
        }
        for row in records(learning.trainability(source))
    ]
    note = (
        "Difference of the shares with Newcombe's 95 % interval, p of Fisher's exact test adjusted "
        "by Holm over the table. Error: mean [Student-t 95 % interval] of the seeds that learned."
    )
    caption = "LeNet-5 on MNIST: what decides whether it learns"
    scale = sentence(load("trainability", source).scale())
    return Table.of(lines, caption, note, ERK, scale)
