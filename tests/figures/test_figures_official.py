"""The readings of the algorithm: figure, table and conclusion, on made-up runs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from matplotlib.text import Text

from lib import claims, experiments, paths
from lib.config import Run
from lib.experiments import READINGS
from lib.figures import FIGURES, TABLES
from lib.figures.readings import JUDGED, NAMES, compared, conclusions, published_errors
from lib.results import reading
from lib.results import store as results
from lib.results.reading import Source
from lib.stats import holm, paired_difference
from tests.support.made_up_effects import wobble
from tests.support.made_up_grid import write_grid

PUBLISHED = {0.01: 2.47, 0.02: 1.80, 0.05: 1.47}


def reading_of(run: Run) -> str:
    (name,) = [
        name
        for name, fields in READINGS.items()
        if all(getattr(run, field) == value for field, value in fields.items())
    ]
    return name


def made_up(shifts: dict[str, float], off: float = 0.0):
    """Error of a run: published + `off` in ours, `shifts` more in a reading, and a little noise."""

    def error(run: Run) -> float:
        level = PUBLISHED[run.density] + off + shifts.get(reading_of(run), 0.0)
        return level + 0.05 * run.seed + wobble(run, 0.005)

    return error


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for profile in ("smoke", "quick", "paper"):
        write_grid(
            tmp_path, "official_readings", profile, made_up({"plain": 0.4, "layer_size": 30.0})
        )
    return tmp_path


def test_every_reading_has_a_name_and_each_run_one_reading() -> None:
    assert list(NAMES) == list(READINGS)
    for profile in experiments.PROFILES:
        for run in experiments.runs("official_readings", profile):
            assert reading_of(run) in NAMES


def test_published_values_are_of_both_files() -> None:
    assert published_errors(0.02) == {
        "MNIST figure": (pytest.approx(1.8), pytest.approx(0.017966)),
        "compression figure": (1.99, 0.019),
    }
    assert JUDGED in published_errors(0.02)


def test_table_by_hand(root: Path) -> None:
    made = TABLES["official_readings"](Source("quick", root))
    frame = made.frame
    runs = reading.load("official_readings", Source("quick", root))
    assert len(frame) == 3 * len(READINGS)
    here = frame[frame["weights (%)"] == "2"].set_index("reading")
    ours = runs.by_seed(density=0.02, **READINGS["ours"])
    pairs = {
        name: paired_difference(runs.by_seed(density=0.02, **fields), ours)
        for name, fields in READINGS.items()
        if name != "ours"
    }
    adjusted = dict(zip(pairs, holm(pair.p_t for pair in pairs.values()), strict=True))
    for name, pair in pairs.items():
        row = here.loc[NAMES[name]]
        assert row["difference to ours (points)"] == f"{pair.mean:+.2f}".replace("-", "−")
        p = adjusted[name]
        assert row["p (Holm)"] == ("< 0.001" if p < 0.001 else f"{p:.3f}")
        assert row["n"] == "3"
    assert here.loc["ours", "difference to ours (points)"] == "ours"
    assert "2.47 ± 0.05 (MNIST figure), 2.36 ± 0.04 (compression figure)" in made.note


def test_weights_that_were_lost_are_said(root: Path) -> None:
    """The budget isn't kept by every reading: the table gives the extremes over the epochs."""
    path = paths.results_csv("quick", "official_readings", root)
    wanted = {"density": 0.05, **READINGS["anywhere"]}
    run = next(
        r
        for r in experiments.runs("official_readings", "quick")
        if all(getattr(r, k) == v for k, v in wanted.items())
    )
    rows = results.read_runs(path)
    row = rows[rows["run_id"] == run.run_id].iloc[0].to_dict()
    kept = [line for line in path.read_text().splitlines() if run.run_id not in line]
    path.write_text("\n".join(kept) + "\n")
    curve = {"run_id": run.run_id, "train_loss": 0.1, "val_error_pct": 2.0, "lr": 0.1}
    curves = [
        {**curve, "epoch": e, "prune_rate": 0.2, "density": share}
        for e, share in enumerate((0.05, 0.0475, 0.04501), start=1)
    ]
    assert results.append_run(path, row, curves, ())
    runs = reading.load("official_readings", Source("quick", root))
    (one,) = [r for r in compared(runs) if (r.name, r.density) == ("anywhere", 0.05)]
    assert one.weights == pytest.approx((0.9002, 1.0))
    frame = TABLES["official_readings"](Source("quick", root)).frame
    row = frame[(frame["reading"] == NAMES["anywhere"]) & (frame["weights (%)"] == "5")].iloc[0]
    assert row["active weights (% of those asked for)"] == "90.0 to 100.0"


@pytest.mark.parametrize("profile", ["smoke", "quick", "paper"])
def test_figure_fits_and_says_its_scale(root: Path, profile: str) -> None:
    plot = FIGURES["official_readings"](Source(profile, root))
    plot.draw_without_rendering()
    width, height = plot.bbox.size
    shown = [t for t in plot.findobj(Text) if t.get_visible() and t.get_text().strip()]
    labels = [t for ax in plot.axes for t in ax.get_xticklabels() if t in shown]
    for text in shown:
        box = text.get_window_extent()
        if text in labels and not -1 <= box.x0 <= width:
            continue  # kept by matplotlib beyond the limits, not drawn
        assert box.x0 >= -1 and box.y0 >= -1, text.get_text()
        assert box.x1 <= width + 1 and box.y1 <= height + 1, text.get_text()
    said = " ".join(t.get_text() for t in shown)
    assert ("published minus ours (MNIST figure)" in said) == (profile == "paper")
    assert all(name in said for key, name in NAMES.items() if key != "ours")
    assert f"Profile {profile}" in said
    assert ("▸" in said) and "+30.0" in said  # far beyond the others: printed, not drawn to scale


def test_each_seed_and_mean_is_drawn_where_it_belongs(root: Path) -> None:
    plot = FIGURES["official_readings"](Source("paper", root))
    runs = reading.load("official_readings", Source("paper", root))
    ax = plot.axes[1]  # 2 %
    ours = runs.by_seed(density=0.02, **READINGS["ours"])
    for i, name in enumerate(list(READINGS)[1:]):
        found = runs.by_seed(density=0.02, **READINGS[name]) - ours
        seeds = [
            line.get_xdata()
            for line in ax.lines
            if len(line.get_xdata()) == 5 and abs(line.get_ydata()[0] - i) < 0.3
        ]
        assert len(seeds) == 1 and sorted(seeds[0]) == pytest.approx(sorted(found))
        mean = [line for line in ax.lines if len(line.get_xdata()) == 1]
        assert any(
            line.get_xdata()[0] == pytest.approx(found.mean()) and line.get_ydata()[0] == i
            for line in mean
        )
    published = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"]
    assert pytest.approx(1.80 - ours.mean()) in published
    assert pytest.approx(1.99 - ours.mean()) in published


# ---------------------------------------------------------------------------------- conclusions


def said_at_paper(tmp_path: Path, shifts: dict[str, float], off: float) -> str:
    write_grid(tmp_path, "official_readings", "paper", made_up(shifts, off - 0.1))  # mean of seeds
    first, *rest = conclusions(Source("paper", tmp_path))
    assert first.startswith("1 % of the weights: ") and len(rest) == 2
    return first


def test_a_reading_that_explains_the_difference_is_named(tmp_path: Path) -> None:
    said = said_at_paper(tmp_path, {"keep": -0.5, "floor": -0.25, "plain": 0.4}, off=0.5)
    assert f"“{NAMES['keep']}” explains it" in said
    assert f"“{NAMES['floor']}” goes that way" in said
    assert f"“{NAMES['plain']}” by +0.40" in said  # moves the error, the other way
    assert f"“{NAMES['plain']}” explains" not in said
    assert f"“{NAMES['plain']}” goes" not in said


def test_it_is_said_that_no_reading_explains_it(tmp_path: Path) -> None:
    said = said_at_paper(tmp_path, {"plain": 0.4}, off=0.5)
    assert said.endswith("no reading is shown to explain it.")
    assert "ours minus published 2.47 is +0.50 [" in said
    assert "+0.61 [" in said and "against the 2.36 of the compression figure" in said


def test_without_a_difference_nothing_is_explained(tmp_path: Path) -> None:
    said = said_at_paper(tmp_path, {"keep": -0.5}, off=0.0)
    assert "no difference is shown that would have to be explained" in said
    assert f"“{NAMES['keep']}” by −0.50" in said


def test_reduced_runs_are_not_compared_with_the_published(root: Path) -> None:
    for said in conclusions(Source("quick", root)):
        assert "published" not in said
        assert f"“{NAMES['plain']}” by +0.40" in said
        assert "of 9 readings 9 are tested, and these move the error" in said


def test_one_seed_is_too_few(tmp_path: Path) -> None:
    write_grid(tmp_path, "official_readings", "paper", made_up({}), keep=lambda run: run.seed == 0)
    for said in conclusions(Source("paper", tmp_path)):
        assert "too few seeds to test a reading" in said
        assert "too few seeds of ours" in said
    FIGURES["official_readings"](Source("paper", tmp_path))


def test_diverged_readings_are_counted(tmp_path: Path) -> None:
    def error(run: Run) -> float | None:
        lost = reading_of(run) == "official" and run.density == 0.05 and run.seed < 2
        return None if lost else made_up({})(run)

    write_grid(tmp_path, "official_readings", "quick", error)
    frame = TABLES["official_readings"](Source("quick", tmp_path)).frame
    row = frame[(frame["reading"] == NAMES["official"]) & (frame["weights (%)"] == "5")].iloc[0]
    assert row["n"] == "1 (2 diverged)"


def test_without_ours_there_is_nothing_to_compare(tmp_path: Path) -> None:
    write_grid(
        tmp_path,
        "official_readings",
        "quick",
        made_up({}),
        keep=lambda run: reading_of(run) != "ours",
    )
    with pytest.raises(reading.NoRuns, match="no seed has finished ours and another reading"):
        conclusions(Source("quick", tmp_path))


def test_the_claims_compare_all_readings_together_with_the_curve(tmp_path: Path) -> None:
    write_grid(tmp_path, "official_readings", "paper", made_up({"official": 0.9}, off=-0.1))
    write_grid(tmp_path, "official_readings", "quick", made_up({}))
    table = claims.verdict_table(Source("paper", tmp_path)).set_index("id")
    for density, published in PUBLISHED.items():
        row = table.loc[f"official_readings_error_{density:g}"]
        assert row["paper_value"] == pytest.approx(published)
        assert row["ours_mean"] == pytest.approx(published + 0.9, abs=0.02)
        assert row["verdict"] == "not reproduced" and row["n"] == 5
    quick = claims.verdict_table(Source("quick", tmp_path)).set_index("id")
    assert quick.loc["official_readings_error_0.05", "verdict"] == "not comparable"
    assert not math.isnan(quick.loc["official_readings_error_0.05", "ours_mean"])
