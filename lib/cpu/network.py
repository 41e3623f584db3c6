"""Training a convolutional network over its non-zero weights, on the CPU.

`SparseNetwork` runs a model in the batch-blocked layout of lib/cpu/ops.py; it shares the model's
parameters, so optimizer and Masking go on unchanged.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib.cpu import ops
from lib.cpu.library import cpu_id, require
from lib.engine import Task, TorchEngine, momentum_buffer
from lib.masking import clear_outside

# Masked layers up to this density are computed over their non-zeros. A rule and no measurement, the
# same on every machine but for small layers (`_weighted`): with two AVX-512 threads VGG16-D's
# convolutions are 2.6 times as fast as dense ones at 20 % of the weights and 1.3 times at 50 %,
# without the conversion of their activations (results/bench/kernels.csv, sparse_layers).
SPARSE_UP_TO = 0.4


@dataclass(frozen=True)
class _Blocked:
    """An activation [B, C, H, W, 16] of so many samples; `flat`: to torch it is [N, C]."""

    data: Tensor
    samples: int
    flat: bool

    def plain(self) -> Tensor:
        """In torch's layout."""
        plain = ops.from_blocked(self.data, self.samples)
        return plain.flatten(1) if self.flat else plain


def _blocked(plain: Tensor) -> _Blocked:
    flat = plain.dim() == 2
    data = ops.to_blocked(plain[:, :, None, None] if flat else plain)
    return _Blocked(data, len(plain), flat)


def single(value: Any) -> int | None:
    """The number in 3 or (3, 3); None for anything else."""
    if isinstance(value, tuple) and len(set(value)) == 1:
        return value[0]
    return value if isinstance(value, int) else None


def _geometry(module: nn.Conv2d | nn.Linear, x: _Blocked) -> tuple[int, int] | None:
    """Stride and padding where the kernels know the layer, None where only torch does."""
    if isinstance(module, nn.Linear):
        return (1, 0) if x.flat else None
    stride, padding = single(module.stride), single(module.padding)
    known = module.groups == 1 and single(module.dilation) == 1 and module.padding_mode == "zeros"
    return (stride, padding) if known and stride is not None and padding is not None else None


class SparseNetwork(nn.Module, fx.Interpreter):
    """A model, computed over its non-zero weights where a layer has few enough.

    Args:
        model: any model that torch.fx can trace, float32 on the CPU; its parameters are shared.
        masks: parameter name -> bool mask, such as `Masking.masks`; looked at in every forward
            pass, so masks may move. Weights outside the mask count as zero in sparse layers: they
            must be zero (Masking.step sees to it). Parameters without a mask run dense.
        sparse_up_to: density up to which a layer is sparse; 1 for all that the kernels know.

    Attributes:
        dense_gradients: whether sparse layers compute the gradients of inactive weights too, in the
            parameter; if not, those of the non-zeros [nnz] go to `values`. Layers that run dense
            have them in any case.
        values: pattern and values [nnz] of each sparse layer without dense gradients, of the last
            pass, by the parameter's name.

    Raises:
        KernelsUnavailable: the kernels cannot be built here (see `available`).
    """

    def __init__(
        self, model: nn.Module, masks: Mapping[str, Tensor], *, sparse_up_to: float = SPARSE_UP_TO
    ) -> None:
        nn.Module.__init__(self)
        require()
        graph = fx.Tracer().trace(model)
        modules = dict(model.named_modules())
        for node in list(graph.nodes):  # a ReLU is the batch norm's before it, if nobody else reads
            source = node.args[0] if node.op == "call_module" else None
            if (
                isinstance(source, fx.Node)
                and source.op == "call_module"
                and len(source.users) == 1
                and isinstance(modules[str(node.target)], nn.ReLU)
                and _known_norm(modules[str(source.target)])
            ):
                source.update_kwarg("relu", True)
                node.replace_all_uses_with(source)
                graph.erase_node(node)
        fx.Interpreter.__init__(self, model, graph=graph)
        self.masks, self.sparse_up_to = masks, sparse_up_to
        self.dense_gradients = False
        self.values: dict[str, tuple[ops.Pattern, Tensor]] = {}
        self._patterns: dict[str, tuple[Tensor, int, ops.Pattern]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """The model's output for a batch [N, ...] of float32 on the CPU."""
        self.values.clear()
        result = self.run(_blocked(x))
        return result.plain() if isinstance(result, _Blocked) else result

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A layer of the model, in the blocked layout if it is one that we know."""
        module, x = self.fetch_attr(target), next(iter(args), None)
        if isinstance(x, _Blocked):
            if isinstance(module, nn.Conv2d | nn.Linear):
                return self._weighted(f"{target}.weight", module, x)
            if _known_norm(module):
                return replace(x, data=ops.batch_norm(x.data, module, x.samples, **kwargs))
            if isinstance(module, nn.ReLU | nn.Dropout | nn.Identity):
                return replace(x, data=module(x.data))
            if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
                return _pooled(x, module)
        return self._by_torch(super().call_module, target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function of tensors."""
        x, *others = args
        if target is torch.flatten and isinstance(x, _Blocked) and others == [1]:
            return _flattened(x)
        if target in (operator.add, torch.add) and not kwargs:
            (other,) = others
            if isinstance(x, _Blocked) and isinstance(other, _Blocked):
                return replace(x, data=x.data + other.data)
        return self._by_torch(super().call_function, target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A method of a tensor."""
        x, *others = args
        if isinstance(x, _Blocked):
            if target == "flatten" and others == [1]:
                return _flattened(x)
            if target == "mean" and [*others, *kwargs.values()] == [(2, 3)]:
                _, _, height, width, _ = x.data.shape
                return replace(_pooled(x, nn.AvgPool2d((height, width))), flat=True)
        return self._by_torch(super().call_method, target, args, kwargs)

    def _by_torch(self, call: Any, target: Any, args: Any, kwargs: Any) -> Any:
        """What we don't know is torch's, in torch's layout."""

        def plain(value: Any) -> Any:
            return value.plain() if isinstance(value, _Blocked) else value

        result = call(target, *fx.node.map_aggregate((args, kwargs), plain))
        known = isinstance(result, Tensor) and result.dim() in (2, 4)
        return _blocked(result) if known else result

    def _pattern(self, name: str) -> ops.Pattern | None:
        """The layer's pattern, rebuilt when its mask is another one or was written to."""
        mask = self.masks.get(name)
        if mask is None:
            return None
        known = self._patterns.get(name)
        if known is None or known[0] is not mask or known[1] != mask._version:
            known = self._patterns[name] = (mask, mask._version, ops.Pattern(mask))
        return known[2]

    def _weighted(self, name: str, module: nn.Conv2d | nn.Linear, x: _Blocked) -> _Blocked:
        geometry, pattern, weight = _geometry(module, x), self._pattern(name), module.weight
        full = pattern is not None and pattern.density > self.sparse_up_to
        # Without AVX-512 torch takes longer for small convolutions, as the first often are.
        by_torch = full and ("avx512f" in cpu_id() or weight.numel() >= 64 * 64)
        if geometry is None or pattern is None or by_torch:
            return _blocked(module(x.plain()))
        values = weight.detach().flatten()[pattern.index]
        dense = (full or self.dense_gradients) and weight.requires_grad
        if not dense:  # the dense gradient contains that of the values
            self.values[name] = pattern, values.requires_grad_(weight.requires_grad)
        how: Any = {"stride": geometry[0], "padding": geometry[1], "samples": x.samples}
        how |= {"dense_gradient_of": weight if dense else None}
        data = ops.conv2d(x.data, values, module.bias, pattern, **how)
        return _Blocked(data, x.samples, isinstance(module, nn.Linear))


def _known_norm(module: nn.Module) -> bool:
    """Whether it is a batch norm with all that `ops.batch_norm` reads."""
    if not isinstance(module, _BatchNorm):
        return False
    return module.affine and module.track_running_stats and module.momentum is not None


def _flattened(x: _Blocked) -> _Blocked:
    return _Blocked(x.data.reshape(len(x.data), -1, 1, 1, ops.LANES), x.samples, True)


def _pooled(x: _Blocked, pool: nn.Module) -> _Blocked:
    images = x.data.flatten(0, 1).permute(0, 3, 1, 2)  # [B * C, 16, H, W], channels last
    pooled = pool(images).permute(0, 2, 3, 1)
    return replace(x, data=pooled.unflatten(0, x.data.shape[:2]))


class SparseEngine(TorchEngine):
    """Layers through the sparse kernels (all that they know, or those with few weights), the others
    through torch; gradients of inactive weights only in the window before an update.

    In a sparse layer that got the gradients of its non-zeros alone, weight and momentum move there
    only. The momentum of its inactive weights, which would shrink by the same factor in each such
    step, shrinks when somebody is to read it: before the next step with a dense gradient, and in
    `write_back()`. `pending`: by how many steps it lags behind in each layer.
    """

    name, windowed = "sparse", True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        up_to = 1.0 if task.run.kernels == "sparse" else SPARSE_UP_TO
        self.network = self.sparse = SparseNetwork(
            task.model, task.masking.masks, sparse_up_to=up_to
        )
        self.pending: dict[str, int] = {}
        for parameter in self.parameters:
            momentum_buffer(task.optimizer, parameter)

    def step(self, index: Tensor, left: float) -> Tensor:
        """See `Engine.step`."""
        self.sparse.dense_gradients = left <= self.task.schedule.window
        return super().step(index, left)

    @torch.no_grad()
    def move_weights(self) -> None:
        """See `TorchEngine.move_weights`."""
        masking, optimizer = self.task.masking, self.task.optimizer
        values = {n: pair for n, pair in self.sparse.values.items() if pair[1].grad is not None}
        dense = [name for name in masking.masks if name not in values]
        for name in dense:
            self._settle(name)
        optimizer.step()
        if not values:
            masking.apply()
        for name in dense if values else ():
            clear_outside(masking.parameters[name], masking.masks[name])
        (group,), threads = optimizer.param_groups, torch.get_num_threads()
        rule = [group[key] for key in ("lr", "momentum", "weight_decay", "nesterov")]
        for name, (pattern, value) in values.items():
            weight, count = masking.parameters[name], len(pattern.index)
            momentum = momentum_buffer(optimizer, weight)
            require().sparse_sgd(weight, momentum, pattern.index, value.grad, count, *rule, threads)
            self.pending[name] = self.pending.get(name, 0) + 1

    @torch.no_grad()
    def write_back(self) -> None:
        """See `Engine.write_back`."""
        for name in list(self.pending):
            self._settle(name)

    def state_dict(self) -> dict[str, Any]:
        """By how many steps momentum lags behind. Caught up with here, it would round as it does
        in no other run.
        """
        return {"pending": dict(self.pending)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Engine.load_state_dict`."""
        self.pending = dict(state["pending"])

    def _settle(self, name: str) -> None:
        if steps := self.pending.pop(name, 0):
            masking, optimizer = self.task.masking, self.task.optimizer
            momentum = momentum_buffer(optimizer, masking.parameters[name])
            share = optimizer.param_groups[0]["momentum"] ** steps
            torch.where(masking.masks[name], momentum, momentum * share, out=momentum)
