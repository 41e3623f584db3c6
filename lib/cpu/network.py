"""Runs a model in the batch-blocked layout, its sparse layers through the kernels.

`sparse_network(model, masking.masks)` shares the model's parameters, so optimizer and Masking go
on unchanged; call it instead of the model. `SparseNetwork.dense_gradients` is the switch for the
steps in which inactive weights need gradients (lib/schedule.py).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib.cpu import ops
from lib.cpu.blocked import LANES, from_blocked, to_blocked
from lib.cpu.library import require
from lib.cpu.norm_and_pool import batch_norm, max_pool2d, mean_pool2d

# Masked layers up to this density are computed over their non-zeros. A rule and no measurement, the
# same on every machine: with two AVX-512 threads VGG16-D's convolutions are 2.6 times as fast as
# dense ones at 20 % of the weights and 1.3 times at 50 %, without the conversion of their
# activations (results/bench/kernels.csv, sparse_layers).
SPARSE_UP_TO = 0.4


class _Activation:
    """A tensor in torch's layout, in the blocked one, or both; converted when asked for."""

    def __init__(
        self,
        samples: int,
        *,
        plain: Tensor | None = None,
        blocked: Tensor | None = None,
        flat: bool = False,
    ) -> None:
        self.samples, self._plain, self._blocked, self.flat = samples, plain, blocked, flat

    @property
    def is_blocked(self) -> bool:
        return self._blocked is not None

    def side(self) -> tuple[int, int]:
        """Height and width in pixels, without conversion."""
        tensor = self._plain if self._blocked is None else self._blocked
        assert tensor is not None
        return (1, 1) if tensor.dim() == 2 else (tensor.shape[2], tensor.shape[3])

    def plain(self) -> Tensor:
        """[N, C, H, W], or [N, F] once flattened."""
        if self._plain is None:
            assert self._blocked is not None
            plain = from_blocked(self._blocked, self.samples)
            self._plain = plain.flatten(1) if self.flat else plain
        return self._plain

    def blocked(self) -> Tensor:
        """[B, C, H, W, 16]."""
        if self._blocked is None:
            assert self._plain is not None
            plain = self._plain
            self._blocked = to_blocked(plain[:, :, None, None] if plain.dim() == 2 else plain)
        return self._blocked

    def like(self, *, plain: Tensor | None = None, blocked: Tensor | None = None) -> _Activation:
        """The result of an elementwise operation."""
        return _Activation(self.samples, plain=plain, blocked=blocked, flat=self.flat)


def _single(value: int | tuple[int, ...] | str | None) -> int | None:
    """The number in 3 or (3, 3); None for anything else."""
    if isinstance(value, int):
        return value
    if isinstance(value, tuple) and len(set(value)) == 1:
        return value[0]
    return None


def _geometry(module: nn.Module) -> tuple[int, int] | None:
    """Stride and padding where the kernels know the layer, None where only torch does."""
    if isinstance(module, nn.Linear):
        return 1, 0
    assert isinstance(module, nn.Conv2d)
    stride, padding = _single(module.stride), _single(module.padding)
    known = module.groups == 1 and _single(module.dilation) == 1 and module.padding_mode == "zeros"
    if not known or stride is None or padding is None or _single(module.kernel_size) is None:
        return None
    return stride, padding


class SparseNetwork(nn.Module):
    """See `sparse_network`.

    Attributes:
        model: the original, with the shared parameters.
        dense_gradients: whether sparse layers compute the gradients of inactive weights too; with
            False these are zero. Layers that run dense have them in any case.
        compact_gradients: whether the gradient of a sparse layer's non-zeros, where nobody asked
            for that of all weights, stays [nnz] and goes to `values` in place of the parameter.
        values: with compact gradients, pattern and values [nnz] of each such layer, of the last
            pass with gradients, by the parameter's name (see SparseSGD).
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor], sparse_up_to: float) -> None:
        super().__init__()
        require()
        self.model, self.masks, self.sparse_up_to = model, masks, sparse_up_to
        self.dense_gradients = self.compact_gradients = False
        self.values: dict[str, tuple[ops.Pattern, Tensor]] = {}
        self._patterns: dict[str, tuple[Tensor, int, ops.Pattern]] = {}
        self._nodes = list(fx.Tracer().trace(model).nodes)
        modules = dict(model.named_modules())
        self._modules_of = {n: modules[str(n.target)] for n in self._nodes if n.op == "call_module"}
        self._fused = self._find_fused()
        self._last_use = self._find_last_uses()

    def _find_fused(self) -> dict[fx.Node, fx.Node]:
        """Batch norms and max-poolings whose only reader is a ReLU, with that ReLU."""
        found = {}
        for node, module in self._modules_of.items():
            if isinstance(module, _BatchNorm | nn.MaxPool2d) and len(node.users) == 1:
                (user,) = node.users
                if isinstance(self._modules_of.get(user), nn.ReLU):
                    found[node] = user
        return found

    def _find_last_uses(self) -> dict[fx.Node, list[fx.Node]]:
        """Node -> the nodes whose results nobody reads after it, so that memory is given back."""
        last: dict[fx.Node, fx.Node] = {}
        for node in self._nodes:
            for source in node.all_input_nodes:
                last[source] = node
        result: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last.items():
            result.setdefault(node, []).append(source)
        return result

    def forward(self, x: Tensor) -> Tensor:
        """The model's output for a batch [N, ...] of float32 on the CPU."""
        done: dict[fx.Node, Any] = {}
        for node in self._nodes:
            if node.op == "placeholder":
                done[node] = _Activation(x.shape[0], plain=x)
            elif node.op == "output":
                result = done[node.args[0]]
                return result.plain() if isinstance(result, _Activation) else result
            elif node.op == "call_module" and isinstance(node.args[0], fx.Node):
                done[node] = self._call_module(node, done)
            else:
                done[node] = self._call_function(node, done)
            for old in self._last_use.get(node, ()):
                del done[old]
        raise RuntimeError("the traced model has no output")

    def _call_module(self, node: fx.Node, done: dict[fx.Node, Any]) -> _Activation:
        module = self._modules_of[node]
        x: _Activation = done[node.args[0]]  # type: ignore[index]
        if isinstance(module, nn.Conv2d | nn.Linear):
            return self._weighted(str(node.target), module, x)
        if not x.is_blocked:
            return x.like(plain=module(x.plain()))
        blocked = x.blocked()
        if isinstance(module, _BatchNorm):
            relu = node in self._fused
            return x.like(blocked=batch_norm(blocked, module, x.samples, relu=relu))
        if isinstance(module, nn.ReLU):
            if node.args[0] in self._fused:
                return x  # done by the batch norm or the pooling
            return x.like(blocked=F.relu(blocked, module.inplace))
        if isinstance(module, nn.Dropout):
            return x.like(blocked=F.dropout(blocked, module.p, module.training))
        if isinstance(module, nn.Identity):
            return x
        if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            size, stride = _single(module.kernel_size), _single(module.stride)
            simple = not module.ceil_mode and _single(module.padding) == 0
            if isinstance(module, nn.MaxPool2d):
                simple = simple and _single(module.dilation) == 1 and not module.return_indices
                pool: Callable = functools.partial(max_pool2d, relu=node in self._fused)
                simple = simple and (node not in self._fused or (size or 0) <= 15)
            else:
                simple = simple and module.divisor_override is None
                pool = mean_pool2d
            if simple and size is not None and stride is not None and size <= 16:
                return x.like(blocked=pool(blocked, size, stride))
        return x.like(plain=module(x.plain()))  # a module we don't know: torch's own

    def _call_function(self, node: fx.Node, done: dict[fx.Node, Any]) -> Any:
        x = done[node.args[0]] if node.args and node.args[0] in done else None  # type: ignore[index]
        if isinstance(x, _Activation) and x.is_blocked:
            if node.target in ("flatten", torch.flatten) and node.args[1:] == (1,):
                blocked = x.blocked()
                flat = blocked.reshape(blocked.shape[0], -1, 1, 1, LANES)
                return _Activation(x.samples, blocked=flat, flat=True)
            dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
            height, width = x.side()
            if node.target == "mean" and dims == (2, 3) and height == width <= 16:
                pooled = mean_pool2d(x.blocked(), height)
                return _Activation(x.samples, blocked=pooled, flat=True)
            other = done.get(node.args[1]) if len(node.args) > 1 else None  # type: ignore[arg-type]
            if node.target in (operator.add, torch.add) and isinstance(other, _Activation):
                return x.like(blocked=x.blocked() + other.blocked())

        # Anything else is torch's, in torch's layout.
        def plain(argument: Any) -> Any:
            value = done.get(argument, argument) if isinstance(argument, fx.Node) else argument
            return value.plain() if isinstance(value, _Activation) else value

        args, kwargs = fx.map_arg((node.args, node.kwargs), plain)
        if node.op == "call_method":
            result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        elif node.op == "call_function":
            assert callable(node.target)
            result = node.target(*args, **kwargs)
        elif node.op == "call_module":
            result = self._modules_of[node](*args, **kwargs)
        else:  # get_attr
            return operator.attrgetter(str(node.target))(self.model)
        if not isinstance(result, Tensor) or result.dim() not in (2, 4):
            return result
        return _Activation(result.shape[0], plain=result, flat=result.dim() == 2)

    def _pattern(self, name: str) -> ops.Pattern | None:
        """The layer's pattern, rebuilt when its mask is another one or was written to."""
        mask = self.masks.get(name)
        if mask is None:
            return None
        known = self._patterns.get(name)
        if known is None or known[0] is not mask or known[1] != mask._version:
            known = self._patterns[name] = (mask, mask._version, ops.Pattern(mask))
        return known[2]

    def _weighted(self, path: str, module: nn.Conv2d | nn.Linear, x: _Activation) -> _Activation:
        geometry, pattern = _geometry(module), self._pattern(f"{path}.weight")
        flat = isinstance(module, nn.Linear)
        if geometry is not None and pattern is not None and pattern.density <= self.sparse_up_to:
            blocked = self._sparse(f"{path}.weight", module, pattern, geometry, x)
            return _Activation(x.samples, blocked=blocked, flat=flat)
        return _Activation(x.samples, plain=module(x.plain()), flat=flat)

    def _sparse(
        self,
        name: str,
        module: nn.Conv2d | nn.Linear,
        pattern: ops.Pattern,
        geometry: tuple[int, int],
        x: _Activation,
    ) -> Tensor:
        stride, padding = geometry
        # Then values need no gradient of their own: the dense one contains theirs.
        dense = self.dense_gradients and module.weight.requires_grad
        compact = self.compact_gradients and not dense and torch.is_grad_enabled()
        values = ops.gather(module.weight.detach() if dense or compact else module.weight, pattern)
        if compact:
            self.values[name] = pattern, values.requires_grad_(module.weight.requires_grad)
        return ops.conv2d(
            x.blocked(),
            values,
            module.bias,
            pattern,
            stride=stride,
            padding=padding,
            samples=x.samples,
            dense_gradient_of=module.weight if dense else None,
            gradient_by_torch=pattern.shape[2:] == (1, 1),
        )


def sparse_network(
    model: nn.Module, masks: Mapping[str, Tensor], *, sparse_up_to: float = SPARSE_UP_TO
) -> SparseNetwork:
    """`model`, computed over its non-zero weights where a layer has few enough.

    Args:
        model: any model that torch.fx can trace, float32 on the CPU; its parameters are shared.
        masks: parameter name -> bool mask, such as `Masking.masks`; looked at in every forward
            pass, so masks may move.  Weights outside the mask count as zero in sparse layers: they
            must be zero (Masking.step sees to it).  Parameters without a mask run dense.
        sparse_up_to: density up to which a layer is sparse; 1 for all that the kernels know.

    Raises:
        KernelsUnavailable: the kernels cannot be built here (see `available`).
    """
    return SparseNetwork(model, masks, sparse_up_to)
