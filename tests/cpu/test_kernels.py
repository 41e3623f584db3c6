"""The sparse CPU kernels against torch in double precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.cpu import library, ops

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler")


def close(got: torch.Tensor, want: torch.Tensor, terms: int) -> None:
    """float32 sums of `terms` products of normal numbers against float64."""
    error = (got.detach().double() - want.detach()).abs().max() if want.numel() else torch.zeros(())
    scale = want.abs().max().clamp_min(1.0) if want.numel() else 1.0
    assert error <= 2e-6 * scale * max(terms, 1) ** 0.5, f"off by {float(error)} of {float(scale)}"


def check_conv(
    batch: int,
    shape: tuple[int, int, int, int],
    size: tuple[int, int],
    stride: int,
    padding: int,
    mask: torch.Tensor,
    bias: bool = True,
) -> None:
    o, c, kh, kw = shape
    x = torch.randn(batch, c, *size, requires_grad=True)
    weight = (torch.randn(shape) * mask).requires_grad_()
    b = torch.randn(o, requires_grad=True) if bias else None
    pattern = ops.Pattern(mask)
    values = weight.detach()[mask].requires_grad_()
    blocked = ops.conv2d(
        ops.to_blocked(x), values, b, pattern, stride=stride, padding=padding, samples=batch
    )
    y = ops.from_blocked(blocked, batch)

    doubles = [t.detach().double().requires_grad_() for t in (x, weight, b) if t is not None]
    want = F.conv2d(doubles[0], doubles[1], doubles[2] if bias else None, stride, padding)
    assert y.shape == want.shape
    close(y, want, c * kh * kw)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, [t for t in (x, values, b) if t is not None], grad)
    wanted = torch.autograd.grad(want, doubles, grad.double())
    terms = batch * want.shape[2] * want.shape[3]
    close(got[0], wanted[0], o * kh * kw)
    close(got[1], wanted[1][mask], terms)
    blocks = ops.to_blocked(x.detach()), ops.to_blocked(grad)
    close(ops.dense_gradient(*blocks, weight.shape, stride, padding, batch), wanted[1], terms)
    if bias:
        close(got[2], wanted[2], terms)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_convolution_matches_torch(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 2**20)))
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    padding = draw(st.integers(0, 3))
    size = tuple(
        draw(st.integers(max(1, k - 2 * padding), max(1, k - 2 * padding) + 10)) for k in kernel
    )
    shape = (draw(st.integers(1, 20)), draw(st.integers(1, 20)), *kernel)
    density = draw(st.sampled_from([0.0, 0.05, 0.2, 0.7, 1.0]))
    mask = torch.rand(shape) < density
    batch = draw(st.sampled_from([1, 2, 15, 16, 17, 33, 70]))
    check_conv(batch, shape, size, draw(st.integers(1, 3)), padding, mask, draw(st.booleans()))


CASES = {
    "empty and full rows": (17, (6, 5, 3, 3), (8, 8), 1, 1),
    "one channel": (5, (1, 1, 3, 3), (7, 7), 1, 1),
    "one weight": (1, (1, 1, 1, 1), (1, 1), 1, 0),
    "first layer": (20, (16, 3, 3, 3), (32, 32), 1, 1),
    "several blocks of channels": (20, (300, 70, 3, 3), (4, 4), 1, 1),
    "2x2 pixels": (128, (40, 48, 3, 3), (2, 2), 1, 1),
    "2x2 pixels, two blocks": (30, (40, 48, 3, 3), (2, 2), 1, 1),
    "1x1 kernel, stride 2": (33, (12, 10, 1, 1), (16, 16), 2, 0),
    "3x3 kernel, stride 2": (33, (12, 10, 3, 3), (9, 16), 2, 1),
    "unused pixels at the border": (3, (4, 4, 2, 2), (8, 8), 3, 0),
    "kernel larger than its stride's phases": (16, (4, 4, 11, 11), (14, 14), 4, 2),
    "linear": (128, (300, 784, 1, 1), (1, 1), 1, 0),
    "linear, 16 blocks and a rest": (260, (10, 100, 1, 1), (1, 1), 1, 0),
    "linear, batch of 20": (20, (10, 100, 1, 1), (1, 1), 1, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_convolution_special_shapes(name: str) -> None:
    torch.manual_seed(3)
    batch, shape, size, stride, padding = CASES[name]
    mask = torch.rand(shape) < 0.3
    if name == "empty and full rows":
        mask[0] = mask[:, 2] = False
        mask[1] = mask[:, 3] = True
    check_conv(batch, shape, size, stride, padding, mask)


@pytest.mark.parametrize("threads", [2, 5])
def test_any_number_of_threads_gives_the_same_bits_each_time(threads: int) -> None:
    """Those of a whole gradient are even the same with any number."""
    torch.manual_seed(5)
    x, weight, grad = (
        torch.randn(64, 40, 8, 8),
        torch.randn(37, 40, 3, 3),
        torch.randn(64, 37, 8, 8),
    )
    mask = torch.rand(weight.shape) < 0.2
    values, found = weight[mask].requires_grad_(), []
    blocks = ops.to_blocked(x), ops.to_blocked(grad)
    whole = ops.dense_gradient(*blocks, weight.shape, 1, 1, 64)
    try:
        torch.set_num_threads(threads)
        for size in ((1, 1), (2, 2), (8, 8)):
            check_conv(40, (37, 20, 3, 3), size, 1, 1, torch.rand(37, 20, 3, 3) < 0.2)
        pattern = ops.Pattern(mask)
        for _ in range(40):
            y = ops.conv2d(blocks[0], values, None, pattern, padding=1, samples=64)
            found.append(torch.autograd.grad(y.square().sum(), values)[0])
        assert torch.equal(ops.dense_gradient(*blocks, weight.shape, 1, 1, 64), whole)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(found[0], other) for other in found)


def test_lanes_beyond_the_batch_do_not_count() -> None:
    torch.manual_seed(6)
    pattern = ops.Pattern(torch.ones(3, 2, 3, 3, dtype=torch.bool))
    values, bias = torch.randn(54, requires_grad=True), torch.randn(3, requires_grad=True)
    x = ops.to_blocked(torch.randn(18, 2, 5, 5))
    x[1, ..., 2:] = 1e6  # garbage in the padding, and a gradient that is not zero there
    y = ops.conv2d(x, values, bias, pattern, padding=1, samples=18)
    grad = torch.ones_like(y)
    dvalues, dbias = torch.autograd.grad(y, (values, bias), grad)
    assert dvalues.abs().max() < 1e4
    assert torch.allclose(dbias, torch.full((3,), 18.0 * 25))
    whole = ops.dense_gradient(x, grad, torch.Size((3, 2, 3, 3)), 1, 1, 18)
    assert torch.allclose(whole.flatten(), dvalues, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("batch", [1, 16, 37])
def test_batch_norm_matches_torch(training: bool, relu: bool, batch: int) -> None:
    torch.manual_seed(7)
    norm = torch.nn.BatchNorm2d(5)
    for numbers in (norm.weight, norm.bias, norm.running_mean):
        torch.nn.init.normal_(numbers)  # type: ignore[arg-type]
    reference = torch.nn.BatchNorm2d(5).double()
    reference.load_state_dict(norm.state_dict())
    norm.train(training), reference.train(training)
    x = torch.randn(batch, 5, 3, 7) * 2 + 3
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    blocked = ops.to_blocked(a)
    blocked.data[-1, ..., (batch - 1) % 16 + 1 :] = 1e4  # the padding must not enter statistics
    blocked.retain_grad()
    y = ops.from_blocked(ops.batch_norm(blocked, norm, batch, relu=relu), batch)
    want = reference(b).relu() if relu else reference(b)
    grad = torch.randn_like(y)
    y.backward(grad)
    want.backward(grad.double())
    close(y, want, 30)
    for got, wanted in ((a, b), (norm.weight, reference.weight), (norm.bias, reference.bias)):
        close(got.grad, wanted.grad, 100)  # type: ignore[arg-type]
    assert not blocked.grad[-1, ..., (batch - 1) % 16 + 1 :].any()
    close(norm.running_mean, reference.running_mean, 30)  # type: ignore[arg-type]
    close(norm.running_var, reference.running_var, 30)  # type: ignore[arg-type]
    assert int(norm.num_batches_tracked) == int(training)  # type: ignore[arg-type]


def test_batch_norm_where_the_mean_dwarfs_the_deviation() -> None:
    torch.manual_seed(7)
    x = torch.randn(48, 3, 6, 6) * 1e-3 + torch.tensor([100.0, -30.0, 0.0])[:, None, None]
    x[:, 2] = 0.1  # constant: normalised to zero, no rounding noise blown up by 1 / sqrt(eps)
    norm, reference = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3).double()
    y = ops.from_blocked(ops.batch_norm(ops.to_blocked(x), norm, 48), 48)
    want = reference(x.double())
    assert not y[:, 2].any()
    # The mean itself is a float32: half a unit of 100 in its last place, in deviations.
    assert (y[:, :2] - want[:, :2]).abs().max() < 2 * 100 * 2**-24 / 3e-3


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (16, 20, 4, 4), (35, 3, 5, 7), (18, 33, 2, 2)])
def test_conversion_there_and_back(shape: tuple[int, ...]) -> None:
    x, n = torch.randn(shape, requires_grad=True), shape[0]
    blocked = ops.to_blocked(x)
    assert blocked.shape == (-(-n // 16), *shape[1:], 16)
    assert torch.equal(blocked.movedim(4, 1).flatten(0, 1)[:n], x)
    assert not blocked.movedim(4, 1).flatten(0, 1)[n:].any()
    back = ops.from_blocked(blocked, n)
    assert torch.equal(back, x) and back.is_contiguous()
    grad = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad(back, x, grad)[0], grad)


def test_clear_errors() -> None:
    pattern = ops.Pattern(torch.ones(2, 3, 3, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="contiguous tensors"):
        ops.conv2d(torch.zeros(1, 3, 4, 4, 16).double(), torch.zeros(54), None, pattern, samples=4)
    with pytest.raises(ValueError, match="more than one value"):
        ops.batch_norm(torch.zeros(1, 3, 1, 1, 16), torch.nn.BatchNorm2d(3), 1)
