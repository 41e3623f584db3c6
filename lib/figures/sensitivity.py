"""How much prune rate, its schedule and momentum move the error; and the layers left dense."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

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
from lib.figures.gallery import figure, table
from lib.figures.plots import (
    BLUE,
    LOOKS,
    Plot,
    curves,
    finish,
    limits_of,
    panels,
    value_axis,
    weights_axis,
)
from lib.figures.tables import Table, difference, error_lines, failures, groups
from lib.results.reading import (
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
    summarise,
)
from lib.stats import paired_difference, t_interval

# Hyper-parameter -> its name, and its two curves, each with the runs that it is made of.
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
_PUBLISHED_NETS = ("alexnet-s", "vgg16-d")


def sensitivity(source: Source) -> pd.DataFrame:
    """The error of each run that learned: over ("prune_rate" or "momentum"), model, variant (a key
    of LOOKS: the decay of the prune rate, or the method), setting, seed, test_error_pct.
    """
    runs = load("sensitivity", source).needed()
    parts = []
    for over, (_, variants) in _CURVES.items():
        for variant, where in variants.items():
            rows = runs.where(**where).errors()
            rows = rows.assign(over=over, variant=variant, setting=rows[over])
            several = rows.groupby("model")["setting"].transform("nunique") > 1
            parts.append(rows[several])
    kept = ["over", "model", "variant", "setting", "seed", "test_error_pct"]
    return pd.concat(parts, ignore_index=True)[kept]


def published_sensitivity() -> pd.DataFrame:
    """The published points in the same columns, and standard_error."""
    parts = []
    for over in _CURVES:
        rows = published_rows(f"sensitivity_{over}", model=list(_PUBLISHED_NETS))
        variant = rows["schedule"] if over == "prune_rate" else rows["method"]
        parts.append(rows.assign(over=over, variant=variant, setting=rows[over]))
    kept = ["over", "model", "variant", "setting", "test_error_pct", "standard_error"]
    every = pd.concat(parts, ignore_index=True)[kept]
    return every[every["variant"].isin([name for _, known in _CURVES.values() for name in known])]


@figure("sensitivity", "sensitivity")
def sensitivity_figure(source: Source) -> Plot:
    """Test error against the prune rate with two ways of its decay, and against the momentum of a
    sparse and a dense network.
    """
    runs, rows, theirs = load("sensitivity", source), sensitivity(source), published_sensitivity()
    shown = []
    planned = [run.model for run in runs.planned]
    for model in dict.fromkeys((*planned, *_PUBLISHED_NETS)):
        mine = rows[rows["model"] == model]
        known = theirs[theirs["model"] == model]
        # A reduced run is far from the published errors, which then have panels of their own.
        if len(mine):
            shown.append((model_name(model), mine, known.iloc[:0] if runs.reduced() else known))
        if len(known) and (mine.empty or runs.reduced()):
            shown.append((f"{model_name(model)} (published)", mine.iloc[:0], known))
    titles = [f"{title}: {_CURVES[over][0]}" for title, *_ in shown for over in _CURVES]
    plot, axes = panels(titles, across=2, height=1.7)
    places = [(over, mine, known) for _, mine, known in shown for over in _CURVES]
    outside = []
    for ax, title, (over, mine, known) in zip(axes, titles, places, strict=True):
        mine, known = mine[mine["over"] == over], known[known["over"] == over]
        outside += [f"{title}: {text}" for text in _panel(ax, over, mine, known)]
    how = (
        "Mean of the seeds (dots) with Student-t 95 % interval; open and dashed: published, from "
        "before the correction of the masks of these networks. Band: what counts as no difference, "
        "around the error at prune rate 0.2 or momentum 0.9."
    )
    cut = f"Above a panel: {'; '.join(outside)}." if outside else ""
    return finish(plot, runs, how, cut, failures(runs, ("model", "method", "momentum")))


def _panel(ax: Any, over: str, mine: pd.DataFrame, known: pd.DataFrame) -> list[str]:
    """One hyper-parameter of one network; what lies above the window of the paper's test."""
    if mine.empty and known.empty:
        ax.text(0.5, 0.5, "no runs", transform=ax.transAxes, ha="center", color="0.4")
        ax.set_axis_off()
        return []
    means = pd.concat([summarise(mine, ["variant", "setting"]).rename(
        columns={"mean": "test_error_pct"}), known])  # fmt: skip
    tested = means[means["setting"].isin(within(means["setting"], *MOMENTA))]
    inside = tested if over == "momentum" and len(tested) else means
    far = means["test_error_pct"].max() > 1.5 * inside["test_error_pct"].max()
    ends = [inside["test_error_pct"], inside["low"].dropna(), inside["high"].dropna()]
    outside = curves(ax, mine, "setting", by="variant", theirs=known,
                     limits=limits_of(*ends, margin=0.15) if far else None)  # fmt: skip
    value_axis(ax, means["setting"])
    at = means[means["setting"].eq(REFERENCE[over]) & means["variant"].ne("dense")]
    if len(at):
        model = (mine if len(mine) else known)["model"].iloc[0]
        centre, margin = at["test_error_pct"].iloc[0], _margin(model)
        ax.axhspan(centre - margin, centre + margin, color=BLUE, alpha=0.1, lw=0, zorder=1.1)
    if over == "momentum":
        ax.tick_params(axis="x", rotation=60)
    ax.set_ylabel("test error (%)")
    return outside


def _margin(model: str) -> float:
    return MARGIN_SETTING["mnist" if model.startswith("lenet") else "cifar10"]


@table("sensitivity", "sensitivity")
def sensitivity_table(source: Source) -> Table:
    """How far each hyper-parameter moves the error: ours and published."""
    runs, theirs = load("sensitivity", source).needed(), published_sensitivity()
    lines = []
    for over, (name, variants) in _CURVES.items():
        for variant, where in variants.items():
            start = {"hyper-parameter": name, "curve": LOOKS[variant].label}
            for model in dict.fromkeys(run.model for run in runs.planned):
                mine = runs.where(model=model, **where).learned()
                if mine.rows[over].nunique() > 1:
                    moved = _moved(_in_range(curves_by_seed(mine, over), over), over, model)
                    lines.append({**start, "network": model_name(model), **moved})
            for model in _PUBLISHED_NETS:
                known = theirs[theirs["over"].eq(over) & theirs["variant"].eq(variant)]
                known = known[known["model"] == model].set_index("setting").sort_index()
                moved = _published_shift(known["test_error_pct"], over)
                lines.append({**start, "network": f"{model_name(model)} (published)", **moved})
    lines.sort(key=lambda line: line["network"])
    note = (
        "Range: highest minus lowest mean error. Largest difference: of the setting whose paired "
        "95 % interval reaches farthest from zero, against prune rate 0.2 or momentum 0.9; "
        "published curves have no paired seeds. Momentum 0.99 is left out, as in the paper's test."
    )
    caption = "How far prune rate and momentum move the test error"
    return Table.of(
        lines, caption, note, failures(runs, ("model", "method", "momentum")), _scale(runs)
    )


def _scale(runs: Runs) -> str:
    return sentence(runs.scale())


def _in_range(curves_: pd.DataFrame, over: str) -> pd.DataFrame:
    return curves_[within(curves_.columns, *MOMENTA)] if over == "momentum" else curves_


def _range_of(means: pd.Series) -> dict[str, str]:
    return {
        "settings": f"{means.index.min():g} to {means.index.max():g} ({len(means)})",
        "lowest error (%)": f"{means.min():.2f} at {means.idxmin():g}",
        "range (points)": f"{means.max() - means.min():.2f}",
    }


def _moved(by_seed: pd.DataFrame, over: str, model: str) -> dict[str, str]:
    """The cells of one of our curves."""
    cells, reference = _range_of(by_seed.mean()), REFERENCE[over]
    pairs = {}
    if reference in by_seed and len(by_seed.columns) > 1:
        pairs = {at: pair for at, pair in shifts(by_seed, reference).items() if pair.n}
    if not pairs:
        return cells
    at = decisive(pairs, _margin(model))[0]
    pair = pairs[at]
    largest = {"largest difference (points)": f"{_signed(pair.mean)} at {at:g}"}
    interval = range_text(pair.low, pair.high, sign=True)
    return {**cells, **largest, "95 % interval": interval, "n": str(pair.n)}


def _published_shift(means: pd.Series, over: str) -> dict[str, str]:
    means = means[within(means.index, *MOMENTA)] if over == "momentum" else means
    off = means - means[REFERENCE[over]]
    at = off.abs().idxmax()
    largest = {"largest difference (points)": f"{_signed(off[at])} at {at:g}"}
    return {**_range_of(means), **largest}


def _signed(value: float) -> str:
    return interval_text(value, math.nan, math.nan, sign=True)


@table("sensitivity_tests", "sensitivity")
def sensitivity_tests(source: Source) -> Table:
    """The paper's Levene and Wilcoxon tests, on our curves and on the published ones."""
    runs, lines = load("sensitivity", source).needed(), []
    for over, (name, variants) in _CURVES.items():
        for data, rows in (("ours", sensitivity(source)), ("published", published_sensitivity())):
            low, high = MOMENTA if over == "momentum" else (0.0, 1.0)
            rows = rows[rows["over"].eq(over) & rows["setting"].between(low, high)]
            a, b = (
                {
                    model: part.groupby("setting")["test_error_pct"].mean()
                    for model, part in groups(rows[rows["variant"] == variant], "model")
                }
                for variant in variants
            )
            if (compared := compare_curves(a, b, REFERENCE[over])) is None:
                continue
            tested, networks = compared
            first, second = (LOOKS[variant].label for variant in variants)
            lines.append(
                {
                    "hyper-parameter": name,
                    "first": first,
                    "second": second,
                    "data": data,
                    "networks": ", ".join(map(model_name, networks)),
                    "points": str(tested.n),
                    "SD of the first": f"{tested.sd_a:.2f}",
                    "SD of the second": f"{tested.sd_b:.2f}",
                    "Levene W": _statistic(tested.levene.statistic, ".3f"),
                    "p": p_text(tested.levene.p),
                    "Wilcoxon": _statistic(tested.wilcoxon.statistic, "g"),
                    "p (Wilcoxon)": p_text(tested.wilcoxon.p),
                }
            )
    if not lines:
        raise NoRuns(f"sensitivity ({source.profile}): no two curves to compare")
    note = (
        "Mean errors centred at momentum 0.9 (prune rate 0.2), networks pooled, in points; "
        "momentum 0.99 left out. Levene's test about the median compares the spread of the two "
        "groups of points, Wilcoxon's signed-rank test their level. With so few points a large p "
        "is weak evidence: look at the spread."
    )
    caption = "The paper's tests of sensitivity to hyper-parameters"
    return Table.of(lines, caption, note, _scale(runs))


def _statistic(value: float, form: str) -> str:
    return f"{value:{form}}" if math.isfinite(value) else "–"


@table("effective_step", "effective_step")
def effective_step_table(source: Source) -> Table:
    """Which runs learn at two momenta and two steps lr / (1 - momentum), and their error."""
    runs = load("effective_step", source).needed()
    by = ("method", "momentum", "lr")
    steps = [cell["lr"] / (1 - cell["momentum"]) for cell in runs.shares(by).to_dict("records")]
    lines = [
        {**line, "lr / (1 − momentum)": f"{step:g}"}
        for line, step in zip(error_lines(runs, by=by), steps, strict=True)
    ]
    lines.sort(key=lambda line: (line["method"], line["lr / (1 − momentum)"], line["momentum"]))
    note = (
        "Along a gradient that stays, SGD with momentum m moves by lr / (1 − m) of it per "
        "mini-batch. Learned: neither diverged nor at chance. Error: of the seeds that learned."
    )
    return Table.of(lines, "Momentum, learning rate, and the step of both", note, _scale(runs))


# ----------------------------------------------------------------------------------- dense layers


def dense_layers(source: Source) -> pd.DataFrame:
    """The outcome of each run of `dense_layers`: the columns of the store, learned, variant
    ("sparse_momentum", "dense", "layers_left_dense"), nominal and real share of weights (%).

    NoRuns where no run with layers left dense is done.
    """
    runs = load("dense_layers", source).needed()
    rows = runs.outcomes()
    variant = rows["method"].where(~rows["keep_dense"].astype(bool), "layers_left_dense")
    if not variant.eq("layers_left_dense").any():
        raise NoRuns(f"dense_layers ({source.profile}): no run with layers left dense is done")
    real = 100 * rows["weights_active"] / rows["weights_total"]
    return rows.assign(variant=variant, nominal=rows["weights"], real=real)


@figure("dense_layers", "dense_layers")
def dense_layers_figure(source: Source) -> Plot:
    """What the layers did that the official code of July 2019 left dense by accident: test error
    against the share of weights there really was; the arrow comes from the share asked for.
    """
    runs, rows = load("dense_layers", source), dense_layers(source)
    models = list(dict.fromkeys(rows.loc[rows["variant"] == "layers_left_dense", "model"]))
    plot, axes = panels([model_name(model) for model in models], across=2, height=2.5)
    for ax, model in zip(axes, models, strict=True):
        mine = rows[(rows["model"] == model) & rows["learned"]]
        july = mine["variant"] == "layers_left_dense"
        # Its real share is the same for all seeds but for a weight or two.
        real = mine.groupby(["variant", "nominal"])["real"].transform("mean")
        at = mine.assign(x=(1.03 * real).where(july, mine["nominal"]))
        curves(ax, at.rename(columns={"x": "share"}), "share", by="variant", level="dense")
        look = LOOKS["layers_left_dense"]
        for (nominal,), part in at[july].groupby(["nominal"]):
            mean, share = part["test_error_pct"].mean(), part["x"].iloc[0]
            arrow = {"arrowstyle": "->", "color": look.colour, "shrinkB": 4}
            ax.annotate("", (share, mean), (nominal, mean), arrowprops=arrow, zorder=2.2)
        weights_axis(ax, (at.loc[at["variant"] != "dense", "x"].round(1) / 100).tolist())
        ax.set_ylabel("test error (%)")
    how = "Mean of the seeds (dots) with Student-t 95 % interval."
    return finish(plot, runs, how, failures(runs, ("model", "method", "density")))


@table("dense_layers", "dense_layers")
def dense_layers_table(source: Source) -> Table:
    """Nominal against real share of weights, and the error of the three kinds of network."""
    runs, rows = load("dense_layers", source).needed(), dense_layers(source)
    rows, lines = rows[rows["learned"]], []
    errors = {
        key: part.set_index("seed")["test_error_pct"]
        for key, part in groups(rows, ["model", "variant", "density"])
    }
    for (model, variant, nominal), mine in errors.items():
        if variant != "layers_left_dense":
            continue
        cell = rows[(rows["model"] == model) & rows["variant"].eq(variant)]
        real = cell.loc[cell["density"] == nominal, "real"].mean()
        known = published_rows(
            "accidental_dense_layers_before_aug2019", model=model, density=[0.05, 0.1]
        ).set_index("density")["value"]
        line = {
            "network": model_name(model),
            "nominal (%)": f"{100 * nominal:g}",
            "real (%)": f"{real:.1f}",
            "real, from the old code (%)": f"{known[nominal]:.1f}" if nominal in known else "–",
            "layers left dense: error (%)": f"{mine.mean():.2f}",
        }
        nothing = pd.Series(dtype=float)
        as_many = round(KEPT_DENSE[model].real_density(nominal), 4)
        for name, share in (("nominal share", nominal), ("as many weights", as_many)):
            other = errors.get((model, "sparse_momentum", share), nothing)
            line[f"fully sparse, {name}: error (%)"] = f"{other.mean():.2f}" if len(other) else "–"
            line[f"difference to {name}"] = difference(paired_difference(mine, other))
        dense = errors.get((model, "dense", 1.0), nothing)
        line["dense: error (%)"] = f"{t_interval(dense).mean:.2f}" if len(dense) else "–"
        lines.append(line | {"n": str(len(mine))})
    note = (
        "Differences: with layers left dense minus fully sparse, in percentage points, paired by "
        "seed, with 95 % interval; negative: the dense layers helped."
    )
    caption = "What the accidentally dense layers of July 2019 did"
    return Table.of(lines, caption, note, _scale(runs))
