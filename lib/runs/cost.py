"""What a run will cost on this machine, from the runs it has done and the FLOPs of the others."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import pandas as pd

from lib.config import Run
from lib.results import store as results

TRAIN_SAMPLES = {"mnist": 54_000, "cifar10": 45_000, "imagenet": 1_281_167}


def samples(run: Run) -> int:
    """Images that pass through the network in training, over all epochs."""
    return run.epochs * (run.train_samples or TRAIN_SAMPLES[run.dataset])


class Estimator:
    """Seconds a run will take: by its like among the rows in `folder`, else by its FLOPs.

    Rows count only when this device computed them. Its like: same model and method, else same
    model. Without any row of the model, training FLOPs (three times the forward pass) over the rate
    of a short dense matrix product measured on the spot.
    """

    def __init__(self, folder: Path, device: str) -> None:
        from lib.runs.runner import device_name

        tables = [results.read_runs(path) for path in results.run_paths(folder)]
        tables = [table for table in tables if not table.empty]
        rows = pd.concat(tables) if tables else pd.DataFrame(columns=list(results.COLUMNS))
        rows = rows[(rows["device"] == device_name(device)) & (rows["steps"] > 0)]
        images = rows["steps"] * rows["batch_size"]
        self.per_image = (rows["train_seconds"] / images).groupby([rows["model"], rows["method"]])
        self.by_method: dict[Any, float] = self.per_image.median().to_dict()
        self.device = device

    def seconds(self, run: Run) -> float:
        """Estimated wall-clock seconds of one run, on its own share of the machine."""
        exact = self.by_method.get((run.model, run.method))
        if exact is None:
            like = [s for (model, _), s in self.by_method.items() if model == run.model]
            exact = sum(like) / len(like) if like else _seconds_per_image(run.model, self.device)
        return samples(run) * exact


@functools.lru_cache(maxsize=64)
def _seconds_per_image(model: str, device: str) -> float:
    from lib.models import forward_flops

    return 3 * sum(forward_flops(model).values()) / _flops_per_second(device)


@functools.lru_cache(maxsize=2)
def _flops_per_second(device: str) -> float:
    """Half the rate of a 1024 x 1024 float32 product: what networks reach of it, roughly."""
    import torch

    a = torch.rand(1024, 1024, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - start)
    return 0.5 * 2 * 1024**3 / best
