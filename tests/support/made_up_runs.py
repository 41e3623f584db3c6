"""Made-up runs for the tests of the CSVs; imports no pytest, as the writer processes use it too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib.config import Run
from lib.results.store import (
    COLUMNS,
    CURVE_COLUMNS,
    append_run,
    read_curves,
    read_layers,
    read_runs,
)

EPOCHS, LAYERS = 5, 3


def make_id(i: int) -> str:
    return f"lenet300-100_sparse_momentum_d0.05_s{i}-{i:010x}"


def named_by(run: Run) -> dict[str, Any]:
    """The id of a run, and the columns that its id must agree with."""
    names = ("run_id", "model", "method", "density", "seed")
    return {name: getattr(run, name) for name in names}


def make_row(i: int, **changes: Any) -> dict[str, Any]:
    """A row of run number i, with values of every type."""
    row: dict[str, Any] = {
        name: {str: f'{name}, "x"', int: i, float: i / 7, bool: i % 2 == 0}[kind]
        for name, kind in COLUMNS.items()
    }
    run = {name: value for name, value in vars(Run(seed=i)).items() if name in COLUMNS}
    run |= {"keep_dense": 'a,b "c"', "prune_rate": 1 / (i + 3), "lr": 1 / (i + 3)}
    run["epochs"] = EPOCHS
    errors = {"test_error_pct": i % 700 / 7, "val_error_pct": i % 700 / 7}
    row |= {"status": "ok", "overrides": "", "density_final": 0.05, "explored": 1 / (i + 3)}
    row |= {"finished_utc": "2026-11-30T08:16:00Z"}
    row |= run | errors | {"run_id": make_id(i)}
    return row | changes


def make_curves(i: int, epochs: int = EPOCHS) -> list[dict[str, Any]]:
    values = {name: 1 / (i + 3) for name, kind in CURVE_COLUMNS.items() if kind is float}
    return [{"run_id": make_id(i), "epoch": e, **values} for e in range(1, epochs + 1)]


def make_layers(i: int, layers: int = LAYERS) -> list[dict[str, Any]]:
    return [
        {
            "run_id": make_id(i),
            "epoch": EPOCHS,
            "layer": f"fc{k}.weight",
            "weights": 100,
            "active": 5,
            "momentum_share": 1 / 3,
        }
        for k in range(layers)
    ]


def add(path: Path, i: int, **changes: Any) -> bool:
    return append_run(path, make_row(i, **changes), make_curves(i), make_layers(i))


def assert_whole(path: Path, exact: bool = True) -> list[int]:
    """Everything reads, and each run is complete in all three files; the seeds of the runs.

    exact: no lines without a run are there, as after a writer that was not killed.
    """
    runs = read_runs(path)
    assert runs["run_id"].is_unique
    for table, n in ((read_curves(path), EPOCHS), (read_layers(path), LAYERS)):
        mine = table[table["run_id"].isin(runs["run_id"])]
        assert mine.groupby("run_id").size().to_dict() == dict.fromkeys(runs["run_id"], n)
        assert not exact or len(mine) == len(table)
    assert not exact or path.read_bytes().endswith(b"\n")
    return runs["seed"].tolist()
