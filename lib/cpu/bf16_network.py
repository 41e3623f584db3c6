"""The passes of whole networks through the bfloat16 kernels (lib/cpu/bf16.py).

A traced network becomes a list of operations, each from Lines to Lines, forward and backward.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib.cpu.bf16 import Lines, Weighted, call, sparse_up_to

Shape = tuple[int, int, int]


def _single(value: Any) -> int | None:
    """The number in 3 or (3, 3); None for anything else."""
    values = set(value) if isinstance(value, tuple) else {value}
    (one,) = values if len(values) == 1 else (None,)
    return one if isinstance(one, int) else None


class _Op:
    """One operation: `inputs` and itself are numbers of results, `out` its result.

    Attributes:
        halo: the border that it needs around its inputs.
        border: the border that it needs around the gradient of its result.
        in_place: whether the result may take the memory of an input that nobody else reads.
    """

    halo = border = 0
    in_place = False

    def __init__(self, number: int, inputs: Sequence[int]) -> None:
        self.number, self.inputs = number, list(inputs)
        self.out: Lines
        self.sources: list[Lines] = []

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """(channels, height, width) of the result, from those of the inputs."""
        return shapes[0]

    def forward(self, samples: int, training: bool) -> None:
        """Compute `out`."""
        raise NotImplementedError

    def backward(self, g: Lines, net: Bf16Network) -> None:
        """Hand the inputs their gradients: `net.give`."""
        raise NotImplementedError


class _Layer(_Op):
    """Convolution or linear layer."""

    def __init__(self, number: int, inputs: Sequence[int], name: str, module: nn.Module) -> None:
        super().__init__(number, inputs)
        self.name, self.module = name, module
        conv = isinstance(module, nn.Conv2d)
        self.weight: nn.Parameter = module.weight  # type: ignore[assignment]
        weight = self.weight.data if conv else self.weight.data[:, :, None, None]
        stride = _single(module.stride) if conv else 1
        self.halo = (_single(module.padding) or 0) if conv else 0
        self.kernel = Weighted(weight, stride or 1, self.halo)
        self.bias: nn.Parameter | None = module.bias  # type: ignore[assignment]
        self.gradient: Tensor | None = None  # of the non-zeros [nnz]
        self.whole: Tensor | None = None  # of all weights, as the weight
        self.normalised = False  # a batch norm takes off what the bias adds

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        self.border = self.kernel.border(shapes[0])
        return self.kernel.output(shapes[0])

    def forward(self, samples: int, training: bool) -> None:
        bias = None if self.bias is None else self.bias.data
        self.kernel.forward(self.sources[0], self.out, bias, -(-samples // 32))

    def backward(self, g: Lines, net: Bf16Network) -> None:
        """See `_Op.backward`; the weight's gradient goes to `gradient` or `whole`."""
        x, blocks = self.sources[0], -(-net.samples // 32)
        self.gradient = None
        if self.kernel.values is None or net.dense_gradients:
            if self.whole is None:
                self.whole = torch.empty_like(self.weight.data)
            self.kernel.whole_gradient(x, g, blocks, self.whole)
        else:
            self.gradient = self.kernel.weight_gradient(x, g, blocks)
        if self.kernel.values is None:
            self.weight.grad = self.whole
        if self.bias is not None:
            grad = torch.zeros_like(self.bias.data)
            if not self.normalised:
                call("channel_sums", g, grad, net.samples)
            self.bias.grad = grad
        if self.inputs[0] in net.wanted:
            dx = net.lines(self.inputs[0])
            self.kernel.input_gradient(g, dx, blocks)
            net.give(self.inputs[0], dx)


class _Norm(_Op):
    """Batch norm, with the ReLU that follows."""

    def __init__(self, number: int, inputs: Sequence[int], module: _BatchNorm, relu: bool) -> None:
        super().__init__(number, inputs)
        self.module, self.relu = module, relu
        self.mean = torch.empty(module.num_features)
        self.variance = torch.empty(module.num_features)

    def _affine(self) -> tuple[Any, Any]:
        m = self.module
        return (m.weight.data, m.bias.data) if m.affine else (None, None)

    def forward(self, samples: int, training: bool) -> None:
        """See `_Op.forward`; moves the running statistics."""
        m, (_, height, width) = self.module, self.out.shape
        training = training or m.running_mean is None
        if not training:
            assert m.running_mean is not None and m.running_var is not None
            self.mean.copy_(m.running_mean)
            self.variance.copy_(m.running_var)
        count = samples * height * width
        if training and count < 2:
            raise ValueError(f"batch norm needs more than one value per channel, got {count}")
        call(
            "norm", self.sources[0], self.out, self.mean, self.variance, *self._affine(), m.eps,
            self.relu, training, samples,
        )  # fmt: skip
        if training and m.running_mean is not None:
            assert m.running_var is not None and m.num_batches_tracked is not None
            m.num_batches_tracked += 1
            share = m.momentum if m.momentum is not None else 1.0 / int(m.num_batches_tracked)
            m.running_mean.lerp_(self.mean, share)
            m.running_var.lerp_(self.variance * (count / (count - 1)), share)

    def backward(self, g: Lines, net: Bf16Network) -> None:
        m, dx = self.module, net.lines(self.inputs[0])
        grads = torch.empty(2, m.num_features)
        call(
            "norm_backward", self.sources[0], g, dx, self.mean, self.variance, *self._affine(),
            m.eps, self.relu, grads[0], grads[1], net.samples,
        )  # fmt: skip
        if m.affine:
            m.weight.grad, m.bias.grad = grads[0], grads[1]
        net.give(self.inputs[0], dx)


class _Relu(_Op):
    in_place = True

    def forward(self, samples: int, training: bool) -> None:
        call("relu", self.sources[0], self.out, samples)

    def backward(self, g: Lines, net: Bf16Network) -> None:
        dx = net.lines(self.inputs[0])
        call("relu_backward", self.out, g, dx, net.samples)
        net.give(self.inputs[0], dx)


class _Dropout(_Op):
    """The mask is a function of a seed that torch's generator draws, and isn't stored."""

    in_place = True

    def __init__(self, number: int, inputs: Sequence[int], module: nn.Dropout) -> None:
        super().__init__(number, inputs)
        self.module = module
        self.rate, self.seed = 0.0, 0

    def forward(self, samples: int, training: bool) -> None:
        self.rate = self.module.p if training else 0.0
        self.seed = int(torch.randint(2**62, ())) if self.rate else 0
        if self.rate or self.out is not self.sources[0]:
            call("dropout", self.sources[0], self.out, self.rate, self.seed, samples)

    def backward(self, g: Lines, net: Bf16Network) -> None:
        dx = net.lines(self.inputs[0])
        call("dropout", g, dx, self.rate, self.seed, net.samples)
        net.give(self.inputs[0], dx)


class _Pool(_Op):
    """Windows side by side; of the size of the image where no size is given."""

    def __init__(self, number: int, inputs: Sequence[int], size: int | None, mean: bool) -> None:
        super().__init__(number, inputs)
        self.size, self.mean = size, mean

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        channels, height, width = shapes[0]
        if self.size is None and height != width:
            raise ValueError(f"the mean of an image that isn't square, {height} x {width}")
        self.size = self.size or height
        return channels, height // self.size, width // self.size

    def forward(self, samples: int, training: bool) -> None:
        call("pool", self.sources[0], self.out, self.size, self.mean, samples)

    def backward(self, g: Lines, net: Bf16Network) -> None:
        dx = net.lines(self.inputs[0])
        call("pool_backward", self.sources[0], self.out, g, dx, self.size, self.mean, net.samples)
        net.give(self.inputs[0], dx)


class _Add(_Op):
    def forward(self, samples: int, training: bool) -> None:
        call("add", *self.sources, self.out, samples)

    def backward(self, g: Lines, net: Bf16Network) -> None:
        """See `_Op.backward`: both have the same, until somebody adds to it."""
        for source in self.inputs:
            net.give(source, g)


class _Flatten(_Op):
    def shape(self, shapes: Sequence[Shape]) -> Shape:
        channels, height, width = shapes[0]
        return channels * height * width, 1, 1

    def forward(self, samples: int, training: bool) -> None:
        """See `_Op.forward`; a pooling of single pixels copies."""
        (x,) = self.sources
        call("pool", x, self.out.seen_as(x.shape), 1, True, samples)

    def backward(self, g: Lines, net: Bf16Network) -> None:
        dx = net.lines(self.inputs[0])
        call("pool", g.seen_as(dx.shape), dx, 1, True, net.samples)
        net.give(self.inputs[0], dx)


def _operation(number: int, node: fx.Node, module: nn.Module | None, at: Mapping) -> _Op:
    """The operation of a node; ValueError with a sentence for one that isn't known."""
    inputs = [at[source] for source in node.all_input_nodes]
    layer = type(module).__name__
    unknown = ValueError(
        f"the bfloat16 kernels don't know {node.target} ({layer}): {module}"
        if module is not None
        else f"the bfloat16 kernels don't know the operation {node.target} in {node.name}"
    )
    if len(inputs) != (2 if node.target in (operator.add, operator.iadd, torch.add) else 1):
        raise unknown
    if isinstance(module, nn.Linear):
        return _Layer(number, inputs, str(node.target), module)
    if isinstance(module, nn.Conv2d):
        plain = module.groups == 1 and module.padding_mode == "zeros"
        plain = plain and _single(module.dilation) == 1 and _single(module.padding) is not None
        if plain and _single(module.stride) in (1, 2) and _single(module.kernel_size):
            return _Layer(number, inputs, str(node.target), module)
    if isinstance(module, _BatchNorm):
        return _Norm(number, inputs, module, False)
    if isinstance(module, nn.ReLU) or node.target in (F.relu, torch.relu, "relu"):
        return _Relu(number, inputs)
    if isinstance(module, nn.Dropout):
        return _Dropout(number, inputs, module)
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
        size, mean = _single(module.kernel_size), isinstance(module, nn.AvgPool2d)
        usual = size and size == _single(module.stride) and _single(module.padding) == 0
        usual = usual and not module.ceil_mode and getattr(module, "divisor_override", None) is None
        if usual and _single(getattr(module, "dilation", 1)) == 1:
            return _Pool(number, inputs, size, mean)
    if isinstance(module, nn.AdaptiveAvgPool2d) and _single(module.output_size) == 1:
        return _Pool(number, inputs, None, True)
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
        return _Flatten(number, inputs)
    if module is None and node.target in (operator.add, operator.iadd, torch.add):
        return _Add(number, inputs)
    if node.target in ("flatten", torch.flatten) and node.args[1:] == (1,):
        return _Flatten(number, inputs)
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if node.target in ("mean", torch.mean) and dims in ((2, 3), [2, 3]):
        return _Pool(number, inputs, None, True)
    raise unknown


class Bf16Network:
    """The model's passes over batches of fp32 images [N, C, H, W], through the kernels.

    Attributes:
        dense_gradients: whether sparse layers have the gradients of all weights (`_Layer.whole`).
        samples: of the last batch.
        wanted: the results whose gradients are computed.

    Raises:
        ValueError: a layer or operation that the kernels don't know.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self.model, self.masks, self.dense_gradients, self.samples = model, masks, True, 0
        for name, parameter in model.named_parameters():
            if parameter.dtype != torch.float32 or not parameter.is_contiguous():
                raise ValueError(f"weights must be contiguous float32 on the CPU, {name} isn't")
        modules, at = dict(model.named_modules()), {}
        self.ops: list[_Op] = []
        for node in fx.Tracer().trace(model).nodes:
            if node.op == "placeholder":
                at[node] = 0
            elif node.op == "output":
                self.last = at[node.args[0]]
            else:
                module = modules[str(node.target)] if node.op == "call_module" else None
                before = at.get(node.all_input_nodes[0]) if node.all_input_nodes else None
                if isinstance(module, nn.Identity) and before is not None:
                    at[node] = before
                    continue
                op = _operation(len(self.ops) + 1, node, module, at)
                norm = self.ops[before - 1] if before else None
                alone = len(node.all_input_nodes[0].users) == 1
                if isinstance(op, _Relu) and isinstance(norm, _Norm) and alone:
                    norm.relu = True
                    at[node] = norm.number
                    continue
                at[node] = op.number
                self.ops.append(op)
        self.layers = {f"{op.name}.weight": op for op in self.ops if isinstance(op, _Layer)}
        readers = [[op for op in self.ops if n in op.inputs] for n in range(len(self.ops) + 1)]
        self._alone = [len(found) == 1 and n > 0 for n, found in enumerate(readers)]
        for op in self.layers.values():
            after = readers[op.number]
            op.normalised = bool(after) and all(isinstance(o, _Norm) for o in after)
        self.wanted = set(range(1, len(self.ops) + 1))
        self._input: Shape | None = None
        self._blocks = 0
        self.follow()

    def follow(self) -> None:
        """Take on the masks and, in sparse layers, the weights of the model as they are now."""
        for name, layer in self.layers.items():
            mask = self.masks.get(name)
            most = sparse_up_to(layer.kernel.kernel)
            few = mask is not None and int(mask.sum()) <= most * mask.numel()
            layer.kernel.follow(mask, few)
            layer.weight.grad = None

    def sparse(self) -> dict[str, _Layer]:
        """The layers that are computed over their non-zeros, by the parameter's name."""
        return {n: layer for n, layer in self.layers.items() if layer.kernel.values is not None}

    def _prepare(self, shape: Shape, blocks: int) -> None:
        """Memory for batches of up to so many blocks of 32 images [C, H, W]."""
        if shape == self._input and blocks <= self._blocks:
            return
        self._input, self._blocks = shape, blocks
        self._shapes = [shape]
        for op in self.ops:
            self._shapes.append(op.shape([self._shapes[n] for n in op.inputs]))
        halos, self._borders = [0] * len(self._shapes), [0] * len(self._shapes)
        for op in self.ops:
            for n in op.inputs:
                halos[n] = max(halos[n], op.halo)
            shared = self._borders[op.inputs[0]] if isinstance(op, _Add) else 0
            shared = max(shared, self._borders[op.inputs[-1]]) if isinstance(op, _Add) else 0
            self._borders[op.number] = max(op.border, shared)
        for op in reversed(self.ops):
            if self._shares(op):
                halos[op.inputs[0]] = max(halos[op.inputs[0]], halos[op.number])
        self.x = Lines(blocks, shape, halos[0])
        results = [self.x]
        for op in self.ops:
            op.sources = [results[n] for n in op.inputs]
            if self._shares(op):
                op.out = op.sources[0]
            else:
                op.out = Lines(blocks, self._shapes[op.number], halos[op.number])
            results.append(op.out)
        self._free: dict[tuple, list[Lines]] = {}

    def _shares(self, op: _Op) -> bool:
        """Whether the result takes its input's memory; a pooling looks at its result again."""
        before = op.inputs[0]
        return op.in_place and self._alone[before] and not isinstance(self.ops[before - 1], _Pool)

    def forward(self, images: Tensor, training: bool) -> Tensor:
        """Logits [N, classes] in fp32."""
        self.samples = len(images)
        channels, height, width = (
            images.shape[1:] if images.dim() == 4 else (*images.shape[1:], 1, 1)
        )
        self._prepare((channels, height, width), -(-self.samples // 32))
        self.x.load(images)
        for op in self.ops:
            op.forward(self.samples, training)
        out = self.ops[self.last - 1].out
        return out.plain(self.samples).flatten(1)

    def backward(self, gradient: Tensor) -> None:
        """Gradients of all parameters, from that of the logits [N, classes]."""
        self._given: list[Lines | None] = [None] * (len(self.ops) + 1)
        g = self.lines(self.last)
        g.load(gradient.reshape(-1, *g.shape))
        self.give(self.last, g)
        for op in reversed(self.ops):
            mine = self._given[op.number]
            if mine is not None:
                op.backward(mine, self)
                self._given[op.number] = None
                if not any(mine is other for other in self._given):
                    self._free.setdefault((mine.shape, mine.halo), []).append(mine)

    def lines(self, result: int) -> Lines:
        """Memory for the gradient of a result, of whatever values within a border of zeros."""
        key = (self._shapes[result], self._borders[result])
        free = self._free.get(key)
        return free.pop() if free else Lines(self._blocks, *key)

    def give(self, result: int, g: Lines) -> None:
        """Add to the gradient of a result."""
        before = self._given[result]
        if result not in self.wanted:
            return
        if before is None:
            self._given[result] = g
            return
        shared = sum(before is other for other in self._given) > 1
        total = self.lines(result) if shared else before
        call("add", before, g, total, self.samples)
        self._given[result] = total
        if not any(g is other for other in self._given):
            self._free.setdefault((g.shape, g.halo), []).append(g)
