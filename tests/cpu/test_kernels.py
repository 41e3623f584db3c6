"""The sparse CPU kernels against torch in double precision, and under sanitizers."""

from __future__ import annotations

import copy
import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.cpu import blocked as layout_of
from lib.cpu import layouts, library, norm_and_pool, ops, select

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    bias: bool,
) -> None:
    o, c, kh, kw = shape
    x = torch.randn(batch, c, *size, requires_grad=True)
    weight = (torch.randn(shape) * mask).requires_grad_()
    b = torch.randn(o, requires_grad=True) if bias else None
    pattern = ops.Pattern(mask)
    assert pattern.nnz == int(mask.sum())
    blocked = ops.conv2d(
        layout_of.to_blocked(x),
        ops.gather(weight, pattern),
        b,
        pattern,
        stride=stride,
        padding=padding,
        samples=batch,
    )
    y = layout_of.from_blocked(blocked, batch)

    leaves = [t for t in (x, weight, b) if t is not None]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    want = F.conv2d(doubles[0], doubles[1], doubles[2] if bias else None, stride, padding)
    assert y.shape == want.shape
    close(y, want, c * kh * kw)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, leaves, grad)
    wanted = torch.autograd.grad(want, doubles, grad.double())
    close(got[0], wanted[0], o * kh * kw)
    close(got[1], wanted[1] * mask, batch * want.shape[2] * want.shape[3])
    assert not got[1][~mask].any()
    for by_torch in (False, True):
        whole = ops.dense_gradient(
            layout_of.to_blocked(x.detach()),
            layout_of.to_blocked(grad),
            weight,
            stride=stride,
            padding=padding,
            samples=batch,
            by_torch=by_torch,
        )
        close(whole, wanted[1], batch * want.shape[2] * want.shape[3])
    if bias:
        close(got[2], wanted[2], batch * want.shape[2] * want.shape[3])


@needs_compiler
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
    "batch of one": (1, (8, 8, 3, 3), (5, 6), 1, 1),
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


@needs_compiler
@pytest.mark.parametrize("name", CASES)
def test_convolution_special_shapes(name: str) -> None:
    torch.manual_seed(3)
    batch, shape, size, stride, padding = CASES[name]
    mask = torch.rand(shape) < 0.3
    if name == "empty and full rows":
        mask[0] = mask[:, 2] = False
        mask[1] = mask[:, 3] = True
    check_conv(batch, shape, size, stride, padding, mask, bias=True)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        torch.manual_seed(4)
        for batch, size in ((16, (1, 1)), (16, (2, 2)), (40, (8, 8))):
            shape = (37, 20, 1, 1) if size == (1, 1) else (37, 20, 3, 3)
            mask = torch.rand(shape) < 0.2
            check_conv(batch, shape, size, 1, shape[2] // 2, mask, bias=False)
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_two_threads_give_the_same_bits_each_time() -> None:
    before = torch.get_num_threads()
    torch.manual_seed(5)
    x, weight = torch.randn(64, 40, 8, 8), torch.randn(37, 40, 3, 3)
    mask = torch.rand(weight.shape) < 0.2
    weight, pattern = (weight * mask).requires_grad_(), ops.Pattern(mask)
    try:
        torch.set_num_threads(2)
        blocked = layout_of.to_blocked(x)
        found = []
        for _ in range(40):
            values = ops.gather(weight, pattern)
            y = ops.conv2d(blocked, values, None, pattern, stride=1, padding=1, samples=64)
            found.append(torch.autograd.grad(y.square().sum(), weight)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)


@needs_compiler
def test_whole_gradient_has_the_same_bits_with_any_number_of_threads() -> None:
    before, found = torch.get_num_threads(), []
    x, grad = torch.randn(3, 7, 9, 9, 16), torch.randn(3, 13, 9, 9, 16)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            weight = torch.empty(13, 7, 3, 3)
            found.append(ops.dense_gradient(x, grad, weight, padding=1, samples=41))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_compiler
def test_linear_matches_torch_and_compact_gradient() -> None:
    torch.manual_seed(5)
    mask = torch.rand(30, 50) < 0.1
    pattern = ops.Pattern(mask)
    x, bias = torch.randn(19, 50, requires_grad=True), torch.randn(30, requires_grad=True)
    values = torch.randn(pattern.nnz, requires_grad=True)
    blocked = layout_of.to_blocked(x[:, :, None, None])
    y = layout_of.from_blocked(ops.linear(blocked, values, bias, pattern, samples=19), 19)
    grad = torch.randn(19, 30)
    got = torch.autograd.grad(y.flatten(1), (x, values, bias), grad)

    dense = torch.zeros(30, 50, dtype=torch.double)
    dense[mask] = values.detach().double()  # row-major order
    close(y.flatten(1), F.linear(x.detach().double(), dense, bias.detach().double()), 50)
    close(got[0], grad.double() @ dense, 30)
    close(got[1], (grad.double().T @ x.detach().double())[mask], 19)
    close(got[2], grad.double().sum(0), 19)


@needs_compiler
def test_lanes_beyond_the_batch_do_not_count() -> None:
    torch.manual_seed(6)
    pattern = ops.Pattern(torch.ones(3, 2, 3, 3, dtype=torch.bool))
    values, bias = torch.randn(54, requires_grad=True), torch.randn(3, requires_grad=True)
    x = layout_of.to_blocked(torch.randn(18, 2, 5, 5))
    x[1, ..., 2:] = 1e6  # garbage in the padding, and a gradient that is not zero there
    y = ops.conv2d(x, values, bias, pattern, padding=1, samples=18)
    grad = torch.ones_like(y)
    dvalues, dbias = torch.autograd.grad(y, (values, bias), grad)
    assert dvalues.abs().max() < 1e4
    assert torch.allclose(dbias, torch.full((3,), 18.0 * 25))
    weight = torch.empty(3, 2, 3, 3)
    whole = ops.dense_gradient(x, grad, weight, padding=1, samples=18)
    assert torch.allclose(whole.flatten(), dvalues, rtol=1e-3, atol=1e-3)


@needs_compiler
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("batch", [1, 16, 37])
def test_batch_norm_matches_torch(training: bool, relu: bool, batch: int) -> None:
    torch.manual_seed(7)
    norm = torch.nn.BatchNorm2d(5)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        norm.running_mean.normal_()  # type: ignore[union-attr, operator]
    reference = torch.nn.BatchNorm2d(5).double()
    reference.load_state_dict(norm.state_dict())
    norm.train(training), reference.train(training)
    x = torch.randn(batch, 5, 3, 7) * 2 + 3
    a, b = x.clone().requires_grad_(), x.double().requires_grad_()
    blocked = layout_of.to_blocked(a)
    blocked.data[-1, ..., (batch - 1) % 16 + 1 :] = 1e4  # the padding must not enter statistics
    y = layout_of.from_blocked(norm_and_pool.batch_norm(blocked, norm, batch, relu=relu), batch)
    want = reference(b).relu() if relu else reference(b)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (a, norm.weight, norm.bias), grad)
    wanted = torch.autograd.grad(want, (b, reference.weight, reference.bias), grad.double())
    close(y, want, 30)
    for g, w in zip(got, wanted, strict=True):
        close(g, w, 100)
    close(norm.running_mean, reference.running_mean, 30)  # type: ignore[arg-type]
    close(norm.running_var, reference.running_var, 30)  # type: ignore[arg-type]
    assert int(norm.num_batches_tracked) == int(training)  # type: ignore[arg-type]


@needs_compiler
def test_batch_norm_where_the_mean_dwarfs_the_deviation() -> None:
    torch.manual_seed(7)
    x = torch.randn(48, 3, 6, 6) * 1e-3 + torch.tensor([100.0, -30.0, 0.0])[:, None, None]
    x[:, 2] = 0.1  # constant: normalised to zero, no rounding noise blown up by 1 / sqrt(eps)
    norm, reference = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3).double()
    y = layout_of.from_blocked(norm_and_pool.batch_norm(layout_of.to_blocked(x), norm, 48), 48)
    want = reference(x.double())
    assert not y[:, 2].any()
    # The mean itself is a float32: half a unit of 100 in its last place, in deviations.
    assert (y[:, :2] - want[:, :2]).abs().max() < 2 * 100 * 2**-24 / 3e-3


@needs_compiler
def test_gradient_is_zero_in_the_padding() -> None:
    torch.manual_seed(8)
    x = torch.randn(2, 4, 4, 4, 16, requires_grad=True)
    y = norm_and_pool.batch_norm(x, torch.nn.BatchNorm2d(4), 20)
    (grad,) = torch.autograd.grad(layout_of.from_blocked(y, 20).square().sum(), x)
    assert grad[0].any() and grad[1, ..., :4].any() and not grad[1, ..., 4:].any()


@needs_compiler
@pytest.mark.parametrize(("size", "stride"), [(2, 2), (3, 2), (2, 1), (4, 4)])
def test_pooling_matches_torch(size: int, stride: int) -> None:
    torch.manual_seed(9)
    x = torch.randn(21, 3, 9, 7, requires_grad=True)
    pairs = (
        (norm_and_pool.max_pool2d, F.max_pool2d),
        (norm_and_pool.mean_pool2d, F.avg_pool2d),
    )
    for ours, torchs in pairs:
        y = layout_of.from_blocked(ours(layout_of.to_blocked(x), size, stride), 21)
        want = torchs(x, size, stride)
        grad = torch.randn_like(want)
        assert torch.allclose(y, want, atol=1e-6)
        got, wanted = (torch.autograd.grad(t, x, grad)[0] for t in (y, want))
        assert torch.allclose(got, wanted, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize(("size", "stride"), [(2, 2), (3, 2), (2, 3), (15, 1)])
def test_max_pooling_with_relu_matches_torch(size: int, stride: int) -> None:
    torch.manual_seed(9)
    x = (torch.randn(21, 3, 15, 17) - 1).round().requires_grad_()  # many zeros, many below zero
    pooled = norm_and_pool.max_pool2d(layout_of.to_blocked(x), size, stride, relu=True)
    y, want = layout_of.from_blocked(pooled, 21), F.max_pool2d(x, size, stride).relu()
    grad = torch.randn_like(want)
    assert torch.equal(y, want)
    got, wanted = (torch.autograd.grad(t, x, grad)[0] for t in (y, want))
    assert torch.allclose(got, wanted, atol=1e-6)
    with pytest.raises(ValueError, match="15 x 15"):
        norm_and_pool.max_pool2d(torch.zeros(1, 1, 16, 16, 16), 16, relu=True)


@needs_compiler
def test_max_pool_keeps_nan() -> None:
    x = torch.zeros(1, 1, 2, 2)
    x[0, 0, 1, 0] = float("nan")
    blocked = layout_of.to_blocked(x)
    for relu in (False, True):
        y = layout_of.from_blocked(norm_and_pool.max_pool2d(blocked, 2, relu=relu), 1)
        assert y.isnan().all()


@needs_compiler
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (16, 20, 4, 4), (35, 3, 5, 7), (18, 33, 2, 2)])
def test_conversion_there_and_back(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
    blocked = layout_of.to_blocked(x)
    n = shape[0]
    assert blocked.shape == (-(-n // 16), *shape[1:], 16)
    assert torch.equal(blocked.movedim(4, 1).flatten(0, 1)[:n], x)
    assert not blocked.movedim(4, 1).flatten(0, 1)[n:].any()
    back = layout_of.from_blocked(blocked, n, layout)
    assert torch.equal(back, x) and back.is_contiguous(memory_format=layout)
    grad = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad(back, x, grad)[0], grad)


@needs_compiler
def test_clear_errors() -> None:
    pattern = ops.Pattern(torch.ones(2, 3, 3, 3, dtype=torch.bool))
    values = torch.zeros(54)
    x = torch.zeros(1, 3, 4, 4, 16)
    with pytest.raises(ValueError, match="batch-blocked"):
        ops.conv2d(torch.zeros(4, 3, 4, 4), values, None, pattern, samples=4)
    with pytest.raises(ValueError, match="batch-blocked"):
        ops.conv2d(x, values, None, pattern, samples=17)
    with pytest.raises(ValueError, match="54 non-zeros"):
        ops.conv2d(x, values[:5], None, pattern, samples=4)
    with pytest.raises(ValueError, match="54 non-zeros"):
        ops.conv2d(x[:, :2], values, None, pattern, samples=4)
    with pytest.raises(ValueError, match="no output"):
        ops.conv2d(x[:, :, :2], values, None, pattern, samples=4)
    with pytest.raises(TypeError, match="float64"):
        ops.conv2d(x.double(), values, None, pattern, samples=4)
    with pytest.raises(ValueError, match="do not give an output"):
        ops.dense_gradient(x, torch.zeros(1, 2, 3, 2, 16), torch.zeros(2, 3, 3, 3), samples=4)
    with pytest.raises(ValueError, match="does not fit"):
        ops.gather(torch.zeros(2, 3, 3, 2), pattern)
    with pytest.raises(ValueError, match="more than one value"):
        norm_and_pool.batch_norm(torch.zeros(1, 3, 1, 1, 16), torch.nn.BatchNorm2d(3), 1)


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """The same values, one element past where torch would put them."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values with gaps between them."""
    return torch.empty(*x.shape, 2, dtype=x.dtype)[..., 0].copy_(x)


@needs_compiler
@pytest.mark.parametrize("awkward", [misaligned, strided])
def test_misaligned_and_strided_input_gives_the_same_bits(
    awkward: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Every operator and every pass over masks: where a tensor lies does not matter."""
    torch.manual_seed(4)
    mask = torch.rand(6, 5, 3, 3) < 0.4
    weight, bias, x = torch.randn(6, 5, 3, 3), torch.randn(6), torch.randn(20, 5, 8, 8)
    grad = torch.randn(20, 6, 8, 8)
    norm = torch.nn.BatchNorm2d(6)
    torch.nn.init.normal_(norm.weight)

    def everything(lay: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        pattern = ops.Pattern(lay(mask))
        leaves = [lay(t).requires_grad_() for t in (x, weight, bias)]
        blocked = lay(layout_of.to_blocked(leaves[0]))
        values = lay(ops.gather(leaves[1], pattern))
        y = ops.conv2d(blocked, values, leaves[2], pattern, padding=1, samples=20)
        trained = copy.deepcopy(norm)
        z = norm_and_pool.batch_norm(lay(y), trained, 20, relu=True)
        pooled = norm_and_pool.max_pool2d(lay(z), 2) + norm_and_pool.mean_pool2d(lay(z), 2)
        out = layout_of.from_blocked(lay(z), 20)
        still = copy.deepcopy(trained).eval()
        still.running_mean, still.running_var = lay(still.running_mean), lay(still.running_var)
        used = norm_and_pool.batch_norm(lay(y), still, 20)
        found = [y, z, pooled, out, used, trained.running_var]
        found += torch.autograd.grad(
            [out, pooled], leaves, [lay(grad), lay(torch.ones_like(pooled))]
        )
        for by_torch in (False, True):
            arguments = {"padding": 1, "samples": 20, "by_torch": by_torch}
            found.append(
                ops.dense_gradient(
                    lay(blocked.detach()), lay(layout_of.to_blocked(grad)), lay(weight), **arguments
                )
            )
        if select.counts(lay(mask)):
            ones = torch.empty(mask.shape)
            select.as_floats(lay(mask), ones)
            found += [ones, torch.tensor(select.count(lay(mask)))]
        return found

    for got, want in zip(everything(awkward), everything(torch.clone), strict=False):
        assert torch.equal(got, want)
    assert select.counts(awkward(mask)) == (awkward is misaligned)


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 1, 3, 3), (1, 4, 1, 1), (4, 1, 3, 3)], ids=str)
@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("batch", [1, 17])
def test_the_smallest_layers_match_torch(
    shape: tuple[int, int, int, int], density: float, batch: int
) -> None:
    """One weight, one channel, one sample; nothing active and all active."""
    torch.manual_seed(5)
    mask = torch.full(shape, density > 0)
    check_conv(batch, shape, (3, 4), 1, shape[2] // 2, mask, bias=True)


@needs_compiler
def test_an_empty_batch_or_layer_is_refused() -> None:
    pattern = ops.Pattern(torch.ones(2, 3, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="N > 0"):
        layout_of.to_blocked(torch.zeros(0, 3, 4, 4))
    nothing = torch.zeros(0, 3, 4, 4, 16)
    for call in (
        lambda: ops.conv2d(nothing, torch.zeros(54), None, pattern, samples=0),
        lambda: layout_of.from_blocked(nothing, 0),
        lambda: norm_and_pool.batch_norm(nothing, torch.nn.BatchNorm2d(3).eval(), 0),
        lambda: ops.dense_gradient(nothing, nothing, torch.zeros(3, 3, 1, 1), samples=0),
        lambda: ops.Pattern(torch.ones(0, 3, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError, match=r"got \[0|for 0 samples"):
            call()
    for pool in (norm_and_pool.max_pool2d, norm_and_pool.mean_pool2d):  # as in torch
        assert pool(nothing, 2).shape == (0, 3, 2, 2, 16)


def test_without_a_compiler_one_line_and_no_crash(tmp_path: Path) -> None:
    code = (
        "from lib.cpu import library\n"
        "assert not library.available() and not library.available()\n"
        "try:\n"
        "    library.require()\n"
        "except RuntimeError as error:\n"
        "    print('refused:', error)\n"
    )
    environment = {**os.environ, "PATH": str(tmp_path), "SPARSE_CACHE": str(tmp_path)}
    environment.pop("CXX", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "refused: no C++ compiler" in done.stdout
    (line,) = done.stderr.splitlines()
    assert "no C++ compiler was found" in line and "masked dense layers" in line


@pytest.fixture
def unloaded() -> Iterator[None]:
    """As in a process that has not asked for the kernels yet."""
    library._load.cache_clear()
    library._warn.cache_clear()
    yield
    library._load.cache_clear()
    library._warn.cache_clear()


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("failing", r"failed: g\+\+: error: it is broken"),
        ("silent", "failed: exit code 1, no message"),
        ("no program", "can't be started"),
        ("nonsense", "file too short"),
        ("no cache", r"can't be written \(Not a directory\); set SPARSE_CACHE"),
    ],
)
def test_a_broken_compiler_or_cache_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unloaded: None, case: str, reason: str
) -> None:
    script = {
        "failing": "echo 'g++: error: it is broken' >&2; exit 1",
        "silent": "exit 1",
        "no program": "",
        "nonsense": 'for f; do :; done; echo "no library" > "$f"',
        "no cache": "exit 1",
    }[case]
    shell = "#!/bin/sh\n[ $1 = --version ] && exit 0\n" if script else "#!/no/such/shell\n"
    broken = tmp_path / "g++"
    broken.write_text(shell + script)
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv(
        "SPARSE_CACHE", str(broken / "below" if case == "no cache" else tmp_path / "cache")
    )
    with pytest.warns(RuntimeWarning, match=reason) as told:
        assert not library.available() and not library.available()
    assert len(told) == 1 and "\n" not in str(told[0].message)
    with pytest.raises(library.KernelsUnavailable, match=reason):
        library.require()


@needs_compiler
def test_failing_compiler_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_CACHE", str(tmp_path))
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "--no-such-flag"))
    with pytest.raises(library.KernelsUnavailable, match="no-such-flag"):
        library.build()
    assert not list(tmp_path.glob("*.so"))


@needs_compiler
def test_compiled_once_by_whoever_is_first_and_again_when_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several at an empty cache: one compiles, all have the same whole library."""
    source = tmp_path / "sparse.cpp"
    source.write_text("int nothing;")
    monkeypatch.setattr(library, "_HERE", tmp_path)
    monkeypatch.setattr(library, "SOURCES", (source,))
    monkeypatch.setenv("SPARSE_CACHE", str(tmp_path / "cache"))

    def build(count: int) -> tuple[set[Path], int]:
        with ThreadPoolExecutor(count) as pool:
            found = {
                future.result() for future in [pool.submit(library.build) for _ in range(count)]
            }
        return found, capsys.readouterr().err.count("compiling")

    paths, compiled = build(3)
    assert len(paths) == 1 and compiled == 1
    built = paths.pop()
    whole = built.read_bytes()
    assert list(built.parent.glob("*.so")) == [built]
    built.write_bytes(whole[: len(whole) // 2])
    assert build(1) == ({built}, 1) and built.read_bytes() == whole
    assert build(1) == ({built}, 0)
    source.write_text("int something;")
    assert build(1)[1] == 1


@needs_compiler
def test_structures_of_another_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nonzeros(ctypes.Structure):
        _fields_ = [*layouts.Nonzeros._fields_, ("added", ctypes.c_int64)]

    loaded = library.require()
    monkeypatch.setattr(library, "MIRRORED", (Nonzeros, *layouts.MIRRORED[1:]))
    with pytest.raises(library.KernelsUnavailable, match=r"Nonzeros .* 88 bytes, but .* has 80"):
        library._declared(loaded)


@needs_compiler
# The passes over masks have a form for AVX-512 and one without.
@pytest.mark.parametrize(
    ("program", "sanitizer", "flags"),
    [
        ("selftest", "address,undefined", ["-march=native"]),
        ("selftest", "thread", ["-march=native"]),
        ("select_selftest", "address,undefined", ["-march=native"]),
        ("select_selftest", "address,undefined", ["-mno-avx512f"]),
    ],
    ids=["kernels", "threads of the kernels", "select", "select without AVX-512"],
)
def test_sanitizers(tmp_path: Path, program: str, sanitizer: str, flags: list[str]) -> None:
    """Kernels against plain loops on exactly sized buffers: memory, undefined behaviour, races."""
    if "-mno-avx512f" in flags and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("a compiler flag of x86")
    native, compiled, binary = ROOT / "tests" / "native", tmp_path / "test.o", tmp_path / "test"
    command = [str(library.compiler()), "-std=c++17", f"-fsanitize={sanitizer}"]
    flags = [*flags, "-O0", "-fno-sanitize-recover=all", "-fopenmp", "-Wno-psabi"]
    flags += ["-I", str(ROOT / "lib" / "cpu"), "-c", str(native / f"{program}.cpp")]
    threads = (
        [str(native / "openmp_on_threads.cpp"), "-pthread"]
        if sanitizer == "thread"
        else ["-fopenmp"]
    )
    for step in ([*flags, "-o", str(compiled)], [str(compiled), *threads, "-o", str(binary)]):
        built = subprocess.run([*command, *step], check=False, capture_output=True, text=True)
        if built.returncode and "cannot find" in built.stderr:
            pytest.skip(f"the compiler has no sanitizer runtime: {built.stderr.splitlines()[-1]}")
        assert built.returncode == 0, built.stderr
    # The OpenMP runtime keeps its threads' memory until exit, which is no leak of ours.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [str(binary)], env=environment, check=False, capture_output=True, text=True
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer can't run with this kernel's address layout")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "ok"
