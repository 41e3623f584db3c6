"""Sparse layers against dense ones on the clock: a topic of `python -m lib bench`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lib.bench.timing import Row, all_threads, row
from lib.engines.timing import Layer, LayerTimes, time_layer
from lib.results.clock import ALL_LAYERS

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def _vgg16_d() -> tuple[Layer, ...]:
    sizes = [(3, 64, 32, 1), (64, 64, 32, 1), (64, 128, 16, 1), (128, 128, 16, 1), (128, 256, 8, 1)]
    sizes += [(256, 256, 8, 2), (256, 512, 4, 1), (512, 512, 4, 2), (512, 512, 2, 3)]
    return tuple(
        Layer(f"{c}-{o} at {s}x{s}", c, o, 3, 1, 1, s, first=c == 3, repeats=n)
        for c, o, s, n in sizes
    )


VGG16_D = _vgg16_d()  # its thirteen convolutions on CIFAR-10


def sparse_layers(repeats: int) -> Iterator[Row]:
    """VGG16-D's convolutions, forward and backward, uniform random masks, batch 128, all threads:
    torch's dense fp32 over the sparse kernels.
    """
    all_threads()
    for density in DENSITIES:
        rows = [
            line
            for layer in VGG16_D
            for line in time_layer(layer, [density], batch=128, seconds=0.0, rounds=repeats)
        ]
        setting = f"vgg16-d, {100 * density:g} %"
        total = total_ratio(rows)
        yield row(ALL_LAYERS, setting, [total], "x")
        for line in rows:
            yield row(line.layer.name, setting, [line.ratio], "x")


def total_ratio(rows: Iterable[LayerTimes]) -> float:
    """Dense over sparse time of all rows together, each counted as often as a network has it."""
    rows = list(rows)
    sparse = sum(r.layer.repeats * r.sparse_ms for r in rows)
    return sum(r.layer.repeats * r.dense_ms for r in rows) / sparse
