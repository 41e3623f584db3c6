"""Picking, counting and clearing, on the CPU and as on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.methods.selection import FloatMasks, count, mean_active, pick
from tests.support.masked import seeded

pytestmark = pytest.mark.usefixtures("one_thread")


class OnGPU(torch.Tensor):
    """A CPU tensor that says it is on a GPU, so that `pick` takes the branch without host syncs."""

    is_cpu = False
    device = torch.device("cuda")


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.sampled_from(["value", "smallness"]))
def test_pick_takes_the_largest_and_the_earliest(seed, size, score):
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.integers(-3, 4, size).astype(np.float32))
    candidates = torch.from_numpy(rng.random(size) < 0.6)
    k = int(rng.integers(0, int(candidates.sum()) + 1))
    ranked = -values.abs() if score == "smallness" else values
    order = sorted(np.flatnonzero(candidates.numpy()), key=lambda j: (-float(ranked[j]), j))
    expected = torch.zeros(size, dtype=torch.bool)
    expected[order[:k]] = True
    by_numpy = values.double()  # the compiled pass takes float32 only
    on_gpu = OnGPU(values)
    for given_values in (values, by_numpy, on_gpu):
        found = pick(given_values, candidates, k, score).as_subclass(torch.Tensor)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pick_refuses_more_than_there_are(dtype):
    with pytest.raises(ValueError, match="cannot pick 3 of 2 candidates"):
        pick(torch.zeros(4, dtype=dtype), torch.tensor([True, False, True, False]), 3)


def test_counts_and_means_are_alike_on_both_devices() -> None:
    values = torch.randn(3, 5000, generator=seeded(0))
    for mask in (values > 1, torch.zeros_like(values, dtype=torch.bool), values == values):
        on_gpu = mask.as_subclass(OnGPU)
        assert count(mask) == int(count(on_gpu)) == int(mask.sum())
        expected = values[mask].abs().double().mean() if mask.any() else 0.0
        found = [mean_active(values, mask), float(mean_active(OnGPU(values), on_gpu))]
        assert found == pytest.approx([float(expected)] * 2, rel=1e-12)


def test_float_masks_stay_where_they_are() -> None:
    """A captured CUDA graph reads the same memory, whatever happens to the masks."""
    masks = {"w": torch.rand(4, 6, generator=seeded(0)) < 0.5}
    weights, floats = {"w": torch.ones(4, 6)}, FloatMasks()
    floats.clear(weights, masks)
    assert torch.equal(weights["w"], masks["w"].float())
    place = floats._kept["w"][2]
    for change in (masks["w"].logical_not_, lambda: masks.update(w=masks["w"].clone())):
        change()
        floats.refresh(weights, masks)
        assert floats._kept["w"][2] is place and torch.equal(place, masks["w"].float())
    weights = {"w": torch.ones(6, 4).T}  # another memory format
    floats.clear(weights, masks)
    assert torch.equal(weights["w"], masks["w"].float())
    floats.clear({}, {})
