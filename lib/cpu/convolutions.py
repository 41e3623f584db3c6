"""Training a convolutional network over its non-zero weights by lib/cpu, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lib.cpu.network import SPARSE_UP_TO, sparse_network
from lib.cpu.optimizer import SparseSGD
from lib.engine import Task, TorchEngine


class SparseEngine(TorchEngine):
    """Layers through the sparse kernels (all that they know, or those with few weights), the others
    through torch; gradients of inactive weights only in the window before an update.
    """

    name, windowed = "sparse", True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        up_to = 1.0 if task.run.kernels == "sparse" else SPARSE_UP_TO
        self.network = self.sparse = sparse_network(
            task.model, task.masking.masks, sparse_up_to=up_to
        )
        self.sgd: SparseSGD | None = None
        if task.run.momentum > 0:
            self.sgd = SparseSGD(self.sparse, task.optimizer, task.masking)

    def step(self, index: Tensor, left: float) -> Tensor:
        """See `Engine.step`."""
        self.sparse.dense_gradients = left <= self.task.schedule.window
        return super().step(index, left)

    def move_weights(self) -> None:
        """See `TorchEngine.move_weights`."""
        if self.sgd is None:
            super().move_weights()
        else:
            self.sgd.step()

    def write_back(self) -> None:
        """See `Engine.write_back`."""
        if self.sgd is not None:
            self.sgd.sync()

    def state_dict(self) -> dict[str, Any]:
        """By how many steps momentum lags behind. Caught up with here, it would round as it does
        in no other run.
        """
        return {"pending": dict(self.sgd.pending)} if self.sgd is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Engine.load_state_dict`."""
        if self.sgd is not None:
            self.sgd.pending = dict(state["pending"])
