"""Sparse layers on the clock: the rows, and that the table of layers is the network's."""

from __future__ import annotations

import pytest
import torch

from lib.bench.layers import VGG16_D, total_ratio
from lib.engines.timing import Layer, time_layer
from lib.kernels import library
from lib.models import build_model


@pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler")
def test_bench_rows() -> None:
    layers = (VGG16_D[0], Layer("fc", 20, 30, 1, 1, 0, 1, repeats=2))
    rows = [
        line
        for layer in layers
        for line in time_layer(layer, [0.1], batch=16, seconds=0.0, rounds=1)
    ]
    assert [r.layer for r in rows] == list(layers)
    assert rows[0].backward_input_ms == 0 < rows[1].backward_input_ms
    assert all(0 < r.density < 0.3 for r in rows)
    sparse = rows[0].sparse_ms + 2 * rows[1].sparse_ms
    dense = rows[0].dense_ms + 2 * rows[1].dense_ms
    assert total_ratio(rows) == pytest.approx(dense / sparse)


def test_vgg16_d_is_the_model() -> None:
    convolutions = [m for m in build_model("vgg16-d").modules() if isinstance(m, torch.nn.Conv2d)]
    table = [layer for layer in VGG16_D for _ in range(layer.repeats)]
    assert [(m.in_channels, m.out_channels) for m in convolutions] == [
        (layer.in_channels, layer.out_channels) for layer in table
    ]
