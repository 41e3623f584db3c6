"""Text of the CSVs and checked tables, in both directions.  Imports no torch.

UTF-8, '\\n', one record per line, an empty field for "no value", true/false, floats in their
shortest form that reads back to the same bits.  Anything else is refused with file and line, on
reading and before writing alike.
"""

from __future__ import annotations

import csv
import io
import math
import numbers
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lib.config import Run, valid
from lib.results.columns import (
    COLUMNS,
    MAX_INT,
    NULLABLE,
    RANGES,
    REQUIRED_STRINGS,
    RUN_ID,
    STATUSES,
    Row,
    slug,
)

_INT = re.compile(r"[0-9]{1,19}")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: UTF-8 has no bytes for it
_FLOAT = re.compile(r"-?[0-9]+(\.[0-9]*)?(e[+-]?[0-9]+)?", re.IGNORECASE)

_CORRECT = "correct the row, or remove it and the run is done again."
# Columns that are fields of a run as they stand: `keep_dense` is one text there, and `kernels` says
# what "auto" was.
_RUN_FIELDS = {item.name for item in fields(Run)} & set(COLUMNS) - {"keep_dense", "kernels"}


class ResultsError(ValueError):
    """A row or a file that can't be trusted; the message has the place and what to do."""


class Table(NamedTuple):
    """One file, checked: record i stands on line i + 2."""

    path: Path
    columns: dict[str, type]
    records: list[list[str]]
    values: dict[str, list[Any]]
    text: str = ""

    def without(self, run_id: str) -> str:
        """The text without the rows of this run."""
        if f"\n{run_id}," not in self.text:
            return self.text
        lines = self.text.splitlines(keepends=True)  # only "\n" gets past the checks
        return "".join(line for line in lines if not line.startswith(f"{run_id},"))


def frame(table: Table) -> pd.DataFrame:
    """The table as columns of the types in `columns`."""
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


def load(path: Path, columns: dict[str, type]) -> Table:
    """Read and check a whole file; an absent file is a table without rows."""
    text = _read_text(path)
    if text is None:
        return Table(path, columns, [], {name: [] for name in columns})
    return _check(path, columns, text)


def _check(path: Path, columns: dict[str, type], text: str) -> Table:
    """The text as a table; raises ResultsError where it does not pass."""
    _check_frame(path, columns, text)
    records = _split(path, columns, text)
    values = {
        name: _decode(path, name, kind, [record[i] for record in records])
        for i, (name, kind) in enumerate(columns.items())
    }
    table = Table(path, columns, records, values, text)
    _check_runs(table)
    return table


def _read_text(path: Path) -> str | None:
    """The file's text; None where there is no file."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ResultsError(
            f"{path}: can't be read ({error.strerror}); a readable CSV file or none must be there."
        ) from error
    for byte, name in ((b"\0", "a NUL byte"), (b"\r", "a carriage return")):
        if byte in data:
            line = data.count(b"\n", 0, data.index(byte)) + 1
            raise ResultsError(
                f"{path}:{line}: {name}, which no row has; restore the file, for instance with git "
                "checkout."
            )
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
    expected = header(columns)
    first = text.split("\n", 1)[0] + "\n"
    if first != expected:
        raise ResultsError(
            f"{path}:1: header is {_shorten(first.strip())!r}, expected "
            f"{_shorten(expected.strip())!r}{_header_difference(first, columns)}; the file comes "
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
    open_quote = "a quote is opened and not closed on this line"
    # A record starts on the line after the last good one, wherever the reader has got to since: an
    # open quote runs on through good rows until the next quote or the end.
    try:
        next(reader)
        for line, record in enumerate(reader, start=2):
            if reader.line_num != line:
                raise csv.Error(open_quote)
            if len(record) != len(columns):
                raise ResultsError(
                    f"{path}:{line}: {len(record)} fields, expected {len(columns)}; a foreign or "
                    "half-written row: remove the line, the run is then done again."
                )
            records.append(record)
    except csv.Error as error:
        line = len(records) + 2
        ran_on = reader.line_num > line or str(error) == "unexpected end of data"
        what = open_quote if ran_on else error
        raise ResultsError(
            f"{path}:{line}: {what}; remove the line, the run is then done again."
        ) from error
    return records


def _decode(path: Path, name: str, kind: type, fields: list[str]) -> list[Any]:
    """One column as Python values; None where a nullable field is empty."""
    if kind is str:
        if name in REQUIRED_STRINGS and "" in fields:
            _refuse(path, fields.index(""), name, "", "a value")
        return fields
    low, high = RANGES.get(name, (-math.inf, math.inf))
    values: list[Any] = []
    for i, field in enumerate(fields):
        if not field and name in NULLABLE:
            values.append(math.nan if kind is float else None)
        elif kind is float:
            value = float(field) if _FLOAT.fullmatch(field) else math.nan
            if not math.isfinite(value):
                _refuse(path, i, name, field, "a finite number")
            if not low <= value <= high:
                _refuse(path, i, name, field, f"{low} to {high}")
            values.append(value)
        elif kind is int:
            if not _INT.fullmatch(field) or int(field) > MAX_INT:
                _refuse(path, i, name, field, f"a whole number from 0 to {MAX_INT}")
            values.append(int(field))
        else:
            if field not in ("true", "false"):
                _refuse(path, i, name, field, "true or false")
            values.append(field == "true")
    return values


def _refuse(path: Path, i: int, name: str, field: str, expected: str) -> None:
    raise ResultsError(f"{path}:{i + 2}: {name} is {field!r}, expected {expected}; {_CORRECT}")


def _check_runs(table: Table) -> None:
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
    for name in _RUN_FIELDS:
        for value in set(values[name]) - {None}:
            if value == value:  # not NaN, which is no value
                try:
                    valid(name, value)
                except ValueError as error:
                    line = values[name].index(value) + 2
                    raise ResultsError(f"{path}:{line}: {error}; {_CORRECT}") from None
    slugs = map(slug, *(values[name] for name in ("model", "method", "density", "seed")))
    for i, (status, start) in enumerate(zip(values["status"], slugs, strict=True)):
        if values["run_id"][i][:-10] != start:
            _refuse(path, i, "run_id", values["run_id"][i], f"{start}... as the row's fields say")
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


def encode(path: Path, columns: dict[str, type], rows: Sequence[Row], run_id: object) -> str:
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
    text = text_of(columns, records)
    _check(Path(f"{path} (rows to append)"), columns, text)
    return text.split("\n", 1)[1]


def _field(path: Path, name: str, kind: type, value: Any) -> str:
    """One value as text; raises ResultsError if its type is not the column's."""
    is_bool = isinstance(value, (bool, np.bool_))
    missing = value is None or value is pd.NA
    if missing or (isinstance(value, numbers.Real) and not is_bool and math.isnan(value)):
        if name in NULLABLE:
            return ""
    elif kind is str and isinstance(value, str):
        if not any(c in value for c in "\n\r\0") and not _SURROGATE.search(value):
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


def header(columns: dict[str, type]) -> str:
    """The first line of a file with these columns."""
    return text_of(columns, [])


def text_of(columns: dict[str, type], records: Iterable[Sequence[str]]) -> str:
    """Header and records as the text of a file."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(records)
    return buffer.getvalue()


def _shorten(text: str, width: int = 160) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
