"""The estimates by hand, and that taking empty channels out changes no output."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lib.config import Run
from lib.measures.speedups import (
    ESTIMATES,
    NETWORK,
    SEGMENTS,
    ConvPlusMap,
    estimates,
    observe_speedups,
    remove_empty_channels,
    time_in_turns,
)
from lib.models import build_model, model_spec
from lib.train import Interrupted, train
from tests.support.made_up_data import cifar


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------- estimates


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


def test_a_dense_network_gets_a_speed_up_from_its_relus() -> None:
    x = torch.randn(8, 16, 6, 6).relu()
    channel, full = estimates(1.0, torch.randn(4, 16, 3, 3), x)
    assert channel == 1.0
    assert 0.4 < full < 0.6


# ------------------------------------------------------------------------------- empty channels


def with_empty_channels(name: str, seed: int, share: float) -> tuple[nn.Module, torch.Tensor]:
    """A network, trained-looking, with rows and columns of zeros everywhere, and a batch."""
    generator = torch.Generator().manual_seed(seed)
    model = build_model(name, generator=generator).double()  # so that equal means equal
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter[torch.rand(parameter.shape[0], generator=generator) < share] = 0
                if parameter.shape[1] > 3:  # not the image
                    parameter[:, torch.rand(parameter.shape[1], generator=generator) < share] = 0
            else:  # biases and batch-norm, so that empty channels have constants
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.momentum = 1.0  # the statistics of this batch, so that signals get through
        images = torch.randn(4, *model_spec(name).input_shape, generator=generator).double()
        model(images)
    return model.eval(), images


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
@pytest.mark.parametrize(
    "name",
    ["alexnet-s", "vgg16-c", "vgg16-like", "wrn-16-2", "lenet5", "lenet300-100", "lenet300-100-bn"],
)
def test_the_smaller_network_computes_the_same(name: str, share: float) -> None:
    model, images = with_empty_channels(name, seed=round(10 * share), share=share)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small, removed = remove_empty_channels(model, images[:1])
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(small(images), expected, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    if share < 0.5:  # with more zeros, hardly a path from the image is left
        assert expected.std(0).max() > 1e-3  # not the comparison of constants
    count = sum(p.numel() for p in small.parameters() if p.dim() > 1)
    assert removed.weights - removed.removed_weights == count
    if share == 0:
        assert removed.removed_channels == removed.removed_weights == 0
    else:
        assert removed.removed_channels >= share * removed.channels


def test_constants_are_folded_at_padded_borders() -> None:
    """A constant channel into a padded convolution: the border differs from the middle."""
    model, images = with_empty_channels("vgg16-like", seed=1, share=0.0)
    features = model.get_submodule("features")
    with torch.no_grad():
        features[0].weight[7] = 0  # type: ignore[index]
        features[1].bias[7] = 2.0  # type: ignore[index]
        expected = model(images)
        assert not torch.allclose(expected, without_channel(model, 7)(images))  # it matters
        small, removed = remove_empty_channels(model, images[:1])
        torch.testing.assert_close(small(images), expected, rtol=1e-9, atol=1e-9)
    assert removed.removed_channels == 1
    folded = small.get_submodule("features")[3]  # type: ignore[index]
    assert isinstance(folded, ConvPlusMap) and folded.conv.in_channels == 63
    assert not torch.allclose(folded.constant[0, :, 0, 0], folded.constant[0, :, 5, 5])


def without_channel(model: nn.Module, channel: int) -> nn.Module:
    """The network with the constant of a channel forgotten instead of folded."""
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.get_submodule("features")[3].weight[:, channel] = 0  # type: ignore[index]
    return wrong


def test_a_layer_never_vanishes() -> None:
    model, images = with_empty_channels("lenet300-100", seed=0, share=0.0)
    with torch.no_grad():
        model.get_submodule("fc2").weight.zero_()
        small, removed = remove_empty_channels(model, images[:1])
        torch.testing.assert_close(small(images), model(images))
    assert removed.removed_channels == 299 + 99


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(TypeError, match="no rule for the channels of Sequential"):
        remove_empty_channels(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2))


def test_an_emptier_network_is_faster_on_the_clock() -> None:
    model, images = with_empty_channels("wrn-10-2", seed=0, share=0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("conv1.weight") and "block" in name:
                parameter[: parameter.shape[0] * 7 // 8] = 0
    small, _ = remove_empty_channels(model, images[:1])
    dense, removed = time_in_turns([model, small], images.repeat(2, 1, 1, 1))
    assert 0 < removed < dense


# ------------------------------------------------------------------------------------- the measure


def test_rows_of_a_run_and_of_a_resumed_one(tmp_path) -> None:
    run = Run(
        dataset="cifar10", model="wrn-10-1", density=0.1, epochs=2, batch_size=10, dropout=0.0
    )
    data = cifar(60)
    whole = train(run, data, measures=[observe_speedups])
    rows = {(r["layer"], r["quantity"], r["position"]): r["value"] for r in whole.measures}
    assert len(rows) == len(whole.measures)
    convolutions = {layer for layer, _, _ in rows if layer != NETWORK}
    assert len(convolutions) == 1 + 3 * 2 + 2  # the stem, two in each block, two shortcuts
    steps = 12
    segments = {position for _, quantity, position in rows if quantity == "dense_s"}
    assert segments == set(range(steps // 2)) and len(segments) <= SEGMENTS
    for layer in convolutions:
        for segment in segments:
            dense, channel, full = (rows[layer, e, segment] for e in ESTIMATES)
            assert 0 < full < dense and 0 < channel <= dense
        assert 0 < rows[layer, "weight_density", 0] <= 1
    active = {row["layer"]: row["active"] / row["weights"] for row in whole.layers}
    assert rows["conv1", "weight_density", 0] == pytest.approx(active["conv1.weight"])
    first = rows["conv1", "full_sparse_s", 0] / rows["conv1", "dense_s", 0]
    assert first == pytest.approx(round(0.1 * 432) / 432)  # pixels aren't zero
    assert rows[NETWORK, "max_difference", 0] < 1e-5
    assert rows[NETWORK, "dense_forward_s", 0] > 0 < rows[NETWORK, "removed_forward_s", 0]

    stops = iter([False] * 7 + [True])
    with pytest.raises(Interrupted):
        train(
            run,
            data,
            measures=[observe_speedups],
            checkpoint=tmp_path / "x.pt",
            should_stop=lambda: next(stops),
        )
    resumed = train(run, data, measures=[observe_speedups], checkpoint=tmp_path / "x.pt")
    keys = Counter((r["layer"], r["quantity"], r["position"]) for r in resumed.measures)
    assert keys == Counter(rows.keys())
    again = {(r["layer"], r["quantity"], r["position"]): r["value"] for r in resumed.measures}
    for layer in convolutions:  # times differ, and with them the weights of the mini-batches
        for segment in segments:
            one, other = (
                table[layer, "full_sparse_s", segment] / table[layer, "dense_s", segment]
                for table in (rows, again)
            )
            assert 1 / 4 < one / other < 4
    assert resumed.test_error_pct == whole.test_error_pct
    assert train(run, data).test_error_pct == whole.test_error_pct  # measuring changes nothing
