"""Rows of an experiment as one DataFrame, and two cells of it set against each other by seed.

A row is one run: the fields of `lib.config.Run` as planned, and what came out of it.  Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib import experiments
from lib.config import Run
from lib.paths import results_dir
from lib.results import store
from lib.results.stats import Interval, t_interval

GUESSING = {"mnist": np.log(10), "cifar10": np.log(10), "imagenet": np.log(1000)}  # nats
SCALES = ("paper", "hours")  # the largest first; quick and smoke show that the code runs, no more
CELL = [name for name in Run.__dataclass_fields__ if name != "seed"]
_RESULT = ["status", "test_error_pct", "val_error_pct", "train_loss", "weights_active"]


def largest(experiment: str, profile: str = "", results: str | Path = "") -> str:
    """The profile if one is given, else the largest of SCALES that has rows of the experiment, and
    the first without any.
    """
    found = (p for p in SCALES if len(load(experiment, p, results)))
    return profile or next(found, SCALES[0])


def planned(experiment: str, profile: str, **knobs: Iterable[Any]) -> pd.DataFrame:
    """The grid: one row per planned run, with its run_id.

    A knob replaces a field of every run by these values (`density=[0.01, 0.1]`); an empty one
    leaves the grid as it is.  Raises ValueError for an unknown experiment, profile or field.
    """
    runs: Sequence[Run] = experiments.runs(experiment, profile)
    for name, values in knobs.items():
        if values := list(values):
            runs = [replace(run, **{name: value}) for run in runs for value in values]
    table = [{"run_id": run.run_id, **vars(run)} for run in dict.fromkeys(runs)]
    return pd.DataFrame(table, columns=["run_id", *Run.__dataclass_fields__])


def load(
    experiment: str,
    profile: str,
    results: str | Path = "",
    grid: pd.DataFrame | None = None,
    **where: Any,
) -> pd.DataFrame:
    """The runs of the grid that are done: fields of the run, its results, and `learned`.

    Errors in %, losses in nats, times in s.  `learned` is false for a run that diverged or ended
    at chance: an error above 80 %, or a loss of at least 98 % of that of guessing.  `grid`: by
    default that of the experiment.  `where` as in `select`.  A run that several experiments
    share is in the file of one of them, so all of the profile are read.
    """
    grid = planned(experiment, profile) if grid is None else grid
    folder = results_dir(profile, results)  # own: runs of a grid that was changed by a knob
    found = store.read_runs(folder.parent / "own" / profile, folder)
    found = found.rename(columns={"kernels": "computed_by"})  # the grid's: what was asked for
    outcome = [name for name in found if name not in grid or name == "run_id"]
    rows = grid.merge(found[outcome], on="run_id")
    chance = (rows.test_error_pct > 80) | (rows.train_loss >= 0.98 * rows.dataset.map(GUESSING))
    return select(rows.assign(learned=(rows.status == "ok") & ~chance), **where)


def beside(rows: pd.DataFrame, kind: str, results: str | Path = "") -> pd.DataFrame:
    """What lies beside the rows of these runs, with the fields of the run: kind "curves" (one row
    per epoch), "layers" (per recorded epoch and layer) or "measures" (lib/results/store.py).
    """
    folders = [results_dir(profile, results) for profile in rows.profile.unique()]
    found = store.read(f".{kind}.csv", *folders)
    fields = ["run_id", *(name for name in Run.__dataclass_fields__ if name not in found)]
    return found.merge(rows[fields], on="run_id")


def select(rows: pd.DataFrame, **where: Any) -> pd.DataFrame:
    """The rows with these values; a list means any of them.  KeyError for an unknown column."""
    chosen = np.ones(len(rows), bool)
    for name, wanted in where.items():
        chosen &= rows[name].isin(wanted if isinstance(wanted, list) else [wanted]).to_numpy()
    return rows[chosen]


def by_seed(rows: pd.DataFrame, over: str = "", log: bool = False) -> pd.Series:
    """Test error in % (or 100 times its logarithm) by seed, of runs that learned.

    With `over` the mean over its values, NaN for a seed that lacks one or did not learn there.
    Raises ValueError where two runs share a seed: select more.
    """
    error, keys = rows.test_error_pct.where(rows.learned), ["seed", *filter(None, [over])]
    found = rows[keys].assign(value=100 * np.log(error) if log else error).set_index(keys).value
    if not found.index.is_unique:
        raise ValueError("two of these runs have the same seed: select more")
    return found.unstack().mean(axis=1, skipna=False) if over else found.sort_index()


def paired(rows: pd.DataFrame, a: Mapping[str, Any], b: Mapping[str, Any]) -> pd.Series:
    """Error of cell A minus that of cell B in points, by seed, of seeds that learned in both."""
    return (by_seed(select(rows, **a)) - by_seed(select(rows, **b))).dropna()


def minus(
    rows: pd.DataFrame, a: Mapping[str, Any], b: Mapping[str, Any], over: str = ""
) -> Interval | None:
    """A minus B as the claims compare them: in points, or as a log-ratio in % where a run of either
    side failed; None where a side has no rows.  `rarer`: A learned less often than B.  With `over`
    the mean over its values that both have.
    """
    one, other = select(rows, **a), select(rows, **b)
    if over:
        both = set(one[over]) & set(other[over])
        one, other = one[one[over].isin(both)], other[other[over].isin(both)]
    if one.empty or other.empty:
        return None
    points = (by_seed(one, over) - by_seed(other, over)).dropna()
    if one.learned.all() and other.learned.all():
        return t_interval(points) if len(points) else None
    logs = (by_seed(one, over, log=True) - by_seed(other, over, log=True)).dropna()
    per_point = 100 / by_seed(other, over)[points.index].mean() if len(points) else 1.0
    rarer = bool(one.learned.mean() < other.learned.mean())
    return t_interval(logs)._replace(unit="% (log-ratio)", scale=per_point, rarer=rarer)


def tuned(rows: pd.DataFrame, *settings: str) -> pd.DataFrame:
    """Of one method at one density, the runs at the setting of lowest mean validation error over
    seeds 0 to 2; none as long as a setting lacks one of the three.
    """
    cells = rows[rows.seed < 3].groupby(list(settings)).val_error_pct
    lowest = cells.mean().reset_index().nsmallest(1, "val_error_pct")
    best = select(rows, **{name: lowest[name].tolist() for name in settings})
    return best if (cells.size() == 3).all() else rows.iloc[:0]


def published(table: str, **where: Any) -> pd.DataFrame:
    """Rows of results/published/<table>.csv: test_error_pct, standard_error (%), n, suspect, ..."""
    return select(pd.read_csv(results_dir("published") / f"{table}.csv"), **where)


def bench(table: str) -> pd.DataFrame:
    """Rows of results/bench/<table>.csv (`make bench`): topic, what, setting, value with unit, low
    and high of n repeats, machine; with model, density (0 to 1) and batch of a whole network.
    """
    rows = pd.read_csv(results_dir("bench") / f"{table}.csv")
    known = rows.setting.str.extract(
        r"(?P<model>[^,]+), (?P<density>[\d.e-]+) %, batch (?P<batch>\d+)"
    )
    return rows.join(known.assign(density=known.density.astype(float) / 100))


def seconds(runs: pd.DataFrame, done: pd.DataFrame) -> pd.Series:
    """What each run takes on one core: the mean of the done runs of the same network, else NaN."""
    return runs["model"].map(done.groupby("model")["train_seconds"].mean()).astype(float)


def missing(grid: pd.DataFrame, rows: pd.DataFrame) -> str:
    """How many runs of the grid have no row, and how long they take on one core, by the mean of the
    done runs of the same network; "" where nothing is missing.
    """
    left = grid[~grid.run_id.isin(rows.run_id)]
    if left.empty:
        return ""
    hours = seconds(left, rows) / 3600
    text = f"{len(left)} of {len(grid)} runs are missing"
    if hours.notna().any():
        text += f"; {hours.notna().sum()} of them take {hours.sum():.1f} hours on one core"
    if hours.isna().any():
        unknown = left.model[hours.isna()]
        text += f"; no run tells how long {len(unknown)} take ({', '.join(unknown.unique())})"
    return text + "."


def scale(rows: pd.DataFrame) -> str:
    """Profile, epochs, seeds in a cell and runs of these rows, in one line."""
    if rows.empty:
        return "No runs yet."
    cells = rows.groupby(CELL).seed.nunique()
    span = lambda v: f"{min(v)}" if min(v) == max(v) else f"{min(v)} to {max(v)}"  # noqa: E731
    profile = rows.profile.iloc[0] + ("" if rows.profile.iloc[0] == "paper" else " (reduced scale)")
    size = f"{span(rows.epochs)} epochs, {span(cells)} seeds, {len(rows)} runs"
    return f"Profile {profile}: {size}."


def compare(profile: str, folder: str | Path) -> pd.DataFrame:
    """One row per cell that both have: experiment, model, method, density, n (shared seeds), both
    mean test errors (%), and whether all runs end in the same bits, the new mean lies in the 95 %
    interval of the committed one, or not (also where one shared seed leaves no interval).

    Raises ValueError where the folder has no run that is committed too.
    """
    found: list[dict[str, object]] = []
    for name in experiments.EXPERIMENTS:
        ours, theirs = load(name, profile), load(name, profile, folder)
        if ours.empty or theirs.empty:
            continue
        ours, theirs = ours.set_index("run_id"), theirs.set_index("run_id")
        ours = ours[ours.index.isin(theirs.index)]
        theirs = theirs.loc[ours.index]
        same = (ours[_RESULT].fillna(-1) == theirs[_RESULT].fillna(-1)).all(axis=1)
        for _, cell in ours.groupby(CELL, dropna=False):
            mine, other = by_seed(cell), by_seed(theirs.loc[cell.index])
            known = t_interval(mine)
            within = known.low <= other.mean() <= known.high
            said = "within its interval" if within else "differs"
            said = "same bits" if same[cell.index].all() else said
            first = cell.iloc[0]
            found.append(
                {"experiment": name, "model": first.model, "method": first.method}
                | {"density": first.density, "n": len(cell), "committed": mine.mean()}
                | {"here": other.mean(), "said": said}
            )
    if not found:
        raise ValueError(f"{folder} has no run of profile {profile} that is committed too")
    return pd.DataFrame(found)
