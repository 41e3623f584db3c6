"""Training a convolutional network over its non-zero weights, on the CPU.

`SparseNetwork` runs a model in the batch-blocked layout of lib/cpu/ops.py; it shares the model's
parameters, so optimizer and Masking go on unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib.cpu import ops
from lib.cpu.library import call, cpu_id, require, sgd_rule
from lib.engine import Task, TorchEngine, momentum_buffer
from lib.masking import clear_outside

# Masked layers up to this density are computed over their non-zeros. A rule and no measurement, the
# same on every machine but for small layers (`_weighted`): with two AVX-512 threads VGG16-D's
# convolutions are 2.6 times as fast as dense ones at 20 % of the weights and 1.3 times at 50 %,
# without the conversion of their activations (results/bench/kernels.csv, sparse_layers).
SPARSE_UP_TO = 0.4


class SparseNetwork(nn.Module, fx.Interpreter):
    """A convolutional network of lib/models.py, computed over its non-zero weights where a layer
    has few enough; activations are batch-blocked from the first layer to the last.

    Args:
        model: float32 on the CPU; its parameters are shared.
        masks: parameter name -> bool mask, such as `Masking.masks`; looked at in every forward
            pass, so others may be assigned. Weights outside the mask count as zero in sparse
            layers: they must be zero (Masking.step sees to it). Without a mask layers run dense.
        sparse_up_to: density up to which a layer is sparse.

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
                and isinstance(modules[str(source.target)], _BatchNorm)
            ):
                source.update_kwarg("relu", True)
                node.replace_all_uses_with(source)
                graph.erase_node(node)
        fx.Interpreter.__init__(self, model, graph=graph)
        self.masks, self.sparse_up_to = masks, sparse_up_to
        self.dense_gradients = False
        self.values: dict[str, tuple[ops.Pattern, Tensor]] = {}
        self._patterns: dict[str, ops.Pattern] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of a batch [N, C, H, W] of float32 on the CPU."""
        self.values.clear()
        self._samples = len(x)
        return ops.from_blocked(self.run(ops.to_blocked(x)), self._samples).flatten(1)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """A layer of the model; NotImplementedError for one of another kind."""
        module, (x,) = self.fetch_attr(target), args
        if isinstance(module, nn.Conv2d | nn.Linear):
            return self._weighted(f"{target}.weight", module, x)
        if isinstance(module, _BatchNorm):
            return ops.batch_norm(x, module, self._samples, **kwargs)
        if isinstance(module, nn.MaxPool2d):
            return _pooled(x, module)
        if isinstance(module, nn.ReLU | nn.Dropout):
            return module(x)
        raise NotImplementedError(f"the sparse kernels don't know {target}: {module}")

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What makes features of an image's channels: `flatten` or `mean`."""
        x: Tensor = args[0]
        if target == "flatten":
            return x.reshape(len(x), -1, 1, 1, ops.LANES)
        assert target == "mean"
        return _pooled(x, nn.AvgPool2d((x.shape[2], x.shape[3])))

    def _weighted(self, name: str, module: Any, x: Tensor) -> Tensor:
        mask, pattern, weight = self.masks.get(name), self._patterns.get(name), module.weight
        if mask is not None and (pattern is None or pattern.mask is not mask):
            pattern = self._patterns[name] = ops.Pattern(mask)
        full = pattern is not None and pattern.density > self.sparse_up_to
        # Without AVX-512 torch takes longer for small convolutions, as the first often are.
        by_torch = full and ("avx512f" in cpu_id() or weight.numel() >= 64 * 64)
        linear = isinstance(module, nn.Linear)
        if pattern is None or by_torch:
            plain = ops.from_blocked(x, self._samples)
            plain = module(plain.flatten(1))[:, :, None, None] if linear else module(plain)
            return ops.to_blocked(plain)
        values = weight.detach().flatten()[pattern.index]
        dense = weight if full or self.dense_gradients else None
        if dense is None:  # a dense gradient contains that of the values
            self.values[name] = pattern, values.requires_grad_()
        stride, padding = (1, 0) if linear else (module.stride[0], module.padding[0])
        how = {"stride": stride, "padding": padding, "samples": self._samples}
        return ops.conv2d(x, values, module.bias, pattern, dense_gradient_of=dense, **how)


def _pooled(x: Tensor, pool: nn.Module) -> Tensor:
    images = x.flatten(0, 1).permute(0, 3, 1, 2)  # [B * C, 16, H, W], channels last
    return pool(images).permute(0, 2, 3, 1).unflatten(0, x.shape[:2])


class SparseEngine(TorchEngine):
    """Layers through the sparse kernels (all that they know, or those with few weights), the others
    through torch; gradients of inactive weights only in the window before an update.

    In a sparse layer that got the gradients of its non-zeros alone, weight and momentum move there
    only. The momentum of its inactive weights, which would shrink by the same factor in each such
    step, shrinks when somebody is to read it: before the next step with a dense gradient, and in
    `write_back()`. `pending`: by how many steps it lags behind in each layer.
    """

    name, windowed = "sparse", True
    network: SparseNetwork

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        up_to = 1.0 if task.run.kernels == "sparse" else SPARSE_UP_TO
        self.network = SparseNetwork(task.model, task.masking.masks, sparse_up_to=up_to)
        self.pending: dict[str, int] = {}
        for parameter in self.parameters:
            momentum_buffer(task.optimizer, parameter)

    def step(self, index: Tensor, left: float) -> Tensor:
        """See `Engine.step`."""
        self.network.dense_gradients = left <= self.task.schedule.window
        return super().step(index, left)

    @torch.no_grad()
    def move_weights(self) -> None:
        """See `TorchEngine.move_weights`."""
        masking, optimizer, values = self.task.masking, self.task.optimizer, self.network.values
        dense = [name for name in masking.masks if name not in values]
        for name in dense:
            self._settle(name)
        optimizer.step()
        if not values:
            masking.apply()
        for name in dense if values else ():
            clear_outside(masking.parameters[name], masking.masks[name])
        rule = sgd_rule(optimizer)
        for name, (pattern, value) in values.items():
            weight, count = masking.parameters[name], len(pattern.index)
            momentum = momentum_buffer(optimizer, weight)
            call("sparse_sgd", weight, momentum, pattern.index, value.grad, count, *rule)
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
