"""The claims on ablations, depth, sensitivity and dense layers: constructed effects are found."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lib import claims
from lib.claims import effects
from lib.claims.ablations import MARGIN_SETTING, Growing, Moved, Worst
from lib.claims.effects import FULL, WITHOUT, Family, rules
from lib.config import Run
from lib.figures.ablations import depth_scaling_table
from lib.results import reading
from lib.results.reading import Source
from lib.stats import PairedDifference, t_interval
from tests.support.made_up_effects import EXPERIMENTS, Effects, write

Judge = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    """judge(error): rows of the verdict table by id, for these experiments alone."""

    def judged(error: Callable[[Run], float | None], **more: Any) -> dict[str, dict[str, Any]]:
        write(tmp_path, "quick", error, **more)
        table = claims.verdict_table(Source("quick", tmp_path))
        ours = table[table["experiment"].isin(EXPERIMENTS)]
        return {str(row["id"]): dict(row) for row in ours.to_dict("records")}

    return judged


# Not planned at quick: the paper's larger networks, and momentum on AlexNet-s.
ABSENT = {
    "insensitive_prune_rate_vgg16-d",
    "insensitive_momentum_alexnet-s",
    "insensitive_momentum_vgg16-d",
    "momentum_no_more_than_dense_alexnet-s",
    "momentum_no_more_than_dense_vgg16-d",
}


def test_effects_as_reported_reproduce_every_claim(judge: Judge) -> None:
    rows = judge(Effects().error)
    assert {name for name, row in rows.items() if row["verdict"] == claims.NO_RUNS} <= ABSENT
    found = {name: row["verdict"] for name, row in rows.items() if name not in ABSENT}
    assert set(found.values()) == {"reproduced"}, found
    assert len(found) > 15
    assert {row["n"] for name, row in rows.items() if name in found} == {3}


def test_effects_the_other_way_reproduce_none(judge: Judge) -> None:
    other = Effects(
        redistribution=-0.5,
        growth_mnist=1.0,
        growth_cifar=-0.5,
        per_doubling=-0.5,
        both_lost=-2.0,
        prune_rate=2.0,
        momentum=1.0,
        dense_layers=1.0,
    )
    rows = judge(other.error)
    found = {name: row["verdict"] for name, row in rows.items() if name not in ABSENT}
    assert set(found.values()) == {"not reproduced"}, found


def test_no_effect_is_not_reproduced_and_noise_is_inconclusive(judge: Judge) -> None:
    nothing = Effects(0, 0, 0, 0, 0, 0, 0, 0, noise=0.001)
    rows = judge(nothing.error)
    for name in (
        "ablation_redistribution_mnist",
        "ablation_growth_cifar10",
        "ablation_worst_mnist",
        "scaling_growth_mnist_depth",
        "dense_layers_lower_error",
    ):
        assert rows[name]["verdict"] == "not reproduced", name
    assert rows["insensitive_prune_rate_lenet300-100"]["verdict"] == "reproduced"


def test_noise_is_inconclusive(judge: Judge) -> None:
    rows = judge(Effects(0, 0, 0, 0, 0, 0, 0, 0, noise=3.0).error)
    found = [row["verdict"] for name, row in rows.items() if name not in ABSENT]
    assert found.count("inconclusive") >= len(found) - 2  # 5 % of intervals miss the truth


def test_what_has_no_number_says_so_and_published_shifts_are_right(judge: Judge) -> None:
    rows = judge(Effects().error)
    assert rows["ablation_growth_cifar10"]["paper"] == "not published"
    # Cosine decay on AlexNet-s: 14.523 at 0.5 and 14.217 at 0.2, the two prune rates of quick.
    assert rows["insensitive_prune_rate_alexnet-s"]["paper_value"] == pytest.approx(0.306)
    paper = claims.verdict_table(Source("paper"), notebook="04_sensitivity").set_index("id")
    assert paper.loc["insensitive_prune_rate_vgg16-d", "paper_value"] == pytest.approx(
        6.712 - 6.387
    )
    # Sparse: mean of |error - 14.498| at 0.5 to 0.95 without 0.9; dense the same from 12.683.
    sparse = np.mean(np.abs(np.array([15.285, 14.998, 14.690, 14.248, 15.292]) - 14.498))
    dense = np.mean(np.abs(np.array([13.102, 12.938, 12.793, 12.655, 14.137]) - 12.683))
    assert paper.loc["momentum_no_more_than_dense_alexnet-s", "paper_value"] == pytest.approx(
        sparse - dense
    )


def test_without_runs_each_claim_says_what_to_do(tmp_path: Path) -> None:
    table = claims.verdict_table(Source("quick", tmp_path))
    for row in table[table["experiment"].isin(EXPERIMENTS)].to_dict("records"):
        assert row["verdict"] == claims.NO_RUNS
        assert "python -m lib run" in row["detail"] or "no such runs" in row["detail"], row["id"]


# ------------------------------------------------------------------------------------- by hand


def test_slope_by_hand_and_seeds_that_are_not_whole(tmp_path: Path) -> None:
    def error(run: Run) -> float | None:
        if run.seed == 2 and run.model == "mlp-100x4" and run.growth == "random":
            return None
        return Effects(noise=0.05).error(run)

    write(tmp_path, "quick", error, ("depth_scaling",))
    runs = reading.load("depth_scaling", Source("quick", tmp_path))
    mlps = effects.families(run.model for run in runs.planned)[0]
    seen = effects.scaling(runs, mlps, "growth")
    slopes = []
    for seed in (0, 1):
        benefit = [
            runs.by_seed(model=m, **WITHOUT["growth"])[seed] - runs.by_seed(model=m, **FULL)[seed]
            for m in mlps.sizes
        ]
        slopes.append(np.polyfit([0, 1, 2], benefit, 1)[0])
    assert tuple(seen.slope) == pytest.approx(tuple(t_interval(slopes)))
    assert seen.cells["n"].tolist() == [3, 3, 2]
    assert seen.line is not None and seen.line.rho == pytest.approx(1.0)
    claimed = Growing("depth_scaling", "growth", "mnist", "hidden").measure(
        Source("quick", tmp_path), None
    )
    assert claimed.decides.mean == pytest.approx(-seen.slope.mean)
    assert (claimed.decides.low, claimed.decides.high) == pytest.approx(
        (-seen.slope.high, -seen.slope.low)
    )


def test_networks_that_learn_nothing_are_not_in_the_slope(tmp_path: Path) -> None:
    def error(run: Run) -> float | None:
        return 88.65 if run.model == "mlp-100x4" else Effects(noise=0.05).error(run)

    write(tmp_path, "quick", error, ("depth_scaling",))
    runs = reading.load("depth_scaling", Source("quick", tmp_path))
    mlps = effects.families(run.model for run in runs.planned)[0]
    seen = effects.scaling(runs, mlps, "growth")
    assert seen.unlearned == ["mlp-100x4"]
    assert seen.cells["model"].tolist() == ["mlp-100x1", "mlp-100x2"]
    one, two = (
        runs.by_seed(model=m, **WITHOUT["growth"]) - runs.by_seed(model=m, **FULL)
        for m in ("mlp-100x1", "mlp-100x2")
    )
    assert tuple(seen.slope) == pytest.approx(tuple(t_interval(two - one)))
    claimed = Growing("depth_scaling", "growth", "mnist", "hidden").measure(
        Source("quick", tmp_path), None
    )
    assert "at 4 nothing learned: not in the slope" in claimed.detail
    assert "missing" not in claimed.detail
    table = depth_scaling_table(Source("quick", tmp_path)).frame
    unlearned = table[table["full: error (%)"] == "88.65"]
    assert unlearned["network"].tolist() == ["MLP 4 × 100: not learned"] * 2
    assert set(unlearned["benefit (points)"]) == {"–"}

    def learned_once(run: Run) -> float | None:  # a part without which nothing learns is a benefit
        with_it = run.growth == "momentum" and run.redistribution == "momentum"
        return 88.65 if run.model == "mlp-100x4" and not with_it else 2.0

    write(tmp_path / "other", "quick", learned_once, ("depth_scaling",))
    runs = reading.load("depth_scaling", Source("quick", tmp_path / "other"))
    assert effects.scaling(runs, mlps, "growth").unlearned == []


def test_families_that_learn_nothing_conclude_nothing(judge: Judge) -> None:
    rows = judge(lambda run: 88.65, names=("depth_scaling",))
    growing = [row for row in rows.values() if "nothing learned" in row["detail"]]
    assert len(growing) > 3
    assert {row["verdict"] for row in growing} == {"inconclusive"}
    assert {row["n"] for row in growing} == {0}


def test_families_differ_in_one_thing_only() -> None:
    models = ["mlp-100x4", "mlp-100x1", "wrn-10-2", "wrn-16-2", "wrn-16-1", "wrn-16-4", "lenet5"]
    assert effects.families(models) == [
        Family("MLPs", "hidden layers", {"mlp-100x1": 1, "mlp-100x4": 4}),
        Family("WRN-d-2", "depth (layers)", {"wrn-10-2": 10, "wrn-16-2": 16}),
        Family("WRN-16-k", "width (factor)", {"wrn-16-1": 1, "wrn-16-2": 2, "wrn-16-4": 4}),
    ]
    assert effects.families(["lenet300-100"]) == []
    assert [family.name for family in effects.families(["wrn-10-1"])] == ["WRN-d-1"]


def pair(low: float, high: float) -> PairedDifference:
    nan = math.nan
    return PairedDifference((low + high) / 2, low, high, 3, nan, nan, nan, (0, 1, 2), ())


@pytest.mark.parametrize(
    ("pairs", "setting", "low", "high"),
    [
        ({0.3: (-0.1, 0.1), 0.5: (0.0, 0.15)}, 0.5, 0.0, 0.15),  # reaches farthest
        ({0.3: (-0.18, -0.1), 0.5: (0.0, 0.15)}, 0.3, 0.1, 0.18),  # below zero counts alike
        ({0.3: (0.25, 0.3), 0.5: (-1.0, 3.0)}, 0.3, 0.25, 0.3),  # wholly beyond the margin
        ({0.3: (-0.5, -0.3), 0.5: (0.25, 0.3)}, 0.3, 0.3, 0.5),
        ({0.3: (-0.01, 0.01), 0.5: (math.nan, math.nan)}, 0.5, math.nan, math.nan),
    ],
)
def test_the_setting_that_decides(
    pairs: dict[float, tuple[float, float]], setting: float, low: float, high: float
) -> None:
    at, interval = effects.decisive({k: pair(*v) for k, v in pairs.items()}, 0.2)
    assert at == setting
    assert (interval.low, interval.high) == pytest.approx((low, high), nan_ok=True)


def test_one_setting_beyond_the_margin_is_enough(tmp_path: Path) -> None:
    def error(run: Run) -> float:
        return 2.0 + 0.01 * run.seed + (run.prune_rate == 0.5) * 0.4

    write(tmp_path, "quick", error, ("sensitivity",))
    where = {"model": "lenet300-100", "method": "sparse_momentum", "momentum": 0.9}
    moved = Moved(
        "sensitivity", {**where, "schedule": "cosine"}, "prune_rate", MARGIN_SETTING["mnist"]
    ).measure(Source("quick", tmp_path), None)
    assert moved.decides.mean == pytest.approx(0.4) and "decided by 0.5" in moved.detail


def test_the_worst_is_decided_by_the_least_clear(tmp_path: Path) -> None:
    def error(run: Run) -> float:
        key = (run.redistribution, run.growth)
        return {("none", "random"): 5.0, ("none", "momentum"): 4.9}.get(key, 3.0) + 0.01 * run.seed

    write(tmp_path, "quick", error, ("ablations",))
    worst = Worst(
        "ablations",
        {**rules("none", "random"), "dataset": "mnist"},
        {
            "full": {**FULL, "dataset": "mnist"},
            "no redistribution": {**WITHOUT["redistribution"], "dataset": "mnist"},
        },
        over="model",
    ).measure(Source("quick", tmp_path), None)
    assert worst.decides.mean == pytest.approx(-0.1)
    assert worst.detail.startswith("decided by no redistribution")


def test_runs_that_did_not_learn_are_told(tmp_path: Path) -> None:
    def error(run: Run) -> float:
        return 90.0 if run.seed == 1 and run.growth == "random" else Effects().error(run)

    write(tmp_path, "quick", error, ("ablations", "depth_scaling"))
    rows = claims.verdict_table(Source("quick", tmp_path)).set_index("id")
    assert (
        "2 of 12 runs did not learn" in rows.loc["ablation_random_growth_suffices_mnist", "detail"]
    )
    assert "3 of 18 runs did not learn" in rows.loc["scaling_growth_mnist_depth", "detail"]
    assert "did not learn" not in rows.loc["scaling_redistribution_mnist_depth", "detail"]


def test_mean_shift_needs_every_setting() -> None:
    curves = pd.DataFrame(
        {0.5: [1.0, math.nan], 0.8: [2.5, 2.0], 0.9: [2.0, 2.0]}, index=pd.Index([0, 1])
    )
    shift = effects.mean_shift(curves, 0.9)
    assert shift[0] == pytest.approx(0.75) and math.isnan(shift[1])
    with pytest.raises(ValueError, match=r"no runs at the reference 0\.7"):
        effects.shifts(curves, 0.7)


def test_claims_of_one_id_are_refused() -> None:
    before = len(claims.CLAIMS)
    with pytest.raises(ValueError, match="two claims have the id"):
        claims.add(claims.CLAIMS[0])
    assert len(claims.CLAIMS) == before
