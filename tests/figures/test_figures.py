"""Figures and tables: drawn without torch, the same bytes each time, with nothing left unsaid."""

from __future__ import annotations

import math
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lib import experiments, figures, paths
from lib.config import METHODS, Run
from lib.results import reading
from lib.results.published import published
from lib.results.reading import Source
from lib.results.store import ResultsError, append_run
from lib.stats import t_interval
from tests.support.made_up_grid import made_up_row, plausible, write_grid

NAME = "main_results_lenet300-100"
LENET = {"dataset": "mnist", "model": "lenet300-100"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results with the whole quick grid and one seed (and a half) of the paper's, without SET."""
    folder = tmp_path_factory.mktemp("results")
    assert write_grid(folder, "main_results", "quick", keep=on_lenet) > 50
    write_grid(folder, "main_results", "paper", keep=started)
    return folder


def on_lenet(run: Run) -> bool:
    return run.model == "lenet300-100"


def started(run: Run) -> bool:
    if run.method == "set" or not on_lenet(run):
        return False
    return run.seed == 0 or (run.seed == 1 and run.method in ("dense", "dsr"))


# ------------------------------------------------------------------------------------ all of them


def test_drawn_without_torch_in_ten_seconds_with_equal_bytes(root: Path) -> None:
    """In a fresh process without torch (as `make figures`), and again in this one."""
    code = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'torchvision'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "from lib.figures import draw_all\n"
        "from lib.results.reading import Source\n"
        f"for path in draw_all(Source('quick', {str(root)!r})): print(path)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=paths.REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the processor, so that other work on the machine doesn't count.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    files = [Path(line) for line in done.stdout.splitlines() if not line.startswith("skipped")]
    assert {f"{NAME}.{kind}" for kind in ("pdf", "png", "md", "tex")} <= {f.name for f in files}
    assert {f.parent for f in files} == {root / "quick" / "figures"}
    first = {f: f.read_bytes() for f in files}
    assert all(first.values())
    again = figures.draw_all(Source("quick", root), say=lambda line: None)
    assert sorted(again) == sorted(files)
    for path in again:
        assert path.read_bytes() == first[path], path.name
    assert not list((root / "quick" / "figures").glob(".*"))


def test_without_runs_each_is_skipped_with_one_line_that_helps(tmp_path: Path) -> None:
    said: list[str] = []
    assert figures.draw_all(Source("quick", tmp_path), say=said.append) == []
    assert len(said) == len(figures.FIGURES) + len(figures.TABLES)
    (line,) = [s for s in said if s.startswith(f"skipped figure {NAME}:")]
    assert "python -m lib run main_results --profile quick" in line
    assert not any(tmp_path.iterdir())


def test_default_place_is_figures_of_the_repository() -> None:
    assert figures.output_dir(Source("quick")) == paths.REPO / "figures" / "quick"


def test_unknown_names_and_damaged_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no figure or table"):
        figures.draw_all(Source("quick", tmp_path), only=["main_result"])
    with pytest.raises(ValueError, match="did you mean 'quick'"):
        figures.draw_all(Source("quik", tmp_path))
    csv = paths.results_csv("quick", "main_results", tmp_path)
    csv.parent.mkdir(parents=True)
    csv.write_text("run_id,method\na,b\n")
    with pytest.raises(ResultsError, match=r"main_results\.csv:1"):
        figures.draw_all(Source("quick", tmp_path))


# -------------------------------------------------------------------------------- what is drawn


def curve(plot: figures.Plot, axes: int, label: str) -> tuple[np.ndarray, np.ndarray]:
    (line,) = [n for n in plot.axes[axes].lines if str(n.get_label()).startswith(label)]
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def test_means_of_the_rows_are_drawn(root: Path) -> None:
    plot = figures.main_results_lenet(Source("quick", root))
    runs = reading.load("main_results", Source("quick", root), **LENET, method="dsr").rows
    means = runs.groupby("density")["test_error_pct"].mean()
    x, accuracy = curve(plot, 0, "DSR (n = 3)")
    assert x == pytest.approx(100 * means.index.to_numpy(), rel=0.05)  # moved aside a little
    assert accuracy == pytest.approx(100 - means.to_numpy())
    _, error = curve(plot, 1, "DSR (n = 3)")
    assert error == pytest.approx(means.to_numpy())
    assert plot.axes[1].yaxis_inverted() and plot.axes[1].get_yscale() == "log"
    _, level = curve(plot, 0, "Dense (n = 3)")
    dense = reading.load("main_results", Source("quick", root), **LENET, method="dense").by_seed()
    assert level[0] == pytest.approx(100 - dense.mean())


def test_every_seed_is_a_dot_and_intervals_are_bars(root: Path) -> None:
    plot = figures.main_results_lenet(Source("quick", root))
    runs = reading.load("main_results", Source("quick", root), **LENET, method="set").rows
    dots = [
        n
        for n in plot.axes[1].lines
        if n.get_marker() == "." and n.get_color() == figures.PALETTE["set"]
    ]
    drawn = np.concatenate([np.asarray(n.get_ydata()) for n in dots])
    assert sorted(drawn) == pytest.approx(sorted(runs["test_error_pct"]))
    one = runs.loc[runs["density"] == 0.01, "test_error_pct"]
    low, high = t_interval(one)[1:3]
    segments = [s for c in plot.axes[1].collections for s in getattr(c, "get_segments", list)()]
    ends = [sorted(s[:, 1]) for s in segments]
    assert any(e == pytest.approx([low, high]) for e in ends)


def test_a_slip_of_the_source_is_drawn_from_its_raw_runs(root: Path) -> None:
    plot = figures.main_results_lenet(Source("quick", root))
    x, y = curve(plot, 0, "published DSR at 1 %")
    raw = published("dsr_authors_raw_runs_wrn28-2_and_mnist")
    row = raw[(raw["model"] == "lenet300-100") & (raw["method"] == "dsr")].iloc[0]
    assert (x[0], y[0]) == (pytest.approx(1), pytest.approx(row["value"]))


def test_points_outside_the_window_are_marked(root: Path) -> None:
    window = figures.main_results_lenet(Source("quick", root)).axes[0]
    low, high = window.get_ylim()
    arrows = [n for n in window.lines if n.get_marker() == "v" and len(n.get_xdata()) == 1]
    static = figures.PALETTE["static"]
    filled = [n for n in arrows if n.get_color() == static and n.get_markerfacecolor() == static]
    runs = reading.load("main_results", Source("quick", root), **LENET, method="static").rows
    accuracy = 100 - runs.groupby("density")["test_error_pct"].mean()
    outside = ((accuracy < low) | (accuracy > high)).sum()
    assert outside > 0 and len(filled) == outside


def test_a_reduced_run_says_so_and_the_paper_profile_does_not(root: Path) -> None:
    said = {p: stamped(figures.main_results_lenet(Source(p, root))) for p in ("quick", "paper")}
    assert "Profile quick (reduced scale, not the paper's): 10 epochs" in said["quick"]
    assert "3 seeds, made-up processor." in said["quick"]
    assert "reduced" not in said["paper"] and "Profile paper: 100 epochs" in said["paper"]


def test_a_partial_grid_says_what_is_missing_and_has_no_interval_at_one_seed(root: Path) -> None:
    plot = figures.main_results_lenet(Source("paper", root))
    runs = reading.load("main_results", Source("paper", root), **LENET)
    assert runs.missing > 0 and "1–2 seeds" in stamped(plot)
    assert f"{runs.missing} of {len(runs.planned)} runs missing" in stamped(plot)
    labels = [text.get_text() for text in plot.legends[0].get_texts()]
    assert "Sparse momentum (n = 1)" in labels and "DSR (n = 2)" in labels
    assert [label for label in labels if label.startswith("SET")] == ["SET (published)"]
    frame = figures.main_results_lenet_table(Source("paper", root)).frame.set_index("method")
    assert set(frame.loc["Sparse momentum", "95 % interval"]) == {"–"}
    assert " to " in frame.loc["DSR", "95 % interval"].iloc[0]


def stamped(plot: figures.Plot) -> str:
    return " ".join(text.get_text() for text in plot.texts)


def test_runs_with_other_settings_and_diverged_ones_are_not_drawn(tmp_path: Path) -> None:
    write_grid(tmp_path, "main_results", "smoke", keep=lambda run: run.method == "dense")
    csv = paths.results_csv("smoke", "main_results", tmp_path)
    planned = experiments.runs("main_results", "smoke")
    lost = next(run for run in planned if run.method == "set")
    for run, error in (
        (planned[0].overridden(epochs=77), 50.0),
        (lost, None),
    ):
        append_run(csv, made_up_row(run, "main_results", "smoke", error), [], [])
    runs = reading.load("main_results", Source("smoke", tmp_path))
    assert set(runs.rows["method"]) == {"dense"} and runs.rows["test_error_pct"].max() < 50
    assert "1 diverged" in runs.scale() and "77" not in runs.scale()
    with pytest.raises(reading.NoRuns, match="1 diverged"):
        runs.where(method="set", density=lost.density, seed=lost.seed).needed()


def test_seeds_of_a_cell_are_counted_whatever_computed_them(tmp_path: Path) -> None:
    planned = [r for r in experiments.runs("main_results", "quick") if r.method == "dense"]
    csv = paths.results_csv("quick", "main_results", tmp_path)
    for run, kernels in zip(planned, ("torch", "perceptron", "perceptron"), strict=True):
        row = made_up_row(run, "main_results", "quick", 2.0)
        append_run(csv, {**row, "kernels": kernels}, [], [])
    assert (
        ", 3 seeds,"
        in reading.load("main_results", Source("quick", tmp_path), method="dense").scale()
    )


# ------------------------------------------------------------------------------------ the tables


def test_table_has_mean_interval_n_and_published(root: Path) -> None:
    table = figures.main_results_lenet_table(Source("quick", root))
    frame = table.frame
    row = frame[(frame["method"] == "Sparse momentum") & (frame["weights (%)"] == "5")].iloc[0]
    planned = [
        run
        for run in experiments.runs("main_results", "quick")
        if run.method == "sparse_momentum" and run.density == 0.05 and on_lenet(run)
    ]
    mean, low, high, n, _ = t_interval([plausible(run) for run in planned])
    assert row["test error (%)"] == f"{mean:.2f}"
    assert row["95 % interval"] == f"{low:.2f} to {high:.2f}"
    assert row["n"] == str(n) == "3"
    assert row["published (%)"] == "1.47 ± 0.03"
    assert row["ours − published"] == f"{mean - 1.47:+.2f}".replace("-", "−")
    slip = frame[(frame["method"] == "DSR") & (frame["weights (%)"] == "1")].iloc[0]
    assert slip["published (%)"].endswith("*") and "raw runs give 2.25" in table.note
    assert "reduced scale" in table.note


def test_markdown_and_latex_of_a_table() -> None:
    frame = pd.DataFrame({"weights (%)": ["1", "−2.5"], "name_1": ["a|b", "50 % & more"]})
    table = figures.Table(frame, "A & B", "± note")
    assert table.markdown().splitlines()[2:6] == [
        "| weights (%) | name_1 |",
        "| ---: | --- |",
        "| 1 | a\\|b |",
        "| −2.5 | 50 % & more |",
    ]
    latex = table.latex()
    assert r"\caption{A \& B}" in latex and r"\begin{tabular}{rl}" in latex
    assert r"$-$2.5 & 50 \% \& more \\" in latex and r"name\_1" in latex and r"$\pm$ note" in latex


# ---------------------------------------------------------------------------------- the palette


def test_every_method_has_its_own_colour_marker_and_name() -> None:
    assert list(figures.PALETTE) == list(figures.MARKERS) == list(reading.METHOD_NAMES)
    assert set(figures.PALETTE) == set(METHODS)
    for of in (figures.PALETTE, figures.MARKERS, reading.METHOD_NAMES):
        assert len(set(of.values())) == len(of)


# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
COLOUR_BLIND = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


def lab(linear: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of one linear RGB colour."""
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x, y, z = np.cbrt(to_xyz @ linear.clip(0, 1) / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", COLOUR_BLIND)
def test_colours_differ_for_the_colour_blind(vision: str) -> None:
    colours = []
    for colour in figures.PALETTE.values():
        code = colour.lstrip("#")
        srgb = np.array([int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)])
        linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
        colours.append(lab(np.array(COLOUR_BLIND[vision]) @ linear))
    distances = [math.dist(a, b) for i, a in enumerate(colours) for b in colours[i + 1 :]]
    assert min(distances) > 15  # just noticeable: 2.3


# ------------------------------------------------------------------------------------- reading


def test_where_takes_any_field_of_a_run_and_refuses_others(root: Path) -> None:
    runs = reading.load("main_results", Source("quick", root), method=["set", "dsr"], nesterov=True)
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
    first = reading.load("main_results", Source("smoke", tmp_path))
    first.rows["test_error_pct"] = -1.0  # what a caller does to its frame is its own
    again = reading.load("main_results", Source("smoke", tmp_path))
    assert again.rows["test_error_pct"].min() > 0
    write_grid(tmp_path, "main_results", "smoke", keep=lambda run: run.seed == 1)
    assert len(reading.load("main_results", Source("smoke", tmp_path)).rows) == 2 * len(again.rows)
