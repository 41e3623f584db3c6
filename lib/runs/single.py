"""One run, trained in this process and stored: claimed, continued, and never trained twice."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from lib import experiments, paths
from lib.config import Run
from lib.results import store as results
from lib.runs.machine import device_name, versions
from lib.runs.plan import stored

# Fields of a run without a column of their own go into the column `overrides`.
COLUMN_OF_FIELD = {item.name for item in fields(Run)} & set(results.COLUMNS)


def train_and_store(
    run: Run,
    experiment: str,
    profile: str,
    csv: Path,
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
    checkpoint = checkpoint_of(run, profile)
    kept = kept_of(checkpoint)
    with claim(checkpoint) as mine:
        if not mine:
            return "elsewhere"
        if run.run_id in stored(csv.parent, experiments.experiment(experiment).measures):
            checkpoint.unlink(missing_ok=True)  # of a process killed between its row and this
            kept.unlink(missing_ok=True)
            return "done"
        done = _read_kept(kept, run.run_id)
        if done is None:
            from lib.measures import MEASURES
            from lib.train import train

            outcome = train(
                run,
                dataset(run.dataset, device, run.val_fraction, run.train_samples),
                measures=[MEASURES[n] for n in experiments.measures(run, experiment, profile)],
                device=device,
                checkpoint=checkpoint,
                checkpoint_seconds=checkpoint_seconds,
                progress=progress,
                should_stop=should_stop,
            )
            done = {
                "row": row_of(run, outcome, experiment, profile, device),
                "curves": outcome.curves,
                "layers": outcome.layers,
                "measures": outcome.measures,
            }
        try:
            results.append_run(csv, **done)
        except (OSError, ValueError) as error:
            raise RuntimeError(_keep(kept, done, csv, error)) from error
        checkpoint.unlink(missing_ok=True)
        kept.unlink(missing_ok=True)
    return str(done["row"]["status"])


def checkpoint_of(run: Run, profile: str) -> Path:
    """Where the checkpoint of an unfinished run lies."""
    return paths.checkpoints_dir() / profile / f"{run.run_id}.pt"


def kept_of(checkpoint: Path) -> Path:
    """Where the result of a finished run waits that could not be appended."""
    return checkpoint.with_suffix(".result.json")


def _keep(kept: Path, done: dict[str, Any], csv: Path, error: Exception) -> str:
    """Write a result beside its checkpoint; the sentence that says where it is."""
    said = f"{done['row']['run_id']} is trained, but {csv} can't take its row ({error}): "
    temporary = kept.with_suffix(".tmp")
    try:
        with open(temporary, "w") as file:
            json.dump(done, file, default=lambda value: value.item())  # NumPy's numbers
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, kept)
    except OSError as second:
        with contextlib.suppress(OSError):
            temporary.unlink()
        return (
            f"{said}nor could {kept} be written ({second.strerror}); correct that, and the same "
            "command goes on from the last checkpoint"
        )
    return f"{said}correct that, and the same command adds it from {kept} without training again"


def _read_kept(kept: Path, run_id: str) -> dict[str, Any] | None:
    """A result that waits to be appended; None without one, or where it is of no use."""
    try:
        done = json.loads(kept.read_text())
        return done if done["row"]["run_id"] == run_id else None
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


@contextlib.contextmanager
def claim(checkpoint: Path) -> Iterator[bool]:
    """Whether this process holds the run; the kernel lets go of it when the process dies."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    lock = checkpoint.with_suffix(".lock")
    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            yield False
            return
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(lock)):
                break
        os.close(fd)  # its last holder removed the file between our two calls
    try:
        yield True
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()
        os.close(fd)


def row_of(run: Run, outcome: Any, experiment: str, profile: str, device: str) -> dict[str, Any]:
    """One row of the results: the run, what it measured, and where it was measured."""
    import torch

    others = {k: v for k, v in run.non_default().items() if k not in COLUMN_OF_FIELD}
    measured = vars(outcome)
    row: dict[str, Any] = {name: getattr(run, name) for name in COLUMN_OF_FIELD}
    row |= {name: measured[name] for name in measured if name in results.COLUMNS}
    if run.prune == "none":  # the masks never move
        row |= {"prune_rate": None, "schedule": "", "update_every_steps": None}
    row |= {
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
    return row
