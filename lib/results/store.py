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

import contextlib
import functools
import io
import re
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
_FILES = {  # of an experiment, in the order of writing
    ".measures.csv": "run_id:str measure:str layer:str quantity:str position:int value:float",
    ".layers.csv": "run_id:str epoch:int layer:str weights:int active:int momentum_share:float?",
    ".curves.csv": """run_id:str epoch:int train_loss:float val_error_pct:float lr:float
        prune_rate:float density:float""",
    ".csv": """
        run_id:str experiment:str profile:str dataset:str model:str method:str method_version:int
        prune:str? redistribution:str? growth:str? init:str density:float keep_dense:str?
        prune_rate:float? schedule:str? update_every_steps:int? momentum:float lr:float
        lr_decay_every_steps:int? weight_decay:float batch_size:int epochs:int train_samples:int?
        precision:str overrides:str?
        seed:int status:str test_error_pct:float? val_error_pct:float? train_loss:float?
        density_final:float? weights_total:int weights_active:int? steps:int train_flops_rel:float?
        inference_flops_rel:float? explored:float? train_seconds:float threads:int kernels:str
        device:str commit:str dirty:bool? python:str torch:str torchvision:str data_sha256:str
        finished_utc:str""",
}
_KINDS: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}
FILES = {
    end: {name: _KINDS[kind] for name, kind in re.findall(r"(\w+):(\w+)", text)}
    for end, text in _FILES.items()
}
MEASURE_COLUMNS, _, CURVE_COLUMNS, COLUMNS = FILES.values()
NULLABLE = frozenset(re.findall(r"(\w+):\w+\?", " ".join(_FILES.values())))
# Where, when and how fast a run was trained: may differ between two copies of it.
SAME_BITS_NEED = {"threads", "kernels", "device", "torch"}
_WHERE_AND_WHEN = {"train_seconds", "commit", "dirty", "python", "torchvision", "finished_utc"}
PROVENANCE = SAME_BITS_NEED | _WHERE_AND_WHEN
KEY = ("run_id", "epoch", "measure", "layer", "quantity", "position")  # what is there once
SHARES = ("density", "density_final", "prune_rate", "explored", "momentum_share")
UTC = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
_WAY_OUT = "correct that row, or remove it and the run is done again"


class ResultsError(ValueError):
    """A row or a file that can't be trusted; the message has the place and what to do."""


def runs_path(path: str | Path) -> Path:
    """The run CSV of an experiment, from the path of any of its files."""
    path = Path(path)
    return path.with_suffix("").with_suffix(".csv") if "".join(path.suffixes) in FILES else path


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

    `row` has COLUMNS, the others the columns of their file, with its run_id; None or NaN is no
    value.  Any number of processes may append.  Raises ResultsError, and writes nothing, for a
    value or a file that does not pass the checks of reading, and OSError where the disk refuses:
    what was stored is then still there.
    """
    path = runs_path(path)
    lines = {}
    for (end, columns), rows in zip(FILES.items(), (measures, layers, curves, [row]), strict=True):
        table = pd.DataFrame(list(rows), columns=list(columns), dtype=object)
        lines[end] = _lines(path, end, table)
    with _locked(path):
        return _append(path, lines)


def _locked(path: Path) -> contextlib.AbstractContextManager[bool]:
    path = path.resolve()
    return paths.locked(path.with_name(f".{path.name}.lock"))


def _lines(path: Path, end: str, table: pd.DataFrame) -> str:
    """The rows as lines of text, after the checks of reading; curves thinned, at six digits."""
    if table.empty:
        return ""
    digits = None
    if end == ".curves.csv":
        last = table.groupby("run_id")["epoch"].transform("max")
        table = table[(table.epoch <= 10) | (table.epoch % 10 == 0) | (table.epoch == last)]
        table = table.astype({name: kind for name, kind in CURVE_COLUMNS.items() if kind is float})
        digits = "%.6g"
    elif end == ".csv":
        table = table.assign(dirty=table["dirty"].astype("str").str.lower().replace("nan", ""))
    text = table.to_csv(index=False, lineterminator="\n", float_format=digits)
    if text.count("\n") != len(table) + 1 or re.search("[\r\0\ud800-\udfff]", text):
        raise ResultsError(f"{path}: {table['run_id'].iloc[0]}: a text is not one line of UTF-8")
    _table(Path(f"{path} (to append)"), end, text.encode())
    return text.split("\n", 1)[1]


def _append(path: Path, lines: Mapping[str, str]) -> bool:
    """Append lines to the files of an experiment, under its lock; False if the run is there."""
    stored = {line.split(b",", 1)[0] for line in _whole(path).splitlines()[1:]}
    if lines[".csv"].split(",", 1)[0].encode() in stored:
        return False
    for end in lines:
        if path.with_suffix(end).exists():
            _repair(path.with_suffix(end), end, stored)
    for end, text in lines.items():
        if text:
            header = "" if _whole(path.with_suffix(end)) else ",".join(FILES[end]) + "\n"
            paths.append(path.with_suffix(end), (header + text).encode())
    return True


def _whole(file: Path) -> bytes:
    """The whole lines of a file; none where there is no file."""
    data = file.read_bytes() if file.exists() else b""
    return data[: data.rfind(b"\n") + 1]


def _repair(file: Path, end: str, stored: set[bytes]) -> None:
    """Take off the end of a file what a killed writer left: half a line, lines without a run."""
    lines = _whole(file).splitlines(keepends=True)
    _check_columns(file, end, b"".join(lines[:1]))
    while len(lines) > 1 and lines[-1].split(b",", 1)[0] not in stored:
        lines.pop()
    if sum(map(len, lines)) < file.stat().st_size:
        paths.write(file, b"".join(lines))  # in place of the old file: a reader has this or that


# ----------------------------------------------------------------------------------------- read


def read(end: str, *paths: str | Path) -> pd.DataFrame:
    """The lines of these files of FILES, or of all in folders (profiles), each once: the last.

    A file that does not exist has none; curves, layers and measures may be there of a run without
    a row.  Raises ResultsError, with the file, for a row that the checks refuse: wrong columns or
    types, values out of range, an id that does not fit the row or comes twice in a file, a status
    that does not fit the error.
    """
    files = [f for p in paths for f in (run_paths(p) if Path(p).is_dir() else [runs_path(p)])]
    found = [file.with_suffix(end) for file in files if file.with_suffix(end).exists()]
    stats = [(file, file.stat()) for file in found]
    known = tuple((file, at.st_ino, at.st_mtime_ns, at.st_size) for file, at in stats)
    return _tables(end, known).copy(deep=False)  # pandas copies what a caller changes


read_runs, read_curves, read_layers, read_measures = (
    functools.partial(read, end) for end in (".csv", ".curves.csv", ".layers.csv", ".measures.csv")
)


@functools.lru_cache(maxsize=16)
def _tables(end: str, files: tuple[tuple[Path, int, int, int], ...]) -> pd.DataFrame:
    """The tables of these files as one."""
    tables = [_one(end, *file) for file in files] or [_table(Path(), end, b"")]
    key = [name for name in KEY if name in FILES[end]]
    return pd.concat(tables).drop_duplicates(key, keep="last", ignore_index=True)


@functools.lru_cache(maxsize=64)
def _one(end: str, file: Path, *changed: int) -> pd.DataFrame:
    """The table of a file, read again when it has changed."""
    return _table(file, end, _whole(file))


def _check_columns(file: Path, end: str, data: bytes) -> None:
    first = data.split(b"\n", 1)[0].decode(errors="replace").strip().split(",")
    if data and first != list(FILES[end]):
        odd = ", ".join(sorted(set(first) ^ FILES[end].keys())) or "another order"
        raise ResultsError(f"{file}: has not the columns of this version: {odd}")


def _table(file: Path, end: str, data: bytes) -> pd.DataFrame:
    """The lines of a file as a table that has passed the checks."""
    columns = FILES[end]
    _check_columns(file, end, data)
    kinds: dict[type, str] = {str: "str", float: "float64", int: "int64", bool: "boolean"}
    types = {n: "Int64" if k is int and n in NULLABLE else kinds[k] for n, k in columns.items()}
    try:
        table = pd.read_csv(
            io.BytesIO(data or ",".join(columns).encode()),
            dtype=types,
            keep_default_na=False,
            na_values={name: [""] for name, kind in columns.items() if kind is not str},
        )
    except (ValueError, OverflowError) as error:
        raise ResultsError(f"{file}: {error}; {_WAY_OUT}") from error
    for name, kind in columns.items():
        if kind is str:
            good = table[name].notna() & ((table[name] != "") | (name in NULLABLE))
        else:
            values = table[name].to_numpy(float, na_value=np.nan)
            top = 100.0 if name.endswith("_pct") else 1.0 if name in SHARES else np.inf
            good = np.isfinite(values) & (values <= top) & ((values >= 0) | (name == "value"))
            good |= np.isnan(values) & (name in NULLABLE)
        _refuse(file, table[name], good)
    if end == ".csv":
        ids, seeds = table["run_id"], table["seed"].astype("str")
        density = table["density"].map("{:g}".format).astype("str")
        start = table["model"] + "_" + table["method"] + "_d" + density + "_s" + seeds + "-"
        fits = ids.str.replace("[0-9a-f]{10}$", "", regex=True) == start
        _refuse(file, ids, fits & ~ids.duplicated())
        _refuse(file, table["status"], table["status"].isin(("ok", "diverged")))
        errors = table["test_error_pct"]
        _refuse(file, errors, errors.notna() == (table["status"] == "ok"))
        _refuse(file, table["finished_utc"], table["finished_utc"].str.fullmatch(UTC))
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
    if absent := [file for file in files if not file.exists()]:
        raise ResultsError(f"{absent[0]}: no such file; name the run CSVs to merge")
    others = [file for file in run_paths(target.parent) if file not in (target, *files)]
    with _locked(target):
        _check_complete(target, {end: read(end, target) for end in FILES})
        every = [read_runs(file).assign(file=str(file)) for file in (target, *others, *files)]
        _check_same(pd.concat(every, ignore_index=True))
        here, elsewhere = set(read_runs(target)["run_id"]), set(read_runs(*others)["run_id"])
        new = []
        for file in files:
            tables = {end: read(end, file) for end in FILES}
            _check_complete(file, tables)
            measured = set(tables[".measures.csv"]["run_id"])
            mine = set(tables[".csv"]["run_id"]) - here - (elsewhere - measured)
            here |= mine
            new.append({end: t[t["run_id"].isin(mine)] for end, t in tables.items()})
        for tables in new:
            if len(tables[".csv"]):
                _append(target, {end: _lines(target, end, t) for end, t in tables.items()})
    return sum(len(tables[".csv"]) for tables in new)


def _check_complete(file: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """Raise ResultsError for a run with a row that lacks the end of its curves, or of its masks."""
    runs = tables[".csv"][tables[".csv"]["status"] == "ok"]
    last = runs.set_index("run_id")["epochs"]
    for end, need in ((".curves.csv", runs), (".layers.csv", runs[~runs.method.isin(UNMASKED)])):
        ended = tables[end]["epoch"] == tables[end]["run_id"].map(last)
        if lacking := set(need["run_id"]) - set(tables[end]["run_id"][ended]):
            raise ResultsError(
                f"{file}: {min(lacking)} ({len(lacking)} runs) has a row and no end in {end}: "
                "bring that file along, or remove the rows and the runs are done again"
            )


def _check_same(rows: pd.DataFrame) -> None:
    """Raise ResultsError where two rows of a run differ in a value that both have."""
    bound = [name for name in COLUMNS if name not in PROVENANCE | {"run_id", "experiment"}]
    differ = rows.groupby("run_id")[bound].nunique() > 1
    if differ.any(axis=None):
        at: Any = differ.stack().idxmax()
        run_id, name = at
        both = rows[rows.run_id == run_id]
        named = [n for n in (name, "file", *SAME_BITS_NEED) if both[n].nunique() > 1]
        said = "; ".join(f"{n} {' and '.join(map(str, both[n].unique()))}" for n in named)
        raise ResultsError(
            f"two different rows of run {run_id}: {said} (the same bits need the same "
            f"{', '.join(SAME_BITS_NEED)}): remove one of the two"
        )
