"""What was measured on trained networks (results/<profile>/<experiment>.measures.csv), per run:
class specialisation and speed-ups.  Imports no torch.

The definitions of the rows are in lib/measures.py, where they are taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pandas as pd

from lib.results import store as results
from lib.results.reading import NoRuns, Runs, published_rows

# The bins of the official histograms; lib/measures.py counts in the same ones.
BIN_EDGES = np.linspace(0.09, 0.51, 50)

# The three speed-ups of a run, in the order of every figure and table.
SPEEDUPS = {
    "full": "estimate, sparse convolution",
    "channel": "estimate, dense convolution",
    "removed": "measured, empty channels removed",
}
POOLED, EQUAL = "pooled", "equal"
WEIGHTINGS = {POOLED: "channels pooled", EQUAL: "layers weighted equally"}

_SUMMED = ["dense_s", "full_sparse_s", "channel_sparse_s", "dense_forward_s", "removed_forward_s"]
_SUMMED += ["channels", "removed_channels", "weights", "removed_weights", "max_difference"]
_RUN = ["model", "method", "density", "seed"]


def measures(runs: Runs, measure: str) -> pd.DataFrame:
    """The rows of one measure with model, method, density and seed of their run beside them.

    Columns: MEASURE_COLUMNS of lib/results/store.py and these four.  Raises NoRuns where none of
    the finished runs was measured.
    """
    runs.needed()
    rows = results.read_measures(runs.csv.parent, runs=runs.rows)
    rows = rows[rows["measure"] == measure]
    if rows.empty:
        raise NoRuns(
            f"{runs.experiment} ({runs.profile}): {len(runs.rows)} runs are done, but none was "
            f"measured; remove them from {runs.csv} and run {runs.experiment} again"
        )
    return rows.merge(runs.rows[["run_id", *_RUN]], on="run_id")


# ---------------------------------------------------------------------------------- speed-ups


def speedups(runs: Runs) -> pd.DataFrame:
    """One row per run: full, channel, removed (times faster than the dense pass) and what went; of
    runs made since empty channels are no longer taken out the first two, NaN for the rest.

    The estimates as the official code sums them: per convolution the mean over the mini-batches
    of a segment, summed over the convolutions and the segments; dense over estimate.  `removed`
    is the ratio of the measured times of a forward pass.  `removed_channels` and
    `removed_weights` are shares (0 to 1), `difference` the largest of the two outputs relative to
    the largest logit.  A quantity that is zero gives an infinite speed-up.
    """
    rows = measures(runs, "speedups")
    found = []
    for key, group in rows.groupby(_RUN, sort=False):
        total = group.groupby("quantity")["value"].sum().reindex(_SUMMED)
        found.append(
            {
                **dict(zip(_RUN, key, strict=True)),
                "full": _ratio(total["dense_s"], total["full_sparse_s"]),
                "channel": _ratio(total["dense_s"], total["channel_sparse_s"]),
                "removed": _ratio(total["dense_forward_s"], total["removed_forward_s"]),
                "removed_channels": total["removed_channels"] / total["channels"],
                "removed_weights": total["removed_weights"] / total["weights"],
                "difference": total["max_difference"],
            }
        )
    return pd.DataFrame(found)


def _ratio(dense: float, sparse: float) -> float:
    return math.inf if sparse == 0 else dense / sparse


# ----------------------------------------------------------------------------------- features


def feature_layers(runs: Runs) -> pd.DataFrame:
    """One row per run and layer: kept, channels, sum of the specialisation, and its mean.

    Layers in the order of the forward pass (`index` from 0).  In a WRN the last ReLU, behind the
    blocks, is left out, as in the official data (24 of WRN-28-2).  `mean` is NaN in a layer
    without any activation.
    """
    rows = measures(runs, "features")
    rows = rows[rows["quantity"].isin(["channels", "kept", "sum"])]
    wide = rows.pivot(index=["run_id", "layer"], columns="quantity", values="value")
    first = rows.drop_duplicates(["run_id", "layer"])[["run_id", "layer", *_RUN]]
    table = first.merge(wide.reset_index(), on=["run_id", "layer"])
    behind_blocks = table["model"].str.startswith("wrn") & ~table["layer"].str.contains(r"\.")
    table = table[~behind_blocks].reset_index(drop=True)
    table["index"] = table.groupby("run_id").cumcount()
    table["mean"] = table["sum"] / table["kept"].where(table["kept"] > 0)
    return table


def specialisation(runs: Runs) -> pd.DataFrame:
    """One row per run: the mean class specialisation, `pooled` over the channels of all layers and
    with the layers weighted equally (`equal`); shares, 1 / classes to 1.
    """
    found = []
    for key, layers in feature_layers(runs).groupby(_RUN, sort=False):
        pooled = float(layers["sum"].sum() / layers["kept"].sum())
        equal = float(layers["mean"].mean())
        found.append({**dict(zip(_RUN, key, strict=True)), POOLED: pooled, EQUAL: equal})
    return pd.DataFrame(found, columns=[*_RUN, POOLED, EQUAL])


def official_specialisation(model: str) -> pd.DataFrame:
    """The official arrays of a model: layer_index, method, mean, kept (channels); empty if none."""
    try:
        rows = published_rows("class_specialization_official_feature_data", model=model)
    except ValueError:  # a network of the reduced scale, which the paper doesn't have
        return pd.DataFrame(columns=["layer_index", "method", "mean", "kept"])
    columns = {"layer_index": "layer_index", "method": "method", "value": "mean", "n": "kept"}
    return pd.DataFrame({new: rows[old] for old, new in columns.items()})


def official_means(model: str) -> dict[str, dict[str, float]]:
    """Method -> the official `pooled` and `equal` means of a model, in per cent; empty if none."""
    return {
        str(method): {
            POOLED: 100 * float((part["mean"] * part["kept"]).sum() / part["kept"].sum()),
            EQUAL: 100 * float(part["mean"].mean()),
        }
        for method, part in official_specialisation(model).groupby("method")
    }


def cells(table: pd.DataFrame) -> Iterable[tuple[str, str, float]]:
    """The (model, method, density) of a table of runs, once each, in its order."""
    return list(dict.fromkeys(zip(table["model"], table["method"], table["density"], strict=True)))
