"""Kills, bad inputs, long processes and odd places: python -m tests.soak, or make soak.

Too long for the tests, which hold one case of each kind. Prints one table, and ends with code 1
where anything was found that was not wanted. Nothing outside of temporary folders is written but
the table, with --csv. The data sets must be there (DATA_ROOT).
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lib import data
from lib.cpu import library
from lib.runs.machine import versions
from tests.soak import bad_inputs, conditions, kills
from tests.soak.parts import Row, Share

# Part of the time each may take; what ends early leaves its rest to the others.
PARTS: dict[str, Callable[[Share], Row | list[Row]]] = {
    "trainings": kills.trainings,
    "writers": kills.writers,
    "inputs": functools.partial(bad_inputs.refused, say=lambda text: _say(f"  {text}")),
    "memory": conditions.memory,
    "places": conditions.places,
}
WHOLE_MINUTES = 20.0
COLUMNS = ("what", "wanted", "found", "n", "passed", "date", "commit")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, print and write the table; 0 if all was found as wanted."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=WHOLE_MINUTES, help="at most (20)")
    parser.add_argument(
        "--scale",
        type=float,
        help="part of the kills, rows and inputs (default: as of the minutes)",
    )
    parser.add_argument("--only", action="append", choices=PARTS, help="one part")
    parser.add_argument("--csv", type=Path, help="write the table there too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    library.available()  # compiled now, not in a child that is to say one sentence
    try:
        data.load("mnist")
    except data.DataError as error:
        _say(f"error: {error}")
        return 2
    part = min(1.0, options.scale or options.minutes / WHOLE_MINUTES)
    started = time.monotonic()
    deadline = started + 60 * options.minutes
    about = versions()
    commit = about["commit"] + ("+" if about["dirty"] else "")
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    lines: list[tuple[object, ...]] = []
    for name in options.only or PARTS:
        _say(f"{name} ...")
        found = PARTS[name](Share(part, deadline))
        for row in [found] if isinstance(found, Row) else found:
            lines.append((*row, date, commit))
    minutes = (time.monotonic() - started) / 60
    _print(lines, f"make soak, {date}, commit {commit}, {minutes:.0f} minutes")
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with open(options.csv, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(
                [str(v).lower() if isinstance(v, bool) else v for v in line] for line in lines
            )
    return 0 if all(line[4] for line in lines) else 1


def _print(lines: Sequence[tuple[object, ...]], title: str) -> None:
    widths = (42, 34, 46, 7, 5)
    print(title)
    for line in [("what", "wanted", "found", "n", "ok"), *lines]:
        shown = [*map(str, line[:4]), {True: "yes", False: "NO"}.get(line[4], line[4])]
        cells = [textwrap.wrap(text, width - 2) for text, width in zip(shown, widths, strict=True)]
        for k in range(max(map(len, cells))):
            parts = (cell[k] if k < len(cell) else "" for cell in cells)
            print("".join(f"{text:<{w}}" for text, w in zip(parts, widths, strict=True)).rstrip())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
