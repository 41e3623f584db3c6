"""What the training loop asks of whatever computes its steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lib.config import Run
from lib.data import Dataset
from lib.masking import LayerReport, Masking
from lib.training.schedule import Schedule

EVALUATION_BATCH = 1000


@dataclass
class Task:
    """All that an engine reads, and what it moves: weights and momentum; with DeepR, masks.

    `batch(index)` gives the training images `index` [B] as the network takes them, [B, C, H, W],
    and their labels [B]; it draws from `generators`.
    """

    run: Run
    schedule: Schedule
    data: Dataset
    device: torch.device
    model: nn.Module
    optimizer: torch.optim.SGD
    masking: Masking
    batch: Callable[[Tensor], tuple[Tensor, Tensor]]
    generators: Sequence[torch.Generator] = ()


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

    def follow(self, report: Sequence[LayerReport]) -> None:  # noqa: B027
        """Go on from masks, weights and momentum after the update that gave this report."""

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: what model, optimizer and Masking, read after this call, don't hold."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on from there, once model, optimizer and Masking are loaded."""
