"""The passes of whole networks through the bfloat16 kernels (lib/cpu/bf16.py).

A traced network becomes a list of operations, each from Lines to Lines, forward and backward.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib.cpu.bf16 import Lines, Weighted, call, sparse_up_to

Shape = tuple[int, int, int]
SUMS = (operator.add, operator.iadd, torch.add)


def _single(value: Any) -> int | None:
    """The number in 3 or (3, 3); None for anything else."""
    values = set(value) if isinstance(value, tuple) else {value}
    (one,) = values if len(values) == 1 else (None,)
    return one if isinstance(one, int) else None


class _Op:
    """One operation.

    Attributes:
        number: of its result; that of the images is 0.
        inputs, readers: the numbers of what it reads; the operations that read its result.
        normalised: whether only batch norms do, which take off what a bias adds.
        sources, out: what it reads, and its result.
        halo: the border that it needs around its inputs.
        border: the border that it needs around the gradient of its result.
        in_place: whether the result may take the memory of an input that nobody else reads.
    """

    number: int
    inputs: list[int]
    readers: list[_Op]
    sources: list[Lines]
    out: Lines
    halo = border = 0
    in_place = normalised = False

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        """(channels, height, width) of the result, from those of the inputs."""
        return shapes[0]

    def forward(self, samples: int, training: bool) -> None:
        """Compute `out`."""
        raise NotImplementedError

    def backward(self, g: Lines, dx: Lines, net: Bf16Network) -> None:
        """Compute the gradient of the (first) input from that of the result."""
        raise NotImplementedError


class _Layer(_Op):
    """Convolution or linear layer. Its weight has a gradient `whole`, or, where it is sparse and
    dense gradients are off, one of the non-zeros [nnz] in `gradient`.
    """

    def __init__(self, name: str, module: nn.Conv2d | nn.Linear) -> None:
        self.name, self.weight, self.bias = name, module.weight, module.bias
        weight, stride = self.weight.data, 1
        if isinstance(module, nn.Conv2d):
            stride, self.halo = _single(module.stride) or 1, _single(module.padding) or 0
        else:
            weight = weight[:, :, None, None]
        self.kernel = Weighted(weight, stride, self.halo)
        self.gradient: Tensor | None = None
        self.whole = torch.empty(0)

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        self.border = self.kernel.border(shapes[0])
        return self.kernel.output(shapes[0])

    def forward(self, samples: int, training: bool) -> None:
        bias = None if self.bias is None else self.bias.data
        self.kernel.forward(self.sources[0], self.out, bias, -(-samples // 32))

    def backward(self, g: Lines, dx: Lines, net: Bf16Network) -> None:
        x, blocks = self.sources[0], -(-net.samples // 32)
        self.gradient = None
        if self.kernel.sparse and not net.dense_gradients:
            self.gradient = self.kernel.weight_gradient(x, g, blocks)
        else:
            if not len(self.whole):
                self.whole = torch.empty_like(self.weight.data)
            self.kernel.whole_gradient(x, g, blocks, self.whole)
        if not self.kernel.sparse:
            self.weight.grad = self.whole
        if self.bias is not None:
            self.bias.grad = torch.zeros_like(self.bias.data)
            if not self.normalised:
                call("channel_sums", g, self.bias.grad, net.samples)
        if self.inputs[0]:  # nobody asks for the gradient of the images
            self.kernel.input_gradient(g, dx, blocks)


class _Norm(_Op):
    """Batch norm, with the ReLU that follows."""

    relu = False

    def __init__(self, module: _BatchNorm) -> None:
        self.module: Any = module
        self.mean, self.variance = torch.empty(2, module.num_features)

    def _given(self) -> tuple[Any, ...]:
        """What both kernels read: statistics, the affine map, whether there is a ReLU."""
        m = self.module
        affine = (m.weight.data, m.bias.data) if m.affine else (None, None)
        return self.mean, self.variance, *affine, float(m.eps), self.relu

    def forward(self, samples: int, training: bool) -> None:
        """See `_Op.forward`; moves the running statistics."""
        m, (_, height, width) = self.module, self.out.shape
        count, running = samples * height * width, (m.running_mean, m.running_var)
        training = training or running[0] is None
        if not training:
            self.mean.copy_(running[0])
            self.variance.copy_(running[1])
        elif count < 2:
            raise ValueError(f"batch norm needs more than one value per channel, got {count}")
        call("norm", self.sources[0], self.out, *self._given(), training, samples)
        if training and running[0] is not None:
            m.num_batches_tracked += 1
            share = m.momentum if m.momentum is not None else 1.0 / int(m.num_batches_tracked)
            running[0].lerp_(self.mean, share)
            running[1].lerp_(self.variance * (count / (count - 1)), share)

    def backward(self, g: Lines, dx: Lines, net: Bf16Network) -> None:
        grads = torch.empty(2, self.module.num_features)
        call("norm_backward", self.sources[0], g, dx, *self._given(), *grads, net.samples)
        if self.module.affine:
            self.module.weight.grad, self.module.bias.grad = grads


class _Relu(_Op):
    in_place = True

    def forward(self, samples: int, training: bool) -> None:
        call("relu", self.sources[0], self.out, samples)

    def backward(self, g: Lines, dx: Lines, net: Bf16Network) -> None:
        call("relu_backward", self.out, g, dx, net.samples)


@dataclass
class _Dropout(_Op):
    """The mask is a function of a seed that torch's generator draws, and isn't stored."""

    module: nn.Dropout
    rate = 0.0
    seed = 0
    in_place = True

    def forward(self, samples: int, training: bool) -> None:
        self.rate = float(self.module.p) if training else 0.0
        self.seed = int(torch.randint(2**62, ())) if self.rate else 0
        if self.rate or self.out is not self.sources[0]:
            call("dropout", self.sources[0], self.out, self.rate, self.seed, samples)

    def backward(self, g: Lines, dx: Lines, net: Bf16Network) -> None:
        call("dropout", g, dx, self.rate, self.seed, net.samples)


@dataclass
class _Pool(_Op):
    """Windows side by side; of the size of the image where no size is given."""

    size: int | None
    mean: bool

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        channels, height, width = shapes[0]
        if self.size is None and height != width:
            raise ValueError(f"the mean of an image that isn't square, {height} x {width}")
        self.size = self.size or height
        return channels, height // self.size, width // self.size

    def forward(self, samples: int, training: bool) -> None:
        call("pool", self.sources[0], self.out, self.size, self.mean, samples)

    def backward(self, g: Lines, dx: Lines, net: Bf16Network) -> None:
        call("pool_backward", self.sources[0], self.out, g, dx, self.size, self.mean, net.samples)


class _Add(_Op):
    def forward(self, samples: int, training: bool) -> None:
        call("add", *self.sources, self.out, samples)


class _Flatten(_Op):
    """A copy, as a pooling of single pixels."""

    def shape(self, shapes: Sequence[Shape]) -> Shape:
        channels, height, width = shapes[0]
        return channels * height * width, 1, 1

    def forward(self, samples: int, training: bool) -> None:
        (x,) = self.sources
        out = Lines(x.blocks, x.shape, data=self.out.data)
        call("pool", x, out, 1, True, samples)

    def backward(self, g: Lines, dx: Lines, net: Bf16Network) -> None:
        call("pool", Lines(g.blocks, dx.shape, data=g.data), dx, 1, True, net.samples)


def _operation(node: fx.Node, module: nn.Module | None) -> _Op:
    """The operation of a node; ValueError with a sentence for one that isn't known."""
    target, name = node.target, str(node.target)
    what = f"{name} ({type(module).__name__}): {module}" if module else f"{name} in {node.name}"
    unknown = ValueError(f"the bfloat16 kernels don't know {what}")
    if len(node.all_input_nodes) != (2 if target in SUMS else 1):
        raise unknown
    if isinstance(module, nn.Linear):
        return _Layer(name, module)
    if isinstance(module, nn.Conv2d):
        plain = module.groups == 1 and module.padding_mode == "zeros"
        plain = plain and _single(module.dilation) == 1 and _single(module.padding) is not None
        if plain and _single(module.stride) in (1, 2) and _single(module.kernel_size):
            return _Layer(name, module)
    if isinstance(module, _BatchNorm):
        return _Norm(module)
    if isinstance(module, nn.ReLU) or target in (F.relu, torch.relu, "relu"):
        return _Relu()
    if isinstance(module, nn.Dropout):
        return _Dropout(module)
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
        size, mean = _single(module.kernel_size), isinstance(module, nn.AvgPool2d)
        usual = size and size == _single(module.stride) and _single(module.padding) == 0
        usual = usual and not module.ceil_mode and getattr(module, "divisor_override", None) is None
        if usual and _single(getattr(module, "dilation", 1)) == 1:
            return _Pool(size, mean)
    if isinstance(module, nn.AdaptiveAvgPool2d) and _single(module.output_size) == 1:
        return _Pool(None, True)
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
        return _Flatten()
    if target in SUMS:
        return _Add()
    if target in ("flatten", torch.flatten) and node.args[1:] == (1,):
        return _Flatten()
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if target in ("mean", torch.mean) and dims in ((2, 3), [2, 3]):
        return _Pool(None, True)
    raise unknown


class Bf16Network:
    """The model's passes over batches of fp32 images [N, C, H, W], through the kernels.

    Attributes:
        dense_gradients: whether sparse layers have the gradients of all weights (`_Layer.whole`).
        samples: of the last batch.
        layers: those with weights, by the name of the weight.

    Raises:
        ValueError: a layer or operation that the kernels don't know.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self.masks, self.dense_gradients, self.samples = masks, True, 0
        for name, parameter in model.named_parameters():
            if parameter.dtype != torch.float32 or not parameter.is_contiguous():
                raise ValueError(f"weights must be contiguous float32 on the CPU, {name} isn't")
        modules: dict[Any, nn.Module] = dict(model.named_modules())
        at: dict[Any, int] = {}
        self.ops: list[_Op] = []
        for node in fx.Tracer().trace(model).nodes:
            inputs = [at[source] for source in node.all_input_nodes]
            module = modules[node.target] if node.op == "call_module" else None
            if node.op == "placeholder":
                at[node] = 0
            elif node.op == "output" or isinstance(module, nn.Identity):
                at[node] = self.last = inputs[0]
            else:
                op, (source, *_) = _operation(node, module), node.all_input_nodes
                norm = self.ops[inputs[0] - 1] if inputs[0] else None
                if isinstance(op, _Relu) and isinstance(norm, _Norm) and len(source.users) == 1:
                    norm.relu = True
                    at[node] = norm.number
                    continue
                self.ops.append(op)
                at[node] = op.number = len(self.ops)
                op.inputs = inputs
        self.layers = {f"{op.name}.weight": op for op in self.ops if isinstance(op, _Layer)}
        for op in self.ops:
            op.readers = [reader for reader in self.ops if op.number in reader.inputs]
            op.normalised = bool(op.readers) and all(isinstance(r, _Norm) for r in op.readers)
        self._input: Shape | None = None
        self._blocks = 0
        self.follow()

    def follow(self) -> None:
        """Take on the masks and, in sparse layers, the weights of the model as they are now."""
        for name, layer in self.layers.items():
            mask = self.masks.get(name)
            most = sparse_up_to(layer.kernel.kernel)
            few = mask is not None and int(mask.sum()) <= most * mask.numel()
            layer.kernel.follow(mask if few else None)
            layer.weight.grad = None

    def sparse(self) -> dict[str, _Layer]:
        """The layers that are computed over their non-zeros, by the parameter's name."""
        return {n: layer for n, layer in self.layers.items() if layer.kernel.sparse}

    def _prepare(self, shape: Shape, blocks: int) -> None:
        """Memory for batches of up to so many blocks of 32 images [C, H, W]."""
        if shape == self._input and blocks <= self._blocks:
            return
        self._input, self._blocks = shape, blocks
        self._free: dict[tuple, list[Lines]] = {}
        self._shapes = [shape]
        for op in self.ops:
            self._shapes.append(op.shape([self._shapes[n] for n in op.inputs]))
        halos, self._borders = [0] * len(self._shapes), [0] * len(self._shapes)
        for op in self.ops:
            for n in op.inputs:
                halos[n] = max(halos[n], op.halo)
            handed_on = [self._borders[n] for n in op.inputs if isinstance(op, _Add)]
            self._borders[op.number] = max([op.border, *handed_on])
        for op in reversed(self.ops):
            if self._shares(op):
                halos[op.inputs[0]] = max(halos[op.inputs[0]], halos[op.number])
        results = [Lines(blocks, shape, halos[0])]
        for op in self.ops:
            op.sources = [results[n] for n in op.inputs]
            op.out = op.sources[0]
            if not self._shares(op):
                op.out = Lines(blocks, self._shapes[op.number], halos[op.number])
            results.append(op.out)
        self._images = results[0]

    def _shares(self, op: _Op) -> bool:
        """Whether the result takes its input's memory; a pooling looks at its result again."""
        before = self.ops[op.inputs[0] - 1] if op.inputs[0] else None
        alone = before is not None and len(before.readers) == 1
        return op.in_place and alone and not isinstance(before, _Pool)

    def forward(self, images: Tensor, training: bool) -> Tensor:
        """Logits [N, classes] in fp32."""
        self.samples = len(images)
        channels, height, width = (
            images.shape[1:] if images.dim() == 4 else (*images.shape[1:], 1, 1)
        )
        self._prepare((channels, height, width), -(-self.samples // 32))
        self._images.load(images)
        for op in self.ops:
            op.forward(self.samples, training)
        return self.ops[self.last - 1].out.plain(self.samples).flatten(1)

    def backward(self, gradient: Tensor) -> None:
        """Gradients of all parameters, from that of the logits [N, classes]."""
        g = self._lines(self.last)
        self._given = {self.last: g.load(gradient.reshape(-1, *g.shape))}
        for op in reversed(self.ops):
            if op.number not in self._given:
                continue
            g = self._given[op.number]
            if isinstance(op, _Add):  # both have the same, until somebody adds to it
                for source in op.inputs:
                    self._give(source, g)
            else:
                dx = self._lines(op.inputs[0])
                op.backward(g, dx, self)
                self._give(op.inputs[0], dx)
            del self._given[op.number]
            self._release(g)

    def _lines(self, result: int) -> Lines:
        """Memory for the gradient of a result, of whatever values within a border of zeros."""
        key = (self._shapes[result], self._borders[result])
        free = self._free.get(key)
        return free.pop() if free else Lines(self._blocks, *key)

    def _give(self, result: int, g: Lines) -> None:
        """Add to the gradient of a result; nobody asks for that of the images."""
        before = self._given.get(result)
        if before is not None:
            shared = sum(before is other for other in self._given.values()) > 1
            self._given[result] = self._lines(result) if shared else before
            call("add", before, g, self._given[result], self.samples)
        elif result:
            self._given[result] = g
        self._release(g)

    def _release(self, g: Lines) -> None:
        """Take back the memory of a gradient that no result has."""
        if not any(g is other for other in self._given.values()):
            self._free.setdefault((g.shape, g.halo), []).append(g)
