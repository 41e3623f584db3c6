"""One case of each kind of the soak, in a process of its own: it forks."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from lib import paths


def test_one_case_of_each_kind(tmp_path: Path) -> None:
    table = tmp_path / "soak.csv"
    words = ["--scale", "0.01", "--minutes", "8", "--csv", str(table)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", *words],
        cwd=paths.REPO,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with open(table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 and {row["passed"] for row in rows} == {"true"}
    surfaces = {row["what"].removeprefix("bad input: ") for row in rows if "bad" in row["what"]}
    assert surfaces == {
        "command line",
        "notebook parameters",
        "CSV",
        "data",
        "checkpoint",
        "Masking",
    }
    assert all(int(row["n"]) > 0 and row["date"] and row["commit"] for row in rows)
