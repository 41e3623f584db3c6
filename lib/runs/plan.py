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
    known = set(results.read_runs(csv)["run_id"])
    return Plan(
        experiment,
        profile,
        csv,
        done=tuple(run for run in runs if run.run_id in known),
        todo=tuple(run for run in runs if run.run_id not in known),
    )


def copy_rows_of_other_experiments(todo: Plan) -> None:
    """The same run can be a cell of several experiments: its row is copied, not trained again,
    unless the other experiment did not take the measures that this one needs.
    """
    known = set(results.read_runs(todo.csv)["run_id"])
    missing = {run.run_id for run in todo.todo} - known
    if not missing:
        return
    needed = set(experiments.experiment(todo.experiment).measures)
    for other in experiments.EXPERIMENTS:
        source = todo.csv.with_name(f"{other}.csv")
        if other == todo.experiment or not source.exists():
            continue
        rows = results.read_runs(source)
        rows = rows[rows["run_id"].isin(missing)]
        if rows.empty:
            continue
        curves = results.read_curves(source, runs=rows)
        layers = results.read_layers(source, runs=rows)
        measures = results.read_measures(source, runs=rows)
        for row in rows.to_dict("records"):
            mine = row["run_id"]
            taken = measures[measures["run_id"] == mine]
            if row["status"] == "ok" and not needed <= set(taken["measure"]):
                continue
            results.append_run(
                todo.csv,
                {**{str(k): v for k, v in row.items()}, "experiment": todo.experiment},
                curves[curves["run_id"] == mine].to_dict("records"),
                layers[layers["run_id"] == mine].to_dict("records"),
                taken.to_dict("records"),
            )
            missing.discard(mine)
