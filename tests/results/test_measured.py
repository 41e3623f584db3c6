"""Speed-ups and features read from made-up measures: numbers by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lib import paths
from lib.results import measured
from lib.results.reading import NoRuns, Source, load
from tests.support.made_up_measures import DENSE_S, INPUT_DENSITY, KEPT, write_measured


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    write_measured(folder)
    write_measured(folder, "hours")
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


def test_bins_are_those_of_the_measurement() -> None:
    from lib.measures import BIN_EDGES

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


def test_runs_without_measures_are_told_apart_from_no_runs(tmp_path: Path) -> None:
    write_measured(tmp_path, "smoke", measured=False)
    with pytest.raises(NoRuns, match="none was measured"):
        measured.speedups(load("speedups", Source("smoke", tmp_path)))


def test_drawing_imports_no_torch() -> None:
    code = "import sys, lib.figures, lib.claims, lib.report.report; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=paths.REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
