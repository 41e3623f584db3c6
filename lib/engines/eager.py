"""Training by torch's operators: each layer as its module, masked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.engines.base import EVALUATION_BATCH, Engine, Task
from lib.masking import EVERY_STEP


class TorchEngine(Engine):
    """All weights, zeros too, on any device; `network` gives the logits [B, classes] of images."""

    name, windowed = "torch", False

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.network: nn.Module = task.model
        self.parameters = list(task.model.parameters())
        self._rewires = task.run.method in EVERY_STEP  # looks at the masks on the host
        if task.device.type == "cuda":
            # Whole epochs of one shape: worth trying out which algorithm is fastest.
            torch.backends.cudnn.benchmark = True

    def step(self, index: Tensor, left: float) -> Tensor:
        """See `Engine.step`."""
        masking = self.task.masking
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

    def _autocast(self) -> torch.autocast:
        low = self.task.run.precision == "bf16"
        return torch.autocast(self.task.device.type, torch.bfloat16, enabled=low)
