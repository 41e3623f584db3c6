"""Measures: class specialisation against NumPy loops, the estimates by hand, and their rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lib.config import Run
from lib.measures import (
    BIN_EDGES,
    ESTIMATES,
    SEGMENTS,
    class_contributions,
    class_specialisation,
    estimates,
    observe_features,
    observe_speedups,
)
from lib.models import build_model
from lib.train import Interrupted, Outcome, train
from tests.support.made_up_data import cifar


def test_contributions_are_the_sums_of_a_loop() -> None:
    """Of the first ReLU alone: the second has no feature maps."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3)
    net = nn.Sequential(
        conv, norm, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 2), nn.ReLU()
    )
    with torch.no_grad():
        norm.running_mean += torch.tensor([0.3, -0.2, 0.1])
        norm.running_var *= 2
    images, labels = torch.randn(11, 1, 4, 4), torch.randint(0, 3, (11,))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = class_contributions(net, [(images[:4], labels[:4]), (images[4:], labels[4:])], 3)
    assert not net[2]._forward_hooks
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # evaluation mode

    expected = np.zeros((3, 3))
    mean, var = norm.running_mean.view(3, 1, 1), norm.running_var.view(3, 1, 1)
    for image, label in zip(images, labels, strict=True):
        maps = (conv(image).detach() - mean) / (var + norm.eps).sqrt()
        expected[:, label] += maps.clamp(0).sum((1, 2)).numpy()
    assert list(found) == ["2"]
    np.testing.assert_allclose(found["2"].numpy(), expected, rtol=1e-5)


def oracle(contribution: np.ndarray) -> list[float]:
    """The specialisation, one channel at a time."""
    total, seen, dropped = contribution.sum(), 0.0, set()
    for channel in sorted(range(len(contribution)), key=lambda c: contribution[c].sum()):
        seen += contribution[channel].sum()
        if seen > 0.05 * total:
            break
        dropped.add(channel)
    kept = [row for c, row in enumerate(contribution.tolist()) if c not in dropped and sum(row)]
    return [max(row) / sum(row) for row in kept]


@pytest.mark.parametrize("seed", range(5))
def test_specialisation_is_that_of_the_oracle(seed: int) -> None:
    random = np.random.default_rng(seed)
    contribution = random.exponential(size=(30, 10)) * random.exponential(size=(30, 1)) ** 3
    contribution[random.random(30) < 0.2] = 0.0  # dead channels
    np.testing.assert_allclose(class_specialisation(contribution), oracle(contribution))
    assert class_specialisation(np.zeros((4, 10))).shape == (0,)


@pytest.mark.parametrize(("model", "layers"), [("alexnet-s", 5), ("vgg16-d", 13), ("wrn-28-2", 25)])
def test_the_layers_are_the_papers(model: str, layers: int) -> None:
    """One per convolution; of WRN-28-2 the paper shows the 24 of the blocks, without the last."""
    batch = (torch.randn(2, 3, 32, 32), torch.tensor([0, 9]))
    found = class_contributions(build_model(model), [batch], 10)
    assert len(found) == layers and {total.shape[1] for total in found.values()} == {10}
    assert (list(found)[-1] == "relu") == (model == "wrn-28-2")


def test_rows_of_features() -> None:
    run = Run(dataset="cifar10", model="wrn-10-1", density=0.3, epochs=1, batch_size=20)
    outcome = train(run, cifar(60), measures=[observe_features])
    layers: dict[str, Counter[str]] = {}
    for row in outcome.measures:
        assert row["measure"] == "features" and 0 <= row["position"] < len(BIN_EDGES) - 1
        layers.setdefault(row["layer"], Counter())[row["quantity"]] += row["value"]
    assert len(layers) == 7 and layers["block3.0.relu2"]["channels"] == 64
    for layer in layers.values():
        assert 0 < layer["kept"] <= layer["channels"]
        assert layer["histogram"] + layer["above"] == layer["kept"]
        assert 0.1 * layer["kept"] <= layer["sum"] <= layer["kept"]
        assert layer["sum"] ** 2 / layer["kept"] <= layer["sum_of_squares"] * (1 + 1e-12)
    assert train(run, cifar(60), measures=[observe_features]).measures == outcome.measures


def test_estimates_by_hand() -> None:
    weight = torch.ones(4, 5, 3, 3)
    weight[:, 0] = 0  # 1 of 5 input channels empty
    weight[0] = 0  # 144 - 36 more zeros: 180 -> 36 + 36 zeros
    x = torch.ones(2, 5, 4, 4)
    x[0, 1] = 0  # 1 of 10 maps is zero
    x[1, 2, 0] = 0  # 4 zeros more, no whole map
    channel, full = estimates(2.0, weight, x)
    assert channel == pytest.approx(2.0 * (1 - 1 / 5) * (1 - 1 / 10))
    assert full == pytest.approx(2.0 * (140 / 160) * (108 / 180))


def by_key(outcome: Outcome) -> dict[tuple[str, str, int], float]:
    return {(r["layer"], r["quantity"], r["position"]): r["value"] for r in outcome.measures}


def test_rows_of_speedups_and_of_a_resumed_run(tmp_path: Path) -> None:
    fields = {"model": "wrn-10-1", "density": 0.1, "batch_size": 10, "kernels": "sparse"}
    run, data = Run(dataset="cifar10", epochs=2, **fields), cifar(60)  # 12 steps
    whole = train(run, data, measures=[observe_speedups])
    rows = by_key(whole)
    convolutions = {layer for layer, _, _ in rows}
    assert len(rows) == len(whole.measures)
    assert len(convolutions) == 1 + 3 * 2 + 2  # the stem, two in each block, two shortcuts
    segments = {position for _, quantity, position in rows if quantity == "dense_s"}
    assert segments == set(range(6)) and len(segments) <= SEGMENTS
    for layer in convolutions:
        for segment in segments:
            dense, channel, full = (rows[layer, e, segment] for e in ESTIMATES)
            assert 0 < full < dense and 0 < channel <= dense
    active = {row["layer"]: row["active"] / row["weights"] for row in whole.layers}
    assert rows["conv1", "weight_density", 0] == pytest.approx(active["conv1.weight"])
    first = rows["conv1", "full_sparse_s", 0] / rows["conv1", "dense_s", 0]
    assert first == pytest.approx(round(0.1 * 432) / 432)  # pixels aren't zero

    stops, kept = iter([False] * 7 + [True]), tmp_path / "x.pt"
    with pytest.raises(Interrupted):
        train(run, data, measures=[observe_speedups], checkpoint=kept,
              should_stop=lambda: next(stops))  # fmt: skip
    resumed = train(run, data, measures=[observe_speedups], checkpoint=kept)
    assert by_key(resumed).keys() == rows.keys()
    assert resumed.test_error_pct == whole.test_error_pct
    bare = train(run, data)  # measuring changes nothing: neither numbers nor what computes them
    assert (bare.curves, bare.kernels) == (whole.curves, whole.kernels)
