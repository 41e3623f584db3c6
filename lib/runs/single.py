"""One run, trained in this process and stored: claimed, continued, and never trained twice."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lib import experiments, paths
from lib.config import Run
from lib.results import store
from lib.runs.machine import device_name, versions

# Fields of a run without a column of their own go into the column `overrides`.
COLUMN_OF_FIELD = {item.name for item in fields(Run)} & set(store.COLUMNS)


@dataclass(frozen=True)
class Task:
    """A run to train, and the experiment and the run CSV that its row goes to."""

    run: Run
    experiment: str
    profile: str
    csv: Path

    @property
    def checkpoint(self) -> Path:
        """Where the checkpoint of the unfinished run lies."""
        return paths.checkpoints_dir() / self.profile / f"{self.run.run_id}.pt"


def stored(folder: Path, measures: Collection[str] = ()) -> set[str]:
    """Ids of the runs that are done at a profile, whichever experiment trained them; with
    `measures`, those that all of these were taken of, or that diverged.
    """
    rows = store.read_runs(folder)
    if not measures:
        return set(rows["run_id"])
    taken = store.read_measures(folder).groupby("run_id")["measure"].agg(set)
    whole = {str(run_id) for run_id, names in taken.items() if names >= set(measures)}
    return set(rows["run_id"][rows["status"] == "diverged"]) | whole


def train_and_store(
    task: Task,
    *,
    device: str = "cpu",
    checkpoint_seconds: float = 30.0,
    progress: Callable[[float | None], None] = lambda error: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> str:
    """Train one run in this process and append its row; "ok", "diverged", "done" or "elsewhere".

    "done": another process stored it meanwhile; "elsewhere": another process is training it.
    Raises as `train`, and RuntimeError where the row can't be appended.
    """
    run, checkpoint = task.run, task.checkpoint
    lock = checkpoint.with_suffix(".lock")  # the kernel lets go of it when the process dies
    versions()  # read before the first step: nothing about git may fail after the last
    with paths.locked(lock, wait=False) as mine:
        if not mine:
            return "elsewhere"
        status = "done"  # also of a process that was killed between its row and its clean-up
        measures = experiments.experiment(task.experiment).measures
        if run.run_id not in stored(task.csv.parent, measures):
            from lib.measures import MEASURES
            from lib.train import train

            names = experiments.measures(run, task.experiment, task.profile)
            outcome = train(
                run,
                measures=[MEASURES[name] for name in names],
                device=device,
                checkpoint=checkpoint,
                checkpoint_seconds=checkpoint_seconds,
                progress=progress,
                should_stop=should_stop,
            )
            append(task, outcome, device)
            status = outcome.status
        for file in (checkpoint, lock):
            file.unlink(missing_ok=True)
    return status


def append(task: Task, outcome: Any, device: str) -> None:
    """Append what a run measured; RuntimeError where the file can't take it."""
    row = row_of(task.run, outcome, task.experiment, task.profile, device)
    try:
        store.append_run(task.csv, row, outcome.curves, outcome.layers, outcome.measures)
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"{task.run.run_id} is trained, but {task.csv} can't take its row ({error}): correct "
            "that, and the same command goes on from its last checkpoint"
        ) from error


def row_of(run: Run, outcome: Any, experiment: str, profile: str, device: str) -> dict[str, Any]:
    """One row of the results: the run, what it measured, and where it was measured."""
    import torch

    others = {k: v for k, v in run.non_default().items() if k not in COLUMN_OF_FIELD}
    row: dict[str, Any] = {name: getattr(run, name) for name in COLUMN_OF_FIELD}
    row |= {name: value for name, value in vars(outcome).items() if name in store.COLUMNS}
    if run.prune == "none":  # the masks never move
        row |= {"prune_rate": None, "schedule": "", "update_every_steps": None}
    return row | {
        "run_id": run.run_id,
        "experiment": experiment,
        "profile": profile,
        "keep_dense": " ".join(run.keep_dense),
        "overrides": json.dumps(others, sort_keys=True) if others else "",
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        **versions(),
        "finished_utc": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
