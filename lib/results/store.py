"""Tidy CSVs of the runs: atomic append under a lock, strict reading.  Imports no torch.

An experiment is up to four files that are always named by the first:

    results/<profile>/<experiment>.csv          one row per run             (COLUMNS)
    results/<profile>/<experiment>.curves.csv   one row per run and epoch   (CURVE_COLUMNS)
    results/<profile>/<experiment>.layers.csv   one row per run, epoch and layer (LAYER_COLUMNS)
    results/<profile>/<experiment>.measures.csv what was measured on the trained networks, one row
                                                per run, measure, layer, quantity and position
                                                (MEASURE_COLUMNS); only where something was

Writing.  A writer holds an exclusive lock on `.<experiment>.csv.lock`, writes measures, layers,
curves and last the run's own row, and puts each file in place with one rename.  So a reader, who
needs no lock, sees whole rows at any moment, a killed writer leaves whole rows, and a row in the
first file means that the run is complete in all of them.  (Appending in place would not do: the
kernel may cut a write short at a page boundary when the process is killed.)

Format.  UTF-8, '\\n', one record per line, an empty field for "no value", true/false, floats in
their shortest form that reads back to the same bits.  Anything else is refused with file and line.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import math
import numbers
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

Row = Mapping[str, Any]

COLUMNS: dict[str, type] = {
    "run_id": str,
    "experiment": str,
    "profile": str,
    "dataset": str,
    "model": str,
    "method": str,
    "method_version": int,
    "prune": str,
    "redistribution": str,
    "growth": str,
    "init": str,
    "density": float,
    "keep_dense": str,
    "prune_rate": float,
    "schedule": str,
    "update_every_steps": int,
    "momentum": float,
    "lr": float,
    "lr_decay_every_steps": int,
    "weight_decay": float,
    "batch_size": int,
    "epochs": int,
    "train_samples": int,
    "precision": str,
    "overrides": str,
    "seed": int,
    "status": str,
    "test_error_pct": float,
    "val_error_pct": float,
    "train_loss": float,
    "density_final": float,
    "weights_total": int,
    "weights_active": int,
    "steps": int,
    "train_flops_rel": float,
    "inference_flops_rel": float,
    "train_seconds": float,
    "threads": int,
    "kernels": str,
    "device": str,
    "commit": str,
    "dirty": bool,
    "python": str,
    "torch": str,
    "torchvision": str,
    "data_sha256": str,
    "finished_utc": str,
}

CURVE_COLUMNS: dict[str, type] = {
    "run_id": str,
    "epoch": int,
    "train_loss": float,
    "val_error_pct": float,
    "lr": float,
    "prune_rate": float,
    "density": float,
}

LAYER_COLUMNS: dict[str, type] = {
    "run_id": str,
    "epoch": int,
    "layer": str,
    "weights": int,
    "active": int,
    "momentum_share": float,
}

# `position` numbers what a quantity has several of: bins of a histogram, segments of the training.
MEASURE_COLUMNS: dict[str, type] = {
    "run_id": str,
    "measure": str,
    "layer": str,
    "quantity": str,
    "position": int,
    "value": float,
}

# None (an empty field) is allowed here: the setting does not apply to the method (prune_rate of a
# dense run), the run diverged, or the tree is no git checkout (dirty).  Strings use "" for that.
NULLABLE = frozenset(
    {
        "prune_rate",
        "update_every_steps",
        "lr_decay_every_steps",
        "train_samples",
        "test_error_pct",
        "val_error_pct",
        "train_loss",
        "density_final",
        "weights_active",
        "train_flops_rel",
        "inference_flops_rel",
        "momentum_share",
        "dirty",
    }
)

# Strings that identify a run and therefore are never empty.
REQUIRED_STRINGS = frozenset(
    {
        "run_id",
        "experiment",
        "profile",
        "dataset",
        "model",
        "method",
        "status",
        "layer",
        "measure",
        "quantity",
        "finished_utc",
    }
)

STATUSES = ("ok", "diverged")

# A readable slug, a hyphen, and the 10 hexadecimal digits of the hash (lib.config.Run.run_id).
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*-[0-9a-f]{10}")

# What may differ between two copies of one run: where, when and how fast it ran.
PROVENANCE = frozenset(
    {
        "train_seconds",
        "threads",
        "kernels",
        "device",
        "commit",
        "dirty",
        "python",
        "torch",
        "torchvision",
        "finished_utc",
    }
)

_INT = re.compile(r"-?[0-9]+")
_FLOAT = re.compile(r"-?[0-9]+(\.[0-9]*)?(e[+-]?[0-9]+)?", re.IGNORECASE)


class ResultsError(ValueError):
    """A row or a file that can't be trusted; the message has the place and what to do."""


class _Table(NamedTuple):
    """One file, checked: record i stands on line i + 2."""

    path: Path
    columns: dict[str, type]
    records: list[list[str]]
    values: dict[str, list[Any]]


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

    Safe with any number of processes, and against a kill at any moment.  Rows that a killed
    append of the same run left in the other files are replaced.  Raises ResultsError, and
    writes nothing, if a value or the file on disk does not pass the checks of reading.
    """
    path = runs_path(path_csv)
    run_id = row.get("run_id")
    new_row = _encode(path, COLUMNS, [row], run_id)
    new_curves = _encode(curves_path(path), CURVE_COLUMNS, curves, run_id)
    new_layers = _encode(layers_path(path), LAYER_COLUMNS, layers, run_id)
    new_measures = _encode(measures_path(path), MEASURE_COLUMNS, measures, run_id)
    with locked(path):
        if run_id in _load(path, COLUMNS).values["run_id"]:
            return False
        if new_measures or measures_path(path).exists():
            _rewrite(measures_path(path), MEASURE_COLUMNS, new_measures, drop=str(run_id))
        _rewrite(layers_path(path), LAYER_COLUMNS, new_layers, drop=str(run_id))
        _rewrite(curves_path(path), CURVE_COLUMNS, new_curves, drop=str(run_id))
        _rewrite(path, COLUMNS, new_row)
    return True


def merge(sources: Iterable[str | Path], target: str | Path) -> int:
    """Collect the runs of `sources` (run CSVs, for instance of shards) in `target`; how many came.

    A run met twice is kept once, the first time (what `target` holds comes first).  Two rows of
    one run_id that differ in more than PROVENANCE raise ResultsError with both places; so does a
    source that does not exist.  Nothing is written then.
    """
    target = runs_path(target)
    paths = [runs_path(source) for source in sources]
    for path in paths:
        if not path.exists():
            raise ResultsError(f"{path}: no such file; name the run CSVs to merge.")
    with locked(target):
        seen: dict[str, tuple[_Table, int]] = {}
        old = _load(target, COLUMNS)
        for i, run_id in enumerate(old.values["run_id"]):
            seen[run_id] = (old, i)
        fresh: dict[Path, list[str]] = {}
        tables = {path: _load(path, COLUMNS) for path in dict.fromkeys(paths)}
        for path, table in tables.items():
            for i, run_id in enumerate(table.values["run_id"]):
                if run_id in seen:
                    _same_run(*seen[run_id], table, i)
                else:
                    seen[run_id] = (table, i)
                    fresh.setdefault(path, []).append(run_id)
        if not fresh:
            return 0
        for beside, columns in (
            (measures_path, MEASURE_COLUMNS),
            (layers_path, LAYER_COLUMNS),
            (curves_path, CURVE_COLUMNS),
        ):
            if beside is measures_path and not any(beside(p).exists() for p in (*paths, target)):
                continue
            kept = _load(beside(target), columns)
            known = set(old.values["run_id"])  # leftovers of a killed append stay behind
            lines = [r for r in kept.records if r[0] in known]
            for path, run_ids in fresh.items():
                wanted = set(run_ids)
                lines += [r for r in _load(beside(path), columns).records if r[0] in wanted]
            _replace(beside(target), _text(columns, lines))
        rows = list(old.records)
        for path, run_ids in fresh.items():
            wanted = set(run_ids)
            rows += [r for r in tables[path].records if r[0] in wanted]
        _replace(target, _text(COLUMNS, rows))
    return sum(map(len, fresh.values()))


def _same_run(first: _Table, i: int, second: _Table, j: int) -> None:
    """Raise unless line i of `first` and line j of `second` agree on everything that counts."""
    for name in COLUMNS:
        a, b = first.values[name][i], second.values[name][j]
        both_empty = a != a and b != b  # NaN
        if name not in PROVENANCE and a != b and not both_empty:
            raise ResultsError(
                f"{first.path}:{i + 2} and {second.path}:{j + 2}: two different rows of run "
                f"{first.values['run_id'][i]}, {name} is {a!r} and {b!r}; find out which is right "
                "and remove the other row."
            )


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold the writers' lock of the experiment at `path`; the kernel frees it if we are killed."""
    path = runs_path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _rewrite(path: Path, columns: dict[str, type], new: str, drop: str | None = None) -> None:
    """Put `new` at the end of the file, without the rows of run `drop`; under the lock."""
    header = _text(columns, [])
    if not path.exists():
        _replace(path, header + new)
        return
    text = _read_text(path)
    _check_frame(path, columns, text)
    if drop is not None and f"\n{drop}," in text:
        lines = io.StringIO(text, newline="\n")
        text = "".join(line for line in lines if not line.startswith(f"{drop},"))
    _replace(path, text + new)


def _replace(path: Path, text: str) -> None:
    """Put `text` in place of the file in one step; under the lock, so one temporary name does."""
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# ----------------------------------------------------------------------------------------- read


def read_runs(path: str | Path) -> pd.DataFrame:
    """All runs of an experiment, one row each, columns and types as in COLUMNS.

    A file that does not exist is an experiment without runs: an empty frame.  Raises ResultsError
    with file and line for a wrong header or number of fields, a value of the wrong type, a last
    line that was cut off, a run_id that has the wrong form or comes twice, an unknown status, or
    errors that do not fit the status (ok has a test error, diverged has none).
    """
    path = runs_path(path)
    return _frame(_load(path, COLUMNS))


def read_curves(path: str | Path, runs: pd.DataFrame | None = None) -> pd.DataFrame:
    """Per-epoch values of an experiment (path of its run CSV), columns as in CURVE_COLUMNS.

    With `runs`, only of the runs in that frame: a killed append can leave curves of a run that
    has no row yet.  Raises ResultsError like read_runs, and for an epoch that comes twice.
    """
    return _known(_frame(_load(curves_path(path), CURVE_COLUMNS)), runs)


def read_layers(path: str | Path, runs: pd.DataFrame | None = None) -> pd.DataFrame:
    """Per-layer values of an experiment (path of its run CSV), columns as in LAYER_COLUMNS.

    `runs` and errors as in read_curves; (run_id, epoch, layer) must be unique.
    """
    return _known(_frame(_load(layers_path(path), LAYER_COLUMNS)), runs)


def read_measures(path: str | Path, runs: pd.DataFrame | None = None) -> pd.DataFrame:
    """Measures of an experiment (path of its run CSV), columns as in MEASURE_COLUMNS.

    `runs` and errors as in read_curves; (run_id, measure, layer, quantity, position) is unique.
    """
    return _known(_frame(_load(measures_path(path), MEASURE_COLUMNS)), runs)


def _known(frame: pd.DataFrame, runs: pd.DataFrame | None) -> pd.DataFrame:
    if runs is None:
        return frame
    return frame[frame["run_id"].isin(set(runs["run_id"]))].reset_index(drop=True)


def _frame(table: _Table) -> pd.DataFrame:
    series = {}
    for name, kind in table.columns.items():
        dtype = {
            str: "str",
            float: "float64",
            int: "Int64" if name in NULLABLE else "int64",
            bool: "boolean",
        }[kind]
        series[name] = pd.Series(table.values[name], dtype=dtype)
    return pd.DataFrame(series)


def _load(path: Path, columns: dict[str, type]) -> _Table:
    """Read and check a whole file; an absent file is a table without rows."""
    if not path.exists():
        return _Table(path, columns, [], {name: [] for name in columns})
    text = _read_text(path)
    _check_frame(path, columns, text)
    records = _split(path, columns, text)
    values = {
        name: _decode(path, name, kind, [record[i] for record in records])
        for i, (name, kind) in enumerate(columns.items())
    }
    table = _Table(path, columns, records, values)
    _check_runs(table)
    return table


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ResultsError(
            f"{path}:{line}: not UTF-8 (byte {data[error.start]:#04x}); restore the file, "
            "for instance with git checkout."
        ) from error


def _check_frame(path: Path, columns: dict[str, type], text: str) -> None:
    """Raise unless the file has our header and ends with a whole line."""
    header = _text(columns, [])
    first = text.split("\n", 1)[0] + "\n"
    if first != header:
        raise ResultsError(
            f"{path}:1: header is {_shorten(first.strip())!r}, expected "
            f"{_shorten(header.strip())!r}{_header_difference(first, columns)}; the file comes "
            "from another version or program: move it away and run again."
        )
    if not text.endswith("\n"):
        raise ResultsError(
            f"{path}:{text.count(chr(10)) + 1}: the last line is not ended, so a writer was cut "
            "off in it; remove that line, the run is then done again."
        )


def _header_difference(first: str, columns: dict[str, type]) -> str:
    names = first.strip().split(",")
    missing = [name for name in columns if name not in names]
    unknown = [name for name in names if name not in columns]
    return (f" (missing: {', '.join(missing)})" if missing else "") + (
        f" (unknown: {_shorten(', '.join(unknown))})" if unknown else ""
    )


def _split(path: Path, columns: dict[str, type], text: str) -> list[list[str]]:
    reader = csv.reader(io.StringIO(text, newline="\n"), strict=True)
    records: list[list[str]] = []
    try:
        next(reader)
        for line, record in enumerate(reader, start=2):
            if len(record) != len(columns):
                raise ResultsError(
                    f"{path}:{line}: {len(record)} fields, expected {len(columns)}; a foreign or "
                    "half-written row: remove the line, the run is then done again."
                )
            if reader.line_num != line:
                raise ResultsError(
                    f"{path}:{line}: a field holds a line break; remove the row, the run is then "
                    "done again."
                )
            records.append(record)
    except csv.Error as error:
        raise ResultsError(
            f"{path}:{reader.line_num}: {error}; remove the line, the run is then done again."
        ) from error
    return records


def _decode(path: Path, name: str, kind: type, fields: list[str]) -> list[Any]:
    """One column as Python values; None where a nullable field is empty."""
    if kind is str:
        if name in REQUIRED_STRINGS and "" in fields:
            _refuse(path, fields.index(""), name, "", "a value")
        return fields
    values: list[Any] = []
    for i, field in enumerate(fields):
        if not field and name in NULLABLE:
            values.append(math.nan if kind is float else None)
        elif kind is float:
            value = float(field) if _FLOAT.fullmatch(field) else math.nan
            if not math.isfinite(value):
                _refuse(path, i, name, field, "a finite number")
            values.append(value)
        elif kind is int:
            if not _INT.fullmatch(field):
                _refuse(path, i, name, field, "a whole number")
            values.append(int(field))
        else:
            if field not in ("true", "false"):
                _refuse(path, i, name, field, "true or false")
            values.append(field == "true")
    return values


def _refuse(path: Path, i: int, name: str, field: str, expected: str) -> None:
    raise ResultsError(
        f"{path}:{i + 2}: {name} is {field!r}, expected {expected}; correct the row, or remove it "
        "and the run is done again."
    )


def _check_runs(table: _Table) -> None:
    """Raise unless run ids have the right form and the key of the table is unique."""
    path, values = table.path, table.values
    unique = ("run_id", "measure", "epoch", "layer", "quantity", "position")
    keys = [name for name in unique if name in table.columns]
    if table.columns is COLUMNS:
        keys = ["run_id"]
    good: set[str] = set()
    first: dict[tuple[Any, ...], int] = {}
    for i, key in enumerate(zip(*(values[name] for name in keys), strict=True)):
        if key[0] not in good:
            if not RUN_ID.fullmatch(key[0]):
                _refuse(path, i, "run_id", key[0], "a slug, '-' and 10 digits of 0-9a-f")
            good.add(key[0])
        if first.setdefault(key, i) != i:
            what = ", ".join(f"{n} {v}" for n, v in zip(keys, key, strict=True))
            raise ResultsError(
                f"{path}:{i + 2}: {what} is on line {first[key] + 2} already; remove one of the "
                "two rows."
            )
    if table.columns is not COLUMNS:
        return
    for i, status in enumerate(values["status"]):
        if status not in STATUSES:
            _refuse(path, i, "status", status, " or ".join(STATUSES))
        has_error = not math.isnan(values["test_error_pct"][i])
        if has_error != (status == "ok"):
            _refuse(
                path,
                i,
                "test_error_pct",
                table.records[i][list(COLUMNS).index("test_error_pct")],
                "a number" if status == "ok" else "no value in a diverged run",
            )


# --------------------------------------------------------------------------------------- encode


def _encode(path: Path, columns: dict[str, type], rows: Sequence[Row], run_id: object) -> str:
    """Rows as lines of text, after the checks that reading makes."""
    records = []
    for i, row in enumerate(rows):
        missing = [name for name in columns if name not in row]
        extra = [name for name in row if name not in columns]
        if missing or extra:
            raise ResultsError(
                f"{path}: row {i + 1} of run {run_id!r} has not the columns of the file: missing "
                f"{missing or 'none'}, unknown {extra or 'none'}; pass exactly {list(columns)}."
            )
        if row["run_id"] != run_id:
            raise ResultsError(
                f"{path}: row {i + 1} belongs to run {row['run_id']!r} but is appended with run "
                f"{run_id!r}; pass the rows of one run."
            )
        records.append([_field(path, name, columns[name], row[name]) for name in columns])
    new = Path(f"{path} (rows to append)")
    values = {
        name: _decode(new, name, kind, [record[i] for record in records])
        for i, (name, kind) in enumerate(columns.items())
    }
    _check_runs(_Table(new, columns, records, values))
    return _text(columns, records).split("\n", 1)[1]


def _field(path: Path, name: str, kind: type, value: Any) -> str:
    """One value as text; raises ResultsError if its type is not the column's."""
    is_bool = isinstance(value, (bool, np.bool_))
    missing = value is None or value is pd.NA
    if missing or (isinstance(value, numbers.Real) and not is_bool and math.isnan(value)):
        if name in NULLABLE:
            return ""
    elif kind is str and isinstance(value, str):
        if not any(c in value for c in "\n\r\0"):
            return value
    elif kind is bool and is_bool:
        return "true" if value else "false"
    elif kind is int and isinstance(value, numbers.Integral) and not is_bool:
        return str(int(value))
    elif kind is float and isinstance(value, numbers.Real) and not is_bool and math.isfinite(value):
        return repr(float(value))
    optional = " or None" if name in NULLABLE else ""
    raise ResultsError(
        f"{path}: {name} is {value!r} ({type(value).__name__}), expected a "
        f"{'finite ' if kind is float else ''}{kind.__name__}{optional}"
        f"{' on one line' if kind is str else ''}; correct the value."
    )


def _text(columns: dict[str, type], records: Iterable[Sequence[str]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(records)
    return buffer.getvalue()


def _shorten(text: str, width: int = 160) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
