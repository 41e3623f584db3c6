"""Columns of the runs' CSVs, and what a value in them may be.  Imports no torch.

The files are described in lib/results/store.py, their format in lib/results/format.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]

COLUMNS: dict[str, type] = {
    "run_id": str,
    "experiment": str,
    "profile": str,
    "dataset": str,
    "model": str,
    "method": str,
    "method_version": int,
    "prune": str,
    "redistribution": str,
    "growth": str,
    "init": str,
    "density": float,
    "keep_dense": str,
    "prune_rate": float,
    "schedule": str,
    "update_every_steps": int,
    "momentum": float,
    "lr": float,
    "lr_decay_every_steps": int,
    "weight_decay": float,
    "batch_size": int,
    "epochs": int,
    "train_samples": int,
    "precision": str,
    "overrides": str,
    "seed": int,
    "status": str,
    "test_error_pct": float,
    "val_error_pct": float,
    "train_loss": float,
    "density_final": float,
    "weights_total": int,
    "weights_active": int,
    "steps": int,
    "train_flops_rel": float,
    "inference_flops_rel": float,
    "explored": float,
    "train_seconds": float,
    "threads": int,
    "kernels": str,
    "device": str,
    "commit": str,
    "dirty": bool,
    "python": str,
    "torch": str,
    "torchvision": str,
    "data_sha256": str,
    "finished_utc": str,
}

CURVE_COLUMNS: dict[str, type] = {
    "run_id": str,
    "epoch": int,
    "train_loss": float,
    "val_error_pct": float,
    "lr": float,
    "prune_rate": float,
    "density": float,
}

LAYER_COLUMNS: dict[str, type] = {
    "run_id": str,
    "epoch": int,
    "layer": str,
    "weights": int,
    "active": int,
    "momentum_share": float,
}

# `position` numbers what a quantity has several of: bins of a histogram, segments of the training.
MEASURE_COLUMNS: dict[str, type] = {
    "run_id": str,
    "measure": str,
    "layer": str,
    "quantity": str,
    "position": int,
    "value": float,
}

# None (an empty field) is allowed here: the setting does not apply to the method (prune_rate of a
# dense run), the run diverged, or the tree is no git checkout (dirty).  Strings use "" for that.
NULLABLE = frozenset(
    {
        "prune_rate",
        "update_every_steps",
        "lr_decay_every_steps",
        "train_samples",
        "test_error_pct",
        "val_error_pct",
        "train_loss",
        "density_final",
        "weights_active",
        "train_flops_rel",
        "inference_flops_rel",
        "explored",
        "momentum_share",
        "dirty",
    }
)

# Strings that identify a run and therefore are never empty.
REQUIRED_STRINGS = frozenset(
    {
        "run_id",
        "experiment",
        "profile",
        "dataset",
        "model",
        "method",
        "status",
        "layer",
        "measure",
        "quantity",
        "finished_utc",
    }
)

STATUSES = ("ok", "diverged")

# What a number lies between, both ends included.  Whole numbers count something, or are a seed:
# none is negative, and a 64-bit column holds each.
RANGES: dict[str, tuple[float, float]] = {
    "test_error_pct": (0, 100),
    "val_error_pct": (0, 100),
    "density": (0, 1),
    "density_final": (0, 1),
    "explored": (0, 1),
    "prune_rate": (0, 1),
}
MAX_INT = 2**63 - 1

# A readable slug, a hyphen, and the 10 hexadecimal digits of the hash (lib.config.Run.run_id).
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*-[0-9a-f]{10}")


def slug(model: str, method: str, density: float, seed: int) -> str:
    """What the id of such a run has before its hash (lib.config.Run.run_id)."""
    return f"{model}_{method}_d{density:g}_s{seed}-"


# What may differ between two copies of one run: where, when and how fast it ran.
PROVENANCE = frozenset(
    {
        "train_seconds",
        "threads",
        "kernels",
        "device",
        "commit",
        "dirty",
        "python",
        "torch",
        "torchvision",
        "finished_utc",
    }
)
