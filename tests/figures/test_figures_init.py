"""Initial densities: figure, table and claims on made-up errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lib import claims, experiments, figures
from lib.config import Run
from lib.figures import initial_densities as figures_init
from lib.masking import Masking
from lib.models import build_model
from lib.results.reading import Source
from tests.support.made_up_grid import write_grid

LEVEL = {"sparse_momentum": 2.0, "dsr": 3.0, "set": 4.0, "deepr": 5.0, "static": 9.0}


def error(run: Run) -> float:
    """Uniform densities cost every method but sparse momentum ten points."""
    uniform = run.init == "uniform" and run.method != "sparse_momentum"
    return LEVEL[run.method] + 10 * uniform + 0.01 * run.seed


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_grid(tmp_path, "initial_densities", "quick", error)
    return tmp_path


def test_the_uniform_runs_are_those_of_the_curve() -> None:
    for profile in ("smoke", "quick", "paper"):
        names = ("main_results", "mnist_compression")
        curve = {run.run_id for name in names for run in experiments.runs(name, profile)}
        mine = experiments.runs("initial_densities", profile)
        assert {run.run_id for run in mine if run.init == "uniform"} <= curve
        assert not curve & {run.run_id for run in mine if run.init == "erk"}
        assert {run.method for run in mine} == set(LEVEL)


def test_table_pairs_the_seeds(root: Path) -> None:
    made = figures_init.initial_densities_table(Source("quick", root))
    rows = made.frame.set_index(["method", "weights (%)"])
    assert len(rows) == 5 * 3
    dsr = rows.loc[("DSR", "2")]
    assert dsr["ERK − uniform (points)"] == "−10.00 [−10.00, −10.00]" and dsr["n"] == "3"
    assert dsr["uniform (%)"].startswith("13.01 [") and dsr["ERK (%)"].startswith("3.01 [")
    assert dsr["published (%)"] == "1.86 ± 0.06"
    assert rows.loc[("Sparse momentum", "1"), "ERK − uniform (points)"].startswith("+0.00")


def test_figure_shows_every_seed_of_both_and_the_published_value(root: Path) -> None:
    plot = figures_init.initial_densities(Source("quick", root))
    assert [ax.get_title() or ax.get_title(loc="left") for ax in plot.axes] == [
        f"{share} % of the weights" for share in (1, 2, 5)
    ]
    for ax in plot.axes:
        seeds = [line for line in ax.lines if line.get_marker() == "."]
        assert len(seeds) == 10 and all(len(line.get_xdata()) == 3 for line in seeds)
        published = [line for line in ax.lines if line.get_marker() == "|"]
        assert sum(len(line.get_xdata()) for line in published) == 5
    assert "reduced scale" in " ".join(text.get_text() for text in plot.texts)


def test_lenet5_shows_who_learned(tmp_path: Path) -> None:
    def stuck(run: Run) -> float:
        return 90.0 if run.init == "uniform" and run.seed > 0 and run.density == 0.01 else 1.0

    write_grid(tmp_path, "initial_densities", "quick", stuck, lambda run: run.density != 0.05)
    plot = figures_init.initial_densities_lenet5(Source("quick", tmp_path))
    (ax,) = plot.axes
    # uniform and ERK at 1 %, then at 5 %, of which there are no runs
    assert [text.get_text() for text in ax.texts] == ["1 of 3", "–", "3 of 3", "–"]
    dots = [list(line.get_ydata()) for line in ax.lines if line.get_marker() in "os"]
    assert dots[0] == [1.0, 90.0, 90.0] and dots[2] == [1.0, 1.0, 1.0]
    assert "reduced scale" in " ".join(text.get_text() for text in plot.texts)


@pytest.mark.parametrize("seed", range(3))
def test_the_signal_fades_at_the_start_as_the_caption_says(seed: int) -> None:
    """How far LeNet-5's logits differ between images, from masks at 1 % and from none."""

    def spread(density: float) -> float:
        model = build_model("lenet5", generator=torch.Generator().manual_seed(seed))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(seed)
        Masking(model, optimizer, density=density, generator=generator)
        images = torch.randn(200, 1, 28, 28, generator=generator)
        with torch.no_grad():
            return float(model.eval()(images).std(0).mean())

    assert spread(0.01) < 1e-3 * spread(1.0)


def test_one_side_alone_is_drawn_without_a_difference(tmp_path: Path) -> None:
    write_grid(tmp_path, "initial_densities", "quick", error, lambda run: run.init == "uniform")
    frame = figures_init.initial_densities_table(Source("quick", tmp_path)).frame
    assert set(frame["ERK − uniform (points)"]) == set(frame["ERK (%)"]) == {"–"}
    assert figures.draw_all(Source("quick", tmp_path), ["initial_densities"], lambda _: None)


def test_claims_compare_methods_from_erk_densities_only(root: Path) -> None:
    rows = claims.verdict_table(Source("quick", root), "01_main_results").set_index("id")
    for method in ("dsr", "set", "deepr", "static"):
        row = rows.loc[f"mnist_erk_lower_than_{method}"]
        assert row["ours_mean"] == pytest.approx(2 - LEVEL[method])
        assert row["verdict"] == "reproduced" and row["n"] == 3
