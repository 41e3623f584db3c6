"""Autograd operators over the kernels.

Activations are batch-blocked: float32 [ceil(N / 16), C, H, W, 16], contiguous; lanes beyond sample
N - 1 mean nothing in activations and are zero in gradients.  Weights are the values of the
non-zeros, float32 [nnz], in the row-major order of the mask.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from .library import check, require

LANES = 16


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _float(tensor: Tensor, name: str) -> Tensor:
    """`tensor`, contiguous.

    Raises:
        TypeError: it is not a float32 tensor on the CPU.
    """
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise TypeError(
            f"sparse kernels take float32 on the CPU, but {name} is {tensor.dtype} on "
            f"{tensor.device}; use masked dense layers for it"
        )
    return tensor.contiguous()


def _blocked(x: Tensor, name: str, samples: int) -> Tensor:
    x = _float(x, name)
    blocks = -(-samples // LANES)
    if x.dim() != 5 or x.shape[0] != blocks or x.shape[4] != LANES or samples < 1:
        raise ValueError(
            f"{name} must be batch-blocked [{blocks}, C, H, W, {LANES}] for {samples} samples, "
            f"got {list(x.shape)}; use to_blocked"
        )
    return x


def _threads() -> int:
    return torch.get_num_threads()


class _Plan:
    """A plan of the library, freed with this object."""

    def __init__(self, *arguments: Any) -> None:
        library = require()
        handle = ctypes.c_void_p()
        check(library.sparse_plan_create(*arguments, ctypes.byref(handle)))
        self.handle = handle.value
        weakref.finalize(self, library.sparse_plan_free, handle.value)


class Pattern:
    """Where a weight's non-zeros are: immutable, rebuilt when the mask changes.

    Args:
        mask: bool [out, in, kernel_h, kernel_w] or [out, in] (a linear layer).

    Attributes:
        shape: of the weight, four numbers.
        nnz: number of non-zeros.
        index: int64 [nnz], places of the non-zeros in the flattened weight, ascending.

    Raises:
        ValueError: the mask is not 2- or 4-dimensional.
    """

    def __init__(self, mask: Tensor) -> None:
        if mask.dim() not in (2, 4):
            raise ValueError(f"a mask must have 2 or 4 dimensions, got {list(mask.shape)}")
        if mask.dim() == 2:
            mask = mask[:, :, None, None]
        self.shape = tuple(mask.shape)
        places = mask.detach().to("cpu").bool().nonzero()
        self.nnz = int(places.shape[0])
        _, c, h, w = self.shape
        steps = torch.tensor([c * h * w, h * w, w, 1])
        self.index = (places * steps).sum(1)
        self._coords = places.to(torch.int32).contiguous()
        self._plans: dict[tuple, list[_Plan]] = {}

    @property
    def density(self) -> float:
        """Fraction of the weights that are non-zero."""
        o, c, h, w = self.shape
        return self.nnz / (o * c * h * w)

    def plans(
        self, height: int, width: int, stride: int, padding: int, blocks: int, transposed: bool
    ) -> list[_Plan]:
        """The library's plans for inputs of this size (one, or one per phase of the stride)."""
        threads = _threads()
        key = (height, width, stride, padding, blocks, transposed, threads)
        if key not in self._plans:
            shape = torch.tensor([*self.shape, stride, padding, height, width])
            phases = [(y, x) for y in range(stride) for x in range(stride)]
            self._plans[key] = [
                _Plan(
                    shape.data_ptr(),
                    self._coords.data_ptr(),
                    self.nnz,
                    int(transposed),
                    y,
                    x,
                    blocks,
                    threads,
                )
                for y, x in (phases if transposed else [(0, 0)])
            ]
        return self._plans[key]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, pattern: Pattern) -> Tensor:
        ctx.pattern, ctx.shape = pattern, weight.shape
        return weight.detach().reshape(-1).index_select(0, pattern.index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.new_zeros(ctx.shape)
        out.view(-1).index_copy_(0, ctx.pattern.index, grad)
        return out, None


def gather(weight: Tensor, pattern: Pattern) -> Tensor:
    """Values of the non-zeros, [nnz]; the gradient is dense, zero elsewhere.

    Raises:
        ValueError: `weight` does not have the pattern's shape.
    """
    shape = tuple(weight.shape) + (1, 1) * (weight.dim() == 2)
    if shape != pattern.shape:
        raise ValueError(f"weight {list(weight.shape)} does not fit a pattern of {pattern.shape}")
    return _Gather.apply(weight, pattern)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        pattern: Pattern,
        stride: int,
        padding: int,
        samples: int,
        weight: Tensor | None,
        by_torch: bool,
    ) -> Tensor:
        x, values = _blocked(x, "input", samples), _float(values, "values")
        bias = None if bias is None else _float(bias, "bias")
        o, c, kh, kw = pattern.shape
        blocks, channels, h, w, _ = x.shape
        out_h = (h + 2 * padding - kh) // stride + 1
        out_w = (w + 2 * padding - kw) // stride + 1
        if channels != c or values.shape != (pattern.nnz,):
            raise ValueError(
                f"a pattern of {pattern.shape} with {pattern.nnz} non-zeros takes {c} channels and "
                f"as many values, got {channels} channels and {list(values.shape)} values"
            )
        if bias is not None and bias.shape != (o,):
            raise ValueError(f"the bias must be [{o}], got {list(bias.shape)}")
        if stride < 1 or padding < 0 or h + 2 * padding < kh or w + 2 * padding < kw:
            raise ValueError(
                f"no output: input {h}x{w}, kernel {kh}x{kw}, stride {stride}, padding {padding}"
            )
        y = x.new_empty(blocks, o, out_h, out_w, LANES)
        (plan,) = pattern.plans(h, w, stride, padding, blocks, transposed=False)
        check(
            require().sparse_convolve(
                plan.handle,
                values.data_ptr(),
                x.data_ptr(),
                _pointer(bias),
                y.data_ptr(),
                blocks,
                _threads(),
            )
        )
        if weight is None:
            ctx.save_for_backward(x, values)
        else:
            ctx.save_for_backward(x, values, weight)
        ctx.geometry, ctx.by_torch = (pattern, stride, padding, samples), by_torch
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, *weight = ctx.saved_tensors
        pattern, stride, padding, samples = ctx.geometry
        grad = _blocked(grad, "gradient", samples)
        blocks, _, h, w, _ = x.shape
        library, threads = require(), _threads()
        dx = dvalues = dbias = dweight = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            for plan in pattern.plans(h, w, stride, padding, blocks, transposed=True):
                check(
                    library.sparse_convolve(
                        plan.handle,
                        values.data_ptr(),
                        grad.data_ptr(),
                        None,
                        dx.data_ptr(),
                        blocks,
                        threads,
                    )
                )
        if ctx.needs_input_grad[1]:
            dvalues = torch.empty_like(values)
            (plan,) = pattern.plans(h, w, stride, padding, blocks, transposed=False)
            check(
                library.sparse_weight_gradient(
                    plan.handle,
                    x.data_ptr(),
                    grad.data_ptr(),
                    dvalues.data_ptr(),
                    samples,
                    threads,
                )
            )
        if ctx.needs_input_grad[2]:
            dbias = channel_sum(grad, samples)
        if ctx.needs_input_grad[7]:
            dweight = dense_gradient(
                x,
                grad,
                weight[0],
                stride=stride,
                padding=padding,
                samples=samples,
                by_torch=ctx.by_torch,
            )
        return dx, dvalues, dbias, None, None, None, None, dweight, None


def dense_gradient(
    x: Tensor,
    grad: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    samples: int,
    by_torch: bool = False,
) -> Tensor:
    """Gradient of a whole convolution weight, zeros included, in the weight's shape.

    Args:
        x: the input, batch-blocked [B, in, H, W, 16].
        grad: of the output, batch-blocked [B, out, H', W', 16].
        weight: [out, in, kernel_h, kernel_w] or [out, in]; its values don't matter.
        samples: batch size without padding.
        by_torch: convert to torch's layout and leave it to torch, which is faster for linear layers
            and small images.
    """
    x, grad = _blocked(x, "input", samples), _blocked(grad, "gradient", samples)
    if not by_torch:
        out = torch.empty(weight.shape)
        kernel = (*weight.shape, 1, 1)[2:4]
        side = x.shape[2:4]
        sizes = (ctypes.c_int64 * 8)(*weight.shape[:2], *kernel, stride, padding, *side)
        expected = [(n + 2 * padding - k) // stride + 1 for n, k in zip(side, kernel, strict=True)]
        if x.shape[1] != weight.shape[1] or list(grad.shape[1:4]) != [weight.shape[0], *expected]:
            raise ValueError(
                f"an input {list(x.shape)} and a weight {list(weight.shape)} do not give an output "
                f"{list(grad.shape)} with stride {stride} and padding {padding}"
            )
        check(
            require().sparse_dense_gradient(
                sizes, x.data_ptr(), grad.data_ptr(), out.data_ptr(), samples, _threads()
            )
        )
        return out
    x, grad = _unblock(x, samples), _unblock(grad, samples)
    if weight.numel() == weight.shape[0] * weight.shape[1] and x.shape[2:] == (1, 1):
        return (grad.flatten(1).T @ x.flatten(1)).view(weight.shape)
    wanted = [False, True, False]
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, wanted
    )[1]


def conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    pattern: Pattern,
    *,
    stride: int = 1,
    padding: int = 0,
    samples: int,
    dense_gradient_of: Tensor | None = None,
    gradient_by_torch: bool = False,
) -> Tensor:
    """Convolution over the non-zeros of a weight (groups 1, dilation 1).

    Args:
        x: batch-blocked [B, in, H, W, 16].
        values: [nnz] of the pattern (see gather); its gradient is [nnz] too.
        bias: [out] or None.
        samples: batch size without padding.
        dense_gradient_of: the weight the values were taken from; it then receives its gradient at
            every position, zeros of the pattern included (in addition to that of the values).
        gradient_by_torch: who computes that (see dense_gradient).

    Returns:
        batch-blocked [B, out, H', W', 16].

    Raises:
        ValueError, TypeError: shapes or types that do not fit.
        KernelsUnavailable: the kernels cannot be built here.
    """
    return _Conv2d.apply(
        x,
        values,
        bias,
        pattern,
        stride,
        padding,
        samples,
        dense_gradient_of,
        gradient_by_torch,
    )


def linear(
    x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, *, samples: int
) -> Tensor:
    """Linear layer over the non-zeros: [B, in, 1, 1, 16] to [B, out, 1, 1, 16]; see conv2d."""
    return conv2d(x, values, bias, pattern, samples=samples)


def channel_sum(x: Tensor, samples: int) -> Tensor:
    """Sum over samples and pixels of a batch-blocked tensor, [C]."""
    x = _blocked(x, "input", samples)
    out = x.new_empty(x.shape[1])
    require().sparse_channel_sum(
        x.data_ptr(), out.data_ptr(), samples, x.shape[1], x.shape[2] * x.shape[3], _threads()
    )
    return out


def _convert(plain: Tensor, blocked: Tensor, to_blocked: bool) -> None:
    n, c, h, w = plain.shape
    last = plain.is_contiguous(memory_format=torch.channels_last) and not plain.is_contiguous()
    strides = (c * h * w, 1, c) if last else (c * h * w, h * w, 1)
    require().sparse_convert(
        int(to_blocked), plain.data_ptr(), *strides, blocked.data_ptr(), n, c, h * w, _threads()
    )


def _block(x: Tensor) -> Tensor:
    if x.dim() != 4 or x.shape[0] < 1:
        raise ValueError(f"to_blocked takes [N, C, H, W] with N > 0, got {list(x.shape)}")
    if not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous()
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise TypeError(f"sparse kernels take float32 on the CPU, got {x.dtype} on {x.device}")
    n, c, h, w = x.shape
    out = x.new_empty(-(-n // LANES), c, h, w, LANES)
    _convert(x, out, True)
    return out


def _unblock(
    x: Tensor, samples: int, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    x = _blocked(x, "input", samples)
    shape = (samples, *x.shape[1:4])
    out = torch.empty(shape, dtype=x.dtype, memory_format=memory_format)
    _convert(out, x, False)
    return out


class _ToBlocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.samples = x.shape[0]
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        ctx.format = torch.channels_last if last else torch.contiguous_format
        return _block(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _unblock(grad, ctx.samples, ctx.format)


class _FromBlocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, samples: int, memory_format: torch.memory_format) -> Tensor:
        return _unblock(x, samples, memory_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _block(grad), None, None


def to_blocked(x: Tensor) -> Tensor:
    """[N, C, H, W] (contiguous or channels last) to [ceil(N / 16), C, H, W, 16], zero-padded."""
    return _ToBlocked.apply(x)


def from_blocked(
    x: Tensor, samples: int, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """[B, C, H, W, 16] to [samples, C, H, W] in the given memory format."""
    return _FromBlocked.apply(x, samples, memory_format)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        training: bool,
        eps: float,
        relu: bool,
        samples: int,
    ) -> Tensor:
        x = _blocked(x, "input", samples)
        weight, bias = _float(weight, "weight"), _float(bias, "bias")
        channels = x.shape[1]
        sizes = {t.numel() for t in (weight, bias, mean, var)}
        if sizes != {channels}:
            raise ValueError(f"batch norm of {channels} channels got parameters of {sizes}")
        y = torch.empty_like(x)
        shape = (samples, channels, x.shape[2] * x.shape[3], _threads())
        require().sparse_norm_forward(
            *(t.data_ptr() for t in (x, y, mean, var, weight, bias)),
            eps,
            int(relu),
            int(training),
            *shape,
        )
        ctx.save_for_backward(x, weight, bias, mean, var)
        ctx.arguments = (eps, int(relu), int(not training), *shape)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, var = ctx.saved_tensors
        grad = _float(grad, "gradient")
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
        require().sparse_norm_backward(
            *(_pointer(t) for t in (x, grad, dx, dweight, dbias, mean, var, weight, bias)),
            *ctx.arguments,
        )
        return dx, dweight, dbias, *[None] * 6


def batch_norm(x: Tensor, norm: _BatchNorm, samples: int, *, relu: bool = False) -> Tensor:
    """Batch normalisation (training or evaluation, as `norm` is set), with ReLU if asked.

    The same as relu(norm(.)) on the ordinary layout, running statistics included.

    Args:
        x: batch-blocked [B, C, H, W, 16].
        norm: an affine module; its running statistics are updated in training.
        samples: batch size without padding; the statistics ignore the rest.

    Raises:
        ValueError: the module has no weight and bias, or training sees one value per channel.
    """
    if norm.weight is None or norm.bias is None:
        raise ValueError("batch_norm needs an affine module (weight and bias)")
    count = samples * x.shape[2] * x.shape[3]
    training = norm.training or norm.running_mean is None or norm.running_var is None
    if training:
        if count < 2:
            raise ValueError(
                f"batch norm needs more than one value per channel in training, got {count}"
            )
        mean, var = x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
    else:
        assert norm.running_mean is not None and norm.running_var is not None
        mean, var = norm.running_mean, norm.running_var
    y = _Norm.apply(x, norm.weight, norm.bias, mean, var, training, norm.eps, relu, samples)
    if norm.training and norm.running_mean is not None and norm.running_var is not None:
        with torch.no_grad():
            rate = norm.momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
                if rate is None:
                    rate = 1.0 / float(norm.num_batches_tracked)
            assert rate is not None
            norm.running_mean.lerp_(mean, rate)
            norm.running_var.lerp_(var * (count / (count - 1)), rate)
    return y


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, stride: int, relu: bool) -> Tensor:
        blocks, channels, h, w, _ = x.shape
        shape = (blocks, channels, (h - size) // stride + 1, (w - size) // stride + 1, LANES)
        y, which = x.new_empty(shape), x.new_empty(shape, dtype=torch.uint8)
        ctx.pool = (blocks * channels, h, w, size, stride)
        require().sparse_max_pool(
            0, int(relu), *ctx.pool, x.data_ptr(), y.data_ptr(), which.data_ptr(), _threads()
        )
        ctx.save_for_backward(which)
        ctx.shape = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (which,) = ctx.saved_tensors
        grad = _float(grad, "gradient")
        dx = grad.new_empty(ctx.shape)
        require().sparse_max_pool(
            1, 0, *ctx.pool, grad.data_ptr(), dx.data_ptr(), which.data_ptr(), _threads()
        )
        return dx, None, None, None


class _MeanPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, stride: int) -> Tensor:
        blocks, channels, h, w, _ = x.shape
        y = x.new_empty(blocks, channels, (h - size) // stride + 1, (w - size) // stride + 1, LANES)
        ctx.pool, ctx.shape = (blocks * channels, h, w, size, stride), x.shape
        require().sparse_mean_pool(0, *ctx.pool, x.data_ptr(), y.data_ptr(), _threads())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = _float(grad, "gradient")
        dx = grad.new_empty(ctx.shape)
        require().sparse_mean_pool(1, *ctx.pool, grad.data_ptr(), dx.data_ptr(), _threads())
        return dx, None, None


def _pool_input(x: Tensor, size: int, stride: int) -> Tensor:
    x = _float(x, "input")
    if x.dim() != 5 or x.shape[4] != LANES or not 1 <= size <= min(x.shape[2:4]) or stride < 1:
        raise ValueError(
            f"pooling of size {size}, stride {stride} does not fit an input of {list(x.shape)}"
        )
    if size > 16:
        raise ValueError(f"pooling windows go up to 16 x 16, got {size} x {size}")
    return x


def max_pool2d(x: Tensor, size: int, stride: int | None = None, *, relu: bool = False) -> Tensor:
    """Max pooling without padding of a batch-blocked tensor; stride `size` by default.

    With `relu`, of windows up to 15 x 15: the same as relu(max_pool2d(.)).
    """
    stride = stride or size
    if relu and size > 15:
        raise ValueError(f"with ReLU pooling windows go up to 15 x 15, got {size} x {size}")
    return _MaxPool.apply(_pool_input(x, size, stride), size, stride, relu)


def mean_pool2d(x: Tensor, size: int, stride: int | None = None) -> Tensor:
    """Average pooling without padding of a batch-blocked tensor; stride `size` by default."""
    stride = stride or size
    return _MeanPool.apply(_pool_input(x, size, stride), size, stride)
