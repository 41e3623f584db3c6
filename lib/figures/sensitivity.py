"""Figures and tables of the experiments `sensitivity` and `dense_layers`.  Imports no torch."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter

from lib.claims.ablations import MARGIN_SETTING
from lib.claims.effects import (
    MOMENTA,
    REFERENCE,
    compare_curves,
    curves_by_seed,
    decisive,
    shifts,
    within,
)
from lib.experiments import KEPT_DENSE
from lib.figures.plots import (
    PALETTE,
    Plot,
    Table,
    draw_level,
    draw_ours,
    draw_published,
    figure,
    legend_below,
    mark_clipped,
    n_text,
    new_plot,
    percent_axis,
    published_key,
    stamp,
    table,
)
from lib.results.reading import (
    METHOD_NAMES,
    NoRuns,
    Runs,
    Source,
    interval_text,
    load,
    model_name,
    p_text,
    published_rows,
    range_text,
    sentence,
)
from lib.stats import paired_difference, t_interval

# The second of two variants of sparse momentum in one panel: not a colour of PALETTE.
SECOND_COLOUR, SECOND_MARKER = "#332288", "s"

# Hyper-parameter: name, and its two curves in every panel, each with the runs that it is made of.
_CURVES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "prune_rate": (
        "prune rate",
        {
            name: {"method": "sparse_momentum", "momentum": 0.9, "schedule": name}
            for name in ("cosine", "linear")
        },
    ),
    "momentum": (
        "momentum",
        {
            name: {"method": name, "prune_rate": 0.2, "schedule": "cosine"}
            for name in ("sparse_momentum", "dense")
        },
    ),
}
_VARIANT_NAMES = {
    "cosine": "Sparse momentum, cosine decay",
    "linear": "Sparse momentum, linear decay",
    "sparse_momentum": METHOD_NAMES["sparse_momentum"],
    "dense": METHOD_NAMES["dense"],
}
_PUBLISHED_NETS = ("alexnet-s", "vgg16-d")


# ------------------------------------------------------------------------------ 04: sensitivity


def _published(over: str, model: str, variant: str) -> pd.DataFrame:
    """Published points of one curve, in order of the setting."""
    wanted = {"schedule": variant} if over == "prune_rate" else {"method": variant}
    return published_rows(f"sensitivity_{over}", model=model, **wanted).sort_values(over)


def _look(variant: str) -> dict[str, Any]:
    if variant == "linear":
        return {"method": "sparse_momentum", "colour": SECOND_COLOUR, "marker": SECOND_MARKER}
    if variant == "dense":
        return {"method": "dense", "marker": "D"}
    return {"method": "sparse_momentum"}


def _panels(runs: Runs) -> list[tuple[str, str, bool, bool]]:
    """Title, model, whether ours and whether the published curves are in it; from left to right.

    A reduced run is far from the published errors, which then have panels of their own.
    """
    ours = list(dict.fromkeys(runs.rows["model"]))
    ours.sort(key=[run.model for run in runs.planned].index)
    overlaid = () if runs.reduced() else _PUBLISHED_NETS
    panels = [(model_name(m), m, True, m in overlaid) for m in ours]
    panels += [
        (f"Published: {model_name(m)}", m, False, True)
        for m in _PUBLISHED_NETS
        if m not in ours or m not in overlaid
    ]
    return panels


def _draw_panel(
    ax: Axes, runs: Runs, over: str, model: str, ours: bool, theirs: bool
) -> dict[str, list[int]]:
    """Both curves of one hyper-parameter in one network; n of our points by variant."""
    points: list[tuple[str, bool, float, float]] = []  # variant, published, setting, mean
    counts: dict[str, list[int]] = {}
    settings: set[float] = set()
    centre = None
    for variant, where in _CURVES[over][1].items():
        look = _look(variant)
        mine = runs.where(model=model, **where) if ours else None
        if mine is not None and mine.rows[over].nunique() > 1:
            curves = curves_by_seed(mine, over)
            at = [float(str(setting)) for setting in curves]
            cells = [curves[setting].dropna().tolist() for setting in at]
            counts[variant] = [len(cell) for cell in cells]
            draw_ours(ax, at, cells, **look)
            settings |= set(at)
            points += [(variant, False, *one) for one in zip(at, curves.mean(), strict=True)]
            if centre is None and REFERENCE[over] in curves:
                centre = float(curves[REFERENCE[over]].mean())
        if theirs:
            rows = _published(over, model, variant)
            draw_published(
                ax,
                rows[over].tolist(),
                rows["test_error_pct"].tolist(),
                rows["standard_error"].tolist(),
                **look,
            )
            settings |= set(rows[over])
            pairs = zip(rows[over], rows["test_error_pct"], strict=True)
            points += [(variant, True, *one) for one in pairs]
            if centre is None:
                at_reference = rows[over] == REFERENCE[over]
                centre = float(rows.loc[at_reference, "test_error_pct"].iloc[0])
    if not points:
        ax.text(0.5, 0.5, "no runs", transform=ax.transAxes, ha="center", color="0.4")
        ax.set_axis_off()
        return counts
    if centre is not None:
        margin = MARGIN_SETTING["mnist" if model.startswith("lenet") else "cifar10"]
        colour = PALETTE["sparse_momentum"]
        ax.axhspan(centre - margin, centre + margin, color=colour, alpha=0.1, lw=0, zorder=1.2)
    ax.margins(x=0.07, y=0.12)
    if over == "momentum":
        _clip_beyond(ax, points)
    ax.xaxis.set_major_locator(FixedLocator(sorted(settings)))
    labels = FuncFormatter(lambda value, _: f"{value:g}".lstrip("0"))
    ax.xaxis.set_major_formatter(labels)
    if over == "momentum":
        ax.tick_params(axis="x", labelrotation=60)
    ax.set_xlabel(_CURVES[over][0])
    return counts


def _clip_beyond(ax: Axes, points: list[tuple[str, bool, float, float]]) -> None:
    """The window of the paper's test, momentum 0.5 to 0.95; what lies above it as arrows and
    numbers, so that one setting at which nothing trains well does not flatten all others.
    """
    inside = [y for _, _, at, y in points if within([at], *MOMENTA)]
    if not inside or max(y for *_, y in points) < 1.5 * max(inside):
        return
    low = ax.dataLim.y0 - max(0.08 * (max(inside) - min(inside)), 0.02 * max(inside))
    high = max(inside) + max(0.3 * (max(inside) - min(inside)), 0.1 * max(inside))
    ax.set_ylim(low, high)
    out = [point for point in points if point[3] > high]
    for variant, published, at, y in out:
        method = _look(variant)["method"]
        mark_clipped(ax, [at], [y], method=method, published=published)
    shown = [point for point in out if not point[1]] or out
    said = " and ".join(f"{y:.1f}" for *_, y in shown)
    ax.text(0.86, 0.985, f"{said} %", transform=ax.transAxes, ha="right", va="top", fontsize=6.3)


@figure("sensitivity", experiment="sensitivity")
def sensitivity(source: Source) -> Plot:
    """Test error against prune rate and against momentum, one column per network."""
    runs = load("sensitivity", source).needed()
    panels = _panels(runs)
    plot, axes = new_plot(2, len(panels), size=(max(6.4, 2.05 * len(panels)), 5.2))
    counts: dict[str, list[int]] = {}
    for over, row in zip(_CURVES, axes, strict=True):
        for ax, (title, model, ours, theirs) in zip(row, panels, strict=True):
            for variant, found in _draw_panel(ax, runs, over, model, ours, theirs).items():
                counts.setdefault(variant, []).extend(found)
            ax.set_title(title)
        row[0].set_ylabel("test error (%)")
    handles: list[Any] = [
        _handle(variant, counts[variant]) for variant in _VARIANT_NAMES if variant in counts
    ]
    handles += [
        Patch(color=PALETTE["sparse_momentum"], alpha=0.15, lw=0, label="± margin of the claim"),
        published_key(),
    ]
    legend_below(plot, handles, columns=3)
    stamp(
        plot,
        runs,
        "Band: what counts as no difference (stated before the runs), around the error at prune "
        "rate 0.2 or momentum 0.9. Each panel has its own scale; arrows: momentum 0.99, above the "
        "window, with the error there. "
        "The published curves were computed before the correction of the masks of these networks.",
    )
    return plot


def _handle(variant: str, counts: list[int]) -> Line2D:
    look = _look(variant)
    return Line2D(
        [],
        [],
        color=look.get("colour", PALETTE[look["method"]]),
        marker=look.get("marker", "o"),
        label=f"{_VARIANT_NAMES[variant]} ({n_text(counts)})",
    )


@table("sensitivity", experiment="sensitivity")
def sensitivity_table(source: Source) -> Table:
    """How far each hyper-parameter moves the error: ours and published."""
    runs = load("sensitivity", source).needed()
    lines = []
    for over, (name, variants) in _CURVES.items():
        for title, model, ours, theirs in _panels(runs):
            for variant, where in variants.items():
                mine = runs.where(model=model, **where) if ours else None
                if mine is not None and mine.rows[over].nunique() > 1:
                    curves = _in_range(curves_by_seed(mine, over), over)
                    lines.append(
                        {
                            "hyper-parameter": name,
                            "network": title,
                            "curve": _SHORT[variant],
                            **_moved(curves, over, model),
                        }
                    )
                if theirs:
                    rows = _published(over, model, variant).set_index(over)["test_error_pct"]
                    shown = rows[within(rows.index, *MOMENTA)] if over == "momentum" else rows
                    lines.append(
                        {
                            "hyper-parameter": name,
                            "network": f"Published: {model_name(model)}",
                            "curve": _SHORT[variant],
                            **_range_of(shown),
                            **_published_shift(shown, over),
                        }
                    )
    note = (
        "Range: highest minus lowest mean error. Largest difference: of the setting whose paired "
        "95 % interval reaches farthest from zero, against prune rate 0.2 or momentum 0.9; "
        "published curves have no paired seeds. Momentum 0.99 is left out, as in the paper's test. "
        f"{sentence(runs.scale())}"
    )
    caption = "How far prune rate and momentum move the test error"
    return Table(pd.DataFrame(lines), caption, note)


_SHORT = {
    "cosine": "cosine decay",
    "linear": "linear decay",
    "sparse_momentum": "sparse",
    "dense": "dense",
}


def _in_range(curves: pd.DataFrame, over: str) -> pd.DataFrame:
    if over != "momentum":
        return curves
    return curves[within(curves.columns, *MOMENTA)]


def _range_of(means: pd.Series) -> dict[str, str]:
    return {
        "settings": f"{means.index.min():g} to {means.index.max():g} ({len(means)})",
        "lowest error (%)": f"{means.min():.2f} at {means.idxmin():g}",
        "range (points)": f"{means.max() - means.min():.2f}",
    }


def _moved(curves: pd.DataFrame, over: str, model: str) -> dict[str, str]:
    """The cells of one of our curves."""
    cells = _range_of(curves.mean())
    reference = REFERENCE[over]
    pairs = {}
    if reference in curves and len(curves.columns) > 1:
        pairs = {at: pair for at, pair in shifts(curves, reference).items() if pair.n}
    if not pairs:
        return {**cells, "largest difference (points)": "–", "95 % interval": "–", "n": "–"}
    margin = MARGIN_SETTING["mnist" if model.startswith("lenet") else "cifar10"]
    at = decisive(pairs, margin)[0]
    pair = pairs[at]
    return {
        **cells,
        "largest difference (points)": f"{_signed(pair.mean)} at {at:g}",
        "95 % interval": range_text(pair.low, pair.high, sign=True),
        "n": str(pair.n),
    }


def _published_shift(means: pd.Series, over: str) -> dict[str, str]:
    difference = means - means[REFERENCE[over]]
    at = difference.abs().idxmax()
    return {
        "largest difference (points)": f"{_signed(difference[at])} at {at:g}",
        "95 % interval": "–",
        "n": "–",
    }


def _signed(value: float) -> str:
    return interval_text(value, math.nan, math.nan, sign=True)


@table("sensitivity_tests", experiment="sensitivity")
def sensitivity_tests(source: Source) -> Table:
    """The paper's Levene and Wilcoxon tests, on our curves and on the published ones."""
    runs = load("sensitivity", source).needed()
    lines = []
    for over, (name, variants) in _CURVES.items():
        first, second = variants
        for data in ("ours", "published"):
            sides: list[dict[str, pd.Series]] = []
            for variant, where in variants.items():
                means: dict[str, pd.Series] = {}
                models = dict.fromkeys(runs.rows["model"]) if data == "ours" else _PUBLISHED_NETS
                for model in models:
                    if data == "ours":
                        mine = runs.where(model=model, **where)
                        if mine.rows[over].nunique() < 2:
                            continue
                        curve = curves_by_seed(mine, over).mean()
                    else:
                        curve = _published(over, model, variant).set_index(over)["test_error_pct"]
                    low, high = MOMENTA if over == "momentum" else (0.0, 1.0)
                    means[model] = curve[within(curve.index, low, high)]
                sides.append(means)
            compared = compare_curves(sides[0], sides[1], REFERENCE[over])
            if compared is None:
                continue
            tested, networks = compared
            spread = max(
                abs(float(m.max() - m.min())) for side in sides for m in side.values() if len(m)
            )
            lines.append(
                {
                    "hyper-parameter": name,
                    "compared": f"{_SHORT[first]} and {_SHORT[second]}",
                    "data": data,
                    "networks": ", ".join(map(model_name, networks)),
                    "points": str(tested.n),
                    "SD of the first (points)": f"{tested.sd_a:.2f}",
                    "SD of the second (points)": f"{tested.sd_b:.2f}",
                    "largest range (points)": f"{spread:.2f}",
                    "Levene W": _statistic(tested.levene.statistic, ".3f"),
                    "p": p_text(tested.levene.p),
                    "Wilcoxon": _statistic(tested.wilcoxon.statistic, "g"),
                    "p (Wilcoxon)": p_text(tested.wilcoxon.p),
                }
            )
    note = (
        "Mean errors centred at momentum 0.9 (prune rate 0.2), networks pooled; momentum 0.99 left "
        "out. Levene's test about the median compares the spread of the two groups of points, "
        "Wilcoxon's signed-rank test their level. With so few points a large p is weak evidence: "
        "look at the spread in points. " + sentence(runs.scale())
    )
    if not lines:
        raise NoRuns(f"sensitivity ({source.profile}): no two curves to compare")
    caption = "The paper's tests of sensitivity to hyper-parameters"
    return Table(pd.DataFrame(lines), caption, note)


def _statistic(value: float, form: str) -> str:
    return f"{value:{form}}" if math.isfinite(value) else "–"


# ------------------------------------------------------------------------------ 07: dense layers


def _july(runs: Runs) -> Runs:
    """The runs with the layers left dense."""
    return runs.only(run for run in runs.planned if run.keep_dense)


def _sparse(runs: Runs) -> Runs:
    return runs.only(
        run for run in runs.planned if run.method == "sparse_momentum" and not run.keep_dense
    )


def _real(rows: pd.DataFrame) -> float:
    """Share of all weights that is active at the end, mean over the seeds."""
    return float((rows["weights_active"] / rows["weights_total"]).mean())


def _as_many(runs: Runs, model: str, nominal: float) -> Runs:
    """The fully sparse runs with as many weights as those of July 2019 at this nominal share."""
    return _sparse(runs).where(
        model=model, density=round(KEPT_DENSE[model].real_density(nominal), 4)
    )


def _models_done(runs: Runs) -> list[str]:
    done = set(_july(runs).rows["model"])
    models = [m for m in dict.fromkeys(run.model for run in runs.planned) if m in done]
    if not models:
        raise NoRuns(f"{runs.experiment} ({runs.profile}): no run with layers left dense is done")
    return models


@figure("dense_layers", experiment="dense_layers")
def dense_layers(source: Source) -> Plot:
    """Test error against nominal and real share of weights, one panel per network."""
    runs = load("dense_layers", source).needed()
    models = _models_done(runs)
    across = min(3, len(models))
    down = -(-len(models) // across)
    plot, axes = new_plot(down, across, size=(max(5.2, 2.9 * across), 2.9 * down + 0.7))
    for ax in axes.flat[len(models) :]:
        ax.set_visible(False)
    counts: list[int] = []
    for ax, model in zip(axes.flat, models, strict=False):
        counts += _draw_dense_layers(ax, runs.where(model=model))
        ax.set_title(model_name(model))
    for ax in axes[:, 0]:
        ax.set_ylabel("test error (%)")
    n = n_text(counts)
    second: dict[str, Any] = {"color": SECOND_COLOUR, "marker": SECOND_MARKER, "ls": "none"}
    colour = PALETTE["sparse_momentum"]
    legend_below(
        plot,
        [
            Line2D([], [], color=colour, marker="o", label=f"Fully sparse ({n})"),
            Line2D([], [], **second, label="Layers left dense, at their real share"),
            Line2D([], [], **second, mfc="white", label="the same, at their nominal share"),
            Line2D([], [], color=PALETTE["dense"], lw=1.1, label="Dense"),
        ],
        columns=2,
    )
    stamp(
        plot,
        runs,
        "The official code of July 2019 left convolutions of VGG16 and AlexNet dense by accident: "
        "the arrow leads from the share of weights asked for to the share there was.",
    )
    return plot


def _draw_dense_layers(ax: Axes, runs: Runs) -> list[int]:
    """One network; n of the cells."""
    sparse, july = _sparse(runs).rows, _july(runs).rows
    dense = runs.where(method="dense").rows["test_error_pct"]
    if len(dense):
        draw_level(ax, dense.tolist())
    counts = []
    shares = sorted(set(sparse["density"]))
    if shares:
        cells = [sparse.loc[sparse["density"] == at, "test_error_pct"].tolist() for at in shares]
        draw_ours(ax, [100 * at for at in shares], cells, method="sparse_momentum")
        counts += [len(cell) for cell in cells]
    for nominal in sorted(set(july["density"])):
        rows = july[july["density"] == nominal]
        real, errors = _real(rows), rows["test_error_pct"].tolist()
        counts.append(len(errors))
        mean = sum(errors) / len(errors)
        look: dict[str, Any] = {"colour": SECOND_COLOUR, "marker": SECOND_MARKER}
        beside = (
            103 * real
        )  # so that its bar and that of the fully sparse network can be told apart
        draw_ours(ax, [beside], [errors], method="sparse_momentum", **look)
        ax.annotate(
            "",
            xy=(beside, mean),
            xytext=(100 * nominal, mean),
            arrowprops={"arrowstyle": "->", "color": SECOND_COLOUR, "lw": 0.8, "shrinkB": 4},
            zorder=2.2,
        )
        ax.plot(
            100 * nominal, mean, SECOND_MARKER, color=SECOND_COLOUR, mfc="white", ms=4.2, mew=0.9
        )
        shares.append(real)
    percent_axis(ax, {round(share, 3) for share in (*shares, *july["density"])})
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    ax.margins(y=0.12)
    return counts


@table("dense_layers", experiment="dense_layers")
def dense_layers_table(source: Source) -> Table:
    """Nominal against real share of weights, and the error of the three kinds of network."""
    runs = load("dense_layers", source).needed()
    lines = []
    for model in _models_done(runs):
        dense = runs.where(model=model, method="dense").by_seed()
        here = _july(runs).where(model=model)
        for nominal in sorted(set(here.rows["density"])):
            cell = here.where(density=nominal)
            known = published_rows(
                "accidental_dense_layers_before_aug2019", model=model, density=[0.05, 0.1]
            ).set_index("density")["value"]
            line = {
                "network": model_name(model),
                "nominal (%)": f"{100 * nominal:g}",
                "real (%)": f"{100 * _real(cell.rows):.1f}",
                "real, computed from the old code (%)": f"{known[nominal]:.1f}"
                if nominal in known.index
                else "–",
                "layers left dense: error (%)": f"{t_interval(cell.by_seed()).mean:.2f}",
            }
            for name, other in (
                ("fully sparse, nominal share", _sparse(runs).where(model=model, density=nominal)),
                ("fully sparse, as many weights", _as_many(runs, model, nominal)),
            ):
                errors = other.by_seed()
                pair = paired_difference(cell.by_seed(), errors)
                line[f"{name}: error (%)"] = f"{errors.mean():.2f}" if len(errors) else "–"
                line[f"difference to {name}"] = interval_text(
                    pair.mean, pair.low, pair.high, sign=True
                )
            line["dense: error (%)"] = f"{dense.mean():.2f}" if len(dense) else "–"
            line["n"] = str(len(cell.rows))
            lines.append(line)
    note = (
        "Differences: with layers left dense minus fully sparse, in percentage points, paired by "
        f"seed, with 95 % interval; negative: the dense layers helped. {sentence(runs.scale())}"
    )
    caption = "What the accidentally dense layers of July 2019 did"
    return Table(pd.DataFrame(lines), caption, note)
