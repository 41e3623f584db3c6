"""Made-up rows of results/bench/kernels.csv, as lib/bench/sparse.py writes them, without torch."""

from __future__ import annotations

import csv
from pathlib import Path

from lib import paths
from lib.results import clock as kernel_rows
from lib.results.clock import PARTS, RATIOS, SECONDS, SIDES

BATCHES = {"alexnet-s": 128, "vgg16-d": 128, "wrn-16-8": 64}
SHARES = (0.01, 0.05, 0.2, 0.5)
DENSE_S, BF16_S = 2.0, 1.25
LAYERS = ("3-64 at 32x32", "64-128 at 16x16", "512-512 at 2x2")

Line = tuple[str, str, str, float, str, float, float, int]


def training_ratio(model: str, share: float) -> float:
    """Falls with the weights; below 1 at 50 %."""
    order = list(BATCHES).index(model)
    return 0.7 / share**0.35 - 0.05 * order


def steps_of(model: str, share: float, topic: str = "sparse_steps") -> list[Line]:
    """All rows of one setting; outside the window a quarter faster, inside a quarter slower; with
    one thread a fifth faster.
    """
    setting = kernel_rows.setting_of(model, share, BATCHES[model])
    whole = training_ratio(model, share) * (1.2 if topic == "one_thread" else 1.0)
    ratios = {
        "training": whole,
        "outside": 1.25 * whole,
        "inside": 0.75 * whole,
        "inference": 1.5 * whole,
        "bf16_over_sparse": whole * BF16_S / DENSE_S,
        "bf16_inference_over_sparse": whole,
        "bf16": DENSE_S / BF16_S,
        "bf16_inference": 1.5,
    }
    seconds = dict.fromkeys(SECONDS, 0.5) | {"dense_s": DENSE_S, "sparse_s": DENSE_S / whole}
    lines: list[Line] = [
        (topic, kernel_rows.FLOPS, setting, 100 * share**0.6, "%", 0.0, 0.0, 1),
        (topic, kernel_rows.SPARSE_LAYERS, setting, 7.0, "of 8", 7.0, 7.0, 1),
    ]
    for name, value in ratios.items():
        row = (RATIOS[name], setting, value, "x", 0.9 * value, 1.1 * value, 3)
        lines.append((topic, *row))
    for name, value in seconds.items():
        lines.append((topic, SECONDS[name], setting, value, "s", value, value, 3))
    return lines


def breakdown_of(model: str) -> list[Line]:
    """Dense: 1 s in its layers and 0.5 s elsewhere. Sparse: 0.1 s of each part."""
    setting = kernel_rows.setting_of(model, 0.05, BATCHES[model])
    lines: list[Line] = []
    for side in SIDES:
        for part in PARTS:
            dense = {kernel_rows.DENSE_LAYERS: 1.0, kernel_rows.ELEMENTWISE: 0.5}.get(part, 0.0)
            value = dense if side == "dense" else 0.1
            what = f"{side}: {part}"
            lines.append(("breakdown", what, setting, value, "s", value, value, 3))
    row = (kernel_rows.CALIBRATION, setting, 12.0, "s", 12.0, 12.0, 1)
    return [*lines, ("breakdown", *row)]


def window_of(model: str, batch: int) -> list[Line]:
    """100 grown positions an update, of which K = 44 misses two in the first."""
    setting = kernel_rows.setting_of(model, 0.05, batch)
    values = {}
    for update in (1, 2):
        values[f"grown positions, update {update}"] = 100.0
        values[f"forward FLOPs of the masks, update {update}"] = 12.0
        for k in (44, 153):
            differing = 2.0 * (k == 44 and update == 1)
            values[f"differing positions, K = {k}, update {update}"] = differing
    values |= {
        "mini-batches between updates": 540.0,
        "training FLOPs, full tracking": 36.7,
        "training FLOPs, K = 44": 7.6,
        "training FLOPs, K = 153": 14.0,
    }
    return [("window", what, setting, v, "", v, v, 1) for what, v in values.items()]


def write_kernels(root: Path, topics: tuple[str, ...] = ()) -> Path:
    """Write kernels.csv below `root` with the rows of these topics (by default all); its path."""
    lines: list[Line] = []
    for share in SHARES:
        setting = f"vgg16-d, {100 * share:g} %"
        row = (kernel_rows.ALL_LAYERS, setting, 0.5 / share**0.7, "x", 1.0, 9.0, 1)
        lines.append(("sparse_layers", *row))
        for i, layer in enumerate(LAYERS):
            value = (0.4 + 0.1 * i) / share**0.7
            lines.append(("sparse_layers", layer, setting, value, "x", value, value, 1))
    for model in reversed(BATCHES):
        lines += breakdown_of(model)
        for share in reversed(SHARES):
            lines += steps_of(model, share)
        lines += steps_of(model, 0.05, "one_thread")
    lines += window_of("lenet300-100", 100)
    path = paths.results_dir("bench", root) / "kernels.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(kernel_rows.COLUMNS)
        for line in lines:
            if not topics or line[0] in topics:
                writer.writerow([*line, "a machine"])
    return path
