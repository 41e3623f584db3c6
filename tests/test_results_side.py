"""Rows, statistics, claims and the bound notebooks: from CSVs to verdicts, figures and report."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from lib import paths, report
from lib.results import claims, rows, stats
from lib.results.stats import NAN, Interval
from lib.runs import notebooks

COMMITTED = sorted(notebooks.NOTEBOOKS.glob("*.ipynb"))
DRAW = np.random.default_rng(0).normal(0.3, 1, 12)


# ------------------------------------------------------------------------------------ statistics


def test_intervals_and_p_agree_with_scipy() -> None:
    one = stats.t_interval([*DRAW, NAN])
    known = scipy_stats.ttest_1samp(DRAW, 0)
    assert one.n == 12 and one.mean == pytest.approx(DRAW.mean())
    assert (one.low, one.high) == pytest.approx(tuple(known.confidence_interval()))
    assert stats.p_different(one) == pytest.approx(known.pvalue)
    other = np.random.default_rng(1).normal(0, 2, 7)
    welch = scipy_stats.ttest_ind(DRAW, other, equal_var=False).confidence_interval()
    error = other.std(ddof=1) / np.sqrt(7)
    ours = stats.minus_published(DRAW, float(other.mean()), float(error), 7)
    assert (ours.low, ours.high) == pytest.approx((welch.low, welch.high))


def test_holm_agrees_with_the_definition_and_leaves_out_what_is_nan() -> None:
    assert stats.holm([0.01, NAN, 0.04, 0.03]).tolist() == pytest.approx(
        [0.03, NAN, 0.06, 0.06], nan_ok=True
    )


@pytest.mark.parametrize(
    ("kind", "low", "high", "said"),
    [
        ("lower", -0.9, -0.1, "reproduced"),
        ("lower", 0.1, 0.9, "not reproduced"),
        ("lower", -0.15, 0.15, "not reproduced"),  # no difference within the margin
        ("lower", -0.5, 0.5, "inconclusive"),
        ("match", -9, 0.1, "reproduced"),
        ("match", 0.3, 9, "not reproduced"),
        ("at_least", -0.1, 9, "reproduced"),
        ("at_least", -9, -0.3, "not reproduced"),
        ("same", -0.1, 0.1, "reproduced"),
        ("same", -0.9, -0.3, "not reproduced"),
        ("value", -0.1, 0.3, "inconclusive"),
        ("lower", NAN, NAN, "inconclusive"),
    ],
)
def test_verdict_by_where_the_interval_lies(kind: str, low: float, high: float, said: str) -> None:
    mean = (low + high) / 2
    sd = (high - mean) * np.sqrt(10) / scipy_stats.t.ppf(0.975, 9)
    one = Interval(mean, low, high, 10, sd)
    assert stats.verdict(kind, one, 0.2) == said
    p = stats.p_value(kind, one, 0.2)
    assert np.isnan(p) or (p < 0.05) == (said == "reproduced")
    if said == "reproduced":
        assert stats.verdict(kind, one._replace(rarer=True), 0.2) == "inconclusive"


# ------------------------------------------------------------------------------------------ rows


def made_up(errors: dict[str, list[float]]) -> pd.DataFrame:
    """Rows of two methods; an error above 80 % did not learn."""
    return pd.DataFrame(
        [{"method": method, "seed": seed, "dataset": "mnist", "test_error_pct": error,
          "learned": error < 80} for method, mine in errors.items()
         for seed, error in enumerate(mine)]
    )  # fmt: skip


def test_two_cells_are_paired_by_seed_and_log_ratios_where_a_run_failed() -> None:
    a, b = {"method": "a"}, {"method": "b"}
    both = made_up({"a": [2.0, 3.0, 4.0], "b": [1.0, 1.0, 1.0]})
    one = rows.minus(both, a, b)
    assert one is not None and one.mean == 2 and one.unit == "points"
    failed = rows.minus(made_up({"a": [2.0, 90.0, 4.0], "b": [1.0, 1.0, 1.0]}), a, b)
    assert failed is not None and failed.n == 2 and failed.rarer
    assert failed.mean == pytest.approx(100 * np.log([2, 4]).mean())
    assert rows.minus(both, a, {"method": "c"}) is None
    with pytest.raises(ValueError, match="the same seed"):
        rows.by_seed(both)
    with pytest.raises(KeyError, match="optimiser"):
        rows.select(both, optimiser="adam")


def test_the_tuned_setting_is_chosen_by_the_validation_error_of_three_seeds() -> None:
    table = pd.DataFrame(
        [
            {"rate": rate, "seed": seed, "val_error_pct": rate + 9 * (seed == 3)}
            for rate in (0.4, 0.2)
            for seed in range(4)
        ]
    )
    best = rows.tuned(table, "rate")
    assert set(best.rate) == {0.2} and len(best) == 4  # the fourth seed chooses nothing
    assert rows.tuned(table[(table.rate != 0.4) | (table.seed != 1)], "rate").empty


def test_a_knob_replaces_a_field_of_the_grid() -> None:
    grid = rows.planned("ablations", "smoke", seed=[7], density=[0.3])
    assert set(grid.seed) == {7} and set(grid.density) == {0.3} and grid.run_id.is_unique
    assert rows.missing(grid, rows.load("ablations", "smoke", "/nowhere", grid)) != ""


def test_the_largest_scale_is_one_that_has_rows(tmp_path: Path) -> None:
    assert rows.largest("ablations") == "paper"
    assert rows.largest("ablations", "smoke") == "smoke"
    assert rows.largest("cifar10_table") in rows.SCALES
    assert rows.largest("ablations", "", tmp_path) == rows.SCALES[0]


def test_each_cell_is_named_by_how_it_came_out(tmp_path: Path) -> None:
    table = pd.read_csv(
        paths.REPO / "results/quick/main_results.csv", dtype=str, keep_default_na=False
    )
    shift = {"static": 60.0, "set": 0.01}  # of all seeds: beyond the interval, and within it
    moved = table.test_error_pct.astype(float) + table.method.map(shift).fillna(0)
    table["test_error_pct"] = moved.clip(upper=99).map("{:.6g}".format)
    (tmp_path / "quick").mkdir()
    table.to_csv(tmp_path / "quick/main_results.csv", index=False)
    cells = rows.compare("quick", tmp_path)
    said = cells.groupby("method").said.unique().map(set)
    assert said["static"] == {"differs"} and said["set"] == {"within its interval"}
    assert said["sparse_momentum"] == said["dense"] == {"same bits"}
    assert set(cells.n) == {3}


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(tmp_path)):
        rows.compare("quick", tmp_path)


# ---------------------------------------------------------------------------------------- claims


def test_every_claim_names_its_experiment_and_a_rule() -> None:
    table = claims.claims()
    assert table.index.is_unique
    assert set(table.kind) <= set(stats.RULES)
    assert set(table.whose.str.split().str[0]) == {"authors", "ours"}


def test_a_claim_is_what_its_weakest_part_says_and_none_is_forgotten() -> None:
    good, bad = stats.t_interval([-1.0, -1.1, -0.9]), stats.t_interval([1.0, 1.1, 0.9])
    for parts, profile, said in (
        ({"a": good, "b": good}, "paper", "reproduced"),
        ({"a": good, "b": bad}, "paper", "not reproduced"),
        ({"a": good, "b": None}, "paper", "inconclusive"),
        ({"a": good}, "smoke", "not comparable"),
        ({"a": None}, "paper", claims.NO_ROWS),
    ):
        judged = claims.judge("ablation_worst", parts, profile=profile)
        assert judged.row["verdict"] == said and said in judged._repr_markdown_()
    with pytest.raises(KeyError):
        claims.judge("no such claim", {"a": good}, profile="paper")
    with pytest.raises(ValueError, match="insensitive_momentum"):
        claims.verdicts("no such profile", "sensitivity")


# ------------------------------------------------------------------------------------- notebooks


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_notebook_is_plain(path: Path) -> None:
    """Without paths of a machine; its knobs are literals with the usual defaults."""
    assert str(paths.REPO) not in path.read_text("utf-8")
    knobs = notebooks.knobs_of(path)
    assert knobs["profile"] in ("quick", "") and knobs["results"] == ""


@pytest.mark.parametrize("profile", ["smoke", "quick", "hours"])  # paper: the committed report
@pytest.mark.parametrize("path", report.chapters(), ids=lambda path: path.stem)
def test_notebook_runs_at_every_profile(path: Path, profile: str) -> None:
    report.execute(path, profile=profile, results="")


BUILD = """
import sys
from pathlib import Path
import lib.__main__, lib.runs.runner
from lib import report
(folder := Path(sys.argv[1]) / "figures").mkdir()
report.write(report.build(folder, folder.parent / "results"), folder)
assert "torch" not in sys.modules
"""


def test_committed_report_figures_and_verdicts_are_those_of_the_rows(tmp_path: Path) -> None:
    """Built without torch, which the commands don't load either; else `make report` is due."""
    subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], check=True, cwd=paths.REPO)
    made = [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert {path.name for path in made} >= {"report.pdf", "report.html", "report.md"}
    shown = re.findall(r"(\w+)\.png\)", (tmp_path / "figures" / "report.md").read_text("utf-8"))
    first = ["main_results_cost", "fixed_point", "mechanism", "trainability", "speedups_clock"]
    assert shown[:5] == first and len(set(shown)) == len(shown)
    for name in made:
        if name.suffix in (".md", ".html", ".ipynb"):
            assert (tmp_path / name).read_text() == (paths.REPO / name).read_text(), name
        elif name.suffix == ".png":
            new, committed = (plt.imread(root / name) for root in (tmp_path, paths.REPO))
            assert new.shape == committed.shape, name
            assert np.mean(np.abs(new - committed) > 0.2) < 1e-3, name
        elif name.suffix == ".csv":
            committed = pd.read_csv(paths.REPO / name)
            pd.testing.assert_frame_equal(pd.read_csv(tmp_path / name), committed, rtol=1e-9)


def test_bad_parameters_of_notebooks_are_refused(tmp_path: Path) -> None:
    for only, given, what in (
        (["02_ablation"], {}, "02_ablations"),
        (["02_ablations"], {"seed": "[1]"}, "seeds"),
        (["02_ablations"], {"seeds": "all"}, "all"),
        (["02_ablations"], {"seeds": "3"}, "list"),
        (["02_ablations"], {"profile": "paper"}, "profile"),
    ):
        with pytest.raises(ValueError, match=what):
            notebooks.execute_all("smoke", only, given, tmp_path)
    assert not any(tmp_path.iterdir())


def test_papermill_runs_a_notebook_with_a_knob(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One trains what is missing; one that fails leaves its copy, and RuntimeError names it."""
    monkeypatch.setenv("CHECKPOINT_ROOT", str(tmp_path / "checkpoints"))
    given = {"seeds": "[0]", "train": "False"}
    (path,) = notebooks.execute_all("smoke", ["03_depth_scaling"], given, tmp_path)
    cells = json.loads(path.read_text("utf-8"))["cells"]
    assert all(cell["execution_count"] for cell in cells if cell["cell_type"] == "code")
    assert "text/markdown" in json.dumps(cells)
    folder = tmp_path / "notebooks"
    folder.mkdir()
    failing = _failing(json.loads(path.read_text("utf-8")))
    (folder / "a.ipynb").write_text(json.dumps(failing), "utf-8")
    monkeypatch.setattr(notebooks, "NOTEBOOKS", folder)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        notebooks.execute_all("smoke", results_root=tmp_path)


def _failing(book: dict[str, object]) -> dict[str, object]:
    cell = {"cell_type": "code", "id": "a", "outputs": [], "execution_count": None}
    tagged = {**cell, "metadata": {"tags": ["parameters"]}, "source": 'profile = ""\nresults = ""'}
    return book | {"cells": [tagged, {**cell, "id": "b", "metadata": {}, "source": "1 / 0"}]}
