"""The vocabulary: what curves, dots, heat maps, effects and bars draw."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection

from lib.figures.plots import (
    LOOKS,
    PALETTE,
    Plot,
    curves,
    dots,
    effect,
    finish,
    heat_map,
    panels,
    stacked,
)
from lib.figures.tables import Table
from lib.stats import t_interval

ERRORS = {1.0: [3.0, 3.2, 3.4], 2.0: [2.0, 2.1, 2.2], 5.0: [1.5]}


@pytest.fixture
def ax() -> Axes:
    return panels(["a panel"])[1][0]


def rows_of(**methods: dict[float, list[float]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"method": method, "weights": x, "seed": seed, "test_error_pct": value}
            for method, cells in methods.items()
            for x, values in cells.items()
            for seed, value in enumerate(values)
        ]
    )


def line_of(ax: Axes, key: str) -> tuple[list[float], list[float]]:
    found = [n for n in ax.lines if n.get_color() == PALETTE[key] and n.get_linestyle() == "-"]
    (line,) = [n for n in found if len(n.get_xdata())]
    return list(line.get_xdata()), list(line.get_ydata())


def bars_of(ax: Axes) -> list[list[float]]:
    segments = [s for c in ax.collections for s in getattr(c, "get_segments", list)()]
    return [sorted(segment[:, 1]) for segment in segments if len(segment) and len(segment.T) == 2]


def seeds_of(ax: Axes) -> list[float]:
    offsets = [np.asarray(c.get_offsets()) for c in ax.collections if isinstance(c, PathCollection)]
    return sorted(y for part in offsets for _, y in part.tolist())


def test_curves_are_means_with_student_intervals_and_every_seed(ax: Axes) -> None:
    assert curves(ax, rows_of(set=ERRORS), "weights") == []
    x, y = line_of(ax, "set")
    assert x == [1, 2, 5] and y == pytest.approx([np.mean(v) for v in ERRORS.values()])
    for values in (ERRORS[1.0], ERRORS[2.0]):
        low, high = t_interval(values)[1:3]
        assert any(bar == pytest.approx([low, high]) for bar in bars_of(ax))
    assert seeds_of(ax) == pytest.approx(sorted(itertools.chain(*ERRORS.values())))
    assert ax.get_legend_handles_labels()[1] == [LOOKS["set"].label]


def test_a_mean_outside_the_limits_is_an_arrow_and_named_without_its_bar(ax: Axes) -> None:
    """The interval of a cell that lies outside must not cross the panel from end to end."""
    wild = {1.0: [2.0, 9.0, 61.0], 2.0: [2.0, 2.1, 2.2]}
    outside = curves(ax, rows_of(set=wild, dsr=ERRORS), "weights", limits=(1.0, 4.0))
    assert outside == ["SET at 1: 24"] and ax.get_ylim() == (1.0, 4.0)
    arrows = [n for n in ax.lines if n.get_marker() == "^" and n.get_linestyle() == "None"]
    assert [n.get_color() for n in arrows if len(n.get_xdata())] == [PALETTE["set"]]
    assert line_of(ax, "set")[0] == [2.0]
    assert not any(low < 1 and high > 4 for low, high in bars_of(ax))


def test_an_interval_that_reaches_zero_has_no_place_on_a_log_scale(ax: Axes) -> None:
    rows = rows_of(set={1.0: [0.7, 0.9], 2.0: [2.0, 2.1, 2.2]})
    assert curves(ax, rows, "weights", log=True) == ["SET at 1: −0.471 to 2.07"]
    assert len(bars_of(ax)) == 1


def test_an_interval_wider_than_what_was_observed_is_named_and_not_drawn(ax: Axes) -> None:
    rows = rows_of(set={1.0: [8.0, 11.0, 79.0], 2.0: [2.0, 2.1, 2.2]})
    low, high = t_interval([8.0, 11.0, 79.0])[1:3]
    said = f"SET at 1: −{-low:.3g} to {high:.3g}"
    assert curves(ax, rows, "weights", log=True) == [said]
    assert all(bar[1] < 79 for bar in bars_of(ax)) and ax.get_ylim()[0] > 1
    assert line_of(ax, "set")[0] == [1.0, 2.0] and 79.0 in seeds_of(ax)
    curves(
        ax, rows.assign(method="dsr"), "weights", log=True
    )  # on the axis that is logarithmic now
    assert line_of(ax, "dsr")[1] == pytest.approx([98 / 3, 2.1])  # arithmetic means


def test_published_values_are_open_and_dashed_and_dense_is_a_level(ax: Axes) -> None:
    theirs = pd.DataFrame(
        {
            "method": ["set", "set", "dense", "deepr"],
            "weights": [1.0, 2.0, 100.0, 1.0],
            "test_error_pct": [3.5, 2.5, 1.3, 6.0],
            "standard_error": [0.1, np.nan, np.nan, 0.1],
        }
    )
    rows = rows_of(set=ERRORS, dense={100.0: [1.2, 1.3, 1.4]})
    curves(ax, rows, "weights", theirs=theirs, level="dense")
    dashed = [n for n in ax.lines if n.get_linestyle() == "--" and len(n.get_xdata())]
    shown = {n.get_color(): list(n.get_ydata()) for n in dashed}
    assert shown[PALETTE["set"]] == [3.5, 2.5] and shown[PALETTE["dense"]] == [1.3, 1.3]
    assert any(bar == pytest.approx([3.5 - 0.196, 3.5 + 0.196]) for bar in bars_of(ax))
    labels = ax.get_legend_handles_labels()[1]
    assert "published (± 1.96 s.e.)" in labels and "DeepR, published" in labels
    level = [n for n in ax.lines if list(n.get_ydata()) == pytest.approx([1.3, 1.3])]
    assert {n.get_linestyle() for n in level} == {"-", "--"}


def test_dots_show_cells_and_seeds_and_name_what_lies_beyond(ax: Axes) -> None:
    cells = pd.DataFrame(
        {"row": ["a", "b"], "mean": [0.1, 30.0], "low": [0.0, 29.0], "high": [0.2, 31.0]}
    )
    seeds = pd.DataFrame({"row": ["a", "a", "b"], "value": [0.05, 0.15, 30.0]})
    beyond = dots(ax, cells, seeds, "row", {"a": "first", "b": "second"}, limits=(-0.5, 0.5))
    assert beyond == ["second: +30.00"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["first", "second"]
    drawn = [list(n.get_xdata()) for n in ax.lines]
    assert [0.0, 0.2] in drawn and [0.05, 0.15] in drawn and [29.0, 31.0] not in drawn


def test_a_heat_map_clips_visibly_and_says_where(ax: Axes) -> None:
    values = pd.DataFrame([[0.0, 0.2], [-0.1, 77.0]], index=["p", "q"], columns=["r", "s"])
    assert heat_map(ax, values, values.astype(str), 0.3, "points") == ["q/s"]
    mesh = ax.collections[0]
    assert mesh.get_clim() == (-0.3, 0.3) and mesh.colorbar is not None
    assert mesh.colorbar.extend == "both" and len(ax.patches) == 1  # the frame
    assert {text.get_text() for text in ax.texts} == {"0.0", "0.2", "-0.1", "77.0"}


def test_an_effect_has_the_line_of_its_slope(ax: Axes) -> None:
    seeds = pd.DataFrame(
        {"size": [1, 2, 4] * 2, "benefit": [0.1, 0.6, 1.1, 0.3, 0.8, 1.3], "init": "uniform"}
    )
    effect(ax, seeds, "size", "benefit", "init", {"uniform": 0.5})
    (trend,) = [n for n in ax.lines if n.get_linestyle() == "--" and len(n.get_xdata()) == 3]
    assert list(trend.get_ydata()) == pytest.approx([0.2, 0.7, 1.2])
    assert ax.get_xscale() == "log"


def test_stacked_bars_add_up_and_nothing_is_below_zero(ax: Axes) -> None:
    parts = pd.DataFrame({"a": [60.0, 20.0], "b": [40.0, -1.0]}, index=["dense", "sparse"])
    stacked(ax, parts, {"a": "#000000", "b": "#0072B2"}, ["1.50 s", "0.30 s"])
    assert sum(patch.get_width() for patch in ax.patches) == 120
    assert [text.get_text() for text in ax.texts] == [" 1.50 s", " 0.30 s"]


def test_a_plot_has_one_legend_of_all_panels_and_its_caption() -> None:
    plot, axes = panels(["one", "two"])
    for ax in axes:
        curves(ax, rows_of(set=ERRORS, sparse_momentum=ERRORS), "weights")
    finish(plot, "Three runs.", "How to read it.", "")
    (legend,) = plot.legends
    assert [t.get_text() for t in legend.get_texts()] == ["Sparse momentum", "SET"]
    assert plot.caption == "How to read it. Three runs."
    assert isinstance(plot, Plot) and plot.content("png") == plot.content("png")


def test_markdown_and_latex_of_a_table() -> None:
    frame = pd.DataFrame({"weights (%)": ["1", "−2.5"], "name_1": ["a|b", "50 % & more"]})
    table = Table(frame, "A & B", "± note")
    assert table.markdown().splitlines()[2:6] == [
        "| weights (%) | name_1 |",
        "| ---: | --- |",
        "| 1 | a\\|b |",
        "| −2.5 | 50 % & more |",
    ]
    latex = table.latex()
    assert r"\caption{A \& B}" in latex and r"\begin{tabular}{rl}" in latex
    assert r"$-$2.5 & 50 \% \& more \\" in latex and r"name\_1" in latex and r"$\pm$ note" in latex
    assert Table.of([{"a": "1"}, {"b": "2"}], "gaps").frame.to_numpy().tolist() == [
        ["1", "–"],
        ["–", "2"],
    ]
