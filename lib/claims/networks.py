"""On which network were the published baselines trained?  Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from lib.claims.claim import Found, Measure, PaperValue, Part, corrected
from lib.claims.learning import learning
from lib.claims.values import NORMED, PLAIN, RAW
from lib.results.reading import NoRuns, Runs, Source, Where, interval_text, load
from lib.stats import paired_difference, t_interval

EXPERIMENT = "baseline_network"

# How each is trained: as the paper does, or as the code of DSR's authors trains SET and DSR.
WAYS: dict[str, Where] = {
    "LeNet-300-100": {"model": "lenet300-100", **PLAIN},
    "with batch norm": {"model": NORMED, **PLAIN},
    "with batch norm, as their code trains": {"model": NORMED, "schedule": "constant"},
    "with batch norm, output layer half dense": {"model": NORMED, **PLAIN, "init": "half_output"},
}


def published_curve(method: str) -> pd.Series:
    """Published test error in % by share of weights; static from the raw runs, slips corrected."""
    where = {"dataset": "mnist", "model": "lenet300-100", "method": method}
    table = RAW if method == "static" else "mnist_sparse_summary"
    rows, _ = corrected(table, where, "" if method == "static" else RAW)
    return rows.set_index("density")["test_error_pct"]


def distances(source: Source, method: str, ways: Sequence[str]) -> pd.DataFrame:
    """Mean absolute difference to the published curve in points, [seeds, ways].

    Over the shares of weights of which each of the ways has rows (`attrs["shares"]`); a seed has a
    value where it learned at all of them. Empty where there is no such share.
    """
    every = load(EXPERIMENT, source, method=method)
    curve = published_curve(method)
    tables = {name: _by_density(every.where(**WAYS[name])) for name in ways}
    shares = [at for at in curve.index if all(at in table for table in tables.values())]
    off = {
        name: table[shared].sub(curve[shared]).abs().mean(axis=1, skipna=False)
        for name, table in tables.items()
        if (shared := shares)
    }
    found = pd.DataFrame(off)
    found.attrs["shares"] = shares
    return found


def _by_density(runs: Runs) -> pd.DataFrame:
    rows = runs.learned().rows
    return rows.pivot(index="seed", columns="density", values="test_error_pct")


@dataclass(frozen=True)
class Closer(Measure):
    """Distance of a method's errors to its published curve: on the network with batch norm minus on
    the paper's LeNet-300-100, paired by seed, in points; below zero the former is closer.
    """

    method: str
    experiment: str = EXPERIMENT

    def measure(self, source: Source, papers: Mapping[str, PaperValue], margin: float) -> Found:
        """The paired difference; each distance with its interval over seeds in the note."""
        every = load(EXPERIMENT, source, method=self.method).needed()
        first, *others = WAYS
        parts, missing = [], []
        for name in others:
            if not every.where(**WAYS[name]).planned:
                continue
            found = distances(source, self.method, (first, name))
            pair = paired_difference(found[name], found[first]) if len(found) else None
            if pair is None or not pair.n:
                missing.append(name)
                continue
            shares = ", ".join(f"{100 * at:g}" for at in found.attrs["shares"])
            each = " and ".join(
                interval_text(*t_interval(found[way].dropna())[:3]) for way in (name, first)
            )
            note = f"{each} points off, over {shares} %"
            parts.append(Part(name, pair.interval, pair.interval, note))
        if not parts:
            raise NoRuns(f"{EXPERIMENT} ({source.profile}): no seed has finished both networks")
        return Found(tuple(parts), every, tuple(missing), learning(every))
