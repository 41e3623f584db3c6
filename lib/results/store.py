"""The CSVs of the runs: what their columns are, appending a run, reading, merging.  No torch.

A run is stored once at a profile, in the files of the experiment that trained it:

    results/<profile>/<experiment>.csv           one row per run
    results/<profile>/<experiment>.curves.csv    epochs 1 to 10, every tenth and the last, rounded
    results/<profile>/<experiment>.layers.csv    one row per run, recorded epoch and layer
    results/<profile>/<experiment>.measures.csv  one row per measure, layer, quantity and position

A writer holds the experiment's lock and appends whole lines: measures, layers, curves and last the
run's row, each on the disk before the next.  So a row says that the run is complete in all files.
What a killed writer leaves is half a line, or lines of a run without a row, at the end of a file:
readers, who need no lock, leave them out, and the next writer cuts them off.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib import paths
from lib.config import UNMASKED

Row = Mapping[str, Any]

# name:type, with "?" where a field may be empty: the setting does not apply (prune_rate of a dense
# run), the run diverged, the code that wrote the row did not record it (explored), or nobody knows
# (dirty).  Errors in %, shares from 0 to 1, times in s.
_RUNS = """
    run_id:str experiment:str profile:str dataset:str model:str method:str method_version:int
    prune:str redistribution:str growth:str init:str density:float keep_dense:str prune_rate:float?
    schedule:str update_every_steps:int? momentum:float lr:float lr_decay_every_steps:int?
    weight_decay:float batch_size:int epochs:int train_samples:int? precision:str overrides:str
    seed:int status:str test_error_pct:float? val_error_pct:float? train_loss:float?
    density_final:float? weights_total:int weights_active:int? steps:int train_flops_rel:float?
    inference_flops_rel:float? explored:float? train_seconds:float threads:int kernels:str
    device:str commit:str dirty:bool? python:str torch:str torchvision:str data_sha256:str
    finished_utc:str"""
_CURVES = """run_id:str epoch:int train_loss:float val_error_pct:float lr:float prune_rate:float
    density:float"""
_LAYERS = "run_id:str epoch:int layer:str weights:int active:int momentum_share:float?"
_MEASURES = "run_id:str measure:str layer:str quantity:str position:int value:float"


def _columns(text: str) -> dict[str, type]:
    kinds: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}
    return {name: kinds[kind] for name, kind in re.findall(r"(\w+):(\w+)", text)}


COLUMNS, CURVE_COLUMNS, LAYER_COLUMNS, MEASURE_COLUMNS = map(
    _columns, (_RUNS, _CURVES, _LAYERS, _MEASURES)
)
NULLABLE = frozenset(re.findall(r"(\w+):\w+\?", _RUNS + _LAYERS))
MAY_BE_BLANK = {"prune", "redistribution", "growth", "keep_dense", "schedule", "overrides"}
# Where, when and how fast a run was trained: may differ between two copies of it.
SAME_BITS_NEED = {"threads", "kernels", "device", "torch"}
PROVENANCE = SAME_BITS_NEED | {
    "train_seconds",
    "commit",
    "dirty",
    "python",
    "torchvision",
    "finished_utc",
}
KEY = ("run_id", "epoch", "measure", "layer", "quantity", "position")  # what is there once
SHARES = ("density", "density_final", "prune_rate", "explored", "momentum_share")
_HASH = re.compile("[0-9a-f]{10}")
_WAY_OUT = "correct that row, or remove it and the run is done again"
# The files beside the run CSV, in the order of writing.
BESIDE = {
    ".measures.csv": MEASURE_COLUMNS,
    ".layers.csv": LAYER_COLUMNS,
    ".curves.csv": CURVE_COLUMNS,
}


class ResultsError(ValueError):
    """A row or a file that can't be trusted; the message has the place and what to do."""


def runs_path(path: str | Path) -> Path:
    """The run CSV of an experiment, from the path of any of its files."""
    path = Path(path)
    beside = "".join(path.suffixes[-2:])
    return path.with_name(path.name.removesuffix(beside) + ".csv") if beside in BESIDE else path


def run_paths(folder: str | Path) -> list[Path]:
    """The run CSVs in a folder, sorted: without the files beside them, and without verdicts."""
    found = sorted(Path(folder).glob("*.csv"))
    return [path for path in found if "." not in path.stem and path.stem != "verdicts"]


# ---------------------------------------------------------------------------------------- write


def append_run(
    path: str | Path,
    row: Row,
    curves: Sequence[Row] = (),
    layers: Sequence[Row] = (),
    measures: Sequence[Row] = (),
) -> bool:
    """Add one finished run; True if it was added, False if its run_id is in the file already.

    `row` has COLUMNS, the others the columns of their file and the same run_id; None or NaN is no
    value.  Any number of processes may append.  Raises ResultsError, and writes nothing, for a
    value or a file that does not pass the checks of reading, and OSError where the disk refuses:
    what was stored is then still there.
    """
    path = runs_path(path)
    beside = {".measures.csv": measures, ".layers.csv": layers, ".curves.csv": curves}
    if others := {one["run_id"] for rows in beside.values() for one in rows} - {row["run_id"]}:
        raise ResultsError(f"{path}: rows of {min(others)} are appended with {row['run_id']}")
    tables = {end: _frame(path, BESIDE[end], rows) for end, rows in beside.items()}
    new = {end: _lines(path, BESIDE[end], table) for end, table in tables.items()}
    rows = _lines(path, COLUMNS, _frame(path, COLUMNS, [row]))
    with paths.locked(_lock(path)):
        return _append(path, new, rows)


def _lock(path: Path) -> Path:
    path = path.resolve()
    return path.with_name(f".{path.name}.lock")


def _frame(path: Path, columns: dict[str, type], rows: Sequence[Row]) -> pd.DataFrame:
    for row in rows:
        if odd := sorted(row.keys() ^ columns.keys()):
            raise ResultsError(f"{path}: missing or unknown in {row.get('run_id')}: {odd}")
    return pd.DataFrame(list(rows), columns=list(columns), dtype=object)


def _lines(path: Path, columns: dict[str, type], table: pd.DataFrame) -> str:
    """The rows as lines of text, after the checks of reading; curves thinned."""
    if table.empty:
        return ""
    if columns is CURVE_COLUMNS:
        last = table.groupby("run_id")["epoch"].transform("max")
        table = table[(table.epoch <= 10) | (table.epoch % 10 == 0) | (table.epoch == last)]
    digits = ".6g" if columns is CURVE_COLUMNS else ""
    fields = table.astype(object).map(lambda value: _text(value, digits))
    text = fields.to_csv(index=False, lineterminator="\n")
    one_a_line = text.count("\n") == len(table) + 1 and not re.search("[\r\0\ud800-\udfff]", text)
    if not one_a_line:
        raise ResultsError(f"{path}: {table['run_id'].iloc[0]}: a text is not one line of UTF-8")
    _table(Path(f"{path} (to append)"), columns, text.encode())
    return text.split("\n", 1)[1]


def _text(value: Any, digits: str) -> str:
    if value is None or value is pd.NA or value != value:
        return ""
    if isinstance(value, float):
        return f"{float(value):{digits}}" if digits else repr(float(value))
    return str(value).lower() if str(value) in ("True", "False") else str(value)


def _append(path: Path, beside: Mapping[str, str], rows: str) -> bool:
    """Append lines to the files of an experiment, under its lock; False if the run is there."""
    stored = _ids(_whole(path))
    if rows.split(",", 1)[0] in stored:
        return False
    new = [(path.with_suffix(end), BESIDE[end], text) for end, text in beside.items()]
    every = [*(one for one in new if one[2] or one[0].exists()), (path, COLUMNS, rows)]
    for file, columns, _ in every:
        _repair(file, columns, stored)
    for file, columns, text in every:
        header = "" if file.exists() else ",".join(columns) + "\n"
        paths.append(file, (header + text).encode())
    return True


def _whole(file: Path) -> bytes:
    """The whole lines of a file; none where there is no file."""
    try:
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return b""
    return data[: data.rfind(b"\n") + 1]


def _ids(data: bytes) -> set[str]:
    return {line.split(b",", 1)[0].decode(errors="replace") for line in data.split(b"\n")[1:-1]}


def _repair(file: Path, columns: dict[str, type], stored: set[str]) -> None:
    """Take off the end of a file what a killed writer left: half a line, lines without a run."""
    data = _whole(file)
    first = data[: data.find(b"\n") + 1].decode(errors="replace").strip()
    if data and first != ",".join(columns):
        raise ResultsError(f"{file}: has the columns of another version: merge it into a new file")
    end = len(data)
    while (start := data.rfind(b"\n", 0, max(end - 1, 0)) + 1) > 0:
        if data[start:end].split(b",", 1)[0].decode(errors="replace") in stored:
            break
        end = start
    if file.exists() and end < file.stat().st_size:
        paths.write(file, data[:end])  # in place of the old file: a reader has this or that


# ----------------------------------------------------------------------------------------- read


def read_runs(path: str | Path) -> pd.DataFrame:
    """The runs of a run CSV, or of all of a folder (a profile) each once; columns as in COLUMNS.

    A file that does not exist has no runs.  Raises ResultsError, with the file, for a row that the
    checks refuse: wrong columns or types, values out of range, an id that does not fit the row or
    comes twice in a file, a status that does not fit the error.
    """
    return _read(path, ".csv", COLUMNS)


def read_curves(path: str | Path, runs: pd.DataFrame | None = None) -> pd.DataFrame:
    """Values by epoch of the file or folder, columns as in CURVE_COLUMNS; with `runs`, of those
    only, and ResultsError names one that has a row and no curves.
    """
    return _of(_read(path, ".curves.csv", CURVE_COLUMNS), runs, path, "curves")


def read_layers(path: str | Path, runs: pd.DataFrame | None = None) -> pd.DataFrame:
    """Values by recorded epoch and layer; as `read_curves`.  Unmasked networks have none."""
    return _of(_read(path, ".layers.csv", LAYER_COLUMNS), runs, path, "layers")


def read_measures(path: str | Path, runs: pd.DataFrame | None = None) -> pd.DataFrame:
    """What was measured on the trained networks, columns as in MEASURE_COLUMNS; as `read_curves`,
    but a run may have none.
    """
    return _of(_read(path, ".measures.csv", MEASURE_COLUMNS), runs, path, "")


def _read(path: str | Path, end: str, columns: dict[str, type]) -> pd.DataFrame:
    files = run_paths(path) if Path(path).is_dir() else [runs_path(path)]
    files = [file.with_suffix(end) for file in files] or [Path(path) / f"none{end}"]
    table = pd.concat([_table(file, columns, _whole(file)) for file in files])
    key = [name for name in KEY if name in columns]
    return table.drop_duplicates(key, keep="last", ignore_index=True)


def _of(
    table: pd.DataFrame, runs: pd.DataFrame | None, path: str | Path, what: str
) -> pd.DataFrame:
    if runs is None:
        return table
    table = table[table["run_id"].isin(set(runs["run_id"]))].reset_index(drop=True)
    need = runs[(runs["status"] == "ok") & (what != "layers" or ~runs["method"].isin(UNMASKED))]
    lacking = set(need["run_id"] if what else ()) - set(table["run_id"])
    if lacking:
        raise ResultsError(
            f"{path}: {len(lacking)} runs have a row and no {what}, {min(lacking)} for one: bring "
            f"the .{what}.csv along, or remove the rows and the runs are done again"
        )
    return table


def _table(file: Path, columns: dict[str, type], data: bytes) -> pd.DataFrame:
    """The lines of a file as a table that has passed the checks."""
    data = data or ",".join(columns).encode()
    first = data.split(b"\n", 1)[0].decode(errors="replace").strip().split(",")
    if odd := (set(first) - set(columns)) | (set(columns) - set(first) - NULLABLE):
        raise ResultsError(f"{file}: has not the columns of this version: {', '.join(sorted(odd))}")
    kinds: dict[type, Any] = {str: "str", float: "float64", int: "int64", bool: "boolean"}
    types = {n: "Int64" if k is int and n in NULLABLE else kinds[k] for n, k in columns.items()}
    try:
        table = pd.read_csv(
            io.BytesIO(data),
            dtype={name: types[name] for name in first},
            keep_default_na=False,
            na_values={name: [""] for name in first if columns[name] is not str},
        )
    except (ValueError, OverflowError) as error:
        raise ResultsError(f"{file}: {error}; {_WAY_OUT}") from error
    table = table.reindex(columns=list(columns)).astype(types)
    for name, kind in columns.items():
        if kind is str:
            blank = name in MAY_BE_BLANK
            good = np.array([isinstance(v, str) and bool(v or blank) for v in table[name]], bool)
        else:
            values = table[name].to_numpy(float, na_value=np.nan)
            high = 100.0 if name.endswith("_pct") else 1.0 if name in SHARES else sys.float_info.max
            good = (values >= (-high if name == "value" else 0.0)) & (values <= high)
            good |= np.isnan(values) & (name in NULLABLE)
        _refuse(file, table[name], good)
    if columns is COLUMNS:
        said = (table[name] for name in ("run_id", "model", "method", "density", "seed"))
        starts = [(i, f"{m}_{k}_d{d:g}_s{s}-") for i, m, k, d, s in zip(*said, strict=True)]
        fits = [i[:-10] == start and bool(_HASH.fullmatch(i[-10:])) for i, start in starts]
        _refuse(file, table["run_id"], np.array(fits, bool) & ~table["run_id"].duplicated())
        _refuse(file, table["status"], table["status"].isin(("ok", "diverged")))
        errors = table["test_error_pct"]
        _refuse(file, errors, errors.notna() == (table["status"] == "ok"))
    return table


def _refuse(file: Path, values: pd.Series, good: Any) -> None:
    """Raise ResultsError for the first value that is not good."""
    if not np.all(good):
        i = int(np.argmin(good))
        raise ResultsError(f"{file}:{i + 2}: {values.name} can't be {values[i]!r}; {_WAY_OUT}")


# ---------------------------------------------------------------------------------------- merge


def merge(sources: Iterable[str | Path], target: str | Path) -> int:
    """Bring the runs of `sources` (run CSVs, of shards or other machines) to `target`; how many.

    What comes with a run comes along, curves thinned.  A run that the target, or another experiment
    beside it, has already stays as it is there; so a run is stored once.  Raises ResultsError, and
    writes nothing, for a source that is not there or lacks curves or layers of its runs, and for
    two rows of one run_id that differ in more than PROVENANCE.
    """
    target = runs_path(target)
    files = list(dict.fromkeys(runs_path(source) for source in sources))
    for file in files:
        if not file.exists():
            raise ResultsError(f"{file}: no such file; name the run CSVs to merge")
    others = [file for file in run_paths(target.parent) if file not in (target, *files)]
    with paths.locked(_lock(target)):
        known = [(file, read_runs(file)) for file in (target, *others)]
        here = set(known[0][1]["run_id"])
        elsewhere = {run_id for _, runs in known[1:] for run_id in runs["run_id"]}
        new = []
        for file in files:
            rows = read_runs(file)
            for place, runs in known:
                _check_same(file, rows, place, runs)
            measures = read_measures(file, rows)
            stored = here | (elsewhere - set(measures["run_id"]))
            rows = rows[~rows["run_id"].isin(stored)]
            here |= set(rows["run_id"])
            known.append((file, rows))
            beside = measures, read_layers(file, rows), read_curves(file, rows)
            new.append((rows, dict(zip(BESIDE, beside, strict=True))))
        for rows, tables in new:
            if len(rows):
                of_rows = {end: t[t["run_id"].isin(rows["run_id"])] for end, t in tables.items()}
                texts = {end: _lines(target, BESIDE[end], t) for end, t in of_rows.items()}
                _append(target, texts, _lines(target, COLUMNS, rows))
    return sum(len(rows) for rows, _ in new)


def _check_same(file: Path, rows: pd.DataFrame, place: Path, known: pd.DataFrame) -> None:
    """Raise ResultsError where two rows of a run differ in a value that both have."""
    both = rows.merge(known, on="run_id", suffixes=("", " there"))
    for name in [c for c in COLUMNS if c not in PROVENANCE | {"run_id", "experiment"}]:
        a, b = both[name], both[f"{name} there"]
        differ = ((a != b) & a.notna() & b.notna()).fillna(False).astype(bool)
        if differ.any():
            one = both[differ].iloc[0]
            other = [n for n in SAME_BITS_NEED if one[n] != one[f"{n} there"]]
            why = "; ".join(f"{n} {one[n]} and {one[f'{n} there']}" for n in other) or "no reason"
            raise ResultsError(
                f"{file} and {place}: two different rows of run {one['run_id']}, {name} is "
                f"{one[name]!r} and {one[f'{name} there']!r} (the same bits need the same "
                f"{', '.join(SAME_BITS_NEED)}; here differ: {why}): remove one of the two"
            )
