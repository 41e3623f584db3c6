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
from lib.claims.ablations import Growing, PublishedShift, settings
from lib.claims.compare import Pairs
from lib.claims.effects import FULL, WITHOUT, Family, rules
from lib.config import Run
from lib.results import reading
from lib.results.reading import Source
from lib.stats import PairedDifference, t_interval
from tests.support.made_up_effects import Effects, write

Judge = Callable[..., dict[str, dict[str, Any]]]
NAMES = ("ablations", "depth_scaling", "sensitivity", "dense_layers")


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    """judge(error): rows by id that have runs, for these experiments alone."""

    def judged(
        error: Callable[[Run], float | None], names: tuple[str, ...] = NAMES, **more: Any
    ) -> dict[str, dict[str, Any]]:
        write(tmp_path, "quick", error, names, **more)
        table = claims.verdict_table(Source("quick", tmp_path))
        # CIFAR-10 has one seed at quick, which decides nothing
        known = (table["verdict"] != claims.NO_RUNS) & (table["n"] != 1)
        ours = table[table["experiment"].isin(names) & known]
        return {str(row["id"]): dict(row) for row in ours.to_dict("records")}

    return judged


def test_effects_as_reported_reproduce_every_claim(judge: Judge) -> None:
    rows = judge(Effects().error)
    whole = {name: row for name, row in rows.items() if "(not planned)" not in row["detail"]}
    assert {row["verdict"] for row in whole.values()} == {"reproduced"}, whole
    assert len(whole) >= 8 and {row["n"] for row in whole.values()} == {3}
    # what holds of the networks planned at this scale does not hold of all
    partly = {row["verdict"] for name, row in rows.items() if name not in whole}
    assert partly == {"inconclusive"}


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
    assert {row["verdict"] for row in rows.values()} == {"not reproduced"}, rows


def test_no_effect_is_not_reproduced(judge: Judge) -> None:
    rows = judge(Effects(0, 0, 0, 0, 0, 0, 0, 0, noise=0.001).error)
    for name in (
        "ablation_redistribution_lenet300-100",
        "ablation_worst",
        "scaling_growth_depth",
    ):
        assert rows[name]["verdict"] == "not reproduced", name


def test_noise_is_inconclusive(judge: Judge) -> None:
    rows = judge(Effects(0, 0, 0, 0, 0, 0, 0, 0, noise=3.0).error)
    found = [row["verdict"] for row in rows.values()]
    assert found.count("inconclusive") >= len(found) - 2  # 5 % of intervals miss the truth


def test_what_has_no_number_says_so_and_published_shifts_are_right(tmp_path: Path) -> None:
    rows = claims.verdict_table(Source("paper", tmp_path)).set_index("id")
    assert rows.loc["ablation_growth", "paper"] == "not published"
    # Cosine decay: AlexNet-s 14.523 at 0.5 and 14.217 at 0.2; the whole range of VGG16-D.
    assert rows.loc["insensitive_prune_rate", "paper_value"] == pytest.approx(0.306)
    whole = PublishedShift("prune_rate", ("vgg16-d",), 0.2, 0.7).read()
    assert whole.value == pytest.approx(6.712 - 6.387)
    # Sparse: mean of |error - 14.498| at 0.5 to 0.95 without 0.9; dense the same from 12.683.
    sparse = np.mean(np.abs(np.array([15.285, 14.998, 14.690, 14.248, 15.292]) - 14.498))
    dense = np.mean(np.abs(np.array([13.102, 12.938, 12.793, 12.655, 14.137]) - 12.683))
    assert rows.loc["momentum_no_more_than_dense", "paper_value"] == pytest.approx(sparse - dense)


# ------------------------------------------------------------------------------------- by hand


def slope_by_hand(runs: reading.Runs, sizes: dict[str, int], seeds: tuple[int, ...]) -> list[float]:
    found = []
    for seed in seeds:
        benefit = [
            runs.by_seed(model=m, **WITHOUT["growth"])[seed] - runs.by_seed(model=m, **FULL)[seed]
            for m in sizes
        ]
        found.append(float(np.polyfit(np.log2(list(sizes.values())), benefit, 1)[0]))
    return found


def test_a_trend_is_shown_with_and_without_each_end(tmp_path: Path) -> None:
    def error(run: Run) -> float | None:
        if run.seed == 2 and run.model == "mlp-100x4" and run.growth == "random":
            return None
        return Effects(noise=0.05).error(run)

    write(tmp_path, "quick", error, ("depth_scaling",))
    source = Source("quick", tmp_path)
    runs = reading.load("depth_scaling", source)
    mlps = effects.families(run.model for run in runs.planned)[0]
    seen = effects.scaling(runs, mlps, "growth")
    assert tuple(seen.slope) == pytest.approx(
        tuple(t_interval(slope_by_hand(runs, mlps.sizes, (0, 1))))
    )
    assert seen.cells["n"].tolist() == [3, 3, 2, 3]
    found = Growing("depth_scaling", "growth", "mnist", ("MLPs",)).measure(source, {}, 0.03)
    parts = {part.name: part for part in found.parts}
    assert {"MLPs", "MLPs without 1", "MLPs without 8"} <= set(parts)
    assert parts["MLPs"].decides.mean == pytest.approx(-seen.slope.mean)
    fewer = {m: size for m, size in mlps.sizes.items() if size != 8}
    by_hand = t_interval(slope_by_hand(runs, fewer, (0, 1)))
    assert parts["MLPs without 8"].decides.mean == pytest.approx(-by_hand.mean)


def test_a_trend_that_rests_on_one_end_is_none(tmp_path: Path) -> None:
    def error(run: Run) -> float:  # the shallowest network loses nothing, all others alike
        lost = run.growth == "random" and not run.model.endswith("x1")
        return 3.0 + 0.5 * lost + 0.01 * run.seed * (run.growth == "random")

    write(tmp_path, "quick", error, ("depth_scaling",))
    rows = claims.extensions(Source("quick", tmp_path)).set_index("id")
    row = rows.loc["scaling_growth_depth"]
    assert row["verdict"] == "not reproduced" and "MLPs without 1" in row["ours"]


def test_networks_that_learn_nothing_are_not_in_the_slope(tmp_path: Path) -> None:
    def error(run: Run) -> float | None:
        return 88.65 if run.model == "mlp-100x4" else Effects(noise=0.05).error(run)

    write(tmp_path, "quick", error, ("depth_scaling",))
    source = Source("quick", tmp_path)
    runs = reading.load("depth_scaling", source)
    mlps = effects.families(run.model for run in runs.planned)[0]
    seen = effects.scaling(runs, mlps, "growth")
    assert seen.unlearned == ["mlp-100x4"]
    assert seen.cells["model"].tolist() == ["mlp-100x1", "mlp-100x2", "mlp-100x8"]
    found = Growing("depth_scaling", "growth", "mnist", ("MLPs",)).measure(source, {}, 0)
    assert "at 4 nothing learned (dense: 0 of 3 [0, 56 %])" in found.parts[0].note
    assert "runs that learned: 18 of 24" in found.note

    def learned_once(run: Run) -> float | None:  # without the part nothing learns: no mean
        with_it = run.growth == "momentum" and run.redistribution == "momentum"
        return 88.65 if run.model == "mlp-100x4" and not with_it else 2.0

    write(tmp_path / "other", "quick", learned_once, ("depth_scaling",))
    runs = reading.load("depth_scaling", Source("quick", tmp_path / "other"))
    assert effects.scaling(runs, mlps, "growth").unlearned == ["mlp-100x4"]


def test_families_that_learn_nothing_conclude_nothing(judge: Judge) -> None:
    rows = judge(lambda run: 88.65, names=("depth_scaling",))
    growing = [row for row in rows.values() if "nothing learned" in row["detail"]]
    assert len(growing) > 3
    assert {(row["verdict"], row["n"]) for row in growing} == {("inconclusive", 0)}


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
    return PairedDifference((low + high) / 2, low, high, 3, nan, nan, (0, 1, 2), (), False)


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
    whole = settings("prune_rate", ("lenet300-100",), 0.2, 0.7)
    found = whole.measure(Source("quick", tmp_path), {}, 0.2)
    by_name = {part.name: part.decides.mean for part in found.parts}
    assert by_name == pytest.approx({"LeNet-300-100 at 0.5": 0.4, "LeNet-300-100 at 0.7": 0.0})
    assert "LeNet-300-100 at 0.3 (not planned)" in found.missing


def test_the_worst_is_decided_by_the_least_clear(judge: Judge) -> None:
    def error(run: Run) -> float:
        key = (run.redistribution, run.growth)
        own = {("none", "random"): 5.0, ("none", "momentum"): 4.9}.get(key, 3.0)
        return own + 0.01 * run.seed * (key == ("none", "random"))

    row = judge(error, names=("ablations",))["ablation_worst"]
    assert "no redistribution: −0.11" in row["ours"]
    assert rules("none", "random")["growth"] == "random"


def test_runs_that_did_not_learn_are_told(judge: Judge) -> None:
    def error(run: Run) -> float:
        return 90.0 if run.seed == 1 and run.growth == "random" else Effects().error(run)

    rows = judge(error, names=("ablations", "depth_scaling"))
    suffices = rows["ablation_random_growth_suffices"]
    assert "runs that learned: 2 of 3 [21, 94 %] against 3 of 3 [44, 100 %]" in suffices["detail"]
    assert "runs that learned: 20 of 24" in rows["scaling_growth_depth"]["detail"]
    assert "learned" not in rows["scaling_redistribution_depth"]["detail"]


def test_pairs_that_are_not_planned_raise_nothing_but_no_runs(tmp_path: Path) -> None:
    nowhere = Pairs("ablations", [("", {"model": "vgg16-d", **FULL}, {"model": "vgg16-d"})])
    with pytest.raises(reading.NoRuns, match="no such runs in this profile"):
        nowhere.measure(Source("quick", tmp_path), {}, 0.1)


def test_mean_shift_needs_every_setting() -> None:
    curves = pd.DataFrame(
        {0.5: [1.0, math.nan], 0.8: [2.5, 2.0], 0.9: [2.0, 2.0]}, index=pd.Index([0, 1])
    )
    shift = effects.mean_shift(curves, 0.9)
    assert shift[0] == pytest.approx(0.75) and math.isnan(shift[1])
    with pytest.raises(ValueError, match=r"no runs at the reference 0\.7"):
        effects.shifts(curves, 0.7)
