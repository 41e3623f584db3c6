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

from lib.engines.timing import Layer, best_times, sparse_jobs, time_layer
from lib.kernels import ops
from lib.kernels.blocked import LANES, to_blocked
from lib.kernels.library import cache_dir, cpu_id

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


@dataclass(frozen=True)
class GradientCost:
    """Seconds per mini-batch of one layer's weight gradient: of all weights by dense.hpp or by
    torch, and of n non-zeros, base + n * per_weight.
    """

    blocked: float
    by_torch: float
    base: float
    per_weight: float

    def torch_is_faster(self) -> bool:
        """Whether torch computes the whole gradient faster, conversions included."""
        return self.by_torch < self.blocked

    def whole_is_faster(self, nnz: int) -> bool:
        """Whether the gradient of all weights takes less than that of so many non-zeros."""
        return min(self.blocked, self.by_torch) < self.base + nnz * self.per_weight


def _line(few: int, few_seconds: float, many: int, many_seconds: float) -> tuple[float, float]:
    """(base, slope) through two measurements; no negative slope or base from noise."""
    slope = max(0.0, (many_seconds - few_seconds) / max(1, many - few))
    return max(0.0, few_seconds - few * slope), slope


def measure(layer: Layer, batch: int, seconds: float = 0.2) -> Cost:
    """Times the layer dense and at two densities; takes about `seconds` for each."""
    rows = time_layer(layer, DENSITIES, batch=batch, seconds=seconds, rounds=2)
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


def measure_gradient(layer: Layer, batch: int, seconds: float = 0.1) -> GradientCost:
    """Times the layer's weight gradient whole, both ways, and at two densities."""
    side = (layer.side + 2 * layer.padding - layer.kernel) // layer.stride + 1
    x = to_blocked(torch.randn(batch, layer.in_channels, layer.side, layer.side))
    grad = to_blocked(torch.randn(batch, layer.out_channels, side, side))
    weight = torch.empty(layer.out_channels, layer.in_channels, layer.kernel, layer.kernel)

    def whole(by_torch: bool) -> Callable[[], object]:
        return lambda: ops.dense_gradient(
            x,
            grad,
            weight,
            stride=layer.stride,
            padding=layer.padding,
            samples=batch,
            by_torch=by_torch,
        )

    patterns = [ops.Pattern(torch.rand(weight.shape) < density) for density in DENSITIES]
    sparse = [sparse_jobs(layer, x, p, grad, batch)[2] for p in patterns]
    blocked, by_torch, *times = best_times([whole(False), whole(True), *sparse], seconds)
    few, many = patterns
    return GradientCost(blocked, by_torch, *_line(few.nnz, times[0], many.nnz, times[1]))


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


def cost(layer: Layer, batch: int) -> Cost:
    """The layer's cost on this machine with the current threads; measured if not known yet.

    The batch is rounded up to whole blocks of samples.  The layer's name and repeats don't matter.
    """
    batch = -(-batch // LANES) * LANES
    return Cost(**kept(_what(layer, batch), lambda: asdict(measure(layer, batch))))


def gradient_cost(layer: Layer, batch: int) -> GradientCost:
    """The cost of the layer's weight gradient, measured if not known yet; see `cost`."""
    batch = -(-batch // LANES) * LANES
    what = f"gradient {_what(layer._replace(first=False), batch)}"  # the input's is left out
    return GradientCost(**kept(what, lambda: asdict(measure_gradient(layer, batch))))


def _what(layer: Layer, batch: int) -> str:
    fields = [f"{k}={v}" for k, v in layer._asdict().items() if k not in ("name", "repeats")]
    return " ".join([*fields, f"batch={batch}"])


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
