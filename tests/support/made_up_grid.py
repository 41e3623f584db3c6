"""Made-up rows for every planned run of an experiment, without training and without torch."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from lib import experiments, paths
from lib.config import Run
from lib.results.store import COLUMNS

# Error in % at 1 % of the weights; it falls with the share of weights towards DENSE.
AT_ONE_PERCENT = {
    "dense": 0.0,
    "sparse_momentum": 2.5,
    "dsr": 3.2,
    "set": 4.2,
    "deepr": 6.0,
    "static": 40.0,
}
DENSE = 1.3


def plausible(run: Run) -> float:
    """An error in % that looks like the paper's, with a spread over seeds; the same every time."""
    spread = int(hashlib.sha256(run.run_id.encode()).hexdigest()[:6], 16) / 16**6 - 0.5
    worst = AT_ONE_PERCENT.get(run.method, 5.0)
    return (
        DENSE
        + (worst - DENSE) * (0.01 / run.density) ** 0.9 * (run.method != "dense")
        + (0.15 * spread)
    )


def made_up_row(run: Run, experiment: str, profile: str, error: float | None) -> dict[str, Any]:
    """A row of the results; error None: the run diverged."""
    known = {item.name for item in fields(Run)} & set(COLUMNS)
    others = {k: v for k, v in run.non_default().items() if k not in known}
    row: dict[str, Any] = {
        name: {str: "made up", int: 1, float: 0.5, bool: False}[kind]
        for name, kind in COLUMNS.items()
    }
    row |= {name: getattr(run, name) for name in known}
    row |= {
        "run_id": run.run_id,
        "experiment": experiment,
        "profile": profile,
        "keep_dense": " ".join(run.keep_dense),
        "overrides": json.dumps(others, sort_keys=True) if others else "",
        "status": "ok" if error is not None else "diverged",
        "test_error_pct": error,
        "val_error_pct": error,
        "kernels": "sparse" if run.kernels == "sparse" else "torch",
        "device": "made-up processor",
    }
    return row


def write_grid(
    root: Path,
    experiment: str,
    profile: str,
    error: Callable[[Run], float | None] = plausible,
    keep: Callable[[Run], bool] = lambda run: True,
) -> int:
    """Add a made-up row for each planned run that `keep` takes; how many.

    Written in one go: `append_run` puts every row on the disk, which takes seconds for a grid. The
    strict reader sees to it that this is the same format.
    """
    csv_path = paths.results_csv(profile, experiment, root)
    csv_path.parent.mkdir(parents=True, exist_ok=True)
    kept = [run for run in experiments.runs(experiment, profile) if keep(run)]
    fresh = not csv_path.exists()
    with open(csv_path, "a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if fresh:
            writer.writerow(COLUMNS)
        for run in kept:
            row = made_up_row(run, experiment, profile, error(run))
            writer.writerow([_field(row[name]) for name in COLUMNS])
    return len(kept)


def _field(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
