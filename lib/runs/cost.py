"""What a run will cost on this machine, by the runs it has done.  Imports no torch by itself."""

from __future__ import annotations

import contextlib
import functools
import heapq
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from lib import experiments, paths
from lib.config import Run
from lib.results import store as results
from lib.runs.machine import device_name

# An image in training costs three forward passes, one in validation one.
PASSES_IN_TRAINING = 3
# Of the rows most like a run the newest so many count: the code changes, and a machine of the same
# name may be another one.
NEWEST = 5
# Loading data and reading the test set: what a run takes beside its training.
BESIDE_TRAINING_SECONDS = 0.3


def passes(run: Run) -> float:
    """Forward passes of one image that the training of a run amounts to, validation included."""
    return run.epochs * (PASSES_IN_TRAINING * run.images_an_epoch + run.images_to_validate_on)


def makespan(seconds: Iterable[float], jobs: int) -> float:
    """Seconds until all are done, `jobs` side by side, each begun in order as one becomes free."""
    free = [0.0] * jobs
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def clock(seconds: float) -> str:
    """A time for people: "40 s", "12 min", "3.4 h", "20 days"."""
    for unit, length, digits in (("s", 1, 0), ("min", 60, 0), ("h", 3600, 1)):
        if seconds < 90 * length and (unit != "h" or seconds < 172_800):
            return f"{seconds / length:.{digits}f} {unit}"
    return f"{seconds / 86_400:,.0f} days"


def rows_under(root: Path) -> pd.DataFrame:
    """The runs of all profiles under a folder of results, and of the repository's own, each once.
    A file that can't be read is left out.
    """
    folders = [paths.results_dir(p, r) for r in (root, None) for p in experiments.PROFILES]
    tables = []
    for path in dict.fromkeys(p.resolve() for f in folders for p in results.run_paths(f)):
        with contextlib.suppress(ValueError, OSError):
            tables.append(results.read_runs(path))
    rows = pd.concat([pd.DataFrame(columns=list(results.COLUMNS)), *tables], ignore_index=True)
    return rows.drop_duplicates("run_id")


class Estimator:
    """Seconds a run will take, on its own share of the machine.

    By the median time of a forward pass among the rows that are most like it: same network, then
    same way of computing, then nearest density, then same method, then this machine. Rows of other
    machines (processors for a processor, GPUs for a GPU) are scaled by what both have done. A
    network without rows is measured by the one with rows whose FLOPs are nearest; without any
    row, by the rate of a short dense matrix product.
    """

    def __init__(self, rows: pd.DataFrame, device: str) -> None:
        self.device = device
        self.machine = device_name(device)
        self.like: dict[str, pd.DataFrame] = {}
        gpu = rows["device"].str.contains("NVIDIA|GeForce|Tesla|Radeon|Instinct")
        rows = rows[(gpu == (device != "cpu")) & (rows["steps"] > 0)].sort_values("finished_utc")
        self.rows_of = sorted(set(rows["device"]), key=lambda name: name != self.machine)[:1]
        if not rows.empty:
            facts = self._scaled(_facts(rows))
            self.like = {str(model): table for model, table in facts.groupby("model")}

    def _scaled(self, facts: pd.DataFrame) -> pd.DataFrame:
        """With the seconds of other machines as they would be here."""
        cells = facts.groupby(["machine", "model", "way", "method", "density"])["seconds"].median()
        machines = cells.unstack("machine")
        if self.machine in machines:
            for other in machines.columns.drop(self.machine):
                ratio = (machines[self.machine] / machines[other]).median()
                if ratio > 0:  # not NaN: there are cells that both have done
                    facts.loc[facts["machine"] == other, "seconds"] *= ratio
        return facts

    def known(self, run: Run) -> bool:
        """Whether rows of the same network say what the run costs."""
        return run.model in self.like

    def seconds(self, run: Run) -> float:
        """Estimated wall-clock seconds of one run."""
        return BESIDE_TRAINING_SECONDS + passes(run) * self._of_a_pass(run)

    def _of_a_pass(self, run: Run) -> float:
        if self.known(run):
            return self._median(run.model, run)
        flops = _flops(run.model)
        if not self.like:
            return flops / _flops_per_second(self.device)
        nearest = min(self.like, key=lambda model: abs(math.log(_flops(model) / flops)))
        return self._median(nearest, run) * flops / _flops(nearest)

    def _median(self, model: str, run: Run) -> float:
        """Of the rows most like the run; each likeness counts among those that share the last."""
        rows = self.like[model]
        for difference in (
            rows["way"] != f"{run.kernels} {run.precision}",
            (np.log(rows["density"]) - math.log(run.density)).abs(),
            rows["method"] != run.method,
            rows["machine"] != self.machine,
        ):
            here = difference.loc[rows.index]
            rows = rows[here == here.min()]
        return float(rows["seconds"].tail(NEWEST).median())


def _facts(rows: pd.DataFrame) -> pd.DataFrame:
    """What tells the cost of each row, and its seconds for a forward pass of one image."""
    others = [json.loads(text) if text else {} for text in rows["overrides"]]
    fractions = [other.get("val_fraction", Run.val_fraction) for other in others]
    samples = rows["train_samples"].fillna(0).astype(int)
    passes_an_image = [
        passes(Run(dataset=name, train_samples=n, val_fraction=share, batch_size=1, epochs=1))
        / (n or Run(dataset=name, val_fraction=share).images_an_epoch)
        for name, n, share in zip(rows["dataset"], samples, fractions, strict=True)
    ]
    images = (rows["steps"] * rows["batch_size"]).astype(float)
    ways = [other.get("kernels", Run.kernels) for other in others]
    return pd.DataFrame(
        {
            "machine": rows["device"],
            "model": rows["model"],
            "way": [f"{way} {p}" for way, p in zip(ways, rows["precision"], strict=True)],
            "method": rows["method"],
            "density": rows["density"].astype(float),
            "seconds": rows["train_seconds"].astype(float) / (images * passes_an_image),
        }
    )


@functools.lru_cache(maxsize=256)
def _flops(model: str) -> int:
    from lib.models import forward_flops

    return sum(forward_flops(model).values())


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
