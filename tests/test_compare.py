"""Somebody's own rows beside the committed ones."""

from pathlib import Path

import pandas as pd
import pytest

from lib.paths import REPO
from lib.results.compare import compare


def test_each_cell_is_named_by_how_it_came_out(tmp_path: Path) -> None:
    rows = pd.read_csv(REPO / "results/quick/main_results.csv", dtype=str, keep_default_na=False)
    shift = {"static": 60.0, "set": 0.01}  # of all seeds: beyond the interval, and within it
    moved = rows.test_error_pct.astype(float) + rows.method.map(shift).fillna(0)
    rows["test_error_pct"] = moved.clip(upper=99).map("{:.6g}".format)
    (tmp_path / "quick").mkdir()
    rows.to_csv(tmp_path / "quick/main_results.csv", index=False)
    cells = compare("quick", tmp_path)
    said = cells.groupby("method").said.unique().map(set)
    assert said["static"] == {"differs"} and said["set"] == {"within its interval"}
    assert said["sparse_momentum"] == said["dense"] == {"same bits"}
    assert set(cells.n) == {3}


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(tmp_path)):
        compare("quick", tmp_path)
