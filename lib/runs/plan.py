"""What a call is about to do: which runs of an experiment are done, and which are to be trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import experiments, paths
from lib.config import Run
from lib.results import store as results


@dataclass(frozen=True)
class Plan:
    """What one call is about to do: runs that are done, and runs to train, in order."""

    experiment: str
    profile: str
    csv: Path
    done: tuple[Run, ...]
    todo: tuple[Run, ...]


def plan(
    experiment: str,
    profile: str,
    *,
    only: str | Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    shard: tuple[int, int] = (1, 1),
    results_root: str | Path | None = None,
) -> Plan:
    """The runs of an experiment at a profile, split into done and to do.

    `only` keeps runs with all the given `field=value` (several values of one field: any of them);
    `overrides` sets fields of every run, which gives new ids; `shard` (i, n) keeps every n-th run
    from the i-th, 1-based. Raises ValueError for unknown names and for a selection without runs.
    """
    runs = experiments.runs(experiment, profile)
    if overrides:
        runs = experiments.unique(run.overridden(**overrides) for run in runs)
    runs = experiments.select(runs, only)
    index, count = shard
    if not 1 <= index <= count:
        raise ValueError(f"shard {index}/{count}: the first number goes from 1 to {count}")
    runs = runs[index - 1 :: count]
    csv = paths.results_csv(profile, experiment, results_root)
    known = stored(csv.parent, experiments.experiment(experiment).measures)
    return Plan(
        experiment,
        profile,
        csv,
        done=tuple(run for run in runs if run.run_id in known),
        todo=tuple(run for run in runs if run.run_id not in known),
    )


def stored(folder: Path, measures: Sequence[str] = ()) -> set[str]:
    """Ids of the runs that are done at a profile, whichever experiment trained them; with
    `measures`, those that all of these were taken of, or that diverged.
    """
    rows = results.read_runs(folder)
    if not measures:
        return set(rows["run_id"])
    taken = results.read_measures(folder).groupby("run_id")["measure"].agg(set)
    whole = {run_id for run_id, names in taken.items() if names >= set(measures)}
    return {str(run_id) for run_id in rows["run_id"][rows["status"] == "diverged"]} | whole
