"""On which network were the published baselines trained?  Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from lib.claims.claim import Found, Measure, PaperValue, Part, corrected
from lib.claims.learning import learning
from lib.claims.values import NORMED, RAW
from lib.results.reading import NoRuns, Runs, Source, Where, interval_text, load
from lib.stats import paired_difference, t_interval

EXPERIMENT = "baseline_network"

# How each is trained: as the paper does, or as the code of DSR's authors trains SET and DSR.
WAYS: dict[str, Where] = {
    "LeNet-300-100": {"model": "lenet300-100", "schedule": "cosine"},
    "with batch norm": {"model": NORMED, "schedule": "cosine"},
    "with batch norm, as their code trains": {"model": NORMED, "schedule": "constant"},
}


def published_curve(method: str) -> pd.Series:
    """Published test error in % by share of weights; static from the raw runs, slips corrected."""
    where = {"dataset": "mnist", "model": "lenet300-100", "method": method}
    table = RAW if method == "static" else "mnist_sparse_summary"
    rows, _ = corrected(table, where, "" if method == "static" else RAW)
    return rows.set_index("density")["test_error_pct"]


def distances(source: Source, method: str) -> dict[str, pd.Series]:
    """Way -> mean absolute difference to the published curve in points, by seed.

    Over the shares of weights that every way planned for the method has rows of; a seed counts
    where it learned at all of them.
    """
    every = load(EXPERIMENT, source, method=method)
    curve = published_curve(method)
    sides = {name: side for name, where in WAYS.items() if (side := every.where(**where)).planned}
    tables = {name: _by_density(side) for name, side in sides.items()}
    tables = {name: table for name, table in tables.items() if not table.empty}
    shared = [at for at in curve.index if tables and all(at in t for t in tables.values())]
    return {
        name: table[shared].sub(curve[shared]).abs().mean(axis=1, skipna=False).dropna()
        for name, table in tables.items()
        if shared
    }


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
        found = distances(source, self.method)
        first, *others = WAYS
        parts, missing = [], []
        for name in others:
            if not every.where(**WAYS[name]).planned:
                continue
            if not (name in found and first in found):
                missing.append(name)
                continue
            pair = paired_difference(found[name], found[first])
            if not pair.n:
                missing.append(name)
                continue
            each = "; ".join(
                f"{way} {interval_text(*t_interval(found[way])[:3])} points off"
                for way in (first, name)
            )
            parts.append(Part(name, pair.interval, pair.interval, each))
        if not parts:
            raise NoRuns(f"{EXPERIMENT} ({source.profile}): no seed has finished both networks")
        return Found(tuple(parts), every, tuple(missing), learning(every))
