"""Merging the run CSVs of several machines or shards into one.  Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lib.results.columns import (
    COLUMNS,
    CURVE_COLUMNS,
    LAYER_COLUMNS,
    MEASURE_COLUMNS,
    PROVENANCE,
)
from lib.results.format import ResultsError, Table, load, text_of
from lib.results.store import (
    curves_path,
    layers_path,
    locked,
    measures_path,
    replace_file,
    runs_path,
    sync_folder,
)


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
        seen: dict[str, tuple[Table, int]] = {}
        old = load(target, COLUMNS)
        for i, run_id in enumerate(old.values["run_id"]):
            seen[run_id] = (old, i)
        fresh: dict[Path, list[str]] = {}
        tables = {path: load(path, COLUMNS) for path in dict.fromkeys(paths)}
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
            kept = load(beside(target), columns)
            known = set(old.values["run_id"])  # leftovers of a killed append stay behind
            lines = [r for r in kept.records if r[0] in known]
            for path, run_ids in fresh.items():
                wanted = set(run_ids)
                lines += [r for r in load(beside(path), columns).records if r[0] in wanted]
            replace_file(beside(target), text_of(columns, lines))
        rows = list(old.records)
        for path, run_ids in fresh.items():
            wanted = set(run_ids)
            rows += [r for r in tables[path].records if r[0] in wanted]
        sync_folder(target)
        replace_file(target, text_of(COLUMNS, rows))
        sync_folder(target)
    return sum(map(len, fresh.values()))


def _same_run(first: Table, i: int, second: Table, j: int) -> None:
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
