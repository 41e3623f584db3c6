"""The planned runs that are done: selected, counted, and read again when the file changes."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from lib import experiments, paths
from lib.results import reading
from lib.results.reading import NoRuns, Source, at_chance, load
from lib.results.store import append_run
from lib.stats import wilson
from tests.support.made_up_grid import made_up_row, write_grid


def test_a_source_names_its_files_and_scale(tmp_path: Path) -> None:
    assert Source("quick", "").root is None and not Source("paper").reduced
    source = Source("quick", str(tmp_path)).at("smoke")
    assert source == Source("smoke", tmp_path) and source.reduced
    assert source.csv("ablations") == paths.results_csv("smoke", "ablations", tmp_path)


def test_where_takes_any_field_of_a_run_and_refuses_others(tmp_path: Path) -> None:
    write_grid(tmp_path, "main_results", "quick")
    runs = load("main_results", Source("quick", tmp_path), method=["set", "dsr"], nesterov=True)
    assert set(runs.rows["method"]) == {"set", "dsr"} and runs.methods == ["dsr", "set"]
    assert len(runs.rows) == len(runs.planned) and runs.missing == 0
    with pytest.raises(ValueError, match="did you mean 'density'"):
        runs.where(densty=0.1)
    with pytest.raises(ValueError, match="not one cell"):
        runs.by_seed(method="set")


def test_published_rows_must_exist() -> None:
    with pytest.raises(ValueError, match="has no row with"):
        reading.published_rows("mnist_sparse_summary", method="rigl")
    with pytest.raises(ValueError, match="unknown column"):
        reading.published_rows("mnist_sparse_summary", methd="set")


def test_rows_read_earlier_are_read_again_when_the_file_changes(tmp_path: Path) -> None:
    write_grid(tmp_path, "main_results", "smoke", keep=lambda run: run.seed == 0)
    first = load("main_results", Source("smoke", tmp_path))
    first.rows["test_error_pct"] = -1.0  # what a caller does to its frame is its own
    again = load("main_results", Source("smoke", tmp_path))
    assert again.rows["test_error_pct"].min() > 0
    write_grid(tmp_path, "main_results", "smoke", keep=lambda run: run.seed == 1)
    assert len(load("main_results", Source("smoke", tmp_path)).rows) == 2 * len(again.rows)


def test_runs_with_other_settings_are_not_read_and_diverged_ones_are_counted(
    tmp_path: Path,
) -> None:
    write_grid(tmp_path, "main_results", "smoke", keep=lambda run: run.method == "dense")
    csv = paths.results_csv("smoke", "main_results", tmp_path)
    planned = experiments.runs("main_results", "smoke")
    lost = next(run for run in planned if run.method == "set")
    for run, error in ((planned[0].overridden(epochs=77), 50.0), (lost, None)):
        append_run(csv, made_up_row(run, "main_results", "smoke", error), [], [])
    runs = load("main_results", Source("smoke", tmp_path))
    assert set(runs.rows["method"]) == {"dense"} and runs.rows["test_error_pct"].max() < 50
    assert "1 diverged" in runs.scale() and "77" not in runs.scale()
    with pytest.raises(NoRuns, match="1 diverged"):
        runs.where(method="set", density=lost.density, seed=lost.seed).needed()


def test_outcomes_say_who_learned_and_means_are_of_those(tmp_path: Path) -> None:
    def error(run: object) -> float | None:
        return {0: 2.0, 1: 88.65}.get(run.seed)  # type: ignore[attr-defined]

    write_grid(tmp_path, "main_results", "quick", error, keep=lambda run: run.method == "set")
    runs = load("main_results", Source("quick", tmp_path), method="set", density=0.05)
    assert runs.outcomes().set_index("seed")["learned"].to_dict() == {0: True, 1: False, 2: False}
    assert runs.errors()["test_error_pct"].tolist() == [2.0]
    assert runs.errors()["weights"].tolist() == [5.0]
    (share,) = runs.shares().to_dict("records")
    assert (share["method"], share["k"], share["n"]) == ("set", 1, 3)
    assert (share["low"], share["high"]) == wilson(1, 3)[3:]
    assert "3 seeds" in runs.scale()


def test_seeds_of_a_cell_are_counted_whatever_computed_them(tmp_path: Path) -> None:
    planned = [r for r in experiments.runs("main_results", "quick") if r.method == "dense"]
    csv = paths.results_csv("quick", "main_results", tmp_path)
    for run, kernels in zip(planned, ("torch", "perceptron", "perceptron"), strict=True):
        row = made_up_row(run, "main_results", "quick", 2.0)
        append_run(csv, {**row, "kernels": kernels}, [], [])
    runs = load("main_results", Source("quick", tmp_path), method="dense")
    assert ", 3 seeds," in runs.scale()


def test_texts_of_numbers() -> None:
    nan = float("nan")
    assert reading.range_text(-0.1, 0.234, sign=True) == "−0.10 to +0.23"
    assert reading.range_text(nan, 1) == "–" and reading.p_text(nan) == "–"
    assert (reading.p_text(0.0004), reading.p_text(0.0124)) == ("< 0.001", "0.012")
    assert reading.published_text({"test_error_pct": 1.47, "standard_error": nan}) == "1.47"
    assert reading.interval_text(-0.001, -0.12, 0.11, sign=True) == "+0.00 [−0.12, +0.11]"


def test_chance_is_told_by_the_error_or_by_the_loss() -> None:
    rows = pd.DataFrame(
        [
            ("mnist", 79.0, 2.1),
            ("mnist", 80.5, 0.3),
            ("mnist", 60.0, 2.27),  # guessing among ten: 2.303
            ("imagenet", 60.0, 2.27),  # among a thousand: 6.908
            ("imagenet", 60.0, 6.8),
        ],
        columns=["dataset", "test_error_pct", "train_loss"],
    )
    assert at_chance(rows).tolist() == [False, True, True, False, True]
