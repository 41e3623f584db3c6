"""Verdicts on made-up rows: the further main results, measures, the clock."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lib import claims, experiments
from lib.config import Run
from lib.results.reading import Source, model_name
from lib.stats import t_interval
from tests.support.made_up_grid import plausible, write_grid
from tests.support.made_up_kernels import BATCHES, training_ratio, write_kernels
from tests.support.made_up_measures import write_measured

OURS = ("mnist_compression", "cifar10_table", "wrn28_2_curve", "imagenet")


def error(run: Run) -> float:
    """CIFAR-10 and ImageNet above MNIST, so that the networks' rows can't be mixed up unseen."""
    return plausible(run) + {"mnist": 0, "cifar10": 5, "imagenet": 23}[run.dataset]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All quick rows, three seeds of the paper's, measures and the clock."""
    folder = tmp_path_factory.mktemp("results")
    for name in OURS:
        write_grid(folder, name, "quick", error)
        write_grid(folder, name, "paper", error, lambda run: run.seed < 3)
    write_measured(folder)
    write_kernels(folder)
    return folder


@pytest.fixture(scope="module")
def judged(root: Path) -> dict[str, dict[str, dict]]:
    return {
        profile: {
            row["id"]: row
            for row in claims.verdict_table(Source(profile, root), "01_main_results").to_dict(
                "records"
            )
        }
        for profile in ("quick", "paper")
    }


def test_every_network_of_the_table_has_its_claims(judged: dict) -> None:
    rows = judged["paper"]
    for model in experiments.CIFAR10_TABLE:
        assert model_name(model) in rows["cifar10_lower_than_snip"]["detail"]
    row = rows["cifar10_lower_than_snip"]
    assert (row["verdict"], row["n"]) == ("reproduced", 3)  # made up so: SNIP 5, ours 2.5


def test_a_reduced_profile_compares_methods_and_no_values(judged: dict) -> None:
    rows = judged["quick"]
    snip = rows["cifar10_lower_than_snip"]
    assert "AlexNet-b (not planned)" in snip["detail"]
    dropout = rows["mnist_variational_dropout_lower"]
    assert dropout["verdict"] == claims.NO_RUNS and "the paper's scale only" in dropout["detail"]
    wrn = rows["wrn28_2_lower_than_others"]
    assert "ours is WRN-10-1, the paper's WRN-28-2" in wrn["detail"] and wrn["n"] == 1
    assert rows["mnist_matches_dense_at_0.2"]["n"] == 3
    assert rows["mnist_lower_than_snip"]["verdict"] == "reproduced"


def test_variational_dropout_is_held_against_ours(judged: dict) -> None:
    row = judged["paper"]["mnist_variational_dropout_lower"]
    cell = [
        error(run)
        for run in experiments.runs("mnist_compression", "paper")
        if (run.model, run.method, run.density) == ("lenet300-100", "sparse_momentum", 0.015)
        and run.seed < 3
    ]
    mean, low, high, n, _ = t_interval(cell)
    assert (row["ours_mean"], row["ours_low"], row["ours_high"]) == pytest.approx(
        (1.9 - mean, 1.9 - high, 1.9 - low)
    )
    assert row["paper_value"] == pytest.approx(1.9 - 2.053) and row["n"] == n == 3
    assert row["verdict"] == "reproduced"


def test_the_reduction_comes_from_the_published_curves(judged: dict) -> None:
    rows = judged["paper"]
    assert "WRN-10-1" not in rows["wrn28_2_lower_than_others"]["detail"]
    reduction = rows["cifar10_relative_reduction"]
    assert reduction["paper_value"] == 15 and "published curves give 9.5 %" in reduction["detail"]
    assert math.isfinite(reduction["ours_low"])


def test_claims_follow_the_rule(root: Path) -> None:
    judged = claims.verdict_table(Source("quick", root)).set_index("id")
    # -1.0, -1.1, -1.2 points by seed: below zero.
    equal = judged.loc["features_more_general_equal"]  # one seed at quick: no verdict
    assert "AlexNet-s: −1.00" in equal["detail"] and equal["verdict"] == "inconclusive"
    assert equal["paper_value"] == pytest.approx(16.83 - 19.10, abs=0.02)
    assert "WRN-10-1" in judged.loc["features_more_general", "detail"]
    # 10 % of the weights: 1 / (0.8 * 0.1); 30 %: 1 / (0.8 * 0.3).
    largest = judged.loc["speedup_estimate_largest"]
    assert largest["ours_mean"] == pytest.approx(12.5)
    least = judged.loc["speedup_estimate_least"]
    assert least["ours_mean"] == pytest.approx(1 / 0.24)
    assert least["paper_value"] == 2.74 and largest["paper_value"] == 5.61
    for row in (largest, least):
        assert row["verdict"] == "not comparable" and "1.25 to 1.25" in row["detail"]
    clock = judged.loc["speedup_measured"]
    assert clock["ours_mean"] == pytest.approx(-20)


def test_claims_judge_the_clock_not_the_estimate(root: Path) -> None:
    judged = claims.verdict_table(Source("quick", root), "05_speedups").set_index("id")
    faster = judged.loc["speedup_clock"]
    slowest = min(training_ratio(model, 0.05) for model in BATCHES)
    fastest = max(training_ratio(model, 0.05) for model in BATCHES)
    assert faster["verdict"] == "reproduced"
    assert faster["ours_mean"] == pytest.approx(100 * (1 / slowest - 1))
    up_to = judged.loc["speedup_clock_up_to"]
    assert up_to["paper_value"] == 5.61 and up_to["verdict"] == "not reproduced"
    assert up_to["ours_mean"] == pytest.approx(fastest)
    assert "AlexNet-s" in up_to["detail"] and "a machine" in up_to["scale"]


def test_claims_without_times_have_no_verdict(tmp_path: Path) -> None:
    judged = claims.verdict_table(Source("quick", tmp_path), "05_speedups").set_index("id")
    assert judged.loc["speedup_clock", "verdict"] == claims.NO_RUNS
