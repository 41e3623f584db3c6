"""Runs grids: skips what is done, trains the rest in worker processes, stores every row at once.

The command line and the notebooks call `run_experiments`.  A run that has a row is not trained
again; a run that was killed continues from its checkpoint; two processes never train the same run
at the same time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lib import experiments, paths
from lib.config import Run
from lib.results import rows as reading
from lib.results import store
from lib.runs.machine import checked_device, cores
from lib.runs.pool import train_all
from lib.runs.single import Task, stored


def run_experiments(
    names: str | Sequence[str],
    profile: str = "quick",
    *,
    grid: pd.DataFrame | Iterable[Run] | None = None,
    only: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    shard: tuple[int, int] = (1, 1),
    results_root: str | Path | None = None,
    jobs: int | None = None,
    threads: int | None = None,
    device: str | None = None,
) -> dict[str, pd.DataFrame]:
    """Train what is missing of some experiments, the first seed of all of them, then the second;
    returns the rows of all selected runs of each (lib/results/store.py).

    `grid`, `only`, `overrides` and `shard` as in `tasks_of`; of several experiments, those in which
    no run has all that `only` asks are left out.  `jobs` runs are trained side by side, by default
    one on each core or one on the GPU, with `threads` threads each.  Raises, before anything is
    trained, ValueError for a selection without runs and OSError for a folder that can't be written
    to; RuntimeError as in lib/runs/pool.py.  On Ctrl-C the workers write their checkpoints.
    Diverged runs are rows, not errors.
    """
    names = [names] if isinstance(names, str) else list(names)
    selected: dict[str, list[Task]] = {}
    refused = None
    for name in names:
        try:
            selected[name] = tasks_of(name, profile, grid, only, overrides, shard, results_root)
        except experiments.NoSuchRunError as error:
            refused = error
    if refused is not None and not selected:
        raise refused
    todo: dict[str, Task] = {}
    for name, tasks in selected.items():
        for task in missing(name, tasks):
            todo.setdefault(task.run.run_id, task)
    by_torchrun = [task for task in todo.values() if task.run.dataset == "imagenet"]
    here = [task for task in todo.values() if task.run.dataset != "imagenet"]
    here.sort(key=lambda task: task.run.seed)
    title = f"{' '.join(names) if len(names) < 4 else f'{len(names)} experiments'} ({profile})"
    if by_torchrun:
        from lib.runs.imagenet import how_to_train

        if not here and set(names) == {"imagenet"}:
            raise ValueError(how_to_train(len(by_torchrun)))
        print(how_to_train(len(by_torchrun)))
    if here:
        device = checked_device(device)
        for folder in {folder for t in here for folder in (t.csv.parent, t.checkpoint.parent)}:
            paths.folder(folder)
            with tempfile.TemporaryFile(dir=folder):  # OSError now, not after the first run
                pass
        jobs = min(jobs or (cores() if device == "cpu" else 1), len(here))
        done = store.read_runs(paths.results_dir(profile, results_root))
        means = done.groupby("model")["train_seconds"].mean()
        train_all(title, here, dict(means), jobs, threads or 1, device)
    elif not any(selected.values()):
        raise ValueError(f"{title} has no runs: profiles are {', '.join(experiments.PROFILES)}")
    elif not by_torchrun:
        print(f"{title}: all {sum(map(len, selected.values()))} runs are done")
    return {name: _rows(tasks) for name, tasks in selected.items()}


def tasks_of(
    experiment: str,
    profile: str,
    grid: pd.DataFrame | Iterable[Run] | None = None,
    only: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    shard: tuple[int, int] = (1, 1),
    results_root: str | Path | None = None,
) -> list[Task]:
    """The runs of an experiment, done or not, each with the CSV that its row goes to.

    `grid` replaces the experiment's own: runs, or a DataFrame with their fields (lib/results/rows).
    `only` keeps runs with all the given `field=value` (several values of one field: any of them);
    `overrides` sets fields of every run, which gives new ids; `shard` (i, n) keeps every n-th run
    from the i-th, 1-based.  Runs that are not in the experiment's own grid go to results/own.
    Raises ValueError for unknown names and for a selection without runs.
    """
    planned = experiments.runs(experiment, profile)
    runs: Sequence[Run] = planned
    if isinstance(grid, pd.DataFrame):
        known = [name for name in Run.__dataclass_fields__ if name in grid]
        runs = [Run(**dict(zip(known, row, strict=True))) for row in grid[known].to_numpy(object)]
    elif grid is not None:
        runs = list(grid)
    if overrides:
        runs = list(dict.fromkeys(run.overridden(**overrides) for run in runs))
    runs = experiments.select(runs, only)
    index, count = shard
    if not 1 <= index <= count:
        raise ValueError(f"shard {index}/{count}: the first number goes from 1 to {count}")
    own = {run.run_id for run in planned}
    there = paths.results_dir(profile, results_root) / f"{experiment}.csv"
    beside = there.parent.parent / "own" / profile / there.name
    return [
        Task(run, experiment, profile, there if run.run_id in own else beside)
        for run in runs[index - 1 :: count]
    ]


def missing(experiment: str, tasks: Iterable[Task]) -> list[Task]:
    """Those that have no row yet, or not the measures that the experiment takes."""
    tasks = list(tasks)
    measures = experiments.experiment(experiment).measures
    done = {folder: stored(folder, measures) for folder in {task.csv.parent for task in tasks}}
    return [task for task in tasks if task.run.run_id not in done[task.csv.parent]]


def _rows(tasks: Sequence[Task]) -> pd.DataFrame:
    found = store.read_runs(*dict.fromkeys(task.csv.parent for task in tasks))
    wanted = {task.run.run_id for task in tasks}
    return found[found["run_id"].isin(wanted)].reset_index(drop=True)


def status_table(
    profile: str, results_root: str | Path | None = None, names: Sequence[str] = ()
) -> str:
    """One line per experiment (all, or those named): runs done, diverged and missing, and the
    core-hours left by the mean of the done runs of the same network; the last line counts a run
    that several experiments need once.
    """
    done = store.read_runs(paths.results_dir(profile, results_root))
    diverged = set(done["run_id"][done["status"] == "diverged"])
    left: dict[str, Task] = {}
    every: dict[str, Task] = {}
    lines = [f"{'experiment':<20}{'done':>7}{'diverged':>10}{'missing':>9}{'core-hours left':>17}"]

    def line(name: str, tasks: Iterable[str], todo: Iterable[Task]) -> str:
        runs = pd.DataFrame({"model": [task.run.model for task in todo]}, dtype=object)
        hours = reading.seconds(runs, done) / 3600
        time = f"{hours.sum():,.1f}{'+' if hours.isna().any() else ''}" if len(runs) else ""
        bad = len(diverged & set(tasks))
        return f"{name:<20}{len(set(tasks)) - len(runs):>7}{bad:>10}{len(runs):>9}{time:>17}"

    for name in names or experiments.EXPERIMENTS:
        tasks = {t.run.run_id: t for t in tasks_of(name, profile, results_root=results_root)}
        todo = {task.run.run_id: task for task in missing(name, tasks.values())}
        lines.append(line(name, tasks, todo.values()))
        every |= tasks
        left |= todo
    lines.append(line("all, each run once", every, left.values()))
    lines.append(f"profile {profile}; +: no run tells how long some networks take")
    return "\n".join(lines)
