"""Training by the bfloat16 kernels: `accelerate` for one's own loop, and the engine of runs.

Torch computes the loss of the logits and moves what isn't sparse.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.cpu.bf16 import available
from lib.cpu.bf16_network import Bf16Network
from lib.engine import Engine, Task
from lib.masking import LayerReport, Masking, clear_outside


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
        """The momentum of all weights, as torch keeps it; its first one is 0.9 * 0 + g too."""
        weight = self.net.layers[name].weight
        state = self.optimizer.state[weight]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(weight)
        return state["momentum_buffer"].view(-1)


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

    def follow(self, report: Sequence[LayerReport]) -> None:
        """See `Engine.follow`."""
        self.fast.gather()

    def state_dict(self) -> dict[str, Any]:
        """See `Engine.state_dict`; momentum caught up with would round as in no other run."""
        self.fast.write_back(settle=False)
        return {"pending": dict(self.fast.pending)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Engine.load_state_dict`."""
        self.fast.gather()
        self.fast.pending = Counter(state["pending"])


def knows(model: nn.Module) -> bool:
    """Whether this machine has the kernels, and these all layers of the model."""
    try:
        return available() and Bf16Network(model, {}) is not None
    except ValueError:
        return False
