"""Measures once per machine what is faster dense and what sparse; kept in the cache."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from . import bench, ops
from .library import cache_dir, cpu_id

# Two densities around the usual crossover; times are linear in the non-zeros between them.
DENSITIES = (0.1, 0.4)


@dataclass(frozen=True)
class Cost:
    """Seconds per mini-batch of one layer: forward alone, and forward plus backward.

    A sparse layer with n non-zeros takes base + n * per_weight.
    """

    dense_forward: float
    dense_total: float
    channels_last: bool  # memory format in which the dense layer is faster
    forward_base: float
    forward_per_weight: float
    total_base: float
    total_per_weight: float

    def sparse(self, nnz: int, training: bool) -> float:
        """Predicted seconds of the sparse layer."""
        if training:
            return self.total_base + nnz * self.total_per_weight
        return self.forward_base + nnz * self.forward_per_weight

    def dense(self, training: bool) -> float:
        """Measured seconds of the dense layer."""
        return self.dense_total if training else self.dense_forward

    def sparse_is_faster(self, nnz: int, training: bool) -> bool:
        """Whether the sparse layer wins with so many non-zeros."""
        return self.sparse(nnz, training) < self.dense(training)


def _line(few: int, few_seconds: float, many: int, many_seconds: float) -> tuple[float, float]:
    """(base, slope) through two measurements; no negative slope or base from noise."""
    slope = max(0.0, (many_seconds - few_seconds) / max(1, many - few))
    return max(0.0, few_seconds - few * slope), slope


def measure(layer: bench.Layer, batch: int, seconds: float = 0.2) -> Cost:
    """Times the layer dense and at two densities; takes about `seconds` for each."""
    rows = bench.bench_layers([layer], DENSITIES, batch=batch, seconds=seconds, rounds=2)
    weights = layer.in_channels * layer.out_channels * layer.kernel**2
    few, many = (round(r.density * weights) for r in rows)
    forward = _line(few, rows[0].forward_ms / 1e3, many, rows[1].forward_ms / 1e3)
    total = _line(few, rows[0].sparse_ms / 1e3, many, rows[1].sparse_ms / 1e3)
    best = min(rows, key=lambda r: r.dense_ms)
    return Cost(
        min(r.dense_forward_ms for r in rows) / 1e3,
        best.dense_ms / 1e3,
        best.channels_last,
        *forward,
        *total,
    )


@functools.cache
def _memory() -> dict[str, dict]:
    return {}


def _path() -> str:
    digest = hashlib.sha256(cpu_id().encode()).hexdigest()[:16]
    return str(cache_dir() / f"calibration-{digest}.json")


def _read() -> dict[str, dict]:
    try:
        with open(_path(), encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise RuntimeError(
            f"{_path()} is damaged ({error}); delete it to calibrate anew"
        ) from error


def cost(layer: bench.Layer, batch: int) -> Cost:
    """The layer's cost on this machine with the current threads; measured if not known yet.

    The batch is rounded up to whole blocks of samples.  The layer's name and repeats don't matter.
    """
    batch = -(-batch // ops.LANES) * ops.LANES
    fields = [f"{k}={v}" for k, v in layer._asdict().items() if k not in ("name", "repeats")]
    return Cost(
        **kept(" ".join([*fields, f"batch={batch}"]), lambda: asdict(measure(layer, batch)))
    )


def kept(what: str, measure: Callable[[], dict]) -> dict:
    """The measurement of this name on this machine with the current threads, taken if need be.

    The first one counts for all processes: a run that is resumed must choose as it did before.
    Nothing is drawn from the caller's random stream.

    Raises:
        RuntimeError: the file of measurements is damaged.
    """
    key = f"{what} threads={torch.get_num_threads()} torch={torch.__version__}"
    known = _memory()
    if key not in known:
        known[key] = _read().get(key) or {}
    if not known[key]:
        # Gradients also when the first batch is one of an evaluation.
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            value = measure()
        known[key] = _write(key, value)
    return known[key]


def _write(key: str, value: dict) -> dict:
    """Store a measurement unless another process was faster; what is stored now."""
    path = _path()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        everything = _read()
        everything.setdefault(key, value)
        handle, name = tempfile.mkstemp(dir=os.path.dirname(path), suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(everything, file, indent=1, sort_keys=True)
        os.replace(name, path)
    return everything[key]
