"""Figures and tables of the experiments `mnist_compression`, `cifar10_table`, `wrn28_2_curve` and
`imagenet`.  Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from lib import claims, experiments
from lib.figures.plots import (
    PALETTE,
    Absent,
    Plot,
    Table,
    draw_density_curves,
    draw_ours,
    draw_published,
    figure,
    legend_below,
    n_text,
    new_plot,
    percent_axis,
    published_key,
    stamp,
    table,
)
from lib.results.reading import (
    CHANCE,
    METHOD_NAMES,
    NoRuns,
    Runs,
    Source,
    interval_text,
    load,
    model_name,
    p_text,
    published_rows,
    published_text,
    range_text,
    sentence,
    summarise,
)

# ------------------------------------------------------- 01: the compression literature on MNIST

_LENETS = ("lenet300-100", "lenet5")
# One marker per source of the literature, in the order of the published table.
_SHAPES = ("p", "h", "*", "D", "v", "^", "s", "X", "<", ">")
_GREY = "#555555"


def _literature(model: str) -> pd.DataFrame:
    """Published points of a LeNet; the leaderboard row, which states no weights, is left out."""
    return published_rows(f"mnist_{model}", setting="")


def _short(label: str) -> str:
    """Authors and year: "Molchanov 2017" of "Variational Dropout (Molchanov 2017)"."""
    return label.rpartition("(")[2].rstrip(")")


def _percent_ticks(ax: Axes, shares: Iterable[float]) -> None:
    """As `percent_axis`, with few ticks: the literature's shares lie too close for one each."""
    known = list(shares)
    percent_axis(ax, known)
    low, high = (100 * f(known) for f in (min, max))
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50) if low <= t <= high]
    ax.xaxis.set_major_locator(FixedLocator(ticks))


def _log_errors(ax: Axes, errors: Iterable[float]) -> None:
    """Vertical axis: test error in %, logarithmic: some sparse networks fail by far."""
    found = [e for e in errors if math.isfinite(e) and e > 0]
    low, high = min(found) / 1.12, max(found) * 1.12
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    steps = (0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 6, 7, 8, 10, 15, 20, 30, 40, 50, 60, 70, 90)
    ticks = [t for t in steps if low <= t <= high]
    while len(ticks) > 8:
        ticks = ticks[::2]
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _images(runs: Runs) -> str:
    """For a title: on how many images the networks were trained, if not on all."""
    found = sorted({int(n) for n in runs.rows["train_samples"] if n > 0})
    return f", trained on {' or '.join(f'{n:,}' for n in found)} images" if found else ""


@figure("mnist_compression", experiment="mnist_compression")
def mnist_compression(source: Source) -> Plot:
    """Both LeNets on MNIST: test error of sparse momentum and SNIP against the share of weights,
    beside the published results of methods that compress a network.
    """
    every = load("mnist_compression", source).needed()
    shown = [every.where(model=model) for model in _LENETS]
    shown = [runs for runs in shown if len(runs.rows)]
    plot, axes = new_plot(1, len(shown), size=(7.4, 4.5))
    handles: dict[str, Any] = {}
    numbers: list[str] = []
    sources = dict.fromkeys(
        _short(label)
        for model in _LENETS
        for label in _literature(model).query("method == 'other'")["label"]
    )
    shapes = dict(zip(sources, _SHAPES, strict=False))
    for ax, runs in zip(axes[0], shown, strict=True):
        model = runs.planned[0].model
        theirs = _literature(model)
        shares = {*runs.rows["density"], *theirs["density"]} - {1.0}
        _percent_ticks(ax, shares)
        shown_errors = [*runs.rows["test_error_pct"], *theirs["test_error_pct"]]
        _log_errors(ax, [*shown_errors, *[90.0] * len(runs.diverged)])
        learned = runs.learned()
        for handle in draw_density_curves(
            ax, learned, theirs[theirs["method"] != "snip"], as_accuracy=False
        ):
            handle.set_label(str(handle.get_label()).partition(" (n")[0])
            handles.setdefault(str(handle.get_label()), handle)
        counts = summarise(learned.rows, ["method", "density"])["n"]
        numbers.append(f"{model_name(model)}: {n_text(counts.astype(int))}")
        failed = runs.rows[runs.rows["test_error_pct"] > CHANCE]
        if len(failed) + len(runs.diverged):
            shares_failed = pd.concat([failed, runs.diverged])["density"]
            errors = [*failed["test_error_pct"], *[90.0] * len(runs.diverged)]
            (drawn,) = ax.plot(100 * shares_failed, errors, "x", color="black", ms=6, mew=1.2)
            drawn.set_label("a run that did not learn, or diverged")
            handles.setdefault("failed", drawn)
        snip = theirs[theirs["method"] == "snip"]
        drawn = draw_published(
            ax,
            (100 * snip["density"]).tolist(),
            snip["test_error_pct"].tolist(),
            method="snip",
            line=False,
        )
        drawn.set(label=f"SNIP ({_short(snip['label'].iloc[0])}, published)", ms=7, zorder=3.2)
        handles.setdefault("published SNIP", drawn)
        for name, points in theirs[theirs["method"] == "other"].groupby("label", sort=False):
            (drawn,) = ax.plot(
                100 * points["density"],
                points["test_error_pct"],
                marker=shapes[_short(str(name))],
                ls="none",
                color=_GREY,
                mfc="white",
                mew=0.9,
                ms=4.8,
                label=_short(str(name)),
                zorder=2.3,
            )
            handles.setdefault(_short(str(name)), drawn)
        ax.set_ylabel("test error (%, log scale)")
        ax.set_title(f"{model_name(model)}{_images(runs)}")
    legend_below(plot, [*handles.values(), published_key("o", "published by the paper")])
    stamp(
        plot,
        every,
        "Filled: mean of the seeds (dots) with Student-t 95 % interval, of those that learned "
        f"({'; '.join(numbers)}); dashed: the paper's sparse "
        "momentum (± 1.96 s.e.) and dense error. Open, grey: published results of methods that "
        "compress a trained network or train with dropout, by first author.",
    )
    return plot


@table("mnist_compression", experiment="mnist_compression")
def mnist_compression_table(source: Source) -> Table:
    """Test error on MNIST by network, method and share of weights, ours beside the published."""
    runs = load("mnist_compression", source).needed()
    lines = []
    for model in _LENETS:
        cells = {
            (cell["method"], cell["density"]): cell
            for cell in summarise(
                runs.rows[runs.rows["model"] == model], ["method", "density"]
            ).to_dict("records")
        }
        theirs = _literature(model)
        keys = [
            *((m, d, "") for m, d in cells),
            *((row["method"], row["density"], row["label"]) for row in theirs.to_dict("records")),
        ]
        names = list(METHOD_NAMES)
        ordered = sorted(
            {(m, d, label if m == "other" else "") for m, d, label in keys},
            key=lambda key: (names.index(key[0]) if key[0] in names else 99, key[1], key[2]),
        )
        for method, density, label in ordered:
            cell = cells.get((method, density))
            known = theirs[(theirs["method"] == method) & (theirs["density"] == density)]
            known = known[known["label"] == label] if label else known
            lines.append(
                {
                    "network": model_name(model),
                    "method": label or METHOD_NAMES[method],
                    "weights (%)": f"{100 * density:g}",
                    "test error (%)": _mean(cell),
                    "95 % interval": range_text(cell["low"], cell["high"]) if cell else "–",
                    "n": str(cell["n"]) if cell else "–",
                    "learned": _learned(runs.where(model=model, method=method, density=density)),
                    "published (%)": published_text(known.iloc[0]) if len(known) else "–",
                }
            )
    scales = " ".join(
        f"{model_name(model)}: {part.scale()}."
        for model in _LENETS
        if len((part := runs.where(model=model)).rows)
    )
    note = (
        "Published: mean ± standard error where one is printed; sparse momentum and dense: the "
        "paper's, the others as compared there. Learned: runs that neither stayed at chance (error "
        f"above {CHANCE:g} %, part of the mean) nor diverged (not part of it). {scales}"
    )
    return Table(pd.DataFrame(lines), "LeNets on MNIST against the compression literature", note)


def _learned(runs: Runs) -> str:
    done = len(runs.rows) + len(runs.diverged)
    return f"{len(runs.learned().rows)} of {done}" if done else "–"


def _mean(cell: Mapping[Any, Any] | None) -> str:
    return interval_text(cell["mean"], math.nan, math.nan) if cell else "–"


# ---------------------------------------------------------------------------- 01: CIFAR-10 table

_COMPARED = ("dense", "snip", "sparse_momentum")


@table("cifar10_table", experiment="cifar10_table")
def cifar10_table(source: Source) -> Table:
    """The paper's CIFAR-10 table: each network dense, with SNIP and with sparse momentum."""
    runs = load("cifar10_table", source).needed()
    theirs = published_rows("cifar10_table").set_index(["model", "method"])
    lines, unknown, count = [], [], 0
    for model in dict.fromkeys(run.model for run in runs.planned):
        here = runs.where(model=model)
        if here.rows.empty:
            continue
        cells = {
            cell["method"]: cell for cell in summarise(here.rows, ["method"]).to_dict("records")
        }
        share = next(run.density for run in here.planned if run.method == "sparse_momentum")
        line = {"network": model_name(model), "weights (%)": f"{100 * share:g}"}
        counts = set()
        for method in _COMPARED:
            cell = cells.get(method)
            name = METHOD_NAMES[method]
            line[name] = interval_text(cell["mean"], cell["low"], cell["high"]) if cell else "–"
            known = (model, method) in theirs.index
            line[f"{name}, paper"] = published_text(theirs.loc[(model, method)]) if known else "–"
            if cell:
                counts.add(int(cell["n"]))
        line["n"] = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)}–{max(counts)}"
        count += 1
        if model not in theirs.index.get_level_values("model"):
            unknown.append(model_name(model))
        lines.append(line)
    note = (
        "Test error in %: mean [95 % interval]; the paper: mean ± standard error, SNIP quoted "
        "there without one."
    )
    if unknown:
        note += f" Not a network of the paper's table: {', '.join(unknown)}."
    planned = len({run.model for run in runs.planned})
    if count < planned:
        note += f" {planned - count} of {planned} networks have no runs yet."
    note += f" {sentence(runs.scale())}"
    return Table(pd.DataFrame(lines), "CIFAR-10: dense, SNIP and sparse momentum", note)


# --------------------------------------------------------------------------- 01: WRN-28-2 curves

_WRN = "wrn-28-2"


def _wrn_published() -> pd.DataFrame:
    """The paper's WRN-28-2 curves, and the raw runs of static masks beside them."""
    columns = ["method", "density", "test_error_pct", "standard_error"]
    curves = published_rows("wrn28-2_cifar10_summary")
    raw = "dsr_authors_raw_runs_wrn28-2_and_mnist"
    static = published_rows(raw, model=_WRN, method="static")
    return pd.concat([curves[columns], static[columns]], ignore_index=True)


def _network(runs: Runs) -> str:
    """The one network of the runs."""
    (model,) = {run.model for run in runs.planned}
    return model


@figure("wrn28_2_curve", experiment="wrn28_2_curve")
def wrn28_2_curve(source: Source) -> Plot:
    """A wide residual network on CIFAR-10: test error of each method against the share of weights
    and, seed by seed, the difference to sparse momentum.
    """
    runs = load("wrn28_2_curve", source).needed()
    model = _network(runs)
    theirs = _wrn_published()
    if model != _WRN:
        theirs = theirs.iloc[:0]
    plot, axes = new_plot(1, 2, size=(7.4, 4.2), gridspec_kw={"width_ratios": [1.25, 1]})
    errors, paired = axes[0]
    shares = {*runs.rows["density"], *theirs["density"]} - {1.0} or {1.0}
    for ax in (errors, paired):
        percent_axis(ax, shares)
        if len(shares) < 2:
            ax.set_xlim(50 * min(shares), 200 * min(shares))
    handles = draw_density_curves(errors, runs, theirs, as_accuracy=False)
    errors.set_ylabel("test error (%)")
    errors.set_title(f"{model_name(model)} on CIFAR-10")
    _paired(paired, runs)
    said = ""
    if model == _WRN:
        handles.append(published_key())
    else:
        said = (
            f" The published curves are of {model_name(_WRN)} and not drawn over "
            f"{model_name(model)}."
        )
    legend_below(plot, handles)
    stamp(
        plot,
        runs,
        "Filled: mean of the seeds (dots) with Student-t 95 % interval. Right: each method minus "
        "sparse momentum over shared seeds, above zero where sparse momentum is better." + said,
    )
    return plot


def _paired(ax: Axes, runs: Runs) -> None:
    """Each method minus sparse momentum at each share, paired by seed, with its interval."""
    ours = runs.where(method="sparse_momentum")
    others = [m for m in runs.methods if m not in ("dense", "sparse_momentum")]
    for i, method in enumerate(others):
        side = runs.where(method=method)
        x: list[float] = []
        values: list[list[float]] = []
        for share in sorted(set(ours.rows["density"]) & set(side.rows["density"])):
            pairs = (side.by_seed(density=share) - ours.by_seed(density=share)).dropna()
            if len(pairs):
                x.append(100 * share * (1 + 0.03 * (i - (len(others) - 1) / 2)))
                values.append(pairs.tolist())
        if x:
            draw_ours(ax, x, values, method=method, label="_")
    ax.axhline(0, color=PALETTE["sparse_momentum"], lw=1.1, zorder=1.8)
    ax.set_ylabel("error minus that of sparse momentum (points)")
    ax.set_title("Paired by seed")


@table("wrn28_2_curve", experiment="wrn28_2_curve")
def wrn28_2_curve_table(source: Source) -> Table:
    """Test error of each method at each share of weights, and sparse momentum minus it."""
    runs = load("wrn28_2_curve", source).needed()
    model = _network(runs)
    theirs = _wrn_published().set_index(["method", "density"])
    ours = runs.where(method="sparse_momentum")
    against = {
        (method, row["density"]): row
        for method in runs.methods
        if method not in ("dense", "sparse_momentum")
        for row in claims.differences(ours, runs.where(method=method), "density").to_dict("records")
    }
    lines = []
    for cell in summarise(runs.rows, ["method", "density"]).to_dict("records"):
        key = (cell["method"], cell["density"])
        pair = against.get(key)
        known = model == _WRN and key in theirs.index
        line = {
            "method": METHOD_NAMES[cell["method"]],
            "weights (%)": f"{100 * cell['density']:g}",
            "test error (%)": interval_text(cell["mean"], cell["low"], cell["high"]),
            "n": str(cell["n"]),
            "published (%)": published_text(theirs.loc[key]) if known else "–",
            "sparse momentum − it (points)": "–",
            "p (Holm)": "–",
        }
        if pair:
            line["sparse momentum − it (points)"] = interval_text(
                pair["mean"], pair["low"], pair["high"], sign=True
            )
            line["p (Holm)"] = p_text(pair["p_holm"])
        lines.append(line)
    note = (
        "Mean [95 % interval]; differences paired by seed, p of the paired t-test adjusted by Holm "
        "over the shares of each method; published: mean ± standard error"
        + ("." if model == _WRN else f", which are of {model_name(_WRN)} and not shown here.")
        + f" {sentence(runs.scale())}"
    )
    caption = f"{model_name(model)} on CIFAR-10: test error by share of weights"
    return Table(pd.DataFrame(lines), caption, note)


# ----------------------------------------------------------------------------------- 01: ImageNet


@table("imagenet", experiment="imagenet")
def imagenet(source: Source) -> Table:
    """ResNet-50 on ImageNet: top-1 error dense and with 10 and 20 % of the weights, partially dense
    and, in the tuned training, fully sparse.
    """
    runs = load("imagenet", source)
    if runs.rows.empty:
        raise NoRuns(
            f"imagenet ({source.profile}): no runs; IMAGENET_ROOT=... torchrun -m "
            "lib.runs.imagenet trains those of profile paper on the images of ILSVRC 2012"
        )
    tuned_ids = {run.run_id for run in runs.planned if run.label_smoothing}
    rows = runs.rows.assign(tuned=[run_id in tuned_ids for run_id in runs.rows["run_id"]])
    lines = []
    for cell in summarise(rows, ["tuned", "method", "density", "keep_dense"]).to_dict("records"):
        known = _imagenet_published(cell)
        lines.append(
            {
                "training": "tuned" if cell["tuned"] else "usual",
                "method": METHOD_NAMES[cell["method"]],
                "weights (%)": f"{100 * cell['density']:g}",
                "left dense": "first and downsampling convolutions" if cell["keep_dense"] else "–",
                "top-1 error (%)": interval_text(cell["mean"], cell["low"], cell["high"]),
                "n": str(cell["n"]),
                "published (%)": f"{known:.2f}" if math.isfinite(known) else "–",
            }
        )
    lines.sort(key=lambda line: line["training"] == "tuned")
    note = (
        "Mean [95 % interval]. Tuned: label smoothing 0.1, five epochs of warm-up, prune rate 0.5. "
        "The published networks that are called partially dense have more weights than stated: "
        f"15.6 % where 10 % are stated, by their log. {sentence(runs.scale())}"
    )
    return Table(pd.DataFrame(lines), "ResNet-50 on ImageNet: top-1 error", note)


# How the published table calls (tuned, dense).
_SETTINGS = {
    (False, True): "DSR-codebase baseline",
    (False, False): "partially dense (first conv + downsample convs dense)",
    (True, True): "tuned: warmup + label smoothing",
    (True, False): "tuned fully sparse, final epoch of log",
}


def _imagenet_published(cell: Mapping[Any, Any]) -> float:
    """The published top-1 error of a cell in %; NaN where there is none."""
    setting = _SETTINGS[bool(cell["tuned"]), cell["method"] == "dense"]
    table = published_rows("imagenet_resnet50_paper_and_logs", quantity="top1_accuracy_pct")
    found = table[
        (table["setting"] == setting)
        & (table["method"] == cell["method"])
        & (table["density"] == cell["density"])
    ]
    return float(found["test_error_pct"].iloc[0]) if len(found) else math.nan


def meaning(experiment: str, source: Source) -> Table | Absent:
    """The verdicts on the claims that rest on one experiment, those with runs."""
    notebook = experiments.experiment(experiment).notebook
    judged = claims.verdict_table(source, notebook)
    mine = judged[judged["experiment"] == experiment]
    known = mine[mine["verdict"] != claims.NO_RUNS]
    if known.empty:
        return Absent(f"{experiment} ({source.profile}): no claim has runs")
    columns = {"claim": "claim", "paper": "paper", "ours": "ours [95 % interval]", "n": "n"}
    columns |= {"verdict": "verdict", "detail": "detail"}
    frame = known[list(columns)].rename(columns=columns).astype(str)
    left = len(mine) - len(known)
    note = f"{left} further claims have no runs at this profile." if left else ""
    return Table(frame, f"What the runs of {experiment} say", note)
