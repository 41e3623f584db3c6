"""Made-up errors in which each part of sparse momentum has a known effect."""

from __future__ import annotations

import csv
import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lib import paths
from lib.config import Run
from lib.experiments import KEPT_DENSE
from tests.support.made_up_grid import write_grid

EXPERIMENTS = ("ablations", "depth_scaling", "sensitivity", "dense_layers")


def wobble(run: Run, size: float) -> float:
    """Of this one run, the same every time; within -+ size."""
    return size * (int(hashlib.sha256(run.run_id.encode()).hexdigest()[:6], 16) / 8**8 - 1)


def size_of(model: str) -> float:
    """log2 of the depth of an MLP, of depth / 10 times width of a WRN; 0 of other networks."""
    if mlp := re.fullmatch(r"mlp(?:bn)?-\d+x(\d+)", model):
        return math.log2(int(mlp[1]))
    if wrn := re.fullmatch(r"wrn-(\d+)-(\d+)", model):
        return math.log2(int(wrn[1]) / 10 * int(wrn[2]))
    return 0.0


@dataclass(frozen=True)
class Effects:
    """Points of test error; a benefit is what is lost without the part."""

    redistribution: float = 0.3
    growth_mnist: float = 0.0
    growth_cifar: float = 1.2
    per_doubling: float = 0.5
    both_lost: float = 0.4
    prune_rate: float = 0.02  # at 0.7, in proportion below
    momentum: float = 0.0  # of the sparse networks, at 0.5
    dense_layers: float = -1.5
    noise: float = 0.01

    def error(self, run: Run) -> float:
        """Test error in % of a run."""
        found = 3.0 if run.dataset == "mnist" else 20.0
        if run.method == "sparse_momentum":
            lost = run.redistribution in ("none", "layer_size")
            random = run.growth == "random"
            if run.model.startswith("mlp"):
                found += (lost + random) * (0.1 + self.per_doubling * size_of(run.model))
            else:
                growth = self.growth_mnist if run.dataset == "mnist" else self.growth_cifar
                grown = self.per_doubling * size_of(run.model)
                found += lost * (self.redistribution + grown) + random * (growth + grown)
                found += self.both_lost * (lost and random)
            found += self.prune_rate * (run.prune_rate - 0.2) / 0.5
            found += self.momentum * (0.9 - run.momentum) / 0.4
            found += self.dense_layers * bool(run.keep_dense)
        return found + 0.2 * (run.seed % 3) + wobble(run, self.noise)


def write(
    root: Path,
    profile: str,
    error: Callable[[Run], float | None],
    names: tuple[str, ...] = EXPERIMENTS,
    keep: Callable[[Run], bool] = lambda run: run.seed < 3,
) -> None:
    """Made-up rows of these experiments, with the weights that the networks really have."""
    for name in names:
        write_grid(root, name, profile, error, keep)
        if name == "dense_layers":
            _with_weights(paths.results_csv(profile, name, root))


def _with_weights(path: Path) -> None:
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        old, density = KEPT_DENSE[row["model"]], float(row["density"])
        share = old.real_density(density) if row["keep_dense"] else density
        row["weights_total"], row["weights_active"] = (
            str(old.weights),
            str(int(share * old.weights)),
        )
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
