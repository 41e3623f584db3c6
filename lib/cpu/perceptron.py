"""Training a perceptron by one call of lib/cpu a mini-batch, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lib.cpu.trainer import SPARSE_BELOW, PerceptronTrainer, Track
from lib.engine import Engine, Task
from lib.masking import EVERY_STEP, LayerReport


class PerceptronEngine(Engine):
    """See `PerceptronTrainer`."""

    name, windowed = "perceptron", True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        run = task.run
        rewires = run.method == "deepr" and run.density < SPARSE_BELOW
        below = 0.0 if run.method in EVERY_STEP else None  # its masks are new after each step
        self.trainer = PerceptronTrainer(
            task.model, task.optimizer, task.masking, sparse_below=below, rewires=rewires
        )

    def step(self, index: Tensor, left: float) -> Tensor:
        """See `Engine.step`."""
        task, trainer, window = self.task, self.trainer, self.task.schedule.window
        track = Track.NOTHING
        # DeepR's connections wake without momentum: what they had before is never read.
        if left <= window and not trainer.rewires:
            # A window that began before the last update goes on; a new one starts from zero.
            whole = window >= task.schedule.period
            track = Track.FIRST if left == window and not whole else Track.MORE
        loss = trainer.step(
            task.data.train_x,
            task.data.train_y,
            index,
            track=track,
            gradients=left == 1 and task.masking.growth.needs == "gradient",
        )
        if trainer.rewires:
            task.masking.advance()
            trainer.deepr_step()
        elif task.run.method in EVERY_STEP:
            task.masking.step()
        else:
            task.masking.advance()
        return torch.tensor(loss, dtype=torch.float64)

    def wrong(self, images: Tensor, labels: Tensor) -> int:
        """See `Engine.wrong`."""
        return self.trainer.wrong(images.contiguous(), labels)

    def write_back(self) -> None:
        """See `Engine.write_back`."""
        self.trainer.sync()

    def follow(self, report: Sequence[LayerReport]) -> None:
        """See `Engine.follow`."""
        self.trainer.follow(report)

    def state_dict(self) -> dict[str, Any]:
        """Nothing, once all is written back."""
        self.trainer.sync()
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Engine.load_state_dict`."""
        self.trainer.reload()
