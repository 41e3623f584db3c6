"""What a run tells: its numbers at the end, its progress before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Outcome:
    """What a run measured. Errors in per cent of images; None where training diverged.

    `curves`, `layers` and `measures` are rows of the other files (lib/results/store.py). FLOPs are
    relative to the dense network's: inference with the final densities; training as the mean over
    all steps of forward, input-gradient and weight-gradient products, the weight gradient counted
    densely in the steps whose growth rule reads it (RigL, appendix H). `explored` is the share of
    the maskable weights that was active at any time (Liu et al. 2021). `kernels` is the name of
    the engine that computed the run.
    """

    status: str = "ok"
    test_error_pct: float | None = None
    val_error_pct: float | None = None
    train_loss: float | None = None
    density_final: float | None = None
    weights_total: int = 0
    weights_active: int | None = None
    steps: int = 0
    train_flops_rel: float | None = None
    inference_flops_rel: float | None = None
    explored: float | None = None
    train_seconds: float = 0.0
    kernels: str = "torch"
    data_sha256: str = ""
    curves: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    measures: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Progress:
    """Handed to the progress callback after every epoch and about once a second."""

    epoch: float
    epochs: int
    val_error_pct: float | None
