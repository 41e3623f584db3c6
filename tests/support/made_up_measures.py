"""Made-up rows of `speedups` and `features` with measures and layers, without training or torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lib import experiments, paths
from lib.config import Run
from lib.results.store import append_run
from tests.support.made_up_grid import made_up_row, plausible

# Two convolutions; the second is listed in two segments of the training.
DENSE_S, INPUT_DENSITY = 0.5, 0.8
KEPT = {"features.2": 50, "features.5": 10}


def specialisation(run: Run, layer: str) -> float:
    """Mean of a layer: the sparse networks lie below the dense ones by a little more per seed."""
    base = {"features.2": 0.15, "features.5": 0.30}[layer]
    return base - (0.01 + 0.001 * run.seed) * (run.method != "dense")


def rows_of(run: Run) -> list[dict[str, Any]]:
    """Measures of one run; `channels` never empty, the clock 1.25 times faster when sparse."""
    lines: list[tuple[str, str, str, int, float]] = []
    for layer in ("features.0", "features.3"):
        for segment in (0, 1) if layer == "features.3" else (0,):
            full = DENSE_S * INPUT_DENSITY * run.density
            for quantity, value in (
                ("dense_s", DENSE_S),
                ("channel_sparse_s", DENSE_S * 0.9),
                ("full_sparse_s", full),
            ):
                lines.append(("speedups", layer, quantity, segment, value))
        lines.append(("speedups", layer, "weight_density", 0, run.density))
        lines.append(("speedups", layer, "empty_input_channels", 0, 0.0))
    sparse = run.method != "dense"
    for quantity, value in (
        ("dense_forward_s", 1.0 + 0.01 * run.seed),
        ("removed_forward_s", (1.0 + 0.01 * run.seed) / (1.25 if sparse else 1.0)),
        ("channels", 200.0),
        ("removed_channels", 20.0 if sparse else 0.0),
        ("weights", 1000.0),
        ("removed_weights", 300.0 if sparse else 0.0),
        ("max_difference", 1e-7),
    ):
        lines.append(("speedups", "network", quantity, 0, value))
    layers = dict(KEPT)
    if run.model.startswith("wrn"):
        layers = {"block1.0.relu1": 30, "relu": 9}
    for layer, kept in layers.items():
        mean = specialisation(run, layer) if layer in KEPT else 0.2
        for quantity, position, value in (
            ("channels", 0, kept + 2.0),
            ("kept", 0, float(kept)),
            ("sum", 0, kept * mean),
            ("sum_of_squares", 0, kept * mean**2),
            ("above", 0, 1.0),
            ("histogram", 7, kept - 1.0),
        ):
            lines.append(("features", layer, quantity, position, value))
    names = ("measure", "layer", "quantity", "position", "value")
    return [{"run_id": run.run_id, **dict(zip(names, line, strict=True))} for line in lines]


def layers_of(run: Run) -> list[dict[str, Any]]:
    """Two layers at two epochs."""
    active = {"features.0.weight": 80, "features.3.weight": 5}
    return [
        {
            "run_id": run.run_id,
            "epoch": epoch,
            "layer": layer,
            "weights": 100,
            "active": count + run.seed,
            "momentum_share": 0.5,
        }
        for epoch in (1, 2)
        for layer, count in active.items()
    ]


def write_measured(root: Path, profile: str = "quick", measured: bool = True) -> None:
    """All planned runs of both experiments."""
    for experiment in ("speedups", "features"):
        csv = paths.results_csv(profile, experiment, root)
        for run in experiments.runs(experiment, profile):
            row = made_up_row(run, experiment, profile, plausible(run))
            layers = [] if run.method == "dense" else layers_of(run)
            append_run(csv, row, [], layers, rows_of(run) if measured else [])
