"""Networks through the bfloat16 kernels: a traced model becomes a list of operations, each from
Lines to Lines; `accelerate` trains it in one's own loop, Bf16Engine in runs.

Torch computes the loss of the logits and moves what isn't sparse.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lib.cpu.bf16 import Layer, Lines, Norm, Op, Shape, available, call
from lib.engine import Engine, Task, momentum_buffer
from lib.masking import LayerReport, Masking, clear_outside

SUMS = (operator.add, operator.iadd, torch.add)


def single(value: Any) -> int | None:
    """The number in 3 or (3, 3); None for anything else."""
    if isinstance(value, tuple) and len(set(value)) == 1:
        return value[0]
    return value if isinstance(value, int) else None


class _Relu(Op):
    in_place = True

    def forward(self, samples: int, training: bool) -> None:
        call("relu", self.x, self.out, samples)

    def backward(self, g: Lines, dx: Lines, samples: int) -> None:
        call("relu_backward", self.out, g, dx, samples)


@dataclass(eq=False)
class _Dropout(Op):
    """The mask is a function of a seed that torch's generator draws, and isn't stored."""

    module: nn.Dropout
    rate = 0.0
    seed = 0
    in_place = True

    def forward(self, samples: int, training: bool) -> None:
        self.rate = float(self.module.p) if training else 0.0
        self.seed = int(torch.randint(2**62, ())) if self.rate else 0
        if self.rate or self.out is not self.x:
            call("dropout", self.x, self.out, self.rate, self.seed, samples)

    def backward(self, g: Lines, dx: Lines, samples: int) -> None:
        call("dropout", g, dx, self.rate, self.seed, samples)


@dataclass(eq=False)
class _Pool(Op):
    """Windows side by side; of the size of the image where no size is given."""

    given: int | None
    mean: bool

    def shape(self) -> Shape:
        channels, height, width = self.inputs[0].size
        if self.given is None and height != width:
            raise ValueError(f"the mean of an image that isn't square, {height} x {width}")
        self.window = self.given or height
        return channels, height // self.window, width // self.window

    def forward(self, samples: int, training: bool) -> None:
        call("pool", self.x, self.out, self.window, self.mean, samples)

    def backward(self, g: Lines, dx: Lines, samples: int) -> None:
        call("pool_backward", self.x, self.out, g, dx, self.window, self.mean, samples)


class _Add(Op):
    def forward(self, samples: int, training: bool) -> None:
        call("add", *(source.out for source in self.inputs), self.out, samples)


class _Flatten(Op):
    """A copy, as a pooling of single pixels."""

    def shape(self) -> Shape:
        channels, height, width = self.inputs[0].size
        return channels * height * width, 1, 1

    def forward(self, samples: int, training: bool) -> None:
        out = Lines(self.out.blocks, self.x.shape, data=self.out.data)
        call("pool", self.x, out, 1, True, samples)

    def backward(self, g: Lines, dx: Lines, samples: int) -> None:
        call("pool", Lines(g.blocks, dx.shape, data=g.data), dx, 1, True, samples)


def _operation(node: fx.Node, module: nn.Module | None) -> Op:
    """The operation of a node; ValueError with a sentence for one that isn't known."""
    target, name = node.target, str(node.target)
    what = f"{name} ({type(module).__name__}): {module}" if module else f"{name} in {node.name}"
    unknown = ValueError(f"the bfloat16 kernels don't know {what}")
    if len(node.all_input_nodes) != (2 if target in SUMS else 1):
        raise unknown
    if isinstance(module, nn.Linear):
        return Layer(name, module, 1, 0)
    if isinstance(module, nn.Conv2d):
        stride, padding = single(module.stride), single(module.padding)
        plain = module.groups == 1 and module.padding_mode == "zeros"
        plain = plain and single(module.dilation) == 1 and single(module.kernel_size) is not None
        if plain and stride in (1, 2) and padding is not None:
            return Layer(name, module, stride, padding)
    if isinstance(module, _BatchNorm):
        return Norm(module)
    if isinstance(module, nn.ReLU) or target in (F.relu, torch.relu, "relu"):
        return _Relu()
    if isinstance(module, nn.Dropout):
        return _Dropout(module)
    if isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
        size, mean = single(module.kernel_size), isinstance(module, nn.AvgPool2d)
        usual = size and size == single(module.stride) and single(module.padding) == 0
        usual = usual and not module.ceil_mode and getattr(module, "divisor_override", None) is None
        if usual and single(getattr(module, "dilation", 1)) == 1:
            return _Pool(size, mean)
    if target in SUMS:
        return _Add()
    flat = isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1)
    if flat or (target in ("flatten", torch.flatten) and node.args[1:] == (1,)):
        return _Flatten()
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    whole = isinstance(module, nn.AdaptiveAvgPool2d) and single(module.output_size) == 1
    if whole or (target in ("mean", torch.mean) and dims in ((2, 3), [2, 3])):
        return _Pool(None, True)
    raise unknown


class Bf16Network:
    """The model's passes over batches of fp32 images [N, C, H, W], through the kernels.

    Attributes:
        dense_gradients: whether sparse layers have the gradients of all weights (`Layer.whole`).
        layers: those with weights, by the name of the weight.

    Raises:
        ValueError: a layer or operation that the kernels don't know.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self.masks, self.dense_gradients = masks, True
        for name, parameter in model.named_parameters():
            if parameter.dtype != torch.float32 or not parameter.is_contiguous():
                raise ValueError(f"weights must be contiguous float32 on the CPU, {name} isn't")
        modules: dict[Any, nn.Module] = dict(model.named_modules())
        images, graph = Op(), fx.Tracer().trace(model)
        self.ops, at = [images], dict.fromkeys(graph.nodes, images)
        for node in graph.nodes:
            sources = node.all_input_nodes
            module = modules[node.target] if node.op == "call_module" else None
            if node.op == "output":
                self.last = at[sources[0]]
            elif isinstance(module, nn.Identity):
                node.replace_all_uses_with(sources[0])
                graph.erase_node(node)
            elif node.op != "placeholder":
                op = _operation(node, module)
                op.inputs = [at[source] for source in sources]
                norm, alone = op.inputs[0], len(sources[0].users) == 1
                if isinstance(op, _Relu) and isinstance(norm, Norm) and alone:
                    norm.relu, at[node] = True, norm
                    continue
                at[node] = op
                self.ops.append(op)
        self.layers = {f"{op.name}.weight": op for op in self.ops if isinstance(op, Layer)}
        for op in self.ops:
            op.readers = [reader for reader in self.ops if op in reader.inputs]
            op.normalised = bool(op.readers) and all(isinstance(r, Norm) for r in op.readers)
        self._prepared: tuple[Shape, int] = (0, 0, 0), 0
        self.follow()

    def follow(self) -> None:
        """Take on the masks and, in sparse layers, the weights of the model as they are now."""
        for name, layer in self.layers.items():
            layer.follow(self.masks.get(name))

    def sparse(self) -> dict[str, Layer]:
        """The layers that are computed over their non-zeros, by the parameter's name."""
        return {n: layer for n, layer in self.layers.items() if layer.sparse}

    def _prepare(self, shape: Shape, blocks: int) -> None:
        """Memory for batches of up to so many blocks of 32 images [C, H, W]."""
        if shape == self._prepared[0] and blocks <= self._prepared[1]:
            return
        self._prepared = shape, blocks
        self._free: dict[tuple[Shape, int], list[Lines]] = {}
        images, *ops = self.ops
        images.size = shape
        for op in ops:
            op.size = op.shape()
            if isinstance(op, _Add):  # hands its gradient on
                op.border = max(source.border for source in op.inputs)
        halos: dict[Op, int] = {}
        for op in reversed(self.ops):
            needed = [halos[r] if self._shares(r) else r.halo for r in op.readers]
            halos[op] = max(needed, default=0)
        for op in self.ops:
            op.out = op.x if self._shares(op) else Lines(blocks, op.size, halos[op])

    def _shares(self, op: Op) -> bool:
        """Whether the result takes its input's memory; a pooling looks at its result again."""
        if not op.in_place:
            return False
        (before,) = op.inputs
        return len(before.readers) == 1 and bool(before.inputs) and not isinstance(before, _Pool)

    def forward(self, images: Tensor, training: bool) -> Tensor:
        """Logits [N, classes] in fp32."""
        self._samples = len(images)
        channels, height, width = (
            images.shape[1:] if images.dim() == 4 else (*images.shape[1:], 1, 1)
        )
        self._prepare((channels, height, width), -(-self._samples // 32))
        first, *ops = self.ops
        first.out.load(images)
        for op in ops:
            op.forward(self._samples, training)
        return self.last.out.plain(self._samples).flatten(1)

    def backward(self, gradient: Tensor) -> None:
        """Gradients of all parameters, from that of the logits [N, classes]."""
        g = self._lines(self.last)
        self._given = {self.last: g.load(gradient.reshape(-1, *g.shape))}
        for layer in self.layers.values():
            layer.dense_gradients = self.dense_gradients
        for op in reversed(self.ops):
            if op not in self._given:
                continue
            g = self._given[op]
            if isinstance(op, _Add):  # both have the same, until somebody adds to it
                for source in op.inputs:
                    self._give(source, g)
            else:
                dx = self._lines(op.inputs[0])
                op.backward(g, dx, self._samples)
                self._give(op.inputs[0], dx)
            del self._given[op]
            self._release(g)

    def _lines(self, op: Op) -> Lines:
        """Memory for the gradient of a result, of whatever values within a border of zeros."""
        free = self._free.get((op.size, op.border))
        return free.pop() if free else Lines(self._prepared[1], op.size, op.border)

    def _give(self, op: Op, g: Lines) -> None:
        """Add to the gradient of a result; nobody asks for that of the images."""
        before = self._given.get(op)
        if before is not None:
            shared = sum(before is other for other in self._given.values()) > 1
            self._given[op] = self._lines(op) if shared else before
            call("add", before, g, self._given[op], self._samples)
        elif op.inputs:
            self._given[op] = g
        self._release(g)

    def _release(self, g: Lines) -> None:
        """Take back the memory of a gradient that no result has."""
        if not any(g is other for other in self._given.values()):
            self._free.setdefault((g.shape, g.halo), []).append(g)


class Accelerated:
    """The model in training through the bfloat16 kernels, in a loop of one's own:

    ```python
    fast = accelerate(model, optimizer, masking)
    loss = F.cross_entropy(fast(images), labels); loss.backward(); fast.step()   # every batch
    report = fast.update()                                                       # every epoch
    fast.write_back()                                  # before model.state_dict()
    ```

    Convolutions, batch norm, ReLU, max and average pooling, dropout, linear layers and sums. The
    gradients of all weights are computed in each step; `fast.net.dense_gradients = False` leaves
    out those of inactive weights, which only the steps before an update need. Sparse layers move as
    [nnz]; the momentum of their inactive weights moves in the steps with gradients of all weights,
    and `pending` is by how many it lags behind.

    Raises:
        ValueError: a layer that isn't known, or anything but SGD with one group and momentum,
            without dampening, minimising.
        KernelsUnavailable: no AVX-512 with bfloat16, or no compiler.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.SGD, masking: Masking) -> None:
        group, *others = optimizer.param_groups
        if not isinstance(optimizer, torch.optim.SGD) or others:
            raise ValueError("sparse steps know torch.optim.SGD with one group of parameters")
        if group["momentum"] <= 0 or group["dampening"] or group["maximize"]:
            raise ValueError("sparse steps know SGD with momentum, without dampening, minimising")
        self.model, self.optimizer, self.masking = model, optimizer, masking
        self.net = Bf16Network(model, masking.masks)
        self.pending: Counter[str] = Counter()
        self.gather()

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [N, classes], fp32, of images [N, C, H, W] in fp32; call backward() on a loss of
        them before the next batch.
        """
        logits = self.net.forward(images, self.model.training)
        if self.model.training and torch.is_grad_enabled():
            logits.requires_grad_().register_hook(self.net.backward)
        return logits

    @torch.no_grad()
    def step(self) -> None:
        """In place of optimizer.step() and masking.step(), by the gradients of the last pass."""
        (group,), layers = self.optimizer.param_groups, self.net.sparse()
        grads: list[Tensor] = []
        for name, layer in layers.items():
            if layer.gradient is None:
                kept = self._buffer(name)
                kept.mul_(group["momentum"] ** (self.pending.pop(name, 0) + 1))
                kept.add_(layer.whole.view(-1))
                grads.append(layer.whole.view(-1)[layer.index])
            else:
                self.pending[name] += 1
                grads.append(layer.gradient)
        if layers:
            values = [layer.values for layer in layers.values()]
            torch._fused_sgd_(
                values, grads, list(self.momentum.values()), weight_decay=group["weight_decay"],
                momentum=group["momentum"], lr=group["lr"], dampening=0.0,
                nesterov=group["nesterov"], maximize=False, is_first_step=False,
            )  # fmt: skip
        self.optimizer.step()
        for name, mask in self.masking.masks.items():
            if name not in layers:
                clear_outside(self.net.layers[name].weight, mask)
        self.masking.advance()

    def update(self, prune_rate: float | None = None) -> list[LayerReport]:
        """In place of masking.update()."""
        self.write_back()
        report = self.masking.update(prune_rate)
        self.gather()
        return report

    @torch.no_grad()
    def write_back(self, settle: bool = True) -> None:
        """Weights and momentum to the model and the optimizer: before anybody reads these. Without
        `settle` the momentum of inactive weights goes on lagging behind.
        """
        for name, layer in self.net.sparse().items():
            kept = self._buffer(name)
            if settle and (steps := self.pending.pop(name, 0)):
                kept.mul_(self.optimizer.param_groups[0]["momentum"] ** steps)
            kept[layer.index] = self.momentum[name]
            layer.weight.data.view(-1)[layer.index] = layer.values

    def gather(self) -> None:
        """Take weights and momentum from model and optimizer, by the masks as they are now."""
        self.net.follow()
        self.momentum = {n: self._buffer(n)[x.index] for n, x in self.net.sparse().items()}

    def _buffer(self, name: str) -> Tensor:
        return momentum_buffer(self.optimizer, self.net.layers[name].weight).view(-1)


accelerate = Accelerated  # of lib.cpu, as README has it


class Bf16Engine(Engine):
    """All layers by the bfloat16 kernels; inactive weights have gradients in the window only."""

    name, windowed = "bf16", True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.fast = Accelerated(task.model, task.optimizer, task.masking)

    def step(self, index: Tensor, left: float) -> Tensor:
        """See `Engine.step`."""
        images, labels = self.task.batch(index)
        self.fast.net.dense_gradients = left <= self.task.schedule.window
        smoothing = self.task.run.label_smoothing
        loss = F.cross_entropy(self.fast(images), labels, label_smoothing=smoothing)
        loss.backward()
        self.fast.step()
        return loss.detach()

    @torch.no_grad()
    def wrong(self, images: Tensor, labels: Tensor) -> int:
        """See `Engine.wrong`; in batches of training's size, whose memory is there."""
        size = -(-self.task.run.batch_size // 32) * 32
        parts = zip(images.split(size), labels.split(size), strict=True)
        return sum(int((self.fast.net.forward(x, False).argmax(1) != y).sum()) for x, y in parts)

    def write_back(self) -> None:
        """See `Engine.write_back`."""
        self.fast.write_back()

    def follow(self) -> None:
        """See `Engine.follow`."""
        self.fast.gather()

    def state_dict(self) -> dict[str, Any]:
        """See `Engine.state_dict`; momentum caught up with would round as in no other run."""
        self.fast.write_back(settle=False)
        return {"pending": dict(self.fast.pending)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Engine.load_state_dict`."""
        self.follow()
        self.fast.pending = Counter(state["pending"])


def knows(model: nn.Module) -> bool:
    """Whether this machine has the kernels, and these all layers of the model."""
    try:
        return available() and Bf16Network(model, {}) is not None
    except ValueError:
        return False
