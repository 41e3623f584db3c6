"""Tidy CSVs of the runs: atomic append under a lock, strict reading.  Imports no torch.

An experiment is up to four files that are always named by the first:

    results/<profile>/<experiment>.csv          one row per run             (COLUMNS)
    results/<profile>/<experiment>.curves.csv   one row per run and epoch   (CURVE_COLUMNS)
    results/<profile>/<experiment>.layers.csv   one row per run, epoch and layer (LAYER_COLUMNS)
    results/<profile>/<experiment>.measures.csv what was measured on the trained networks, one row
                                                per run, measure, layer, quantity and position
                                                (MEASURE_COLUMNS); only where something was

Writing.  A writer holds an exclusive lock on `.<experiment>.csv.lock`, writes measures, layers,
curves and last the run's own row, and puts each file in place with one rename; the files are on
the disk before that last rename, and the row before `append_run` returns.  So a reader, who needs
no lock, sees whole rows at any moment, a killed writer or a power cut leaves whole rows, and a row
in the first file means that the run is complete in all of them.  (Appending in place would not do:
the kernel may cut a write short at a page boundary when the process is killed.)

Columns and what their values may be are in lib/results/columns.py, the text format and its checks
in lib/results/format.py, the merging of shards in lib/results/merge.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from lib.results.columns import (
    COLUMNS,
    CURVE_COLUMNS,
    LAYER_COLUMNS,
    MEASURE_COLUMNS,
    PROVENANCE,
    Row,
)
from lib.results.format import ResultsError, encode, frame, header, load

__all__ = [
    "BESIDE",
    "COLUMNS",
    "CURVE_COLUMNS",
    "LAYER_COLUMNS",
    "MEASURE_COLUMNS",
    "PROVENANCE",
    "ResultsError",
    "WriteError",
    "append_run",
    "curves_path",
    "layers_path",
    "locked",
    "measures_path",
    "read_curves",
    "read_layers",
    "read_measures",
    "read_runs",
    "replace_file",
    "run_paths",
    "runs_path",
    "sync_folder",
]


class WriteError(OSError):
    """A CSV could not be written; the message has its name, the reason and what is safe."""


# ---------------------------------------------------------------------------------------- paths

# Suffixes of the files beside the run CSV.
BESIDE = (".curves.csv", ".layers.csv", ".measures.csv")


def runs_path(path: str | Path) -> Path:
    """The run CSV of an experiment, from the path of any of its files."""
    path = Path(path)
    for suffix in BESIDE:
        if path.name.endswith(suffix):
            return path.with_name(path.name.removesuffix(suffix) + ".csv")
    return path


def curves_path(path: str | Path) -> Path:
    """The per-epoch CSV beside the run CSV `path`."""
    return runs_path(path).with_suffix(".curves.csv")


def layers_path(path: str | Path) -> Path:
    """The per-layer CSV beside the run CSV `path`."""
    return runs_path(path).with_suffix(".layers.csv")


def measures_path(path: str | Path) -> Path:
    """The CSV of the measures beside the run CSV `path`."""
    return runs_path(path).with_suffix(".measures.csv")


def run_paths(folder: str | Path) -> list[Path]:
    """The run CSVs in a folder, sorted, without the files beside them."""
    return [path for path in sorted(Path(folder).glob("*.csv")) if not path.name.endswith(BESIDE)]


# ---------------------------------------------------------------------------------------- write


def append_run(
    path_csv: str | Path,
    row: Row,
    curves: Sequence[Row] = (),
    layers: Sequence[Row] = (),
    measures: Sequence[Row] = (),
) -> bool:
    """Add one finished run; True if it was added, False if its run_id is there already.

    row     a value for each of COLUMNS, no more and no less; None, NaN or pd.NA for "no value"
    curves  one mapping per epoch with CURVE_COLUMNS; `run_id` as in `row`
    layers  one mapping per recorded epoch and layer with LAYER_COLUMNS; `run_id` as in `row`
    measures  one mapping per value with MEASURE_COLUMNS; `run_id` as in `row`

    Safe with any number of processes, and against a kill or a power cut at any moment.  Rows that
    a killed append of the same run left in the other files are replaced.  Raises ResultsError, and
    writes nothing, if a value or a file on disk does not pass the checks of reading, and
    WriteError where the disk refuses: then every row of before is still there.
    """
    path = runs_path(path_csv)
    run_id = row.get("run_id")
    new_row = encode(path, COLUMNS, [row], run_id)
    beside = [
        (measures_path(path), MEASURE_COLUMNS, measures),
        (layers_path(path), LAYER_COLUMNS, layers),
        (curves_path(path), CURVE_COLUMNS, curves),
    ]
    new = [encode(file, columns, rows, run_id) for file, columns, rows in beside]
    with locked(path):
        runs = load(path, COLUMNS)
        if run_id in runs.values["run_id"]:
            return False
        old = [load(file, columns) for file, columns, _ in beside]  # all checked before any write
        for (file, columns, _), table, added in zip(beside, old, new, strict=True):
            if added or columns is not MEASURE_COLUMNS or file.exists():
                replace_file(file, (table.without(str(run_id)) or header(columns)) + added)
        sync_folder(path)
        replace_file(path, (runs.text or header(COLUMNS)) + new_row)
        sync_folder(path)
    return True


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold the writers' lock of the experiment at `path`; the kernel frees it if we are killed."""
    path = runs_path(path).resolve()
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def replace_file(path: Path, text: str) -> None:
    """Put `text` in place of the file in one step; under the lock, so one temporary name does."""
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.tmp")
    with _explained(path):
        try:
            with open(temporary, "wb") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def sync_folder(path: Path) -> None:
    """Wait until the renames in the folder of the CSV `path` are on the disk."""
    path = path.resolve()
    with _explained(path):
        fd = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that cannot do this for folders
                raise
        finally:
            os.close(fd)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        no_folder = isinstance(error, (FileExistsError, NotADirectoryError))
        reason = f"{path.parent} is no folder" if no_folder else error.strerror or error
        raise WriteError(
            f"{path}: can't be written ({reason}); the rows that it had are safe, "
            "the new ones are not in it: make room there or allow writing, and give the same "
            "command again."
        ) from error


# ----------------------------------------------------------------------------------------- read


def read_runs(path: str | Path) -> pd.DataFrame:
    """All runs of an experiment, one row each, columns and types as in COLUMNS.

    A file that does not exist is an experiment without runs: an empty frame.  Raises ResultsError
    with file and line for a wrong header or number of fields, a value of the wrong type, a last
    line that was cut off, a run_id that has the wrong form or comes twice, an unknown status, or
    errors that do not fit the status (ok has a test error, diverged has none).
    """
    path = runs_path(path)
    return frame(load(path, COLUMNS))


def read_curves(path: str | Path, runs: pd.DataFrame | None = None) -> pd.DataFrame:
    """Per-epoch values of an experiment (path of its run CSV), columns as in CURVE_COLUMNS.

    With `runs`, only of the runs in that frame: a killed append can leave curves of a run that
    has no row yet.  Raises ResultsError like read_runs, and for an epoch that comes twice.
    """
    return _known(frame(load(curves_path(path), CURVE_COLUMNS)), runs)


def read_layers(path: str | Path, runs: pd.DataFrame | None = None) -> pd.DataFrame:
    """Per-layer values of an experiment (path of its run CSV), columns as in LAYER_COLUMNS.

    `runs` and errors as in read_curves; (run_id, epoch, layer) must be unique.
    """
    return _known(frame(load(layers_path(path), LAYER_COLUMNS)), runs)


def read_measures(path: str | Path, runs: pd.DataFrame | None = None) -> pd.DataFrame:
    """Measures of an experiment (path of its run CSV), columns as in MEASURE_COLUMNS.

    `runs` and errors as in read_curves; (run_id, measure, layer, quantity, position) is unique.
    """
    return _known(frame(load(measures_path(path), MEASURE_COLUMNS)), runs)


def _known(frame: pd.DataFrame, runs: pd.DataFrame | None) -> pd.DataFrame:
    if runs is None:
        return frame
    return frame[frame["run_id"].isin(set(runs["run_id"]))].reset_index(drop=True)
