"""Training by the bfloat16 kernels: SGD, the engine of runs, and `accelerate` for one's own loop.

Torch computes the loss of the logits and moves what isn't sparse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.cpu.bf16 import available
from lib.cpu.bf16_network import Bf16Network
from lib.engine import Engine, Task
from lib.masking import LayerReport, Masking, clear_outside


class Bf16SGD:
    """The optimizer's part of a mini-batch: what is sparse moves as [nnz], the rest by torch.

    The momentum of inactive weights moves in the steps with gradients of all weights; by how many
    it lags behind is in `pending` (see lib/cpu/optimizer.py, which does the same in fp32).

    Raises:
        ValueError: anything but SGD with one group and momentum, without dampening, minimising.
    """

    def __init__(self, net: Bf16Network, optimizer: torch.optim.Optimizer, masking: Masking):
        groups = optimizer.param_groups
        if not isinstance(optimizer, torch.optim.SGD) or len(groups) != 1:
            raise ValueError("sparse steps know torch.optim.SGD with one group of parameters")
        if groups[0]["momentum"] <= 0 or groups[0]["dampening"] or groups[0]["maximize"]:
            raise ValueError("sparse steps know SGD with momentum, without dampening, minimising")
        self.net, self.optimizer, self.masking = net, optimizer, masking
        self.pending: dict[str, int] = {}
        self.momentum: dict[str, Tensor] = {}  # of the non-zeros [nnz]
        self.gather()

    def _buffer(self, name: str) -> Tensor:
        """The momentum of all weights, as torch keeps it; its first one is 0.9 * 0 + g too."""
        weight = self.net.layers[name].weight
        state = self.optimizer.state[weight]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(weight)
        return state["momentum_buffer"].view(-1)

    def gather(self) -> None:
        """Take weights and momentum from model and optimizer, by the masks as they are now."""
        self.net.follow()
        self.momentum = {n: self._buffer(n)[x.kernel.index] for n, x in self.net.sparse().items()}

    @torch.no_grad()
    def step(self) -> None:
        """Move all parameters by the gradients of the last pass."""
        (group,) = self.optimizer.param_groups
        values: list[Tensor] = []
        grads: list[Tensor] = []
        momenta: list[Tensor] = []
        for name, layer in self.net.sparse().items():
            if layer.gradient is None:
                assert layer.whole is not None
                whole, kept = layer.whole.view(-1), self._buffer(name)
                kept.mul_(group["momentum"] ** (self.pending.pop(name, 0) + 1)).add_(whole)
                grads.append(whole[layer.kernel.index])
            else:
                self.pending[name] = self.pending.get(name, 0) + 1
                grads.append(layer.gradient)
            values.append(layer.kernel.kept())
            momenta.append(self.momentum[name])
        if values:
            torch._fused_sgd_(
                values, grads, momenta, weight_decay=group["weight_decay"],
                momentum=group["momentum"], lr=group["lr"], dampening=0.0,
                nesterov=group["nesterov"], maximize=False, is_first_step=False,
            )  # fmt: skip
        self.optimizer.step()
        for name, mask in self.masking.masks.items():
            if self.net.layers[name].kernel.values is None:
                clear_outside(self.net.layers[name].weight, mask)

    @torch.no_grad()
    def write_back(self, settle: bool = True) -> None:
        """Weights and momentum to model and optimizer, inactive momentum caught up with."""
        for name, layer in self.net.sparse().items():
            kept = self._buffer(name)
            steps = self.pending.pop(name, 0) if settle else 0
            if steps:
                kept.mul_(self.optimizer.param_groups[0]["momentum"] ** steps)
            kept[layer.kernel.index] = self.momentum[name]
            layer.weight.data.view(-1)[layer.kernel.index] = layer.kernel.kept()


class Bf16Engine(Engine):
    """All layers by the bfloat16 kernels; inactive weights have gradients in the window only."""

    name, windowed = "bf16", True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.net = Bf16Network(task.model, task.masking.masks)
        self.sgd = Bf16SGD(self.net, task.optimizer, task.masking)

    def step(self, index: Tensor, left: float) -> Tensor:
        """See `Engine.step`."""
        images, labels = self.task.batch(index)
        self.net.dense_gradients = left <= self.task.schedule.window
        logits = self.net.forward(images, True).requires_grad_()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.task.run.label_smoothing)
        (gradient,) = torch.autograd.grad(loss, logits)
        self.net.backward(gradient)
        self.sgd.step()
        self.task.masking.advance()
        return loss.detach()

    @torch.no_grad()
    def wrong(self, images: Tensor, labels: Tensor) -> int:
        """See `Engine.wrong`; in batches of training's size, whose memory is there."""
        size = -(-self.task.run.batch_size // 32) * 32
        parts = zip(images.split(size), labels.split(size), strict=True)
        return sum(int((self.net.forward(x, False).argmax(1) != y).sum()) for x, y in parts)

    def write_back(self) -> None:
        """See `Engine.write_back`."""
        self.sgd.write_back()

    def follow(self, report: Sequence[LayerReport]) -> None:
        """See `Engine.follow`."""
        self.sgd.gather()

    def state_dict(self) -> dict[str, Any]:
        """See `Engine.state_dict`; momentum caught up with would round as in no other run."""
        self.sgd.write_back(settle=False)
        return {"pending": dict(self.sgd.pending)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Engine.load_state_dict`."""
        self.sgd.gather()
        self.sgd.pending = dict(state["pending"])


class _Pass(torch.autograd.Function):
    """A network's forward and backward pass as one function of torch's."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, images: Tensor, net: Bf16Network) -> Tensor:
        ctx.net = net
        return net.forward(images, True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.net.backward(gradients[0].contiguous())
        return torch.zeros(()), None, None


class Accelerated:
    """See `accelerate`."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.SGD, masking: Masking) -> None:
        self.model, self.masking = model, masking
        self.net = Bf16Network(model, masking.masks)
        self.sgd = Bf16SGD(self.net, optimizer, masking)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [N, classes], fp32, of images [N, C, H, W] in fp32; call backward() on a loss of
        them before the next batch.
        """
        if self.model.training and torch.is_grad_enabled():
            return _Pass.apply(torch.zeros((), requires_grad=True), images, self.net)
        return self.net.forward(images, self.model.training)

    def step(self) -> None:
        """In place of optimizer.step() and masking.step()."""
        self.sgd.step()
        self.masking.advance()

    def update(self, prune_rate: float | None = None) -> list[LayerReport]:
        """In place of masking.update()."""
        self.write_back()
        report = self.masking.update(prune_rate)
        self.sgd.gather()
        return report

    def write_back(self) -> None:
        """Weights and momentum to the model and the optimizer: before anybody reads these."""
        self.sgd.write_back()


def accelerate(model: nn.Module, optimizer: torch.optim.SGD, masking: Masking) -> Accelerated:
    """The model in training through the bfloat16 kernels, in a loop of one's own:

    ```python
    fast = accelerate(model, optimizer, masking)
    loss = F.cross_entropy(fast(images), labels); loss.backward(); fast.step()   # every batch
    report = fast.update()                                                       # every epoch
    fast.write_back()                                  # before model.state_dict()
    ```

    Convolutions, batch norm, ReLU, max and average pooling, dropout, linear layers and sums. The
    gradients of all weights are computed in each step; `fast.net.dense_gradients = False` leaves
    out those of inactive weights, which only the steps before an update need.

    Raises:
        ValueError: a layer that isn't known, or another kind of optimizer.
        KernelsUnavailable: no AVX-512 with bfloat16, or no compiler.
    """
    return Accelerated(model, optimizer, masking)


def knows(model: nn.Module) -> bool:
    """Whether this machine has the kernels, and these all layers of the model."""
    try:
        return available() and Bf16Network(model, {}) is not None
    except ValueError:
        return False
