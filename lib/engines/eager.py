"""Training by torch's operators: each layer as its module, masked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.engines.base import EVALUATION_BATCH, Engine, Task
from lib.engines.graphs import CudaRecorder, GraphedStep
from lib.masking import EVERY_STEP

# What a recorded step keeps of the optimizer's settings.
_FIXED = ("lr", "momentum", "weight_decay", "nesterov")


class TorchEngine(Engine):
    """On a GPU that holds the data, steps are recorded once and replayed (lib/engines/graphs.py).

    Attributes:
        network: what computes the logits [B, classes] of images.
        graphed: the recorded step, None where each is computed anew.
    """

    name, windowed = "torch", False

    def __init__(self, task: Task, *, graphs: bool = True) -> None:
        super().__init__(task)
        self.network: nn.Module = task.model
        self.parameters = list(task.model.parameters())
        self.graphed: GraphedStep | None = None
        self._rewires = task.run.method in EVERY_STEP  # looks at the masks on the host
        if task.device.type == "cuda":
            # Whole epochs of one shape: worth trying out which algorithm is fastest.
            torch.backends.cudnn.benchmark = True
            if graphs and task.data.train_x.is_cuda and not self._rewires:
                recorder = CudaRecorder(task.device, task.generators)
                self.graphed = GraphedStep(
                    self.compute, self.parameters, task.run.batch_size, recorder
                )

    def step(self, index: Tensor, left: float) -> Tensor:
        """See `Engine.step`."""
        masking = self.task.masking
        if self.graphed is not None:
            masking.refresh()
            group = self.task.optimizer.param_groups[0]
            loss = self.graphed(index, tuple(group[name] for name in _FIXED))
            masking.advance()
            return loss
        loss = self.compute(index)
        if self._rewires:
            masking.step()
        else:
            masking.advance()
        return loss

    def compute(self, index: Tensor) -> Tensor:
        """The arithmetic of a step, up to inactive weights set back to zero: its mean loss."""
        images, labels = self.task.batch(index)
        with self._autocast():
            loss = F.cross_entropy(
                self.network(images), labels, label_smoothing=self.task.run.label_smoothing
            )
        for parameter in self.parameters:  # optimizer.zero_grad() costs 3 % of a LeNet step
            parameter.grad = None
        loss.backward()
        self.move_weights()
        return loss.detach()

    def move_weights(self) -> None:
        """From their gradients; the inactive ones stay at zero."""
        self.task.optimizer.step()
        self.task.masking.apply()

    @torch.no_grad()
    def wrong(self, images: Tensor, labels: Tensor) -> int:
        """See `Engine.wrong`."""
        self.network.eval()
        right = torch.zeros((), dtype=torch.long, device=self.task.device)
        for start in range(0, len(labels), EVALUATION_BATCH):
            part = slice(start, start + EVALUATION_BATCH)
            with self._autocast():
                logits = self.network(images[part])
            right += (logits.argmax(1) == labels[part]).sum()
        self.network.train()
        return len(labels) - int(right)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Engine.load_state_dict`: the momentum has other addresses now."""
        if self.graphed is not None:
            self.graphed.forget()

    def _autocast(self) -> torch.autocast:
        low = self.task.run.precision == "bf16"
        return torch.autocast(self.task.device.type, torch.bfloat16, enabled=low)
