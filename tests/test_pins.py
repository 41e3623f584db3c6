"""What no rewriting may change: ids of the planned runs, and short runs bit for bit.

`python -m tests.test_pins` writes both tables anew, for a change that is meant.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from lib import experiments
from lib.config import METHODS, Run
from lib.data import Dataset
from lib.results.store import COLUMNS, PROVENANCE
from lib.runs.single import row_of
from lib.train import Interrupted, train

HERE = Path(__file__).parent / "pins"
NOT_PINNED = ("mechanism", "tuned_baselines")  # grids that are still growing
PINNED = [name for name in COLUMNS if name not in PROVENANCE] + ["digest", "kernels"]

SHORT: dict[str, Any] = {
    "epochs": 4,
    "train_samples": 600,
    "batch_size": 50,
    "val_fraction": 0.01,
    "density": 0.1,
    "prune_rate": 0.3,
    "init_scale": "density",
    "lr_decay_every_steps": 30,
}
ENGINES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "perceptron": ({"kernels": "sparse"}, tuple(METHODS)),
    "torch": ({"kernels": "torch"}, tuple(METHODS)),
    "sparse": (
        {"kernels": "sparse", "model": "lenet5", "epochs": 2, "train_samples": 400},
        ("sparse_momentum", "dsr", "set", "rigl", "snip", "static"),
    ),
}
SHORT_RUNS = {
    f"{engine}/{method}": Run(
        **{**SHORT, **fields, "method": method},
        weight_decay=0.0 if method == "deepr" else 5e-4,
        update_every_steps=0 if method in ("set", "dsr") else 7,
    )
    for engine, (fields, methods) in ENGINES.items()
    for method in methods
}
RESUMED = ("perceptron/sparse_momentum", "torch/deepr", "sparse/rigl")


def planned() -> pd.DataFrame:
    """Experiment, profile, number of planned runs, and a hash of their ids."""
    rows = []
    for name in experiments.EXPERIMENTS:
        for profile in experiments.PROFILES:
            ids = sorted(run.run_id for run in experiments.runs(name, profile))
            if ids and name not in NOT_PINNED:
                digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]
                rows.append((name, profile, len(ids), digest))
    return pd.DataFrame(rows, columns=["experiment", "profile", "runs", "sha256"])


def images(run: Run) -> Dataset:
    """Images as large as MNIST's that can be learnt: the class is the brightest stripe."""
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(count) % 10
        x = torch.randn(count, 1, 28, 28, generator=generator)
        for image, label in zip(x, labels.tolist(), strict=True):
            image[:, 2 * label + 4 : 2 * label + 6] += 0.6
        return x, labels

    (train_x, train_y), (val_x, val_y), (test_x, test_y) = map(part, (run.train_samples, 100, 300))
    return Dataset(train_x, train_y, val_x, val_y, test_x, test_y, sha256="0" * 64)


def row(name: str, checkpoint: Path | None = None) -> dict[str, Any]:
    """The row of a short run, with a digest of its curves and layers; with `checkpoint` stopped in
    the middle and continued from there.
    """
    run = SHORT_RUNS[name]
    data = images(run)
    if checkpoint is not None:
        with pytest.raises(Interrupted):
            train(run, data, checkpoint=checkpoint, should_stop=after(9))
        assert checkpoint.exists()
    outcome = train(run, data, checkpoint=checkpoint)
    beside = repr([sorted(one.items()) for one in (*outcome.curves, *outcome.layers)])
    found = row_of(run, outcome, name, "smoke", "cpu")
    return {**found, "digest": hashlib.sha256(beside.encode()).hexdigest()[:16]}


def after(calls: int) -> Callable[[], bool]:
    """Says stop at the call of this number."""
    left = iter(range(calls))
    return lambda: next(left, None) is None


def pins() -> dict[str, dict[Any, str]]:
    table = pd.read_csv(HERE / "rows.csv", dtype=str, keep_default_na=False)
    return {one["experiment"]: one for one in map(dict, table.to_dict("records"))}


def test_planned_runs_keep_their_ids() -> None:
    pinned = pd.read_csv(HERE / "run_ids.csv")
    keys = ["experiment", "profile"]
    both = pinned.merge(planned(), on=keys, how="left", suffixes=("", "_now"))
    changed = both[(both.sha256 != both.sha256_now) | (both.runs != both.runs_now)]
    assert changed.empty, changed.to_string()


@pytest.mark.parametrize("name", [*SHORT_RUNS, *(f"{one}, resumed" for one in RESUMED)])
def test_short_runs_keep_their_bits(name: str, tmp_path: Path) -> None:
    name, _, resumed = name.partition(", ")
    pinned = pins()[name]
    found = row(name, tmp_path / "run.pt" if resumed else None)
    here = pinned["device"] == found["device"] and pinned["torch"] == found["torch"]
    for column in [c for c in PINNED if c != "experiment"]:
        mine, theirs = found[column], pinned[column]
        if here or column == "kernels":  # the CSV's text of a float has all its bits
            assert str("" if mine is None else mine) == theirs, column
        elif isinstance(mine, float) and theirs != "" and column != "digest":
            # another processor or torch rounds otherwise; its row is near, its masks may differ
            near = 40 if "error" in column else 0.2
            assert math.isclose(mine, float(theirs), rel_tol=0.2, abs_tol=near), column


if __name__ == "__main__":
    torch.set_num_threads(1)
    HERE.mkdir(exist_ok=True)
    planned().to_csv(HERE / "run_ids.csv", index=False)
    columns = [*PINNED, "device", "torch"]
    found = map(row, SHORT_RUNS)
    rows = [{c: one[c] for c in columns} for one in found]
    pd.DataFrame(rows, columns=columns, dtype=object).to_csv(HERE / "rows.csv", index=False)
