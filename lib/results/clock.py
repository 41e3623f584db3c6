"""What `python -m lib bench` measured of the sparse kernels: results/bench/kernels.csv, read.
Imports no torch.

The words of the rows stand here, for lib/bench/sparse.py, which writes them, and for figures,
tables and claims. A row of a whole network has the setting "<model>, <weights> %, batch <n>".
"""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd

from lib import paths
from lib.results.reading import NoRuns

COLUMNS = ["topic", "what", "setting", "value", "unit", "low", "high", "n", "machine"]

# Topic of whole steps -> threads: all of them by the clock, or one by the processor's seconds.
ALL, ONE = "all", "one"
THREADS = {"sparse_steps": ALL, "one_thread": ONE}

# Times faster than dense, of whole steps; column of the wide table -> what the row is called.
RATIOS = {
    "training": "training step, dense window counted",
    "outside": "training step outside the window",
    "inside": "training step inside the window",
    "inference": "inference",
    "bf16_over_sparse": "dense bf16 step over sparse fp32",
    "bf16_inference_over_sparse": "dense bf16 inference over sparse fp32",
    "bf16": "dense fp32 step over dense bf16",
    "bf16_inference": "dense fp32 inference over dense bf16",
}
FLOPS = "forward FLOPs of the masks, of dense"
SPARSE_LAYERS = "layers computed sparse"
SECONDS = {
    "dense_s": "seconds: dense fp32 step",
    "bf16_s": "seconds: dense bf16 step",
    "sparse_s": "seconds: sparse step, window counted",
    "outside_s": "seconds: sparse step outside the window",
    "inside_s": "seconds: sparse step inside the window",
    "dense_inference_s": "seconds: dense fp32 inference",
    "bf16_inference_s": "seconds: dense bf16 inference",
    "sparse_inference_s": "seconds: sparse inference",
}
ALL_LAYERS = "all convolutions, dense over sparse"

# The parts of a training step, in the order in which they are stacked.
DENSE_LAYERS, CONVERSIONS, OPTIMIZER = (
    "layers computed dense",
    "conversions of the layout",
    "optimizer and masks",
)
KERNELS, ELEMENTWISE = "sparse layers", "batch norm, ReLU, pooling, other elementwise"
REST, WINDOW_EXTRA = "loss, Python, the rest", "extra of the dense window"
PARTS = (DENSE_LAYERS, KERNELS, CONVERSIONS, ELEMENTWISE, OPTIMIZER, REST, WINDOW_EXTRA)
SIDES = ("dense", "sparse")
CALIBRATION = "calibration, once per machine"

_SETTING = re.compile(r"([^,]+), ([\d.e-]+) %, batch (\d+)")


def setting_of(model: str, density: float, batch: int) -> str:
    """The setting of a whole network; `density` from 0 to 1."""
    return f"{model}, {100 * density:g} %, batch {batch}"


def kernel_rows(results_root: str | Path | None = None, topic: str = "") -> pd.DataFrame:
    """All rows, or those of one topic, with model, density (0 to 1) and batch where the setting is
    one of a whole network.

    Raises NoRuns without the file, with other columns and without rows of the topic.
    """
    path = paths.results_dir("bench", results_root) / "kernels.csv"
    if not path.exists():
        raise NoRuns(
            "speedups: no results/bench/kernels.csv, the sparse kernels have not been timed; "
            "python -m lib bench"
        )
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        lines = list(reader)
    if list(reader.fieldnames or []) != COLUMNS or not lines:
        raise NoRuns(
            f"{path}: columns {reader.fieldnames} and {len(lines)} rows, expected {COLUMNS} and at "
            "least one; time the kernels again"
        )
    rows = pd.DataFrame(lines)
    for name in ("value", "low", "high", "n"):
        rows[name] = pd.to_numeric(rows[name])
    known = rows["setting"].str.extract(_SETTING)
    rows["model"] = known[0]
    rows["density"] = pd.to_numeric(known[1]) / 100
    rows["batch"] = pd.to_numeric(known[2])
    if topic:
        rows = rows[rows["topic"] == topic].reset_index(drop=True)
        if rows.empty:
            raise NoRuns(
                f"speedups: no rows of {topic} in results/bench/kernels.csv; "
                f"python -m lib bench --only {topic}"
            )
    return rows


_MACHINE = re.compile(r"(.*), commit (\w+), load ([\d.]+), (\S+)")


def machine(rows: pd.DataFrame) -> str:
    """Where the rows were measured, in one line: commits, loads and days of all of them."""
    found = list(dict.fromkeys(rows["machine"]))
    matches = [_MACHINE.fullmatch(one) for one in found]
    known = [match for match in matches if match]
    if len(known) < len(found) or len({match[1] for match in known}) > 1:
        return "; ".join(found)
    commits = ", ".join(dict.fromkeys(match[2] for match in known))
    loads = sorted({float(match[3]) for match in known})
    load = " to ".join(f"{value:g}" for value in dict.fromkeys((loads[0], loads[-1])))
    days = ", ".join(dict.fromkeys(match[4] for match in known))
    return f"{known[0][1]}, commit {commits}, load {load}, {days}"


def whole_steps(results_root: str | Path | None = None) -> pd.DataFrame:
    """One row per network, threads (ALL or ONE) and share of weights, in this order: model,
    threads, density, batch, n, flops (% of dense), sparse_layers, layers, machine, and RATIOS and
    SECONDS, each as the median and, with "_low" and "_high", the range of the repeats (NaN: not
    measured). ONE is in seconds of the processor, ALL by the clock.
    """
    rows = kernel_rows(results_root)
    rows = rows[rows["topic"].isin(THREADS)]
    if rows.empty:
        rows = kernel_rows(results_root, "sparse_steps")  # says how to get them
    rows = rows.assign(threads=rows["topic"].map(THREADS))
    keys = ["model", "threads", "density", "batch"]
    found = []
    for key, group in rows.groupby(keys, sort=False):
        by_name = {str(row["what"]): row for row in group.to_dict("records")}
        line: dict[str, Any] = dict(zip(keys, key, strict=True))
        line["batch"] = int(line["batch"])
        names = {**RATIOS, **SECONDS, "flops": FLOPS, "sparse_layers": SPARSE_LAYERS}
        for column, name in names.items():
            for part, suffix in (("value", ""), ("low", "_low"), ("high", "_high")):
                line[column + suffix] = by_name[name][part] if name in by_name else math.nan
        line["n"] = int(group["n"].max())
        unit = str(by_name[SPARSE_LAYERS]["unit"]) if SPARSE_LAYERS in by_name else "of 0"
        line["layers"] = int(unit.removeprefix("of "))
        line["machine"] = group["machine"].iloc[0]
        found.append(line)
    table = pd.DataFrame(found)
    return table.sort_values(keys, key=_in_order, ignore_index=True)


def _in_order(column: pd.Series) -> pd.Series:
    """Networks as the topics name them, everything else by value."""
    order = {"alexnet-s": 0, "vgg16-d": 1, "wrn-16-8": 2}
    return column.map(lambda m: order.get(m, 9)) if column.name == "model" else column


def parts(results_root: str | Path | None = None) -> pd.DataFrame:
    """Seconds of a training step: one row per network, side (dense, sparse) and part."""
    rows = kernel_rows(results_root, "breakdown")
    split = rows["what"].str.split(": ", n=1, expand=True)
    rows = rows[split[0].isin(SIDES)].assign(side=split[0], part=split[1])
    if strange := sorted(set(rows["part"]) - set(PARTS)):
        raise NoRuns(f"speedups: unknown parts {strange} of a step; time the breakdown again")
    columns = ["model", "density", "batch", "side", "part", "value", "low", "high", "n", "machine"]
    return rows.sort_values("model", key=_in_order, kind="stable")[columns].reset_index(drop=True)


def calibrations(results_root: str | Path | None = None) -> dict[str, float]:
    """Network -> seconds that finding out the faster way of each layer takes, once per machine."""
    rows = kernel_rows(results_root, "breakdown")
    rows = rows[rows["what"] == CALIBRATION]
    return dict(zip(rows["model"], rows["value"], strict=True))


def layer_ratios(results_root: str | Path | None = None) -> pd.DataFrame:
    """Times faster than dense, forward and backward: one row per convolution of VGG16-D, in their
    order, and one for all of them (ALL_LAYERS, last); one column per share of weights (0 to 1).
    """
    rows = kernel_rows(results_root, "sparse_layers")
    shares = rows["setting"].str.extract(r"([\d.e-]+) %")[0]
    rows = rows.assign(density=pd.to_numeric(shares) / 100)
    wide = rows.pivot(index="what", columns="density", values="value")
    order = [name for name in dict.fromkeys(rows["what"]) if name != ALL_LAYERS]
    return wide.loc[[*order, *([ALL_LAYERS] if ALL_LAYERS in wide.index else [])]]


def window_counts(results_root: str | Path | None = None) -> pd.DataFrame:
    """The dense window against full tracking: one row per network, K and update: grown (positions)
    and differing ones, and flops (% of dense, forward, of the masks after the update).
    """
    rows = kernel_rows(results_root, "window")
    found = []
    for key, group in rows.groupby(["model", "density", "batch"], sort=False):
        values = dict(zip(group["what"], group["value"], strict=True))
        base = dict(zip(("model", "density", "batch"), key, strict=True))
        for name, value in values.items():
            match = re.fullmatch(r"differing positions, K = (\d+), update (\d+)", name)
            if match:
                at = f"update {match[2]}"
                found.append(
                    {
                        **base,
                        "window": int(match[1]),
                        "update": int(match[2]),
                        "grown": int(values[f"grown positions, {at}"]),
                        "differing": int(value),
                        "flops": values[f"forward FLOPs of the masks, {at}"],
                    }
                )
    return pd.DataFrame(found).sort_values(["model", "window", "update"], ignore_index=True)


def window_flops(results_root: str | Path | None = None) -> dict[tuple[str, int], float]:
    """(network, K) -> training FLOPs in % of dense; K = 0: full tracking. As far as measured."""
    rows = kernel_rows(results_root, "window")
    found = {}
    for row in rows.to_dict("records"):
        match = re.fullmatch(r"training FLOPs, (?:K = (\d+)|full tracking)", row["what"])
        if match:
            found[str(row["model"]), int(match[1] or 0)] = float(row["value"])
    return found
