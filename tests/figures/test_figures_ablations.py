"""Figures and tables of ablations, depth, sensitivity and dense layers, on made-up runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text

from lib import figures, paths
from lib.claims.effects import FULL, rules
from lib.config import Run
from lib.figures import FIGURES, TABLES, Plot
from lib.results import reading
from lib.results.reading import Source
from lib.stats import holm, paired_difference
from tests.support.made_up_effects import EXPERIMENTS, Effects, write

OURS_TABLES = (
    "ablations",
    "depth_scaling",
    "depth_scaling_trends",
    "sensitivity",
    "sensitivity_tests",
    "dense_layers",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    effects = Effects(prune_rate=0.5, momentum=0.3, noise=0.1)
    write(folder, "smoke", effects.error)
    write(folder, "quick", effects.error)
    write(folder, "paper", effects.error, keep=lambda run: run.seed < 2)
    return folder


def texts(plot: Plot) -> list[Text]:
    """What can be read in a figure (matplotlib also keeps labels of ticks outside the limits)."""
    axes = [ax for ax in plot.axes if ax.get_visible()]
    found = [*plot.texts, *(text for legend in plot.legends for text in legend.get_texts())]
    for ax in axes:
        found += [*ax.texts, ax.title, ax._left_title]
        for axis in (ax.xaxis, ax.yaxis) if ax.axison else ():
            low, high = sorted(axis.get_view_interval())
            ticks = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
            found += [axis.label, *(tick.label1 for tick in ticks)]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def words(plot: Plot) -> str:
    return " ".join(" ".join(t.get_text().split()) for t in texts(plot))


# ------------------------------------------------------------------------------------ all of them


def test_all_are_drawn_without_torch(root: Path) -> None:
    code = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'torchvision'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "from lib.figures import draw_all\n"
        "from lib.results.reading import Source\n"
        f"source = Source('smoke', {str(root)!r})\n"
        f"for path in draw_all(source, only={[*EXPERIMENTS, *OURS_TABLES]!r}):\n"
        "    print(path)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=paths.REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "skipped" not in done.stdout
    files = [Path(line) for line in done.stdout.splitlines()]
    assert {f"{name}.{kind}" for name in EXPERIMENTS for kind in ("pdf", "png")} | {
        f"{name}.{kind}" for name in OURS_TABLES for kind in ("md", "tex")
    } == {file.name for file in files}
    assert all(file.stat().st_size > 100 for file in files)


@pytest.mark.parametrize("profile", ["smoke", "quick", "paper"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_nothing_is_clipped_and_the_scale_is_said(root: Path, name: str, profile: str) -> None:
    plot = FIGURES[name](Source(profile, root))
    plot.draw_without_rendering()
    width, height = plot.bbox.size
    for text in texts(plot):
        box = text.get_window_extent()
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        assert inside, (text.get_text(), box)
    said = words(plot)
    assert f"Profile {profile}" in said
    assert ("reduced scale, not the paper's" in said) == (profile != "paper")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_without_runs_one_line_says_how_to_get_them(tmp_path: Path, name: str) -> None:
    said: list[str] = []
    assert figures.draw_all(Source("quick", tmp_path), only=[name], say=said.append) == []
    assert said and all(f"python -m lib run {name} --profile quick" in line for line in said)
    assert all("\n" not in line for line in said)


# ------------------------------------------------------------------------------------- ablations


def test_ablation_table_by_hand(root: Path) -> None:
    frame = TABLES["ablations"](Source("quick", root)).frame
    runs = reading.load("ablations", Source("quick", root), model="lenet300-100")
    here = frame[frame["network"] == "LeNet-300-100"]
    assert len(here) == 15 and (here["difference to full (points)"] == "full").sum() == 1
    full = runs.by_seed(**FULL)
    names = {"non-zeros": "nonzeros", "layer size": "layer_size"}
    pairs = [
        paired_difference(
            runs.by_seed(
                **rules(names.get(row["redistribution"], row["redistribution"]), row["growth"])
            ),
            full,
        )
        for row in here.to_dict("records")
    ]
    adjusted = holm(p.p_t if p.mean else np.nan for p in pairs)
    for row, pair, p in zip(here.to_dict("records"), pairs, adjusted, strict=True):
        if row["difference to full (points)"] == "full":
            assert row["p (Holm)"] == "–"
            continue
        assert row["difference to full (points)"] == f"{pair.mean:+.2f}".replace("-", "−")
        assert row["95 % interval"] == f"{pair.low:+.2f} to {pair.high:+.2f}".replace("-", "−")
        assert row["p (Holm)"] == ("< 0.001" if p < 0.001 else f"{p:.3f}")


def test_a_rule_that_does_not_learn_leaves_the_other_cells_their_colours(tmp_path: Path) -> None:
    def error(run: Run) -> float:
        return 2 + (80 if run.redistribution == "nonzeros" else 0.2 * (run.growth == "random"))

    write(tmp_path, "quick", error, ("ablations",))
    plot = FIGURES["ablations"](Source("quick", tmp_path))
    image = plot.axes[0].images[0]
    assert image.get_clim() == pytest.approx((-0.2, 0.2))
    assert image.colorbar is not None and image.colorbar.extend == "both"


def test_layers_drained_by_rounding_are_told(tmp_path: Path) -> None:
    """As written by a run: one that keeps its last layer and one that loses it."""
    write(tmp_path, "quick", lambda run: 2.0, ("ablations",), keep=lambda run: run.seed == 0)
    runs = reading.load(
        "ablations", Source("quick", tmp_path), model="lenet300-100", growth="momentum"
    )
    lines = ["run_id,epoch,layer,weights,active,momentum_share"]
    for run in runs.planned:
        for epoch, active in (
            (1, 50),
            (2, 30),
            (10, 25 if run.redistribution == "nonzeros" else 26),
        ):
            lines.append(f"{run.run_id},{epoch},fc3.weight,1000,{active},0.5")
            lines.append(f"{run.run_id},{epoch},fc2.weight,30000,{1500 - active},0.5")
    path = paths.results_csv("quick", "ablations", tmp_path).with_suffix(".layers.csv")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    said = "Rounding drains small layers: non-zeros at 5 % fc3.weight from 50 to 25 active weights."
    assert said in words(FIGURES["ablations"](Source("quick", tmp_path)))
    assert said in TABLES["ablations"](Source("quick", tmp_path)).note


def test_heat_map_has_a_panel_per_network_and_says_which_none(root: Path) -> None:
    plot = FIGURES["ablations"](Source("quick", root))
    maps = [ax for ax in plot.axes if ax.get_images() and ax.get_xlabel() == "growth"]
    assert [np.asarray(ax.get_images()[0].get_array()).shape for ax in maps] == [
        (5, 3),
        (2, 2),
        (2, 2),
    ]
    values = np.asarray(maps[0].get_images()[0].get_array())  # [redistribution, growth]
    assert values[0, 0] == 0 and values[3, 0] > 0.1 and values[4, 0] > 0.1
    assert "official code of July 2019" in words(plot) and "since August 2019" in words(plot)


def test_diverged_variants_are_told(tmp_path: Path) -> None:
    def error(run: Run) -> float | None:
        lost = run.redistribution == "none" and run.growth == "random"
        return None if lost and (run.model != "lenet5" or run.seed == 0) else Effects().error(run)

    write(tmp_path, "quick", error, ("ablations",))
    said = words(FIGURES["ablations"](Source("quick", tmp_path)))
    assert "3 diverged" in said and "n = 2, 1 diverged" in said
    frame = TABLES["ablations"](Source("quick", tmp_path)).frame
    assert "2 (1 diverged)" in set(frame["n"])


# ------------------------------------------------------------------------------------------ depth


def test_trends_find_what_was_put_in(root: Path) -> None:
    frame = TABLES["depth_scaling_trends"](Source("quick", root)).frame
    for family, networks in (("MLPs", "3"), ("BN-MLPs", "4")):
        mlps = frame[frame["family"] == family]
        assert list(mlps["conclusion"]) == ["grows", "grows"]
        for row in mlps.to_dict("records"):
            slope = float(row["slope (points per doubling)"])
            assert slope == pytest.approx(0.5, abs=0.1) and row["networks"] == networks
    plot = FIGURES["depth_scaling"](Source("quick", root))
    (title,) = [t.get_text() for t in texts(plot) if t.get_text() == "MLPs: redistribution"]
    assert title and len(re.findall(r"per doubling, p ", words(plot))) == 8


def test_one_size_has_no_trend(tmp_path: Path) -> None:
    write(tmp_path, "smoke", Effects().error, ("depth_scaling",))
    assert "one size only: no trend" in words(FIGURES["depth_scaling"](Source("smoke", tmp_path)))
    frame = TABLES["depth_scaling_trends"](Source("smoke", tmp_path)).frame
    assert set(frame["family"]) == {"MLPs", "BN-MLPs"}


# ------------------------------------------------------------------------------------ sensitivity


def test_the_papers_tests_on_the_published_data(root: Path) -> None:
    """As computed from the official data: Levene W = .0102, p = .92; Wilcoxon 27, p = 1."""
    frame = TABLES["sensitivity_tests"](Source("quick", root)).frame
    wanted = (frame["data"] == "published") & (frame["hyper-parameter"] == "momentum")
    (row,) = frame[wanted].to_dict("records")
    assert (row["points"], row["Levene W"], row["p"]) == ("12", "0.010", "0.921")
    assert (row["Wilcoxon"], row["p (Wilcoxon)"]) == ("27", "1.000")
    assert row["networks"] == "AlexNet-s, VGG16-D"


def test_size_of_the_effect(root: Path) -> None:
    frame = TABLES["sensitivity"](Source("quick", root)).frame
    here = frame[(frame["network"] == "LeNet-300-100") & (frame["curve"] == "cosine decay")]
    (row,) = here.to_dict("records")
    assert row["largest difference (points)"].endswith(" at 0.7")
    assert float(row["largest difference (points)"].split()[0]) == pytest.approx(0.5, abs=0.2)
    theirs = frame[frame["network"] == "Published: AlexNet-s"].set_index("curve")
    assert theirs.loc["cosine decay", "range (points)"] == "0.73"  # 14.943 - 14.217
    assert theirs.loc["dense", "settings"] == "0.5 to 0.95 (6)"


def test_published_curves_beside_a_reduced_scale_and_over_the_papers(root: Path) -> None:
    reduced = {
        ax.get_title(loc="left") for ax in FIGURES["sensitivity"](Source("quick", root)).axes
    }
    assert {"LeNet-300-100", "Published: AlexNet-s", "Published: VGG16-D"} <= reduced
    paper = {ax.get_title(loc="left") for ax in FIGURES["sensitivity"](Source("paper", root)).axes}
    assert paper == {"LeNet-300-100", "AlexNet-s", "VGG16-D"}


# ----------------------------------------------------------------------------------- dense layers


def test_real_shares_are_those_of_the_old_code(root: Path) -> None:
    frame = TABLES["dense_layers"](Source("paper", root)).frame
    assert len(frame) == 10
    for row in frame.to_dict("records"):
        computed = float(row["real, computed from the old code (%)"])
        assert float(row["real (%)"]) == pytest.approx(computed, abs=0.1), row["network"]
    quick = TABLES["dense_layers"](Source("quick", root)).frame
    (row,) = quick.to_dict("records")
    difference = row["difference to fully sparse, nominal share"]
    assert float(difference.split()[0].replace("−", "-")) == pytest.approx(-1.5, abs=0.2)
    assert row["n"] == "3"
