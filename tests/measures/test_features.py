"""Class specialisation of channels, against NumPy loops, and that the measure reaches the CSV."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from lib.config import Run
from lib.measures import MEASURES
from lib.measures.features import BIN_EDGES, class_contributions, class_specialisation
from lib.models import build_model
from lib.train import train
from tests.support.made_up_data import cifar


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: waiting for a second thread would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def oracle(contribution: np.ndarray) -> list[float]:
    """The same number, one channel at a time."""
    total = contribution.sum()
    seen, dropped = 0.0, set()
    for channel in sorted(range(len(contribution)), key=lambda c: contribution[c].sum()):
        seen += contribution[channel].sum()
        if seen > 0.05 * total:
            break
        dropped.add(channel)
    return [
        max(row) / sum(row)
        for channel, row in enumerate(contribution.tolist())
        if channel not in dropped and sum(row) > 0
    ]


class TinyNet(nn.Module):
    """conv-ReLU, linear-ReLU: only the first ReLU has feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.relu1 = nn.ReLU(inplace=True)
        self.fc = nn.Linear(3 * 4, 2)
        self.relu2 = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu1(self.norm(self.conv(x)))
        return self.relu2(self.fc(x.flatten(1)))


def test_contributions_are_the_sums_of_a_loop() -> None:
    torch.manual_seed(0)
    net = TinyNet()
    with torch.no_grad():
        net.norm.running_mean += torch.tensor([0.3, -0.2, 0.1])
        net.norm.running_var *= 2
    images, labels = torch.randn(11, 1, 4, 4), torch.randint(0, 3, (11,))
    batches = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.train()
    found = class_contributions(net, batches, num_classes=3)
    assert net.training and not net.relu1._forward_hooks
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # evaluation mode

    weight = net.conv.weight.detach().double().numpy()
    expected = np.zeros((3, 3))
    for image, label in zip(images.double().numpy()[:, 0], labels.tolist(), strict=True):
        for c in range(3):
            mean, var = float(net.norm.running_mean[c]), float(net.norm.running_var[c])
            for i in range(2):
                for j in range(2):
                    x = (image[i : i + 3, j : j + 3] * weight[c, 0]).sum()
                    expected[c, label] += max(0.0, (x - mean) / np.sqrt(var + net.norm.eps))
    assert list(found) == ["relu1"]
    np.testing.assert_allclose(found["relu1"].numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_specialisation_is_that_of_the_oracle(seed: int) -> None:
    random = np.random.default_rng(seed)
    contribution = random.exponential(size=(30, 10)) * random.exponential(size=(30, 1)) ** 3
    contribution[random.random(30) < 0.2] = 0.0  # dead channels
    np.testing.assert_allclose(class_specialisation(contribution), oracle(contribution))


def test_specialisation_by_hand() -> None:
    contribution = np.array(
        [
            [10.0, 10.0],  # general
            [0.0, 40.0],  # one class only
            [0.0, 0.0],  # dead
            [1.0, 0.0],  # 1 of 64: in the low tail
            [2.0, 1.0],  # 4 of 64 with the one before: beyond 5 %, so it stays
        ]
    )
    np.testing.assert_allclose(class_specialisation(contribution), [0.5, 1.0, 2 / 3])
    assert class_specialisation(np.zeros((4, 10))).shape == (0,)


def test_a_relu_used_twice_is_refused() -> None:
    relu = nn.ReLU()
    net = nn.Sequential(nn.Conv2d(1, 2, 1), relu, nn.Conv2d(2, 2, 1), relu)
    with pytest.raises(ValueError, match="used twice"):
        class_contributions(net, [(torch.ones(1, 1, 2, 2), torch.zeros(1).long())], 2)


@pytest.mark.parametrize(("model", "layers"), [("alexnet-s", 5), ("vgg16-d", 13), ("wrn-28-2", 25)])
def test_the_layers_are_the_papers(model: str, layers: int) -> None:
    """One per convolution; of WRN-28-2 the paper shows the 24 of the blocks, without the last."""
    net = build_model(model)
    found = class_contributions(net, [(torch.randn(2, 3, 32, 32), torch.tensor([0, 9]))], 10)
    assert len(found) == layers
    assert all(contribution.shape[1] == 10 for contribution in found.values())
    assert (list(found)[-1] == "relu") == (model == "wrn-28-2")


def test_rows_of_a_run() -> None:
    run = Run(dataset="cifar10", model="wrn-10-1", density=0.3, epochs=1, batch_size=20)
    outcome = train(run, cifar(60), measures=[MEASURES["features"]])
    assert {row["measure"] for row in outcome.measures} == {"features"}
    layers: dict[str, dict[str, float]] = {}
    for row in outcome.measures:
        layer = layers.setdefault(row["layer"], {"histogram": 0.0})
        layer[row["quantity"]] = layer.get(row["quantity"], 0.0) + row["value"]
        if row["quantity"] == "histogram":
            assert 0 <= row["position"] < len(BIN_EDGES) - 1
    assert len(layers) == 7 and layers["block3.0.relu2"]["channels"] == 64
    for layer in layers.values():
        assert 0 < layer["kept"] <= layer["channels"]
        assert layer["histogram"] + layer["above"] == layer["kept"]
        assert 0.1 * layer["kept"] <= layer["sum"] <= layer["kept"]
        assert layer["sum"] ** 2 / layer["kept"] <= layer["sum_of_squares"] * (1 + 1e-12)
    assert train(run, cifar(60), measures=[MEASURES["features"]]).measures == outcome.measures
