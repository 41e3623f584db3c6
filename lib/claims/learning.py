"""Which seeds learned at all, and what decides it: shares with Wilson's interval, and the error of
those that learned beside them; never a mean over both.  Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pandas as pd

from lib.claims.claim import Found, Measure, PaperValue, Part
from lib.results.reading import (
    CHANCE,
    NoRuns,
    Runs,
    Source,
    Where,
    at_chance,
    interval_text,
    load,
)
from lib.stats import Interval, Share, fisher, holm, share_difference, t_interval, wilson

EXPERIMENT = "trainability"

# How the network starts, as in the paper, and what is changed, one thing at a time.
START: Where = {
    "method": "sparse_momentum",
    "init": "uniform",
    "prune_rate": 0.2,
    "init_scale": "dense",
    "growth": "momentum",
    "lr": 0.1,
}
VARIANTS: dict[str, Where] = {
    "as the paper starts it": START,
    "ERK densities": {**START, "init": "erk"},
    "masks drawn per weight": {**START, "init": "uniform_drawn"},
    "prune rate 0.5": {**START, "prune_rate": 0.5},
    "initial scale corrected for density": {**START, "init_scale": "density"},
    "initial scale and half the learning rate": {**START, "init_scale": "density", "lr": 0.05},
    "masks that stay": {**START, "method": "static", "growth": "none"},
    "random growth": {**START, "growth": "random"},
    "half the learning rate": {**START, "lr": 0.05},
}


def learned_share(runs: Runs) -> Share:
    """How many of the finished runs learned: neither diverged nor at chance at the end."""
    return wilson(len(runs.learned().rows), len(runs.rows) + len(runs.diverged))


def all_learned(*sides: Runs) -> bool:
    """Whether every finished run of these learned."""
    return all(share.k == share.n for share in map(learned_share, sides))


def less_often(one: Runs, *others: Runs) -> bool:
    """Whether a smaller share of the first's finished runs learned than of one of the others'."""
    return any(learned_share(one).share < learned_share(other).share for other in others)


def share_text(share: Share) -> str:
    """ "7 of 10 [40, 89 %]": k of n with Wilson's interval."""
    if not share.n:
        return "no runs"
    return f"{share.k} of {share.n} [{100 * share.low:.0f}, {100 * share.high:.0f} %]"


def learning(*sides: Runs) -> str:
    """How many runs of each side learned, and how many of the others learned and collapsed later;
    "" where all did.
    """
    if all_learned(*sides):
        return ""
    shares = " against ".join(share_text(learned_share(side)) for side in sides)
    said = f"runs that learned: {shares}"
    if late := sum(map(collapsed, sides)):
        said += f"; {late} learned first and collapsed later"
    return said


def collapsed(runs: Runs) -> int:
    """How many runs that are at chance at the end, or diverged, had been below it (validation)."""
    lost = pd.concat([runs.rows[at_chance(runs.rows)], runs.diverged])
    if lost.empty:
        return 0
    curves = replace(runs, rows=lost).curves()
    best = curves.groupby("run_id")["val_error_pct"].min()
    return int((best <= CHANCE).sum())


def trainability(source: Source) -> pd.DataFrame:
    """One row per share of weights and variant planned there: density, variant, k, n, share, low,
    high (Wilson); collapsed, how many of the others had learned before; difference,
    difference_low, difference_high to the paper's start (Newcombe), p (Fisher) and p_holm over all
    of them; error (mean [interval] in % of those that learned), error_n.

    NoRuns without any row.
    """
    every = load(EXPERIMENT, source).needed()
    lines = []
    for density in sorted({run.density for run in every.planned}):
        start = learned_share(every.where(density=density, **START))
        for variant, where in VARIANTS.items():
            runs = every.where(density=density, **where)
            if not runs.planned:
                continue
            share = learned_share(runs)
            off = share_difference(share, start)
            errors = runs.learned().rows["test_error_pct"]
            error = interval_text(*t_interval(errors)[:3]) if len(errors) else "–"
            lines.append(
                {
                    "density": density,
                    "variant": variant,
                    **share._asdict(),
                    "collapsed": collapsed(runs),
                    "difference": off.mean,
                    "difference_low": off.low,
                    "difference_high": off.high,
                    "p": fisher(share, start) if where != START else float("nan"),
                    "error": error,
                    "error_n": len(errors),
                }
            )
    table = pd.DataFrame(lines)
    return table.assign(p_holm=holm(table["p"]))


@dataclass(frozen=True)
class MoreLearn(Measure):
    """Share of seeds that learn from the paper's start minus that with one thing changed, in
    points of per cent (below zero: more learn with it); one part per share of weights at which both
    are planned.
    """

    variant: str
    experiment: str = EXPERIMENT

    def measure(self, source: Source, papers: Mapping[str, PaperValue], margin: float) -> Found:
        """The differences with Newcombe's interval; shares, Fisher's p and errors in the note."""
        table = trainability(source)
        parts, missing = [], []
        for density in dict.fromkeys(table["density"]):
            rows = table[table["density"] == density].to_dict("records")
            by_variant = {row["variant"]: row for row in rows}
            if self.variant not in by_variant:
                continue
            start, other = by_variant[next(iter(VARIANTS))], by_variant[self.variant]
            name = f"{100 * density:g} %"
            if not (start["n"] and other["n"]):
                missing.append(name)
                continue
            shares = [wilson(row["k"], row["n"]) for row in (start, other)]
            mean, low, high = (-100 * other[f"difference{end}"] for end in ("", "_high", "_low"))
            scaled = Interval(mean, low, high, min(share.n for share in shares), float("nan"))
            note = (
                f"learned {share_text(shares[1])} against {share_text(shares[0])}, Fisher p = "
                f"{other['p']:.2g}, Holm {other['p_holm']:.2g}; error of those that learned "
                f"{other['error']} against {start['error']} %"
            )
            parts.append(Part(name, scaled, scaled, note))
        if not parts:
            raise NoRuns(f"{EXPERIMENT} ({source.profile}): {self.variant} has no runs to compare")
        return Found(tuple(parts), load(EXPERIMENT, source), tuple(missing))
