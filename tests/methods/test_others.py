"""The other methods' rules, against what their papers say."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from torch import nn

from lib import Masking
from lib.masking import (
    REDISTRIBUTION,
    DivergenceError,
)
from lib.methods import deepr
from lib.methods.masks import maskable_parameters
from lib.methods.selection import pick
from lib.methods.snip import snip_masks
from tests.support.masked import (
    Net,
    Trained,
    made,
    params,
    seeded,
    sgd,
    small_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_their_set_prunes_one_more_and_grows_elsewhere():
    """Constant fraction of DSR's authors' code: int(fraction * active) + 1, never the same ones."""
    rng = np.random.default_rng(4)
    weights = [rng.normal(size=(20, 20)), rng.normal(size=(6, 6))]
    masks = [rng.random((20, 20)) < 0.3, rng.random((6, 6)) < 0.9]
    momenta = [np.ones((20, 20)), np.ones((6, 6))]
    rules = {"prune": "magnitude_and_one", "redistribution": "none", "growth": "random_elsewhere"}
    _, kept = made(weights, masks, momenta, **rules)
    report = kept.update(0.1)
    for line, before in zip(report, masks, strict=True):
        after = kept.masks[line.name].numpy()
        assert line.pruned == line.grown == math.floor(0.1 * before.sum()) + 1
        free = int((~before).sum())
        regrown = line.pruned - int((before & ~after).sum())
        assert regrown == max(0, line.grown - free)


def test_redistribution_rules_by_hand():
    weights = [np.arange(1, 11.0).reshape(2, 5), np.arange(2, 42, 2.0).reshape(4, 5)]
    masks = [np.ones((2, 5), bool), np.zeros((4, 5), bool)]
    masks[0][0] = False  # 5 of 10 active: 6..10
    masks[1][1:3] = True  # 10 of 20 active: 12..30
    momenta = [np.full((2, 5), 3.0), np.full((4, 5), 1.0)]
    # Rate 0.4 removes 2 of 5 and 4 of 10: six weights to share out.
    grown = {
        "momentum": [5, 1],  # 3 : 1 is 4.5 : 1.5, a tie that the first layer wins
        "momentum_after": [5, 1],
        "magnitude": [2, 4],  # mean 8 : 21
        "nonzeros": [2, 4],  # survivors 3 : 6
        "layer_size": [2, 4],  # 10 : 20
        "none": [2, 4],
        "inactive": [2, 4],  # 7 : 14
    }
    assert set(grown) == set(REDISTRIBUTION)
    for rule, expected in grown.items():
        report = made(weights, masks, momenta, redistribution=rule)[1].update(0.4)
        assert [line.pruned for line in report] == [2, 4]
        assert [line.grown for line in report] == expected, rule


def test_no_redistribution_gives_each_layer_back_what_it_lost():
    run = Trained(redistribution="none")
    run.steps(3)
    for line in run.masking.update(0.4):
        assert line.pruned == line.grown > 0


def test_global_magnitude_prunes_the_smallest_of_all_layers():
    run = Trained(prune="global_magnitude", growth="random")
    run.steps(3)
    before = {n: m.clone() for n, m in run.masking.masks.items()}
    size = torch.cat(
        [run.masking.parameters[n].detach().abs()[m].reshape(-1) for n, m in before.items()]
    )
    count = math.floor(0.3 * len(size) + 0.5)
    limit = size.sort().values[count]
    below = {n: int((p.detach().abs()[before[n]] < limit).sum()) for n, p in params(run)}
    assert {line.name: line.pruned for line in run.masking.update(0.3)} == below


def test_gradient_growth_takes_the_largest_gradients():
    run = Trained(method="rigl")
    run.steps(3)
    before = {n: m.clone() for n, m in run.masking.masks.items()}
    gradient = {n: p.grad.abs().clone() for n, p in params(run)}
    size = {n: p.detach().abs().clone() for n, p in params(run)}
    report = run.masking.update(0.3)
    for line in report:
        kept = before[line.name] & ~pick(-size[line.name], before[line.name], line.pruned)
        grown = run.masking.masks[line.name] & ~kept
        assert grown.sum() == line.pruned == line.grown > 0
        rest = ~kept & ~grown
        assert gradient[line.name][grown].min() >= gradient[line.name][rest].max()


def test_random_growth_is_uniform_over_the_inactive():
    counts, times = torch.zeros(40), 300
    generator = seeded(11)
    for _ in range(times):
        model = Net((5, 8))
        mask = {"w0": (torch.arange(40) < 20).view(5, 8)}
        kept = Masking(model, sgd(model), method="set", generator=generator, masks=mask)
        kept.step()
        model.w0.data = torch.arange(1, 41.0).view(5, 8)
        kept.update(0.5)  # the ten smallest go; ten of the thirty without a weight grow
        assert kept.masks["w0"].view(-1)[10:20].all()
        counts += kept.masks["w0"].view(-1)
    grown = torch.cat([counts[:10], counts[20:]]).numpy()
    assert grown.sum() == 10 * times
    assert scipy_stats.chisquare(grown).pvalue > 1e-3


def test_dsr_threshold_adapts():
    weights = [np.arange(1, 101).reshape(10, 10) / 1000]
    masks, momenta = [np.ones((10, 10), bool)], [np.ones((10, 10))]

    def after(threshold: float) -> tuple[float, int]:
        _, kept = made(weights, masks, momenta, method="dsr")
        kept.rule_state["threshold"] = threshold
        report = kept.update(0.2)
        return kept.rule_state["threshold"], report[0].pruned

    assert after(0.0105) == (0.021, 10)  # fewer than 18: doubles
    assert after(0.0175) == (0.035, 17)
    assert after(0.0185) == (0.0185, 18)  # within a tenth of 20: stays
    assert after(0.0225) == (0.0225, 22)
    assert after(0.0235) == (0.01175, 23)  # more than 22: halves
    _, kept = made(weights, masks, momenta, method="dsr")
    assert kept.update(0.2)[0].pruned == 0  # it starts at 0.001: |w| = 0.001 isn't below
    assert kept.rule_state["threshold"] == 0.002


def test_dsr_redistributes_by_survivors():
    weights = [np.full((10, 10), 1.0), np.full((10, 10), 1.0)]
    weights[0].flat[:20] = 1e-4
    masks = [np.ones((10, 10), bool), np.zeros((10, 10), bool)]
    masks[1].flat[:20] = True
    masks[0].flat[90:] = False  # survivors 70 and 20
    _, kept = made(weights, masks, [np.ones((10, 10))] * 2, method="dsr")
    report = kept.update(0.2)
    assert [line.pruned for line in report] == [20, 0]
    assert [line.grown for line in report] == [16, 4]  # 20 * 70/90 = 15.6, 20 * 20/90 = 4.4


def test_deepr_keeps_signs_and_rewires_at_once():
    run = Trained(method="deepr", density=0.2)
    run.steps(1)
    signs = {n: run.masking.rule_state[f"sign/{n}"].clone() for n, _ in params(run)}
    born = 0
    for _ in range(30):
        before = dict(run.masking.masks)  # not even DeepR writes into a mask: no copies needed
        run.steps(1)
        for name, p in params(run):
            mask, weight = run.masking.masks[name], p.detach()
            assert torch.equal(run.masking.rule_state[f"sign/{name}"], signs[name])
            assert not (weight * signs[name] < 0).any()
            assert not weight[~mask].any()
            new = mask & ~before[name]
            born += int(new.sum())
            assert not weight[new].any()
            assert not run.optimizer.state[p]["momentum_buffer"][new].any()
    assert born > 20
    assert {abs(s) for n in signs for s in signs[n].unique().tolist()} == {1}


def test_deepr_step_by_hand():
    """lr * l1 is taken off towards zero; a weight that crosses goes, another wakes at zero."""
    model = Net((2, 5))
    optimizer = sgd(model, lr=0.5)
    kept = Masking(
        model,
        optimizer,
        density=0.4,
        method="deepr",
        generator=seeded(0),
        options={"l1": 0.1, "temperature": 0.0},
    )
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, :4] = True
    kept.masks["w0"] = mask
    model.w0.data[0, :4] = torch.tensor([1.0, -1.0, 0.2, -0.2])
    kept.step()
    expected = torch.tensor([0.95, -0.95, 0.15, -0.15])
    torch.testing.assert_close(model.w0.detach()[0, :4], expected)
    model.w0.data[0, 2] = -0.3  # its sign is +
    kept.step()
    assert not kept.masks["w0"][0, 2] or model.w0[0, 2] == 0
    assert int(kept.masks["w0"].sum()) == 4
    torch.testing.assert_close(model.w0.detach()[0, [0, 1, 3]], torch.tensor([0.9, -0.9, -0.1]))


def test_deepr_noise_has_the_right_size():
    model = Net((200, 200))
    kept = Masking(
        model,
        sgd(model, lr=0.5),
        method="deepr",
        density=1.0,
        generator=seeded(0),
        options={"l1": 0.0, "temperature": 0.01},
    )
    model.w0.data.fill_(10.0)
    kept.step()
    noise = model.w0.detach() - 10
    assert float(noise.std()) == pytest.approx(math.sqrt(2 * 0.5 * 0.01), rel=0.03)
    assert abs(float(noise.mean())) < 0.003


def test_deepr_wakes_uniformly():
    counts = torch.zeros(30)
    generator = seeded(5)
    for _ in range(300):
        model = Net((2, 5), (4, 5))
        kept = Masking(model, sgd(model), density=1.0, method="deepr", generator=generator)
        for name in ("w0", "w1"):
            kept.masks[name] = torch.zeros_like(kept.masks[name])
        kept.rule_state = {
            f"sign/{n}": torch.ones_like(m, dtype=torch.int8) for n, m in kept.masks.items()
        }
        nothing = torch.empty(0, dtype=torch.int64)
        deepr._wake(kept, 6, [nothing, nothing])
        flat = torch.cat([m.reshape(-1) for m in kept.masks.values()])
        assert int(flat.sum()) == 6
        counts += flat
    assert scipy_stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_snip_against_gradients_taken_by_hand():
    model = small_model()
    x, y = torch.randn(8, 2, 4, 4, generator=seeded(0)), torch.arange(8) % 4

    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(model(x), y)

    parameters = maskable_parameters(model)
    twin = copy.deepcopy(model)
    nn.functional.cross_entropy(twin(x), y).backward()
    score = np.concatenate(
        [
            np.abs(p.grad.numpy() * p.detach().numpy()).reshape(-1)
            for n, p in twin.named_parameters()
            if n in parameters
        ]
    )
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    before = {n: b.clone() for n, b in model.named_buffers()}
    masks = snip_masks(model, parameters, 0.1, loss)
    flat = np.concatenate([masks[n].numpy().reshape(-1) for n in parameters])
    assert flat.sum() == round(0.1 * flat.size)
    assert score[flat].min() > score[~flat].max()
    assert all((p.grad == 7).all() for p in model.parameters())
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    with pytest.raises(DivergenceError, match="SNIP"):
        snip_masks(model, parameters, 0.1, lambda: loss() * math.nan)
