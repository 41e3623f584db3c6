"""Somebody's own rows beside the committed ones, cell by cell.  Imports no torch."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lib.config import Run
from lib.experiments import EXPERIMENTS
from lib.results.rows import by_seed, load
from lib.results.stats import t_interval

SAME, WITHIN, DIFFERS = "same bits", "within its interval", "differs"
_RESULT = ["status", "test_error_pct", "val_error_pct", "train_loss", "weights_active"]
_CELL = [name for name in Run.__dataclass_fields__ if name != "seed"]


def compare(profile: str, folder: str | Path) -> pd.DataFrame:
    """One row per cell that both have: experiment, model, method, density, n (shared seeds), both
    mean test errors (%), and whether all runs end in the same bits, the new mean lies in the 95 %
    interval of the committed one, or not (also where one shared seed leaves no interval).

    Raises ValueError where the folder has no run that is committed too.
    """
    found: list[dict[str, object]] = []
    for name in EXPERIMENTS:
        ours, theirs = load(name, profile), load(name, profile, folder)
        if ours.empty or theirs.empty:
            continue
        ours, theirs = ours.set_index("run_id"), theirs.set_index("run_id")
        ours = ours[ours.index.isin(theirs.index)]
        theirs = theirs.loc[ours.index]
        same = (ours[_RESULT].fillna(-1) == theirs[_RESULT].fillna(-1)).all(axis=1)
        for _, cell in ours.groupby(_CELL, dropna=False):
            mine, other = by_seed(cell), by_seed(theirs.loc[cell.index])
            known = t_interval(mine)
            said = WITHIN if known.low <= other.mean() <= known.high else DIFFERS
            said = SAME if same[cell.index].all() else said
            first = cell.iloc[0]
            found.append(
                {"experiment": name, "model": first.model, "method": first.method}
                | {"density": first.density, "n": len(cell), "committed": mine.mean()}
                | {"here": other.mean(), "said": said}
            )
    if not found:
        raise ValueError(f"{folder} has no run of profile {profile} that is committed too")
    return pd.DataFrame(found)
