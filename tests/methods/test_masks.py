"""Which weights are masked, and the masks at the start."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

from lib import Masking, build_model
from lib.methods.masks import initial_counts, maskable_parameters
from tests.support.masked import (
    Net,
    Trained,
    seeded,
    sgd,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("init", ["uniform", "erk"])
@pytest.mark.parametrize("density", [0.01, 0.05, 0.123, 0.5, 0.9, 1.0])
def test_start_density_is_exact(init, density):
    model = build_model("lenet5", generator=seeded(0))
    kept = Masking(model, sgd(model), density=density, init=init, generator=seeded(1))
    assert sum(kept.active().values()) == round(density * 430_500)
    assert kept.weights_total == 430_500
    assert kept.density == round(density * 430_500) / 430_500
    for name, mask in kept.masks.items():
        assert mask.dtype == torch.bool
        assert not kept.parameters[name].detach()[~mask].any()


def test_uniform_and_erk_layer_densities():
    model = build_model("lenet5", generator=seeded(0))
    parameters = maskable_parameters(model)
    counts = initial_counts(parameters, 0.05, "uniform")
    assert all(abs(c - 0.05 * parameters[n].numel()) < 1 for n, c in counts.items())
    counts = initial_counts(parameters, 0.05, "erk")
    ideal = {n: sum(p.shape) / p.numel() for n, p in parameters.items()}
    scales = {n: counts[n] / parameters[n].numel() / ideal[n] for n in counts}
    open_layers = [s for n, s in scales.items() if counts[n] < parameters[n].numel()]
    assert max(open_layers) / min(open_layers) < 1.02
    full = [s for n, s in scales.items() if counts[n] == parameters[n].numel()]
    assert full and max(full) < min(open_layers) * 1.01  # only what the cap cuts off


def test_an_output_layer_can_start_half_dense():
    parameters = maskable_parameters(build_model("lenet300-100", generator=seeded(0)))
    for density in (0.01, 0.02, 0.05):
        *others, last = initial_counts(parameters, density, "half_output").values()
        assert sum(others) + last == round(density * 266_200) and abs(last - 500) <= 1
        first, second = (n / p.numel() for n, p in zip(others, parameters.values(), strict=False))
        assert first == pytest.approx(second, rel=0.01)


def test_start_masks_are_uniform_over_positions():
    counts = torch.zeros(20)
    for seed in range(400):
        model = Net((4, 5))
        counts += (
            Masking(model, sgd(model), density=0.25, generator=seeded(seed)).masks["w0"].reshape(-1)
        )
    assert scipy_stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("init", ["uniform_drawn", "erk_drawn"])
def test_drawn_masks_have_their_density_in_expectation(init):
    model = build_model("lenet5", generator=seeded(0))
    counts = initial_counts(maskable_parameters(model), 0.01, init.removesuffix("_drawn"))
    drawn = []
    for seed in range(20):
        model = build_model("lenet5", generator=seeded(0))
        kept = Masking(model, sgd(model), density=0.01, init=init, generator=seeded(seed))
        drawn.append(list(kept.active().values()))
    found = np.array(drawn)
    assert (found.min(0) > 0).all() and (found.std(0) > 0).all()
    expected = np.array([counts[n] for n in kept.masks])
    assert (abs(found.mean(0) - expected) < 4 * np.sqrt(expected / 20) + 0.2).all()


def test_a_layer_drawn_empty_gets_one_weight():
    model = Net((2, 2), (200, 200))
    for seed in range(30):
        kept = Masking(model, sgd(model), 0.15, init="uniform_drawn", generator=seeded(seed))
        assert kept.active()["w0"] >= 1
    with pytest.raises(ValueError, match="unknown init 'drawn'"):
        Masking(model, sgd(model), 0.1, init="drawn")


@pytest.mark.parametrize(
    ("keep", "gone"),
    [
        ((), set()),
        ("0.weight", {"0.weight"}),
        ("4", {"4.weight"}),
        (["0", "6.weight"], {"0.weight", "6.weight"}),
        ("[46].weight", {"4.weight", "6.weight"}),
    ],
)
def test_keep_dense(keep, gone):
    run = Trained(keep_dense=keep)
    assert set(run.masking.masks) == {"0.weight", "4.weight", "6.weight"} - gone
    sizes = {n: p.numel() for n, p in run.model.named_parameters() if p.dim() > 1 and n not in gone}
    assert sum(run.masking.active().values()) == round(0.2 * sum(sizes.values()))
    for name in gone:
        assert (dict(run.model.named_parameters())[name] != 0).all()


def test_biases_and_batch_norm_stay_dense():
    run = Trained(density=0.05)
    run.steps(3)
    run.masking.update()
    ones = [p for p in run.model.parameters() if p.dim() == 1]
    for p in ones:
        p.data.fill_(1.0)
    run.masking.step()
    run.masking.update()
    assert len(ones) == 5 and all((p == 1).all() for p in ones)


def test_masks_are_assignable_and_edits_count():
    run = Trained()
    run.steps(1)
    mask = torch.zeros(4, 12, dtype=torch.bool)
    mask[:, :3] = True
    run.masking.masks["6.weight"] = mask
    weight = run.masking.parameters["6.weight"].detach()
    weight.fill_(1.0)
    run.masking.step()
    assert torch.equal(weight, mask.float())
    run.masking.masks["6.weight"] = mask.clone()
    run.masking.step()
    run.masking.masks["6.weight"][0, 0] = False  # in place
    run.masking.step()
    assert weight[0, 0] == 0 and weight[1, 0] != 0
    new = {n: torch.rand(m.shape) < 0.5 for n, m in run.masking.masks.items()}
    run.masking.masks = new
    budget = sum(int(m.sum()) for m in new.values())
    run.steps(1)
    with pytest.warns(UserWarning, match=rf"{budget} weights are active, \d+ were before masks"):
        assert sum(line.active_after for line in run.masking.update()) == budget
    run.masking.masks.update({"6.weight": mask})
    assert run.masking.active()["6.weight"] == 12
    run.masking.update(0.0)
    assert not weight[:, 3:].any()
