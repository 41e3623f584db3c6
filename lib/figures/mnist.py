"""LeNet-300-100 on MNIST: the curve, both networks of the baselines, initial densities; and both
LeNets beside the compression literature.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from lib.claims import differences
from lib.figures.gallery import figure, table
from lib.figures.plots import (
    GREY,
    Plot,
    curves,
    dots,
    finish,
    log_axis,
    panels,
    weights_axis,
)
from lib.figures.tables import Table, difference, error_lines, failures, groups, records
from lib.results.reading import (
    METHOD_NAMES,
    NoRuns,
    Runs,
    Source,
    load,
    model_name,
    p_text,
    published_rows,
    sentence,
    summarise,
)
from lib.stats import value_difference

LENET = {"dataset": "mnist", "model": "lenet300-100"}
_RAW = "dsr_authors_raw_runs_wrn28-2_and_mnist"
_MARKS = (
    "Mean of the seeds (dots) with Student-t 95 % interval; open and dashed: published (± 1.96 "
    "standard errors)."
)


def published_curves() -> pd.DataFrame:
    """The curves of the paper's MNIST figure and, beside them, static masks from the raw runs.

    Columns: method, density, weights (%), test_error_pct, standard_error, slip (the value printed
    where it is probably a slip and the raw runs behind it are taken; else NaN).
    """
    curves_ = published_rows("mnist_sparse_summary", **LENET)
    rows = pd.concat([curves_, published_rows(_RAW, **LENET, method="static")], ignore_index=True)
    rows["slip"] = rows["test_error_pct"].where(rows["suspect"])
    for i in rows.index[rows["suspect"]]:
        key = {name: rows.loc[i, name] for name in ("method", "density")}
        raw = published_rows(_RAW, **LENET, **key).iloc[0]
        rows.loc[i, ["test_error_pct", "standard_error"]] = raw[
            ["test_error_pct", "standard_error"]
        ].to_list()
    rows["weights"] = 100 * rows["density"]
    return rows[["method", "density", "weights", "test_error_pct", "standard_error", "slip"]]


def _slips() -> str:
    rows = published_curves().dropna(subset="slip").to_dict("records")
    return " ".join(
        f"The published {METHOD_NAMES[row['method']]} at {row['weights']:g} % is that of its raw "
        f"runs, {row['test_error_pct']:.2f}; {row['slip']:.2f} as printed is probably a slip."
        for row in rows
    )


# --------------------------------------------------------------------------------- the main curve


@figure("main_results_lenet300-100", "main_results")
def main_results(source: Source) -> Plot:
    """LeNet-300-100 on MNIST: test error of each method against the share of weights, ours and
    published.
    """
    runs = load("main_results", source, **LENET).needed()
    rows, theirs = runs.errors(), published_curves()
    plot, (near, whole) = panels(["Near the dense error", "Everything, log scale"], height=3.1)
    # What sparse momentum and dense networks reach, ours and published, is never outside.
    means = summarise(rows, ["method", "density"])
    best = ["dense", "sparse_momentum"]
    inside = [
        *means.loc[means["method"].isin(best), "mean"],
        *theirs.loc[theirs["method"].isin(best), "test_error_pct"],
    ]
    limits = (min(inside) - 0.1, max(inside) + 0.4)
    how: dict[str, Any] = {"theirs": theirs, "level": "dense", "spread": 0.015}
    outside = curves(near, rows, "weights", limits=limits, **how)
    wide = curves(whole, rows, "weights", log=True, **how)
    for ax in (near, whole):
        weights_axis(ax, {*rows["density"], *theirs["density"]} - {1.0})
    near.set_ylabel("test error (%)")
    beyond = f"Arrows: above the left panel, {'; '.join(outside)}." if outside else ""
    return finish(plot, runs, _MARKS, beyond, _wide(wide), _slips(), failures(runs))


def _wide(intervals: list[str]) -> str:
    return f"Intervals too wide to draw: {'; '.join(intervals)}." if intervals else ""


@table("main_results_lenet300-100", "main_results")
def main_results_table(source: Source) -> Table:
    """Test error of each method at each share of weights, ours beside the published."""
    runs = load("main_results", source, **LENET).needed()
    lines = error_lines(runs, published_curves())
    caption = "LeNet-300-100 on MNIST: test error by share of weights"
    return Table.of(lines, caption, _COMPARED, _slips(), sentence(runs.scale()))


_COMPARED = (
    "Mean [Student-t 95 % interval] of the seeds that learned; published: mean ± standard error; "
    "difference: Welch's interval."
)


@table("main_results_lenet300-100_differences", "main_results")
def main_results_differences(source: Source) -> Table:
    """Sparse momentum minus each other method at each share of weights, paired by seed."""
    runs = load("main_results", source, **LENET).needed()
    lines = []
    for method in [m for m in runs.methods if m not in ("dense", "sparse_momentum")]:
        ours, other = (runs.where(method=m).learned() for m in ("sparse_momentum", method))
        for row in records(differences(ours, other, "density")):
            lines.append(
                {
                    "sparse momentum −": METHOD_NAMES[method],
                    "weights (%)": f"{100 * row.density:g}",
                    "difference (points)": difference(row),
                    "n": str(row.n),
                    "p": p_text(row.p),
                    "p (Holm)": p_text(row.p_holm),
                }
            )
    if not lines:
        raise NoRuns(f"main_results ({source.profile}): no seed has finished two methods")
    note = (
        "Percentage points of test error [95 % interval] among seeds that learned in both; paired "
        "t-test, p adjusted by Holm over the shares of weights of each method."
    )
    caption = "LeNet-300-100 on MNIST: sparse momentum against each method"
    return Table.of(lines, caption, note, sentence(runs.scale()))


# ------------------------------------------------------------------------ the baselines' network

_NETWORKS = {
    ("lenet300-100", "uniform"): "As the paper trains it",
    ("lenet300-100-bn", "uniform"): "DSR authors' network",
    ("lenet300-100-bn", "half_output"): "Output half dense",
}


def baseline_network(source: Source) -> pd.DataFrame:
    """The outcome of each run of `baseline_network`, and beside the columns of the store: network
    (a panel's title), curve (the method, or "set_code", "dsr_code": as their authors' code trains
    it), weights (%) and learned.
    """
    rows = load("baseline_network", source).needed().outcomes()
    keys = zip(rows["model"], rows["init"], strict=True)
    by_code = rows["schedule"].eq("constant") & rows["method"].isin(["set", "dsr"])
    return rows.assign(
        network=[_NETWORKS[key] for key in keys],
        curve=rows["method"].where(~by_code, rows["method"] + "_code"),
    )


@figure("baseline_network", "baseline_network")
def baseline_network_figure(source: Source) -> Plot:
    """On which network were the published baselines trained? Test error of each method on MNIST in
    LeNet-300-100 as the paper trains it and as the DSR authors' code has it (batch norm after all
    three layers, no biases).
    """
    runs = load("baseline_network", source).needed()
    rows = baseline_network(source).query("learned")
    theirs = published_curves().rename(columns={"method": "curve"})
    names = [name for name in _NETWORKS.values() if name in set(rows["network"])]
    plot, axes = panels(names, across=3, height=3.0, sharey=True)
    how: dict[str, Any] = {"by": "curve", "theirs": theirs, "level": "dense", "spread": 0.015}
    wide = []
    for ax, name in zip(axes, names, strict=True):
        mine = rows[rows["network"] == name]
        wide += [f"{name}, {text}" for text in curves(ax, mine, "weights", log=True, **how)]
        weights_axis(ax, {*mine["density"], *theirs["density"]} - {1.0})
        ax.set_ylabel("test error (%, log scale)")
    errors = [*rows["test_error_pct"], *theirs["test_error_pct"]]
    axes[0].set_ylim(min(errors) / 1.15, max(errors) * 1.15)
    note = "The published curves are the same in each panel."
    shown = failures(runs, ("model", "method", "density"))
    return finish(plot, runs, _MARKS, note, _wide(wide), _slips(), shown)


@table("baseline_network", "baseline_network")
def baseline_network_table(source: Source) -> Table:
    """Ours minus the published curve by method and network, at each share of weights."""
    runs = load("baseline_network", source).needed()
    rows = baseline_network(source)
    theirs = published_curves().set_index(["method", "density"])
    shares = sorted(set(theirs.index.get_level_values("density")))
    lines = []
    for (curve, network), mine in groups(rows, ["curve", "network"]):
        method = mine["method"].iloc[0]
        line = {
            "method": METHOD_NAMES[method] + (", as in its code" if curve != method else ""),
            "network": network,
        }
        line["n"] = _range(mine.groupby("density")["seed"].nunique())
        for density in shares:
            at = mine[mine["density"] == density]
            errors = at.loc[at["learned"], "test_error_pct"]
            text = "–"
            if len(errors) and (method, density) in theirs.index:
                known = theirs.loc[(method, density)].to_dict()
                text = difference(
                    value_difference(errors, known["test_error_pct"], known["standard_error"])
                )
            if len(errors) < len(at):
                text += f" ({len(errors)} of {len(at)})"
            line[f"{100 * density:g} %"] = text
        lines.append(line)
    lines.sort(key=lambda line: [*METHOD_NAMES.values()].index(line["method"].split(",")[0]))
    note = (
        "Percentage points of test error, ours minus published, with Welch's 95 % interval; "
        "columns: shares of weights (100 %: dense); (k of n): seeds that learned, the mean's."
    )
    caption = "Which network reproduces each published baseline?"
    return Table.of(lines, caption, note, _slips(), sentence(runs.scale()))


def _range(counts: pd.Series) -> str:
    return "–".join(str(n) for n in dict.fromkeys((counts.min(), counts.max())))


# ------------------------------------------------------------------------------ initial densities

ERK = (
    "ERK: the density of a layer is proportional to (inputs + outputs) / (inputs × outputs), as in "
    "RigL, with the same number of weights in all."
)


@figure("initial_densities", "initial_densities")
def initial_densities(source: Source) -> Plot:
    """LeNet-300-100 on MNIST: test error of each method when every layer starts with the same
    density, and when small layers start denser (ERK).
    """
    runs = load("initial_densities", source, model="lenet300-100").needed()
    rows, theirs = runs.errors(), published_curves()
    shares = sorted(set(rows["density"]))
    order = {m: METHOD_NAMES[m] for m in dict.fromkeys(run.method for run in runs.planned)}
    titles = [f"{100 * share:g} % of the weights" for share in shares]
    plot, axes = panels(titles, across=3, height=3.0, sharey=True)
    for ax, share in zip(axes, shares, strict=True):
        here = rows[rows["density"] == share]
        cells = summarise(here, ["method", "init"])
        cells["low"] = cells["low"].clip(lower=cells["mean"] / 2)  # the scale has no zero
        dots(ax, cells, here, "method", order, by="init", value="test_error_pct")
        known = theirs[(theirs["density"] == share) & theirs["method"].isin(order)]
        at = [list(order).index(method) for method in known["method"]]
        ax.plot(known["test_error_pct"], at, "|", color="black", ms=13, mew=1.4, label="published")
        ax.set_xlabel("test error (%, log scale)")
        log_axis(ax, "x")
    how = (
        "Mean of the seeds (dots) with Student-t 95 % interval, cut at half the mean. The "
        "published runs of SET, DSR and DeepR are of another network (experiment baseline_network)."
    )
    return finish(plot, runs, how, ERK, failures(runs, ("method", "init", "density")))


@table("initial_densities", "initial_densities")
def initial_densities_table(source: Source) -> Table:
    """Each method's error from uniform and from ERK densities, and the difference seed by seed."""
    runs = load("initial_densities", source, model="lenet300-100").needed()
    lines = error_lines(runs, by=("method", "density", "init"))
    pairs = {}
    for method in runs.methods:
        erk, uniform = (
            runs.where(method=method, init=init).learned() for init in ("erk", "uniform")
        )
        for row in records(differences(erk, uniform, "density")):
            pairs[METHOD_NAMES[method], f"{100 * row.density:g}"] = row
    for line in lines:
        pair = pairs.get((line["method"], line["weights (%)"]))
        if line["initial densities"] == "ERK" and pair is not None:
            line |= {
                "ERK − uniform (points)": difference(pair),
                "n": str(pair.n),
                "p (Holm)": p_text(pair.p_holm),
            }
    lines.sort(key=lambda line: (runs.methods.index(_METHOD[line["method"]]),
                                 float(line["weights (%)"])))  # fmt: skip
    note = (
        "Mean [95 % interval] of the seeds that learned; differences paired by seed, p of the "
        "paired t-test adjusted by Holm over the shares of each method."
    )
    caption = "LeNet-300-100: initial densities of the layers"
    return Table.of(lines, caption, note, ERK, sentence(runs.scale()))


_METHOD = {name: method for method, name in METHOD_NAMES.items()}

# ------------------------------------------------------------------------ compression literature

_LENETS = ("lenet300-100", "lenet5")
# One marker per source of the literature, in the order of the published table.
_SHAPES = "ph*Dv^sX<>"


def literature(model: str) -> pd.DataFrame:
    """Published points of a LeNet (the leaderboard row states no weights and is left out): the
    columns of results/published, weights (%) and authors ("Molchanov 2017").
    """
    rows = published_rows(f"mnist_{model}", setting="")
    authors = rows["label"].str.extract(r"\(([^)]*)\)$")[0]
    return rows.assign(weights=100 * rows["density"], authors=authors)


@figure("mnist_compression", "mnist_compression")
def mnist_compression(source: Source) -> Plot:
    """Both LeNets on MNIST: test error of sparse momentum and SNIP against the share of weights,
    beside published results of methods that compress a trained network or train with dropout.
    """
    every = load("mnist_compression", source).needed()
    models = [model for model in _LENETS if len(every.where(model=model).rows)]
    plot, axes = panels([model_name(m) + _images(every.where(model=m)) for m in models], height=3.3)
    names = dict.fromkeys(
        name
        for model in _LENETS
        for name in literature(model).query("method == 'other'")["authors"]
    )
    shapes = dict(zip(names, _SHAPES, strict=False))
    wide: list[str] = []
    for ax, model in zip(axes, models, strict=True):
        rows, theirs = every.where(model=model).errors(), literature(model)
        if len(rows):
            own = theirs[theirs["method"] != "other"]
            cut = curves(ax, rows, "weights", theirs=own, level="dense", spread=0.02, log=True)
            wide += [f"{model_name(model)} {interval}" for interval in cut]
        for authors, points in theirs[theirs["method"] == "other"].groupby("authors", sort=False):
            ax.plot(points["weights"], points["test_error_pct"], shapes[authors], color=GREY,
                    mfc="white", mew=1.0, label=authors, zorder=2.3)  # fmt: skip
        errors = [*rows["test_error_pct"], *theirs["test_error_pct"]]
        ax.set_ylim(min(errors) / 1.1, max(errors) * 1.1)
        log_axis(ax)
        weights_axis(ax, {*rows["density"], *theirs["density"]} - {1.0})
    axes[0].set_ylabel("test error (%, log scale)")
    shown = failures(every, ("model", "method", "density"))
    grey = "Grey: the literature, by first author."
    return finish(plot, every, _MARKS, grey, _wide(wide), shown)


def _images(runs: Runs) -> str:
    """For a title: on how many images the networks were trained, if not on all."""
    found = sorted({int(n) for n in runs.rows["train_samples"] if n > 0})
    return f", {' or '.join(f'{n:,}' for n in found)} images" if found else ""


@table("mnist_compression", "mnist_compression")
def mnist_compression_table(source: Source) -> Table:
    """Test error on MNIST by network, method and share of weights, ours beside the published."""
    runs = load("mnist_compression", source).needed()
    theirs = pd.concat([literature(model) for model in _LENETS])
    lines = error_lines(runs, theirs[theirs["method"] != "other"], ("model", "method", "density"))
    for row in theirs[theirs["method"] == "other"].to_dict("records"):
        lines.append(
            {
                "network": model_name(row["model"]),
                "method": row["label"],
                "weights (%)": f"{row['weights']:g}",
                "published (%)": f"{row['test_error_pct']:.2f}",
            }
        )
    lines.sort(key=lambda line: line["network"] != model_name(_LENETS[0]))
    scales = [
        f"{model_name(model)}: {part.scale()}."
        for model in _LENETS
        if len((part := runs.where(model=model)).rows)
    ]
    caption = "LeNets on MNIST against the compression literature"
    return Table.of(lines, caption, _COMPARED, *scales)
