"""Runs a grid: skips what is done, trains the rest in worker processes, stores every row at once.

The command line, the notebooks and cluster shards all call `run_experiment`. A run that is in the
CSV is not trained again; a run that was killed continues from its checkpoint; two processes never
train the same run at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import pandas as pd

from lib import experiments, paths
from lib.results import store as results
from lib.runs import cost
from lib.runs.checks import check_before_training, check_settings
from lib.runs.machine import check_device, default_device, default_jobs, device_name, versions
from lib.runs.plan import Plan, plan
from lib.runs.pool import Task, train_all
from lib.runs.progress import Board, print_line
from lib.runs.single import row_of, train_and_store

__all__ = [
    "device_name",
    "plan",
    "row_of",
    "run_experiment",
    "run_experiments",
    "train_and_store",
    "versions",
]


class Options(TypedDict, total=False):
    """What `run_experiments` takes beside names and profile."""

    only: str | Sequence[str]
    overrides: dict[str, Any] | None
    shard: tuple[int, int]
    results_root: str | Path | None
    jobs: int | None
    threads: int | None
    device: str | None
    say: Callable[[str], None] | None


def run_experiment(
    experiment: str, profile: str = "quick", **options: Unpack[Options]
) -> pd.DataFrame:
    """Train what is missing of one experiment and return the rows of its selected runs; the options
    are those of `run_experiments`.
    """
    return run_experiments([experiment], profile, **options)[experiment]


def run_experiments(
    names: str | Sequence[str],
    profile: str = "quick",
    *,
    only: str | Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    shard: tuple[int, int] = (1, 1),
    results_root: str | Path | None = None,
    jobs: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, pd.DataFrame]:
    """Train what is missing of some experiments, the first seed of all of them, then the second;
    returns the rows of all selected runs of each (lib/results/store.py). A run that several need is
    trained once.

    `only`, `overrides` and `shard` select and change runs (`plan`); of several experiments, those
    in which no run has all that `only` asks are left out, and ValueError says when none is left.
    `jobs` runs are trained side by side with `threads` threads each; by default whichever
    `default_jobs` says. `say` receives one line of progress, about twice a second. Everything that
    can be known to fail raises ValueError before the first step (lib/runs/checks.py). On Ctrl-C
    the workers write their checkpoints and KeyboardInterrupt goes on. Raises WorkerError for the
    first run that failed, after the runs in training have ended, and, at the end, for runs whose
    worker was killed; diverged runs are rows, not errors.
    """
    names = [names] if isinstance(names, str) else list(names)
    check_settings(jobs, threads)
    if device is not None:
        check_device(device)
    say = say or print_line()

    def plans() -> list[Plan]:
        found, refused = [], None
        for name in names:
            try:
                found.append(
                    plan(
                        name,
                        profile,
                        only=only,
                        overrides=overrides,
                        shard=shard,
                        results_root=results_root,
                    )
                )
            except experiments.NoSuchRunError as error:
                refused = error
        if refused is not None and not found:
            raise refused
        return found

    planned = plans()
    tasks: dict[str, Task] = {}
    for one in planned:
        for run in one.todo:
            if run.dataset != "imagenet":
                tasks.setdefault(run.run_id, (run, one))
    if any(run.dataset == "imagenet" for one in planned for run in one.todo):
        from lib.runs.imagenet import missing

        say(
            (missing() or "ImageNet runs are left out: torchrun -m lib.runs.imagenet trains them")
            + "\n"
        )
    title = f"{' '.join(names) if len(names) < 4 else f'{len(names)} experiments'} ({profile})"
    if tasks:
        device = device or default_device()
        in_order = sorted(tasks.values(), key=lambda task: task[0].seed)
        runs = [run for run, _ in in_order]
        own_jobs, own_threads = default_jobs(runs, device)
        jobs = min(jobs or own_jobs, len(runs))
        check_before_training(
            runs, [one.csv for one in planned], paths.checkpoints_dir() / profile, jobs
        )
        estimate = cost.Estimator(cost.rows_under(planned[0].csv.parent.parent), device)
        board = Board(title, runs, estimate, jobs)
        train_all(title, in_order, board, threads or own_threads, device, say)
    else:
        say(f"{title}: all {sum(len(one.done) for one in planned)} runs are done\n")
    tables = {}
    for one in planned:
        wanted = {run.run_id for run in (*one.done, *one.todo)}
        rows = results.read_runs(one.csv.parent)
        tables[one.experiment] = rows[rows["run_id"].isin(wanted)].reset_index(drop=True)
    return tables
