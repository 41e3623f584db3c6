"""CIFAR-10 (the paper's table, the curve of a wide residual network) and ImageNet."""

from __future__ import annotations

from typing import Any

import pandas as pd

from lib.claims import differences
from lib.figures.gallery import figure, table
from lib.figures.plots import Plot, curves, finish, panels, weights_axis, zero_line
from lib.figures.tables import Table, difference, error_lines, failures, records
from lib.results.reading import (
    METHOD_NAMES,
    NoRuns,
    Source,
    load,
    model_name,
    p_text,
    published_rows,
    sentence,
)

_CELL = ("model", "method", "density")
_WRN = "wrn-28-2"


@table("cifar10_table", "cifar10_table")
def cifar10_table(source: Source) -> Table:
    """The paper's CIFAR-10 table: each network dense, with SNIP and with sparse momentum."""
    runs = load("cifar10_table", source).needed()
    lines = error_lines(runs, published_rows("cifar10_table"), _CELL)
    note = (
        "Test error in %: mean [95 % interval] of the seeds that learned; published: mean ± "
        "standard error, SNIP quoted in the paper without one."
    )
    missing = {run.model for run in runs.planned} - set(runs.rows["model"])
    several = len({run.model for run in runs.planned})
    lost = f"{len(missing)} of {several} networks have no runs yet." if missing else ""
    caption = "CIFAR-10: test error by network and method"
    return Table.of(lines, caption, note, lost, sentence(runs.scale()))


@table("training_length", "training_length")
def training_length(source: Source) -> Table:
    """Test error dense and with sparse momentum, by the number of epochs."""
    runs = load("training_length", source).needed()
    lines = error_lines(runs, by=(*_CELL, "epochs"))
    note = "Test error in %: mean [95 % interval] of the seeds that learned; decays at the same "
    note += "fractions of the training."
    return Table.of(
        lines, "CIFAR-10: test error by length of training", note, sentence(runs.scale())
    )


# ------------------------------------------------------------------------------------- WRN curves


def published_wrn() -> pd.DataFrame:
    """The paper's WRN-28-2 curves and the raw runs of static masks: model, method, density,
    weights (%), test_error_pct, standard_error.
    """
    raw = "dsr_authors_raw_runs_wrn28-2_and_mnist"
    rows = pd.concat(
        [
            published_rows("wrn28-2_cifar10_summary"),
            published_rows(raw, model=_WRN, method="static"),
        ],
        ignore_index=True,
    )
    return rows.assign(model=_WRN, weights=100 * rows["density"])


def minus_sparse_momentum(source: Source) -> pd.DataFrame:
    """Each method's error minus that of sparse momentum with the same seed and share of weights:
    method, density, weights (%), seed, difference (points), of seeds that learned in both.
    """
    rows = load("wrn28_2_curve", source).errors()
    wide = rows.pivot(
        index=["density", "weights", "seed"], columns="method", values="test_error_pct"
    )
    if "sparse_momentum" not in wide:
        return pd.DataFrame(columns=["method", "density", "weights", "seed", "difference"])
    others = wide.drop(columns=["sparse_momentum", "dense"], errors="ignore")
    found = others.sub(wide["sparse_momentum"], axis=0).reset_index()
    return found.melt(["density", "weights", "seed"], value_name="difference").dropna()


@figure("wrn28_2_curve", "wrn28_2_curve")
def wrn28_2_curve(source: Source) -> Plot:
    """A wide residual network on CIFAR-10: test error of each method against the share of weights
    and, seed by seed, the difference to sparse momentum (above zero it is better).
    """
    runs = load("wrn28_2_curve", source).needed()
    model = runs.planned[0].model
    rows, theirs = runs.errors(), published_wrn()
    theirs = theirs[theirs["model"] == model]  # none for the narrower network of a reduced run
    plot, (left, right) = panels([model_name(model), "Minus sparse momentum"], height=3.0)
    how: dict[str, Any] = {"level": "dense", "spread": 0.02}
    curves(left, rows, "weights", theirs=theirs, **how)
    paired = minus_sparse_momentum(source)
    zero_line(right, vertical=False)
    if len(paired):
        curves(right, paired, "weights", "difference", spread=0.02)
    for ax in (left, right):
        weights_axis(ax, {*rows["density"], *theirs["density"]} - {1.0} or {1.0})
    left.set_ylabel("test error (%)")
    right.set_ylabel("points")
    note = (
        "Mean of the seeds (dots) with Student-t 95 % interval, on the right paired by seed; open "
        "and dashed: published."
    )
    unlike = f"The published curves are of {model_name(_WRN)} and not drawn." * theirs.empty
    return finish(plot, runs, note, unlike, failures(runs))


@table("wrn28_2_curve", "wrn28_2_curve")
def wrn28_2_curve_table(source: Source) -> Table:
    """Test error of each method at each share of weights, and sparse momentum minus it."""
    runs = load("wrn28_2_curve", source).needed()
    lines = error_lines(runs, published_wrn(), _CELL)
    ours = runs.where(method="sparse_momentum").learned()
    pairs = {
        (METHOD_NAMES[method], f"{100 * row.density:g}"): row
        for method in runs.methods
        if method not in ("dense", "sparse_momentum")
        for row in records(differences(ours, runs.where(method=method).learned(), "density"))
    }
    for line in lines:
        pair = pairs.get((line["method"], line["weights (%)"]))
        line["sparse momentum − it (points)"] = difference(pair) if pair else "–"
        line["p (Holm)"] = p_text(pair.p_holm) if pair else "–"
    note = (
        "Mean [95 % interval] of the seeds that learned; differences paired by seed, p of the "
        "paired t-test adjusted by Holm over the shares of each method; published: mean ± standard "
        f"error, of {model_name(_WRN)}."
    )
    caption = f"{model_name(runs.planned[0].model)} on CIFAR-10: test error by share of weights"
    return Table.of(lines, caption, note, sentence(runs.scale()))


# --------------------------------------------------------------------------------------- ImageNet

# How the published table calls (tuned, dense).
_SETTINGS = {
    (False, True): "DSR-codebase baseline",
    (False, False): "partially dense (first conv + downsample convs dense)",
    (True, True): "tuned: warmup + label smoothing",
    (True, False): "tuned fully sparse, final epoch of log",
}


@table("imagenet", "imagenet")
def imagenet(source: Source) -> Table:
    """ResNet-50 on ImageNet: top-1 error dense and with 10 and 20 % of the weights, partially dense
    and, in the tuned training, fully sparse.
    """
    every = load("imagenet", source)
    if every.rows.empty:
        raise NoRuns(
            f"imagenet ({source.profile}): no runs; IMAGENET_ROOT=... torchrun -m "
            "lib.runs.imagenet trains those of profile paper on the images of ILSVRC 2012"
        )
    theirs = published_rows("imagenet_resnet50_paper_and_logs", quantity="top1_accuracy_pct")
    lines = []
    for tuned in (False, True):
        runs = every.only(run for run in every.planned if bool(run.label_smoothing) == tuned)
        names = [_SETTINGS[tuned, True], _SETTINGS[tuned, False]]
        known = theirs[theirs["setting"].isin(names)]
        for line in error_lines(runs, known):
            sparse = line["method"] != METHOD_NAMES["dense"]
            dense = "first and downsampling convolutions" if sparse and not tuned else "–"
            lines.append({"training": "tuned" if tuned else "usual", "left dense": dense, **line})
    note = (
        "Top-1 error, mean [95 % interval]. Tuned: label smoothing 0.1, five epochs of warm-up, "
        "prune rate 0.5. The published networks that are called partially dense have more weights "
        "than stated: 15.6 % where 10 % are stated, by their log."
    )
    return Table.of(lines, "ResNet-50 on ImageNet: top-1 error", note, sentence(every.scale()))
