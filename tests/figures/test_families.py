"""The data steps and tables of each family, by hand on made-up errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lib import experiments, figures
from lib.claims.effects import FULL, rules
from lib.config import Run
from lib.experiments import READINGS
from lib.figures import (
    ablations,
    cifar10,
    mnist,
    readings,
    trainability,
)
from lib.results.published import published
from lib.results.reading import NoRuns, Source, load
from lib.stats import holm, paired_difference, t_interval, value_difference, wilson
from tests.support.made_up_effects import wobble, write
from tests.support.made_up_grid import write_grid


def table(name: str, source: Source, *index: str) -> pd.DataFrame:
    frame = figures.TABLES[name](source).frame
    return frame.set_index(list(index)) if index else frame


# ------------------------------------------------------------------------------------------ MNIST


def test_a_slip_of_the_source_is_replaced_by_its_raw_runs() -> None:
    rows = mnist.published_curves().set_index(["method", "density"])
    assert rows.loc[("dsr", 0.01), "test_error_pct"] == pytest.approx(2.246)
    assert rows.loc[("dsr", 0.01), "slip"] == pytest.approx(2.46)
    assert rows["slip"].notna().sum() == 1 and len(rows.loc["static"]) == 6


def test_ours_stands_beside_the_published(root: Path) -> None:
    source = Source("paper", root)
    row = table("main_results_lenet300-100", source, "method", "weights (%)").loc[("SET", "5")]
    errors = load("main_results", source, method="set", density=0.05, **mnist.LENET).by_seed()
    mean, low, high, *_ = t_interval(errors)
    assert row["test error (%)"] == f"{mean:.2f} [{low:.2f}, {high:.2f}]"
    assert (row["learned"], row["published (%)"]) == ("3 of 3", "1.86")
    row = table("main_results_lenet300-100", source, "method", "weights (%)").loc[("DSR", "1")]
    off = value_difference(
        load("main_results", source, method="dsr", density=0.01, **mnist.LENET).by_seed(),
        2.246,
        0.0157,
    )
    assert row["ours − published"].startswith(f"{off.mean:+.2f} [{off.low:+.2f}".replace("-", "−"))
    reduced = table("main_results_lenet300-100", Source("quick", root))
    assert "published (%)" in reduced and "ours − published" not in reduced


def test_a_failed_seed_is_in_no_mean_and_counted(tmp_path: Path) -> None:
    def error(run: Run) -> float | None:
        if run.method == "set" and run.density == 0.01:
            return {0: 3.0, 1: 88.65}.get(run.seed)
        return 2.0

    write_grid(tmp_path, "main_results", "quick", error, lambda run: run.model == "lenet300-100")
    source = Source("quick", tmp_path)
    row = table("main_results_lenet300-100", source, "method", "weights (%)").loc[("SET", "1")]
    assert (row["test error (%)"], row["learned"]) == ("3.00", "1 of 3")
    plot = figures.FIGURES["main_results_lenet300-100"](source)
    low, high = (round(100 * end) for end in wilson(1, 3)[3:])
    assert f"not all did (Wilson's 95 % interval): SET at 1 % 1 of 3 [{low}, {high} %]." in (
        plot.caption
    )
    right = plot.axes[1]
    assert max(max(n.get_ydata()) for n in right.lines if len(n.get_ydata())) < 60


def test_both_networks_are_compared_with_the_published_curve(root: Path) -> None:
    source = Source("paper", root)
    rows = mnist.baseline_network(source)
    assert set(rows["network"]) == set(mnist._NETWORKS.values())
    code = rows[rows["curve"].str.endswith("_code")]
    assert set(code["curve"]) == {"set_code", "dsr_code"}
    assert set(code["schedule"]) == {"constant"} and set(code["model"]) == {"lenet300-100-bn"}
    frame = table("baseline_network", source, "method", "network")
    cell = rows[
        rows["curve"].eq("set_code") & rows["density"].eq(0.02)
    ]["test_error_pct"]  # fmt: skip
    known = published("mnist_sparse_summary")
    known = known[known["method"].eq("set") & known["density"].eq(0.02)].iloc[0]
    off = value_difference(cell, known["test_error_pct"], known["standard_error"])
    said = frame.loc[("SET, as in its code", "DSR authors' network"), "2 %"]
    assert said == f"{off.mean:+.2f} [{off.low:+.2f}, {off.high:+.2f}]".replace("-", "−")
    plot = figures.FIGURES["baseline_network"](source)
    assert [ax.get_title(loc="left") for ax in plot.axes[:2]] == list(mnist._NETWORKS.values())[:2]


def test_initial_densities_are_paired_and_the_uniform_runs_are_those_of_the_curve(
    tmp_path: Path,
) -> None:
    def error(run: Run) -> float:
        return 3.0 + 10 * (run.init == "uniform" and run.method == "dsr") + 0.01 * run.seed

    write_grid(tmp_path, "initial_densities", "quick", error)
    frame = table("initial_densities", Source("quick", tmp_path))
    dsr = frame[frame["method"].eq("DSR") & frame["weights (%)"].eq("5")]
    assert dsr["initial densities"].tolist() == ["uniform", "ERK"]
    assert dsr["ERK − uniform (points)"].tolist() == ["–", "−10.00 [−10.00, −10.00]"]
    for profile in ("smoke", "quick", "paper"):
        names = ("main_results", "mnist_compression")
        curve = {run.run_id for name in names for run in experiments.runs(name, profile)}
        for run in experiments.runs("initial_densities", profile):
            assert (run.run_id in curve) == (run.init == "uniform")


def test_the_literature_is_drawn_with_a_marker_each(root: Path) -> None:
    plot = figures.FIGURES["mnist_compression"](Source("paper", root))
    labels = [text.get_text() for text in plot.legends[0].get_texts()]
    for ax, model in zip(plot.axes, ("lenet300-100", "lenet5"), strict=True):
        others = mnist.literature(model).query("method == 'other'")
        drawn = {str(n.get_label()): n for n in ax.lines}
        for authors, points in others.groupby("authors"):
            assert sorted(drawn[authors].get_ydata()) == sorted(points["test_error_pct"])
        assert set(others["authors"]) <= set(labels)
    frame = table("mnist_compression", Source("paper", root), "network", "method", "weights (%)")
    assert not frame.index.duplicated().any()
    dropout = frame.loc[("LeNet-300-100", "Variational Dropout (Molchanov 2017)", "1.5")]
    assert (dropout["published (%)"], dropout["learned"]) == ("1.90", "–")
    assert frame.loc[("LeNet-5", "Sparse momentum", "1"), "learned"] == "1 of 3"


def test_trainability_is_a_share_beside_the_error_of_those_that_learned(
    root: Path, tmp_path: Path
) -> None:
    source = Source("paper", root)
    rows = trainability.trainability(source)
    assert list(dict.fromkeys(rows["variant"])) == list(trainability.VARIANTS)
    found = trainability.shares(rows).set_index("cell")
    for cell in found.index:
        k = 3 if cell.startswith("5 %") else 1  # elsewhere one stays at chance, one diverges
        share = wilson(k, 3)
        assert tuple(found.loc[cell, ["k", "n"]]) == (k, 3)
        expected = [100 * end for end in share[2:]]
        assert found.loc[cell, ["mean", "low", "high"]].tolist() == pytest.approx(expected)
    frame = table("trainability", source)
    assert "1.40" in set(frame["error of those (%)"]) and len(frame) == len(found)
    plot = figures.FIGURES["trainability"](source)
    assert "1 %, ERK densities: 1 of 3" in [t.get_text() for t in plot.axes[0].get_yticklabels()]
    write_grid(tmp_path, "trainability", "quick", lambda run: 88.65)  # none learns: no error
    none = figures.FIGURES["trainability"](Source("quick", tmp_path))
    assert "1 %, ERK densities: 0 of 3" in [t.get_text() for t in none.axes[0].get_yticklabels()]
    lenet = figures.FIGURES["initial_densities_lenet5"](source)
    texts = [t.get_text() for t in lenet.axes[0].get_yticklabels()]
    assert "1 %, uniform: 1 of 3" in texts and "5 %, ERK: 3 of 3" in texts


# ---------------------------------------------------------------------------------------- CIFAR-10


def test_the_cifar_tables_are_the_papers(root: Path) -> None:
    frame = table("cifar10_table", Source("paper", root), "network", "method")
    theirs = published("cifar10_table").set_index(["model", "method"])
    assert frame.index.get_level_values("network").nunique() == 8
    value = theirs.loc[("vgg16-d", "snip"), "test_error_pct"]
    assert frame.loc[("VGG16-D", "SNIP"), "published (%)"].startswith(f"{value:.2f}")
    imagenet = table("imagenet", Source("paper", root), "training", "weights (%)")
    assert imagenet["published (%)"].to_dict() == {
        ("usual", "100"): "25.10",
        ("usual", "10"): "27.60",
        ("usual", "20"): "25.80",
        ("tuned", "100"): "23.00",
        ("tuned", "10"): "26.93",
        ("tuned", "20"): "25.09",
    }


def test_methods_are_compared_seed_by_seed_and_published_curves_with_their_network(
    root: Path,
) -> None:
    source = Source("paper", root)
    runs, rows = load("wrn28_2_curve", source), cifar10.minus_sparse_momentum(source)
    for method in ("set", "dsr"):
        mine = rows[rows["method"].eq(method) & rows["density"].eq(0.2)].set_index("seed")
        sides = (
            runs.by_seed(method=m, density=0.2) for m in (method, "sparse_momentum")
        )  # fmt: skip
        expected = next(sides) - next(sides)
        assert mine["difference"].to_dict() == pytest.approx(expected.to_dict())
    full, reduced = (figures.FIGURES["wrn28_2_curve"](Source(p, root)) for p in ("paper", "quick"))
    dashed = [n for n in full.axes[0].lines if n.get_linestyle() == "--" and len(n.get_xdata())]
    assert len(dashed) >= 1 + 5  # the dense level and five methods
    assert not [n for n in reduced.axes[0].lines if n.get_linestyle() == "--"]
    assert "The published curves are of WRN-28-2 and not drawn." in reduced.caption


# --------------------------------------------------------------------------------------- ablations


def test_variants_are_paired_with_full_among_seeds_that_learned(tmp_path: Path) -> None:
    def error(run: Run) -> float | None:
        if run.redistribution == "nonzeros" and run.seed == 1:
            return 88.6
        lost = run.redistribution == "none" and run.growth == "random"
        return None if lost else 2 + 0.3 * (run.growth == "random") + wobble(run, 0.1)

    write(tmp_path, "quick", error, ("ablations",))
    source = Source("quick", tmp_path)
    runs = load("ablations", source, model="lenet300-100").learned()
    cells = ablations.variants(source)
    here = cells[cells["model"] == "lenet300-100"].to_dict("records")
    full = runs.by_seed(**FULL)
    pairs = [
        paired_difference(runs.by_seed(**rules(c["redistribution"], c["growth"])), full)
        for c in here
    ]
    tests = [p.p_t if p.mean else np.nan for p in pairs]
    for cell, pair, p in zip(here, pairs, holm(tests), strict=True):
        assert (cell["mean"], cell["n"]) == (pytest.approx(pair.mean, nan_ok=True), pair.n)
        assert cell["p_holm"] == pytest.approx(p, nan_ok=True)
    counts = {(c["redistribution"], c["growth"]): (c["n"], c["learned"], c["done"]) for c in here}
    assert counts["nonzeros", "momentum"] == (2, 2, 3)
    assert counts["none", "random"] == (0, 0, 3)
    plot = figures.FIGURES["ablations"](source)
    texts = [text.get_text() for text in plot.axes[0].texts]
    assert "0 of 3\nlearned" in texts and sum("2 of 3" in text for text in texts) == 3, texts


def test_a_difference_beyond_the_colours_is_framed_and_named(tmp_path: Path) -> None:
    write(tmp_path, "quick", lambda run: 2 + 70 * (run.growth == "random"), ("ablations",))
    plot = figures.FIGURES["ablations"](Source("quick", tmp_path))
    assert plot.axes[0].collections[0].get_clim() == (-0.5, 0.5)
    assert "Beyond the colour scale (dashed frame): LeNet-300-100, 5 %: momentum/random" in (
        plot.caption
    )


def test_depth_keeps_the_starts_apart_and_takes_only_seeds_that_learned(tmp_path: Path) -> None:
    def error(run: Run) -> float:
        if run.model == "mlp-100x8" or (run.model == "mlp-100x4" and run.seed == 2):
            return 88.65
        size = int(run.model.rsplit("x", 1)[1])
        gain = 0.5 * np.log2(size) * (1 if run.init == "uniform" else -1)
        return 5 + gain * (run.redistribution == "none") + wobble(run, 0.001)

    def few(run: Run) -> bool:
        return run.dataset == "mnist" and run.seed < 3

    write(tmp_path, "paper", error, ("depth_scaling",), few)
    source = Source("paper", tmp_path)
    rows = ablations.benefits(source)
    mine = rows[rows["part"].eq("redistribution") & rows["family"].eq("MLPs")]
    assert set(mine["init"]) == {"uniform", "erk"} and "mlp-100x8" not in set(mine["model"])
    assert set(mine.loc[mine["model"].eq("mlp-100x4"), "seed"]) == {0, 1}
    means = mine.groupby(["init", "size"])["benefit"].mean()
    assert means["uniform", 2] == pytest.approx(0.5, abs=0.01)
    assert means["erk", 2] == pytest.approx(-0.5, abs=0.01)
    trends = table("depth_scaling_trends", source)
    bn = trends[trends["family"].eq("BN-MLPs") & trends["benefit of"].eq("momentum redistribution")]
    assert bn["networks"].tolist() == 2 * [
        "8", "7, without MLP-BN 1 × 100", "7, without MLP-BN 8 × 100"
    ]  # fmt: skip
    slopes = [text.split(" ")[0] for text in bn["slope (points per doubling)"]]
    assert slopes == ["+0.50"] * 3 + ["−0.50"] * 3
    plot = figures.FIGURES["depth_scaling"](source)
    assert "No seed learned in both: MLP 8 × 100 (same density in every layer" in plot.caption
    shown = table("depth_scaling", source, "network")
    assert set(shown.loc["MLP 8 × 100: no seed learned in both", "dense: error (%)"]) == {
        "– (0 of 3 learned)"
    }


# ---------------------------------------------------------------------------------------- readings

PUBLISHED = {0.01: 2.47, 0.02: 1.80, 0.05: 1.47}


def reading_of(run: Run) -> str:
    (name,) = [
        name
        for name, fields in READINGS.items()
        if all(getattr(run, field) == value for field, value in fields.items())
    ]
    return name


def made_up(shifts: dict[str, float], off: float = 0.0) -> Callable[[Run], float]:
    """Error of a run: published + `off` in ours, `shifts` more in a reading, and a little noise."""

    def error(run: Run) -> float:
        level = PUBLISHED[run.density] + off + shifts.get(reading_of(run), 0.0)
        return level + 0.05 * (run.seed - 2) + wobble(run, 0.005)

    return error


def readings_of(tmp_path: Path, profile: str, shifts: dict[str, float], off: float = 0) -> Source:
    write_grid(tmp_path, "official_readings", profile, made_up(shifts, off), lambda r: r.seed < 5)
    return Source(profile, tmp_path)


def test_every_reading_has_a_name_and_each_run_one_reading() -> None:
    assert list(readings.NAMES) == list(READINGS)
    for profile in experiments.PROFILES:
        for run in experiments.runs("official_readings", profile):
            assert reading_of(run) in readings.NAMES


def test_readings_are_paired_with_ours(tmp_path: Path) -> None:
    source = readings_of(tmp_path, "paper", {"plain": 0.4, "layer_size": 30.0})
    runs = load("official_readings", source)
    every = readings.readings(source)
    here = every[every["density"] == 0.02].set_index("reading")
    ours = runs.by_seed(density=0.02, **READINGS["ours"])
    pairs = {
        name: paired_difference(runs.by_seed(density=0.02, **fields), ours)
        for name, fields in READINGS.items()
        if name != "ours"
    }
    for (name, pair), p in zip(pairs.items(), holm(p.p_t for p in pairs.values()), strict=True):
        assert here.loc[name, ["mean", "low", "high"]].tolist() == pytest.approx(
            [pair.mean, pair.low, pair.high]
        )
        assert here.loc[name, "p_holm"] == pytest.approx(p)
    assert list(here.index[here["moves"]]) == ["plain", "layer_size"]
    plot = figures.FIGURES["official_readings"](source)
    assert f"Beyond the axis: {readings.NAMES['layer_size']}: +30.00 at 1 %" in plot.caption
    published_lines = [n for n in plot.axes[1].lines if n.get_linestyle() == "--"]
    assert [n.get_xdata()[0] for n in published_lines] == pytest.approx(
        [1.80 - ours.mean(), 1.99 - ours.mean()]
    )


@pytest.mark.parametrize(
    ("shifts", "off", "said"),
    [
        ({"keep": -0.5, "floor": -0.25}, 0.5, ["keep explains it", "floor goes that way"]),
        ({"plain": 0.4}, 0.5, ["plain by +0.40", "no reading is shown to explain it."]),
        ({"keep": -0.5}, 0.0, ["no difference is shown that would have to be explained"]),
    ],
)
def test_conclusions_name_what_explains_a_difference(
    tmp_path: Path, shifts: dict[str, float], off: float, said: list[str]
) -> None:
    first, *rest = readings.conclusions(readings_of(tmp_path, "paper", shifts, off))
    assert first.startswith("1 % of the weights: ") and len(rest) == 2
    for words in said:
        name, _, more = words.partition(" ")
        expected = f"“{readings.NAMES[name]}” {more}" if name in readings.NAMES else words
        assert expected in first, first


def test_reduced_runs_are_not_compared_and_ours_is_needed(tmp_path: Path) -> None:
    for said in readings.conclusions(readings_of(tmp_path, "quick", {"plain": 0.4})):
        assert "published" not in said and "of 11 readings 11 are tested" in said
    write_grid(
        tmp_path / "other", "official_readings", "quick", made_up({}),
        lambda run: reading_of(run) != "ours",
    )  # fmt: skip
    with pytest.raises(NoRuns, match="no seed has finished ours and another reading"):
        readings.conclusions(Source("quick", tmp_path / "other"))
