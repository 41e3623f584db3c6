"""What the training loop asks of whatever computes its steps, and the engine that torch gives.

Faster ones for the CPU are in lib/cpu; without that folder everything trains through torch.
"""

from __future__ import annotations

import ctypes
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.config import Run
from lib.data import Dataset
from lib.masking import EVERY_STEP, Masking
from lib.schedule import Schedule

EVALUATION_BATCH = 1000


@dataclass
class Task:
    """All that an engine reads, and what it moves: weights and momentum; with DeepR, masks.

    `batch(index)` gives the training images `index` [B] as the network takes them, [B, C, H, W],
    and their labels [B].
    """

    run: Run
    schedule: Schedule
    data: Dataset
    device: torch.device
    model: nn.Module
    optimizer: torch.optim.SGD
    masking: Masking
    batch: Callable[[Tensor], tuple[Tensor, Tensor]]


class Engine(ABC):
    """Computes the steps of one run. Between `write_back()` and the next step, weights, momentum
    and masks are as everybody knows them: in the model, the optimizer and the Masking.
    """

    name: ClassVar[str]  # in the row of the results, column `kernels`
    windowed: ClassVar[bool]  # the momentum of inactive weights is gathered in a window only

    def __init__(self, task: Task) -> None:
        self.task = task

    @abstractmethod
    def step(self, index: Tensor, left: float) -> Tensor:
        """One mini-batch, images `index` [B] of the training set: forward, loss, backward, SGD,
        inactive weights at zero, the Masking one step on. Returns its mean loss, 0-d, detached.

        `left`: mini-batches up to the next update of the masks, this one included; inf: none.
        """

    @abstractmethod
    def wrong(self, images: Tensor, labels: Tensor) -> int:
        """How many of the images [N, C, H, W] get another class than their label [N], in
        evaluation mode; the model is in training mode afterwards.
        """

    def write_back(self) -> None:  # noqa: B027  torch keeps everything where it belongs
        """Weights and momentum to the model and the optimizer: before an update of the masks."""

    def follow(self) -> None:  # noqa: B027
        """Go on from masks, weights and momentum as they are: after an update of the masks."""

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: what model, optimizer and Masking, read after this call, don't hold."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, once model, optimizer and Masking are loaded."""
        self.follow()


class TorchEngine(Engine):
    """All weights, zeros too, on any device; `network` gives the logits [B, classes] of images."""

    name, windowed = "torch", False

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.network: nn.Module = task.model
        self.parameters = list(task.model.parameters())
        if task.device.type == "cuda":
            # Whole epochs of one shape: worth trying out which algorithm is fastest.
            torch.backends.cudnn.benchmark = True

    def step(self, index: Tensor, left: float) -> Tensor:
        """See `Engine.step`."""
        images, labels = self.task.batch(index)
        with self._autocast():
            loss = F.cross_entropy(
                self.network(images), labels, label_smoothing=self.task.run.label_smoothing
            )
        for parameter in self.parameters:  # optimizer.zero_grad() costs 3 % of a LeNet step
            parameter.grad = None
        loss.backward()
        self.move_weights()
        if self.task.run.method in EVERY_STEP:
            self.task.masking.step()
        else:
            self.task.masking.advance()
        return loss.detach()

    def move_weights(self) -> None:
        """From their gradients; the inactive ones stay at zero."""
        self.task.optimizer.step()
        self.task.masking.apply()

    @torch.no_grad()
    def wrong(self, images: Tensor, labels: Tensor) -> int:
        """See `Engine.wrong`."""
        self.network.eval()
        wrong = torch.zeros((), dtype=torch.long, device=self.task.device)
        size = EVALUATION_BATCH
        for batch, target in zip(images.split(size), labels.split(size), strict=True):
            with self._autocast():
                wrong += (self.network(batch).argmax(1) != target).sum()
        self.network.train()
        return int(wrong)

    def _autocast(self) -> torch.autocast:
        low = self.task.run.precision == "bf16"
        return torch.autocast(self.task.device.type, torch.bfloat16, enabled=low)


def choose(run: Run, data: Dataset, model: nn.Module, device: torch.device) -> type[Engine]:
    """The engine of the run: what `run.kernels` asks for, as far as lib/cpu is there and knows this
    network, these settings and this machine.
    """
    if device.type != "cpu" or run.kernels == "torch":
        return TorchEngine
    try:
        from lib.cpu import choose as fast
    except ModuleNotFoundError as error:
        if error.name != "lib.cpu":
            raise
        return TorchEngine
    return fast(run, data, model) or TorchEngine


def momentum_buffer(optimizer: torch.optim.SGD, parameter: Tensor) -> Tensor:
    """The parameter's momentum; zeros before the first step: torch starts at 0.9 * 0 + g too."""
    state = optimizer.state[parameter]
    if state.get("momentum_buffer") is None:
        state["momentum_buffer"] = torch.zeros_like(parameter)
    return state["momentum_buffer"]


def memory_format(engine: type[Engine], run: Run, model: nn.Module) -> torch.memory_format:
    """In which the engine has images and weights: convolutions run faster with channels last
    (`make bench`), but DeepR and the kernels index flat weights.
    """
    convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
    if convolutional and engine is TorchEngine and run.method != "deepr":
        return torch.channels_last
    return torch.contiguous_format


def keep_freed_memory() -> None:
    """Have malloc keep large blocks for reuse in this process, where it is glibc's.

    By default glibc returns tensors of 32 MiB and more to the system when freed and gets them back
    as new pages, zeroed one by one: at batch 128 that costs several times the arithmetic of
    elementwise layers, in dense and sparse training alike.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)
