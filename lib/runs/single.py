"""One run, trained in this process and stored: claimed, continued, and never trained twice."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
from collections.abc import Callable, Collection, Iterator
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
    progress: Callable[[Any], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> str:
    """Train one run in this process and append its row; "ok", "diverged", "done" or "elsewhere".

    "done": another process stored it meanwhile; "elsewhere": another process is training it.
    Raises RuntimeError where the row can't be appended; the result is then kept beside the
    checkpoint, and the next call appends it without training again.
    """
    run, checkpoint = task.run, task.checkpoint
    kept = checkpoint.with_suffix(".result.json")
    versions()  # read before the first step: nothing about git may fail after the last
    with claim(checkpoint) as mine:
        if not mine:
            return "elsewhere"
        if run.run_id in stored(task.csv.parent, experiments.experiment(task.experiment).measures):
            status = "done"  # also of a process that was killed between its row and this
        else:
            result = _read_kept(kept, run.run_id)
            if result is None:
                from lib.measures import MEASURES
                from lib.train import train

                names = experiments.measures(run, task.experiment, task.profile)
                outcome = train(
                    run,
                    dataset(run.dataset, device, run.val_fraction, run.train_samples),
                    measures=[MEASURES[name] for name in names],
                    device=device,
                    checkpoint=checkpoint,
                    checkpoint_seconds=checkpoint_seconds,
                    progress=progress,
                    should_stop=should_stop,
                )
                result = {
                    "row": row_of(run, outcome, task.experiment, task.profile, device),
                    "curves": outcome.curves,
                    "layers": outcome.layers,
                    "measures": outcome.measures,
                }
            keep_or_append(task, result, kept)
            status = str(result["row"]["status"])
        for file in (checkpoint, kept, checkpoint.with_suffix(".lock")):
            file.unlink(missing_ok=True)
    return status


@contextlib.contextmanager
def claim(checkpoint: Path) -> Iterator[bool]:
    """Whether this process holds the run; the kernel lets go of it when the process dies."""
    with paths.locked(checkpoint.with_suffix(".lock"), wait=False) as mine:
        yield mine


def keep_or_append(task: Task, result: dict[str, Any], kept: Path) -> None:
    """Append a result; where that fails, RuntimeError says in which file it waits."""
    try:
        store.append_run(task.csv, **result)
    except (OSError, ValueError) as error:
        said = f"{task.run.run_id} is trained, but {task.csv} can't take its row ({error}): "
        try:
            text = json.dumps(result, default=lambda value: value.item())  # NumPy's numbers
            paths.write(kept, text.encode())
        except OSError as second:
            said += f"nor could {kept} be written ({second.strerror}); correct that, and the same "
            raise RuntimeError(f"{said}command goes on from the last checkpoint") from error
        said += f"correct that, and the same command adds it from {kept} without training again"
        raise RuntimeError(said) from error


def _read_kept(kept: Path, run_id: str) -> dict[str, Any] | None:
    """A result that waits to be appended; None without one, or where it is of no use."""
    try:
        result: dict[str, Any] = json.loads(kept.read_text())
        return result if result["row"]["run_id"] == run_id else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        kept.replace(kept.with_suffix(".damaged"))
        return None


@functools.lru_cache(maxsize=2)
def dataset(name: str, device: str, val_fraction: float, train_samples: int) -> Any:
    """The data set of a run, the last two of a process kept."""
    from lib import data

    return data.load(name, device=device, val_fraction=val_fraction, train_subset=train_samples)


def row_of(run: Run, outcome: Any, experiment: str, profile: str, device: str) -> dict[str, Any]:
    """One row of the results: the run, what it measured, and where it was measured."""
    import torch

    others = {k: v for k, v in run.non_default().items() if k not in COLUMN_OF_FIELD}
    measured = vars(outcome)
    row: dict[str, Any] = {name: getattr(run, name) for name in COLUMN_OF_FIELD}
    row |= {name: measured[name] for name in measured if name in store.COLUMNS}
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
