"""Figures, tables and claims of the further main results, on made-up rows."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from lib import claims, experiments, figures
from lib.config import Run
from lib.figures import main_results as figures_main
from lib.results import reading
from lib.results.published import published
from lib.results.reading import Source
from lib.stats import t_interval
from tests.support.made_up_grid import plausible, write_grid

OURS = ("mnist_compression", "cifar10_table", "wrn28_2_curve", "imagenet")


def error(run: Run) -> float:
    """CIFAR-10 and ImageNet above MNIST, so that the networks' rows can't be mixed up unseen."""
    return plausible(run) + {"mnist": 0, "cifar10": 5, "imagenet": 23}[run.dataset]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All quick rows, and three seeds of the paper's."""
    folder = tmp_path_factory.mktemp("results")
    for name in OURS:
        write_grid(folder, name, "quick", error)
        write_grid(folder, name, "paper", error, lambda run: run.seed < 3)
    return folder


def labels(plot: figures.Plot) -> list[str]:
    return [text.get_text() for text in plot.legends[0].get_texts()]


def said(plot: figures.Plot) -> str:
    return " ".join(text.get_text() for text in plot.texts)


def points(plot: figures.Plot, axes: int, label: str) -> dict[float, float]:
    """x -> y of the line with this label."""
    (line,) = [n for n in plot.axes[axes].lines if str(n.get_label()).startswith(label)]
    x, y = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
    return dict(zip(x.round(3).tolist(), y.tolist(), strict=True))


# -------------------------------------------------------------------------------------- the LeNets


def test_every_published_compression_point_is_drawn_and_named(root: Path) -> None:
    plot = figures_main.mnist_compression(Source("quick", root))
    for axes, model in enumerate(("lenet300-100", "lenet5")):
        table = published(f"mnist_{model}")
        for label, rows in table[table["method"] == "other"].groupby("label"):
            name = label.rpartition("(")[2].rstrip(")")
            assert name in labels(plot)
            expected = dict(
                zip((100 * rows["density"]).round(3), rows["test_error_pct"], strict=True)
            )
            assert points(plot, axes, name) == pytest.approx(expected), label
        snip = table[table["method"] == "snip"]
        drawn = points(plot, axes, "SNIP (Lee 2019, published)")
        assert sorted(drawn.values()) == sorted(snip["test_error_pct"])
    assert len(labels(plot)) == len(set(labels(plot)))


def test_markers_of_the_literature_differ(root: Path) -> None:
    plot = figures_main.mnist_compression(Source("paper", root))
    grey = [n for n in plot.axes[0].lines if n.get_color() == "#555555"]
    table = published("mnist_lenet300-100")
    assert len(grey) == table.loc[table["method"] == "other", "label"].nunique() == 8
    assert len({n.get_marker() for n in grey}) == len(grey)


def test_sparse_momentum_is_drawn_with_its_seeds_and_the_papers_curve(root: Path) -> None:
    plot = figures_main.mnist_compression(Source("quick", root))
    runs = reading.load("mnist_compression", Source("quick", root), model="lenet300-100")
    rows = runs.where(method="sparse_momentum").rows
    means = rows.groupby("density")["test_error_pct"].mean()
    assert list(points(plot, 0, "Sparse momentum").values()) == pytest.approx(list(means))
    dots = [n for n in plot.axes[0].lines if n.get_marker() == "."]
    drawn = np.concatenate([np.asarray(n.get_ydata(), float) for n in dots])
    assert set(rows["test_error_pct"].round(9)) <= set(drawn.round(9))
    table = published("mnist_lenet300-100")
    curve = table[(table["method"] == "sparse_momentum") & table["density"].notna()]
    dashed = [
        n
        for n in plot.axes[0].lines
        if n.get_color() == figures.PALETTE["sparse_momentum"] and n.get_linestyle() == "--"
    ]
    (line,) = dashed
    assert sorted(np.asarray(line.get_ydata())) == pytest.approx(sorted(curve["test_error_pct"]))


def test_runs_that_did_not_learn_are_shown_apart_and_stay_in_the_table(tmp_path: Path) -> None:
    def error(run: Run) -> float | None:
        if run.model == "lenet5" and run.method == "sparse_momentum" and run.seed > 0:
            return 88.65 if run.seed == 1 else None
        return 1.0

    write_grid(tmp_path, "mnist_compression", "quick", error)
    plot = figures_main.mnist_compression(Source("quick", tmp_path))
    assert list(points(plot, 1, "Sparse momentum").values()) == [1.0, 1.0]
    (failed,) = [n for n in plot.axes[1].lines if n.get_marker() == "x"]
    places = sorted(zip(failed.get_xdata(), failed.get_ydata(), strict=True))
    assert places == [(1, 88.65), (1, 90), (5, 88.65), (5, 90)]
    assert not [n for n in plot.axes[0].lines if n.get_marker() == "x"]
    said = " ".join(text.get_text() for text in plot.texts).replace("\n", " ")
    assert "LeNet-300-100: n = 3; LeNet-5: n = 1–3" in said
    frame = figures_main.mnist_compression_table(Source("quick", tmp_path)).frame
    row = frame.set_index(["network", "method", "weights (%)"]).loc[
        ("LeNet-5", "Sparse momentum", "5")
    ]
    assert row["learned"] == "1 of 3" and row["n"] == "2" and row["test error (%)"] == "44.83"


def test_a_bound_on_the_images_is_in_the_title_and_not_at_the_papers_scale(root: Path) -> None:
    run = next(r for r in experiments.runs("mnist_compression", "quick") if r.model == "lenet5")
    titles = [
        ax.get_title(loc="left")
        for ax in figures_main.mnist_compression(Source("quick", root)).axes
    ]
    assert titles == ["LeNet-300-100", f"LeNet-5, trained on {run.train_samples:,} images"]
    titles = [
        ax.get_title(loc="left")
        for ax in figures_main.mnist_compression(Source("paper", root)).axes
    ]
    assert titles == ["LeNet-300-100", "LeNet-5"]


def test_the_compression_table_has_ours_and_theirs(root: Path) -> None:
    frame = figures_main.mnist_compression_table(Source("quick", root)).frame
    assert not frame.duplicated(["network", "method", "weights (%)"]).any()
    key = frame.set_index(["network", "method", "weights (%)"])
    row = key.loc[("LeNet-300-100", "Sparse momentum", "5")]
    cell = [
        error(run)
        for run in experiments.runs("mnist_compression", "quick")
        if (run.model, run.method, run.density) == ("lenet300-100", "sparse_momentum", 0.05)
    ]
    mean, low, high, n, _ = t_interval(cell)
    assert row["test error (%)"] == f"{mean:.2f}" and row["n"] == str(n) == "3"
    assert row["95 % interval"] == f"{low:.2f} to {high:.2f}"
    assert row["published (%)"] == "1.53 ± 0.02"
    dropout = key.loc[("LeNet-300-100", "Variational Dropout (Molchanov 2017)", "1.5")]
    assert (dropout["published (%)"], dropout["n"]) == ("1.90", "–")
    assert key.loc[("LeNet-300-100", "Sparse momentum", "20"), "n"] == "3"


def test_one_network_alone_is_drawn_alone(tmp_path: Path) -> None:
    write_grid(tmp_path, "mnist_compression", "quick", keep=lambda run: run.model == "lenet5")
    plot = figures_main.mnist_compression(Source("quick", tmp_path))
    assert len(plot.axes) == 1 and "runs missing" in said(plot)


# ---------------------------------------------------------------------------------------- CIFAR-10


def test_the_cifar_table_at_the_papers_scale_is_the_papers(root: Path) -> None:
    frame = figures_main.cifar10_table(Source("paper", root)).frame.set_index("network")
    table = published("cifar10_table").set_index(["model", "method"])
    assert len(frame) == table.index.get_level_values("model").nunique() == 8
    for model, name in ((m, reading.model_name(m)) for m in dict(table.index)):
        for method in ("dense", "snip", "sparse_momentum"):
            printed = frame.loc[name, f"{reading.METHOD_NAMES[method]}, paper"]
            assert printed.startswith(f"{table.loc[(model, method), 'test_error_pct']:.2f}")
    vgg = [
        error(run)
        for run in experiments.runs("cifar10_table", "paper")
        if (run.model, run.method) == ("vgg16-d", "snip") and run.seed < 3
    ]
    assert frame.loc["VGG16-D", "SNIP"].startswith(f"{np.mean(vgg):.2f} [")
    assert set(frame["n"]) == {"3"}


def test_a_network_that_is_not_the_papers_is_named(root: Path) -> None:
    table = figures_main.cifar10_table(Source("quick", root))
    assert "Not a network of the paper's table: WRN-10-1." in table.note
    assert "reduced scale" in table.note
    row = table.frame.set_index("network").loc["WRN-10-1"]
    assert {row[name] for name in table.frame.columns if name.endswith(", paper")} == {"–"}


def test_unequal_seeds_and_missing_networks_are_said(tmp_path: Path) -> None:
    write_grid(
        tmp_path,
        "cifar10_table",
        "quick",
        error,
        lambda run: run.model == "alexnet-s" and (run.seed == 0 or run.method == "dense"),
    )
    table = figures_main.cifar10_table(Source("quick", tmp_path))
    assert table.frame["n"].tolist() == ["1–3"]
    assert "1 of 2 networks have no runs yet" in table.note


def test_published_wrn_curves_are_drawn_over_the_same_network_only(root: Path) -> None:
    full, reduced = (figures_main.wrn28_2_curve(Source(p, root)) for p in ("paper", "quick"))
    dashed = [n for n in full.axes[0].lines if n.get_linestyle() == "--"]
    assert len(dashed) == 1 + 5  # the dense level and five methods
    assert "published (± 1.96 s.e.)" in labels(full)
    assert not [n for n in reduced.axes[0].lines if n.get_linestyle() == "--"]
    assert "published curves are of WRN-28-2 and not drawn over WRN-10-1" in said(reduced)
    assert not [label for label in labels(reduced) if "published" in label]


def test_paired_panel_shows_the_differences(root: Path) -> None:
    plot = figures_main.wrn28_2_curve(Source("quick", root))
    runs = reading.load("wrn28_2_curve", Source("quick", root))
    expected = [
        (
            runs.by_seed(method="set", density=share)
            - runs.by_seed(method="sparse_momentum", density=share)
        ).mean()
        for share in (0.1,)
    ]
    (line,) = [
        n
        for n in plot.axes[1].lines
        if n.get_color() == figures.PALETTE["set"] and n.get_marker() == figures.MARKERS["set"]
    ]
    assert np.asarray(line.get_ydata()) == pytest.approx(expected)
    frame = figures_main.wrn28_2_curve_table(Source("quick", root)).frame
    row = frame[(frame["method"] == "SET") & (frame["weights (%)"] == "10")].iloc[0]
    printed = row["sparse momentum − it (points)"].split(" ")[0]
    assert printed == f"{-expected[0]:+.2f}".replace("-", "−")


# ---------------------------------------------------------------------------------------- ImageNet


def test_imagenet_stands_beside_the_published(root: Path) -> None:
    frame = figures_main.imagenet(Source("paper", root)).frame
    found = {
        (row["training"], row["weights (%)"]): row["published (%)"]
        for row in frame.to_dict("records")
    }
    assert found == {
        ("usual", "100"): "25.10",
        ("usual", "10"): "27.60",
        ("usual", "20"): "25.80",
        ("tuned", "100"): "23.00",
        ("tuned", "10"): "26.93",
        ("tuned", "20"): "25.09",
    }
    left = frame[frame["left dense"] != "–"]
    assert set(left["training"]) == {"usual"} and set(left["weights (%)"]) == {"10", "20"}


def test_without_imagenet_one_line_says_so_and_the_notebook_goes_on(tmp_path: Path) -> None:
    lines: list[str] = []
    assert figures.draw_all(Source("quick", tmp_path), ["imagenet"], lines.append) == []
    (line,) = lines
    assert line.startswith("skipped table imagenet: imagenet (quick): no runs; IMAGENET_ROOT")
    shown = figures.show("imagenet", Source("quick", tmp_path))
    assert isinstance(shown, figures_main.Absent)
    assert "IMAGENET_ROOT" in shown._repr_markdown_()
    absent = figures_main.meaning("cifar10_table", Source("quick", tmp_path))
    assert isinstance(absent, figures_main.Absent)


# ------------------------------------------------------------------------------------- the claims


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
        row = rows[f"cifar10_lower_than_snip_{model}"]
        assert (row["verdict"], row["n"]) == ("reproduced", 3)  # made up so: SNIP 5, ours 2.5
        for method in ("dense", "sparse_momentum"):
            assert rows[f"cifar10_error_{method}_{model}"]["n"] == 3
    value = rows["cifar10_error_dense_wrn-22-8"]
    assert value["verdict"] == "not reproduced" and value["paper"] == "4.26 ± 0.03 %"


def test_a_reduced_profile_compares_methods_and_no_values(judged: dict) -> None:
    rows = judged["quick"]
    assert rows["cifar10_lower_than_snip_alexnet-s"]["verdict"] == "reproduced"
    assert rows["cifar10_lower_than_snip_vgg16-d"]["verdict"] == claims.NO_RUNS
    assert rows["cifar10_error_dense_alexnet-s"]["verdict"] == "not comparable"
    assert rows["cifar10_relative_reduction"]["verdict"] == "not comparable"
    dropout = rows["mnist_variational_dropout_lower_lenet300-100"]
    assert dropout["verdict"] == claims.NO_RUNS and "the paper's scale only" in dropout["detail"]
    wrn = rows["wrn28_2_lower_than_deepr"]
    assert "ours is WRN-10-1, the paper's WRN-28-2" in wrn["detail"] and wrn["n"] == 3
    assert rows["mnist_matches_dense_at_0.2"]["n"] == 3
    assert rows["mnist_lower_than_snip_lenet5"]["verdict"] == "reproduced"


def test_variational_dropout_is_held_against_ours(judged: dict) -> None:
    row = judged["paper"]["mnist_variational_dropout_lower_lenet300-100"]
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


def test_static_masks_and_the_reduction_come_from_the_published_curves(judged: dict) -> None:
    rows = judged["paper"]
    assert rows["wrn28_2_lower_than_static"]["paper_value"] == pytest.approx(-0.8016, abs=1e-3)
    assert "WRN-10-1" not in rows["wrn28_2_lower_than_static"]["detail"]
    reduction = rows["cifar10_relative_reduction"]
    assert reduction["paper_value"] == 15 and "published curves give 9.5 %" in reduction["detail"]
    assert math.isfinite(reduction["ours_low"])


def test_imagenet_values_without_a_standard_error_use_our_interval(judged: dict) -> None:
    row = judged["paper"]["imagenet_error_partial_0.1"]
    assert (row["paper_value"], row["n"]) == (27.6, 3)
    assert row["verdict"] == "not reproduced" and 23 < row["ours_mean"] < 26


def test_meaning_lists_the_claims_of_one_experiment(root: Path, judged: dict) -> None:
    table = figures_main.meaning("cifar10_table", Source("quick", root))
    assert isinstance(table, figures.Table)
    mine = [r for r in judged["quick"].values() if r["experiment"] == "cifar10_table"]
    known = [r for r in mine if r["verdict"] != claims.NO_RUNS]
    assert table.frame["claim"].tolist() == [r["claim"] for r in known]
    assert f"{len(mine) - len(known)} further claims" in table.note


def test_a_verdict_on_runs_that_did_not_learn_says_so(tmp_path: Path) -> None:
    def stuck(run: Run) -> bool:
        return run.model == "lenet5" and run.density == 0.004

    write_grid(tmp_path, "mnist_compression", "paper", lambda run: 88.65 if stuck(run) else 1.0)
    rows = claims.verdict_table(Source("paper", tmp_path), "01_main_results").set_index("id")
    detail = rows.loc["mnist_variational_dropout_lower_lenet5", "detail"]
    assert detail.endswith("10 of 10 runs did not learn (error above 80 %)")
    assert "learn" not in rows.loc["mnist_variational_dropout_lower_lenet300-100", "detail"]
