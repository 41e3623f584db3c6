"""The networks: the sizes the paper's tables rest on, initialisation, names, FLOPs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib.models import (
    MODELS,
    PreActBlock,
    build_model,
    init_weights,
    layer_flops,
    maskable_weights,
    small_dense_scale,
)
from tests.support.masked import seeded

MASKABLE = {
    "lenet300-100": 266_200,
    "lenet5": 430_500,
    "lenet300-100-bn": 266_200,
    "alexnet-s": 5_066_784,
    "alexnet-b": 8_484_896,
    "vgg16-c": 11_307_712,
    "vgg16-d": 15_239_872,
    "vgg16-like": 14_977_728,
    "wrn-28-2": 1_463_984,
    "wrn-16-8": 10_954_160,
    "wrn-16-10": 17_107_632,
    "wrn-22-8": 17_147_312,
    "resnet50": 25_502_912,
    # the families; width 1 has no shortcut in the first stage, where the shape does not change
    "wrn-10-1": 77_360,
    "mlp-100x1": 784 * 100 + 1_000,
    "mlpbn-37x8": 784 * 37 + 7 * 37**2 + 370,
}


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {name: build_model(name, generator=seeded(0)) for name in MASKABLE}


def modules_of(model: nn.Module, *kinds: type[nn.Module]) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kinds)]


@pytest.mark.parametrize("name", MASKABLE)
def test_maskable_weights_and_batch_norm_that_starts_as_the_identity(models, name):
    assert sum(maskable_weights(models[name]).values()) == MASKABLE[name]
    for bn in modules_of(models[name], nn.BatchNorm1d, nn.BatchNorm2d):
        assert (bn.weight == 1).all() and (bn.bias == 0).all() and bn.num_batches_tracked == 0
        assert (bn.running_mean == 0).all() and (bn.running_var == 1).all()
    assert MASKABLE.keys() >= MODELS.keys()


@pytest.mark.parametrize("name", MASKABLE)
def test_logits_and_gradients_of_a_batch(name):
    shape = (1, 28, 28) if name.startswith(("lenet", "mlp")) else (3, 32, 32)
    shape, scale = ((3, 64, 64), 1.0) if name == "resnet50" else (shape, 0.1)
    model = build_model(name, width_scale=scale, num_classes=7, generator=seeded(0))
    logits = model(torch.randn(4, *shape, generator=seeded(1)))
    assert model.training and logits.shape == (4, 7) and logits.isfinite().all()
    assert not torch.allclose(logits.exp().sum(1), torch.ones(4))  # logits, not log-probabilities
    logits.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_lenets_against_their_definition(models):
    relu, pool = torch.relu, nn.functional.max_pool2d
    x = torch.randn(3, 1, 28, 28, generator=seeded(2))
    fc = models["lenet300-100"]
    h = relu(fc.fc2(relu(fc.fc1(x.view(3, 784)))))
    torch.testing.assert_close(fc(x), fc.fc3(h))
    assert torch.equal(fc(x), fc(x.flatten(1)))  # rows of pixels too
    conv = models["lenet5"]
    h = pool(relu(conv.conv2(pool(relu(conv.conv1(x)), 2))), 2)  # ReLU first, as in the paper's
    torch.testing.assert_close(conv(x), conv.fc4(relu(conv.fc3(h.view(3, 800)))))


def test_the_perceptron_of_dsrs_authors_against_its_definition():
    model = build_model("lenet300-100-bn", generator=seeded(0)).train()
    h = x = torch.randn(8, 1, 28, 28, generator=seeded(2))
    h = h.view(8, 784)
    for i in (1, 2, 3):
        bn = model.get_submodule(f"bn{i}")
        nn.init.normal_(bn.weight, 1, 0.2, generator=seeded(i))
        nn.init.normal_(bn.bias, 0, 0.3, generator=seeded(-i))
        h = h @ model.get_parameter(f"fc{i}.weight").T
        h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt() * bn.weight + bn.bias
        h = torch.relu(h) if i < 3 else h
    torch.testing.assert_close(model(x), h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "stacks"), [("vgg16-c", 2), ("vgg16-d", 2), ("vgg16-like", 1)])
def test_vgg16_details(models, name, stacks):
    convs = modules_of(models[name].features, nn.Conv2d)
    ones = [i for i, conv in enumerate(convs) if conv.kernel_size == (1, 1)]
    assert ones == ([6, 9, 12] if name == "vgg16-c" else [])
    assert {conv.padding for conv in convs} == {(1, 1)}  # 1x1 kernels too
    kinds = [type(m).__name__ for m in models[name].classifier]
    assert kinds == [*["Linear", "ReLU", "BatchNorm1d"] * stacks, "Linear"]


def test_wrn_block_against_its_definition():
    block, plain = PreActBlock(4, 8, 2, 0.0), PreActBlock(8, 8, 1, 0.0)
    x = torch.randn(2, 4, 8, 8, generator=seeded(4))
    act = torch.relu(block.bn1(x))
    y = block.conv2(torch.relu(block.bn2(block.conv1(act)))) + block.shortcut(act)
    torch.testing.assert_close(block(x), y)
    z = plain.conv2(torch.relu(plain.bn2(plain.conv1(torch.relu(plain.bn1(y)))))) + y
    torch.testing.assert_close(plain(y), z)


# ---------------------------------------------------------------------------------- initialisation


@pytest.mark.parametrize("name", ["lenet5", "alexnet-s", "wrn-10-1"])
def test_generator_alone_decides_the_weights(name):
    before = torch.get_rng_state()
    one = build_model(name, width_scale=0.25, generator=seeded(7)).state_dict()
    assert torch.equal(torch.get_rng_state(), before)  # the global stream is not touched
    torch.manual_seed(2)
    two = build_model(name, width_scale=0.25, generator=seeded(7)).state_dict()
    other = build_model(name, width_scale=0.25, generator=seeded(8)).state_dict()
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert not all(torch.equal(value, other[key]) for key, value in one.items())


def test_without_generator_the_global_stream_gives_pytorchs_own_bits():
    torch.manual_seed(3)
    model = build_model("lenet300-100")
    torch.manual_seed(3)
    for ours, shape in ((model.fc1, (784, 300)), (model.fc2, (300, 100)), (model.fc3, (100, 10))):
        theirs = nn.Linear(*shape)
        assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)


def test_wrn_initialisation(models):
    model = models["wrn-16-8"]
    for conv in modules_of(model, nn.Conv2d):
        if conv.weight.numel() > 50_000:
            expected = (2 / (conv.weight[0, 0].numel() * conv.out_channels)) ** 0.5
            assert conv.weight.std().item() == pytest.approx(expected, rel=0.02)
    assert model.fc.bias.abs().max() == 0
    assert 0.9 * 512**-0.5 < model.fc.weight.abs().max().item() <= 512**-0.5


@pytest.mark.parametrize(("name", "low", "high"), [("mlp-100x8", 0.3, 3), ("mlpbn-100x8", 0, 0.01)])
def test_a_deep_mlp_without_batch_norm_passes_its_input_on(name, low, high):
    x = torch.randn(500, 784, generator=seeded(6))
    for layer in modules_of(build_model(name, generator=seeded(5)), nn.Linear)[:-1]:
        x = torch.relu(x @ layer.weight.T)
    assert low <= x.square().mean() <= high


def test_unknown_parameters_are_not_left_uninitialised():
    with pytest.raises(TypeError, match=r"no initialisation rule for 0 \(PReLU\)"):
        init_weights(nn.Sequential(nn.PReLU()))


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("lenet-300-100", {}, r"unknown model 'lenet-300-100': did you mean 'lenet300-100'"),
        ("transformer", {}, r"'transformer': known are .*lenet5, .*wrn-<d"),
        ("resnet50", {"width_scale": 0.5}, "no width multiplier, got width_scale=0.5"),
        ("wrn-20-2", {}, r"'wrn-20-2': depth must be 6n \+ 4"),
        ("wrn-10-0", {}, "width at least 1"),
        ("mlp-0x3", {}, "must be at least 1"),
        ("mlp-100x0", {}, "must be at least 1"),
        ("lenet5", {"dropout": 0.3}, "'lenet5': it has no dropout, got dropout=0.3"),
        ("wrn-10-1", {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ("lenet5", {"width_scale": 0.0}, r"width_scale must be in \(0, 1\], got 0.0"),
        ("lenet5", {"num_classes": 0}, "num_classes must be at least 1, got 0"),
    ],
)
def test_bad_values(name, keywords, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, **keywords)


# ---------------------------------------------------------------------- small dense networks, FLOPs


@pytest.mark.parametrize(
    ("name", "density", "tolerance"),
    [
        ("lenet300-100", 0.01, 0.15),  # 3 or 4 units in the first layer
        ("lenet5", 0.05, 0.03),
        ("vgg16-d", 0.05, 0.01),
        ("wrn-28-2", 0.1, 0.05),
        ("wrn-28-2", 1.0, 0.0),
    ],
)
def test_small_dense_has_the_weights_of_the_sparse_network(name, density, tolerance):
    small = build_model(name, width_scale=small_dense_scale(name, density))
    total = sum(maskable_weights(small).values())
    assert total == pytest.approx(density * MASKABLE[name], rel=tolerance)
    first, *_, last = modules_of(small, nn.Conv2d, nn.Linear)  # images and classes stay
    sides = {"lenet300-100": 784, "lenet5": 1}
    assert first.weight.shape[1] == sides.get(name, 3) and last.weight.shape[0] == 10


@pytest.mark.parametrize("density", [0.01, 0.1, 0.33, 0.5, 0.9])
def test_small_dense_is_the_closest_of_all_scales(density):
    """Against a scan of every scale, with the weights counted by hand."""
    counts = []
    for step in range(1, 10_001):
        one, two = (max(1, int(width * step / 10_000 + 0.5)) for width in (300, 100))
        counts.append(784 * one + one * two + two * 10)
    scale = small_dense_scale("lenet300-100", density)
    got = sum(maskable_weights(build_model("lenet300-100", width_scale=scale)).values())
    assert abs(got - density * 266_200) == min(abs(c - density * 266_200) for c in counts)
    with pytest.raises(ValueError, match=r"with one unit in every layer it has 795"):
        small_dense_scale("lenet300-100", 0.001)


def test_flops_by_hand(models):
    def flops(name: str, *shape: int) -> list[int]:
        return list(layer_flops(models[name], shape).values())

    assert flops("lenet300-100-bn", 1, 28, 28) == [2 * 784 * 300, 2 * 300 * 100, 2 * 100 * 10]
    convolutions = [24 * 24 * 20 * 25, 8 * 8 * 50 * 20 * 25]
    assert flops("lenet5", 1, 28, 28) == [2 * n for n in (*convolutions, 800 * 500, 500 * 10)]
    assert flops("alexnet-s", 3, 32, 32)[:2] == [2 * 13**2 * 96 * 3 * 121, 2 * 49 * 256 * 96 * 25]
    wrn = layer_flops(models["wrn-10-1"], (3, 32, 32))
    assert wrn["block2.0.shortcut.weight"] == 2 * 16**2 * 32 * 16
    assert list(wrn) == list(maskable_weights(models["wrn-10-1"]))
