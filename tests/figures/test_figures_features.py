"""Speed-ups and features read from made-up measures: numbers by hand, figures, tables, claims."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lib import claims, figures, paths
from lib.results import measured
from lib.results.reading import NoRuns, Source, load
from tests.support.made_up_kernels import write_kernels
from tests.support.made_up_measures import DENSE_S, INPUT_DENSITY, KEPT, write_measured

OURS = [
    name for name in (*figures.FIGURES, *figures.TABLES) if name[:8] in ("speedups", "features")
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    write_measured(folder)
    return folder


def test_speedups_sum_layers_and_segments(root: Path) -> None:
    found = measured.speedups(load("speedups", Source("quick", root), model="alexnet-s"))
    dense = found[found["method"] == "dense"]
    sparse = found[found["method"] == "sparse_momentum"]
    assert np.allclose(dense["full"], 1 / INPUT_DENSITY)
    assert np.allclose(sparse["full"], 1 / (INPUT_DENSITY * 0.1))
    assert np.allclose(found["channel"], 1 / 0.9)
    assert np.allclose(dense["removed"], 1) and np.allclose(sparse["removed"], 1.25)
    assert np.allclose(sparse["removed_channels"], 0.1)
    assert np.allclose(sparse["removed_weights"], 0.3)
    assert DENSE_S != 1  # a ratio, not a time


def test_segments_count_by_their_time(root: Path) -> None:
    """A ratio of sums, not a mean of ratios: the slow layer decides."""
    runs = load("speedups", Source("quick", root), model="alexnet-s", method="dense", seed=0)
    rows = measured.measures(runs, "speedups")
    slow = rows["layer"] == "features.0"
    changed = rows.copy()
    changed.loc[slow & (rows["quantity"] == "dense_s"), "value"] = 9.0
    changed.loc[slow & (rows["quantity"] == "full_sparse_s"), "value"] = 9.0
    total, rest = 9.0 + 2 * DENSE_S, 9.0 + 2 * DENSE_S * INPUT_DENSITY
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured, "measures", lambda runs, measure: changed)
        assert measured.speedups(runs)["full"].iloc[0] == pytest.approx(total / rest)


def test_pooled_and_equal_weighting_differ(root: Path) -> None:
    found = measured.specialisation(load("features", Source("quick", root), model="alexnet-s"))
    dense = found[found["method"] == "dense"].iloc[0]
    a, b = KEPT["features.2"], KEPT["features.5"]
    assert dense["pooled"] == pytest.approx((a * 0.15 + b * 0.30) / (a + b))
    assert dense["equal"] == pytest.approx(0.225)


def test_last_relu_of_a_wrn_is_left_out(root: Path) -> None:
    layers = measured.feature_layers(load("features", Source("quick", root), model="wrn-10-1"))
    assert set(layers["layer"]) == {"block1.0.relu1"}
    alexnet = measured.feature_layers(load("features", Source("quick", root), model="alexnet-s"))
    assert list(alexnet["index"][:2]) == [0, 1]


def test_histograms_are_shares_of_the_kept_channels(root: Path) -> None:
    found = measured.histograms(load("features", Source("quick", root)))
    shares = found["alexnet-s", "dense", 1]
    assert shares.shape == (49,)
    kept = KEPT["features.5"]
    assert shares[7] == pytest.approx((kept - 1) / kept) and shares.sum() == shares[7]


def test_bins_are_those_of_the_measurement() -> None:
    from lib.measures.features import BIN_EDGES

    assert np.array_equal(BIN_EDGES, measured.BIN_EDGES)


def test_official_means_are_the_published_ones() -> None:
    """Means computed from the authors' arrays, pooled and with layers weighted equally."""
    expected = {
        "alexnet-s": (19.73, 18.00, 19.10, 16.83),
        "vgg16-d": (19.80, 18.70, 17.68, 17.99),
        "wrn-28-2": (16.38, 16.66, 14.64, 15.11),
    }
    for model, values in expected.items():
        means = measured.official_means(model)
        found = [means[m][k] for k in ("pooled", "equal") for m in ("dense", "sparse_momentum")]
        assert found == pytest.approx(values, abs=0.011), model
    assert measured.official_means("wrn-10-1") == {}


def test_layer_densities_are_means_over_seeds(root: Path) -> None:
    found = measured.layer_densities(
        load("features", Source("quick", root), method="sparse_momentum")
    )
    cell = found[(found["model"] == "alexnet-s") & (found["epoch"] == 2)].set_index("layer")
    assert cell.loc["features.0.weight", "density"] == pytest.approx(0.81)
    assert list(cell.index) == ["features.0.weight", "features.3.weight"]


def test_every_figure_and_table_is_drawn_once_and_alike(root: Path) -> None:
    write_kernels(root)
    said: list[str] = []
    written = figures.draw_all(Source("quick", root), OURS, said.append)
    assert not said
    assert {path.stem for path in written} == set(OURS)
    for path in written:
        assert path.stat().st_size > 200, path
    first = {path: path.read_bytes() for path in written if path.suffix == ".pdf"}
    heat = "features_layer_densities"
    figures.draw_all(Source("quick", root), [heat])
    again = figures.output_dir(Source("quick", root)) / f"{heat}.pdf"
    assert again.read_bytes() == first[again]


def test_what_is_missing_is_skipped_with_a_line(tmp_path: Path) -> None:
    said: list[str] = []
    assert figures.draw_all(Source("quick", tmp_path), OURS, said.append) == []
    assert len(said) == len([n for n in figures.FIGURES if n in OURS]) + len(
        [n for n in figures.TABLES if n in OURS]
    )
    assert any("python -m lib run features --profile quick" in line for line in said)


def test_runs_without_measures_are_told_apart_from_no_runs(tmp_path: Path) -> None:
    write_measured(tmp_path, "smoke", measured=False)
    with pytest.raises(NoRuns, match="none was measured"):
        measured.speedups(load("speedups", Source("smoke", tmp_path)))


def test_claims_follow_the_rule(root: Path) -> None:
    judged = claims.verdict_table(Source("quick", root)).set_index("id")
    # -1.0, -1.1, -1.2 points by seed: below zero.
    lower = judged.loc["features_more_general_alexnet-s_equal"]
    assert lower["verdict"] == "reproduced" and lower["n"] == 3
    assert lower["ours_mean"] == pytest.approx(-1.1)
    assert lower["paper_value"] == pytest.approx(16.83 - 19.10, abs=0.02)
    # Exactly nothing: inside the margin, hence not lower.
    same = judged.loc["features_more_general_wrn-28-2_pooled"]
    assert same["verdict"] == "not reproduced" and "WRN-10-1" in same["detail"]
    # 10 % of the weights: 1 / (0.8 * 0.1); 30 %: 1 / (0.8 * 0.3).
    largest = judged.loc["speedup_estimate_largest"]
    assert largest["ours_mean"] == pytest.approx(12.5)
    least = judged.loc["speedup_estimate_least"]
    assert least["ours_mean"] == pytest.approx(1 / 0.24)
    assert least["paper_value"] == 2.74 and largest["paper_value"] == 5.61
    for row in (largest, least):
        assert row["verdict"] == "not comparable" and "1.25 to 1.25" in row["detail"]
    clock = judged.loc["speedup_measured"]
    assert clock["ours_mean"] == pytest.approx(-20) and clock["verdict"] == "reproduced"


def test_drawing_imports_no_torch() -> None:
    code = "import sys, lib.figures, lib.claims, lib.report.report; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=paths.REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
