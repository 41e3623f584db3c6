"""The numbers of the literature, results/published/*.csv.  Imports no torch.

Every file starts with COLUMNS and may go on with any of EXTRA, in that order; results/README.md
says what each file and column is.  `value` is the number as printed at its source;
`test_error_pct` is computed from it (100 - accuracy) where it is an error rate or an accuracy.
"""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd

from lib.paths import published_dir

COLUMNS: dict[str, type] = {
    "method": str,
    "label": str,
    "model": str,
    "dataset": str,
    "setting": str,
    "density": float,
    "quantity": str,
    "value": float,
    "standard_error": float,
    "standard_deviation": float,
    "n": int,
    "test_error_pct": float,
    "suspect": bool,
    "source": str,
    "confidence": str,
    "note": str,
}

EXTRA: dict[str, type] = {
    "momentum": float,
    "prune_rate": float,
    "schedule": str,
    "init": str,
    "redistribution": str,
    "training_times": float,
    "train_flops_rel": float,
    "inference_flops_rel": float,
    "layer": str,
    "layer_index": int,
    "nonzeros": int,
    "momentum_share": float,
    "median": float,
    "maximum": float,
    "maskable_weights": int,
    "layers_left_dense": str,
    "runs": str,
    "code": str,
}

# Our methods; "other" for what this repository does not train; "" where no method is meant.
METHODS = (
    "dense",
    "sparse_momentum",
    "dsr",
    "set",
    "deepr",
    "rigl",
    "snip",
    "static",
    "small_dense",
    "other",
    "",
)

CONFIDENCE = ("exact", "computed", "secondary")

ACCURACIES = ("test_accuracy_pct", "top1_accuracy_pct")

_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?")
_WHOLE = re.compile(r"[0-9]+")


class PublishedError(ValueError):
    """A published file that can't be read; the message has file, line and what to do."""


def published_names() -> list[str]:
    """Names of the published tables, for `published`."""
    return sorted(path.stem for path in published_dir().glob("*.csv"))


def published(name: str, directory: str | Path | None = None) -> pd.DataFrame:
    """One published table, for instance `published("cifar10_table")`, strictly checked.

    Raises PublishedError with file and line for a name that does not exist, an unknown column,
    method or confidence, a value of the wrong type, a missing source, or a test_error_pct that
    does not follow from the value.
    """
    folder = published_dir() if directory is None else Path(directory)
    path = folder / f"{name}.csv"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.csv")))
        raise PublishedError(f"{path}: no such table; known are {known or 'none'}.")
    rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline="\n")))
    columns = _columns(path, rows[0] if rows else [])
    table: dict[str, list[Any]] = {column: [] for column in columns}
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != len(columns):
            raise PublishedError(
                f"{path}:{line}: {len(row)} fields, expected {len(columns)}; correct the row."
            )
        for (column, kind), field in zip(columns.items(), row, strict=True):
            table[column].append(_value(path, line, column, kind, field))
        _check(path, line, {column: values[-1] for column, values in table.items()})
    dtypes = {str: "str", float: "float64", int: "Int64", bool: "bool"}
    return pd.DataFrame({c: pd.Series(table[c], dtype=dtypes[kind]) for c, kind in columns.items()})


def _columns(path: Path, header: list[str]) -> dict[str, type]:
    known = COLUMNS | EXTRA
    expected = [*COLUMNS, *(name for name in EXTRA if name in header)]
    if header != expected:
        raise PublishedError(
            f"{path}:1: header is {header}, expected {list(COLUMNS)} and then any of "
            f"{list(EXTRA)} in this order; correct the header."
        )
    return {name: known[name] for name in header}


def _value(path: Path, line: int, column: str, kind: type, field: str) -> Any:
    expected = None
    if kind is bool:
        expected = None if field in ("true", "false") else "true or false"
    elif kind is float and field:
        expected = None if _NUMBER.fullmatch(field) else "a number or nothing"
    elif kind is int and field:
        expected = None if _WHOLE.fullmatch(field) else "a whole number or nothing"
    if expected is not None:
        raise PublishedError(
            f"{path}:{line}: {column} is {field!r}, expected {expected}; correct it."
        )
    if kind is bool:
        return field == "true"
    if kind is float:
        return float(field) if field else math.nan
    if kind is int:
        return int(field) if field else None
    return field


def _check(path: Path, line: int, row: dict[str, Any]) -> None:
    problem = None
    if row["method"] not in METHODS:
        problem = f"method is {row['method']!r}, known are {', '.join(filter(None, METHODS))}"
    elif row["confidence"] not in CONFIDENCE:
        problem = f"confidence is {row['confidence']!r}, known are {', '.join(CONFIDENCE)}"
    elif not row["source"] or not row["quantity"]:
        problem = "source or quantity is empty"
    elif math.isnan(row["value"]) and not row["note"]:
        problem = "no value, and no note that says why"
    elif row["suspect"] and not row["note"]:
        problem = "suspect, and no note that says why"
    elif not (math.isnan(row["density"]) or 0 < row["density"] <= 1):
        problem = f"density is {row['density']}, expected a fraction in (0, 1]"
    else:
        error = math.nan
        if row["quantity"] == "test_error_pct":
            error = row["value"]
        elif row["quantity"] in ACCURACIES:
            error = 100 - row["value"]
        given = row["test_error_pct"]
        if math.isnan(error) != math.isnan(given) or abs(error - given) > 1e-9:
            problem = f"test_error_pct is {given}, but the value gives {error}"
    if problem:
        raise PublishedError(f"{path}:{line}: {problem}; correct the row.")
