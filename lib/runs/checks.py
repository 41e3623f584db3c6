"""What can be known to fail is said before the first step: networks, rules, folders, disk space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lib.config import Run
from lib.runs.machine import check_space, check_writable

# A weight in a checkpoint: itself and its momentum in float32, its mask; twice, since the new
# file is complete before the old one goes.
CHECKPOINT_BYTES = 2 * (4 + 4 + 1)
# Rows of a run, with its curves and layers; a CSV is written anew beside the old one.
ROW_BYTES = 100_000


def check_settings(jobs: int | None, threads: int | None) -> None:
    """Raise ValueError unless both are None or at least 1."""
    for name, value in (("jobs", jobs), ("threads", threads)):
        if value is not None and not 1 <= value <= 10_000:
            raise ValueError(f"{name} must be from 1 to 10000, got {value}")


def check_before_training(
    runs: Sequence[Run], csvs: Sequence[Path], checkpoints: Path, jobs: int
) -> None:
    """Raise ValueError, one sentence, for networks that can't be built or masked as asked, for
    folders that can't be written to, and for a disk without room for `jobs` checkpoints.
    """
    check_writable(dict.fromkeys((*(csv.parent for csv in csvs), checkpoints)))
    largest = max((check_network(run) for run in _of_a_kind(runs)), default=0)
    check_space(checkpoints, jobs * largest * CHECKPOINT_BYTES)
    for folder in {csv.parent for csv in csvs}:
        stored = sum(path.stat().st_size for path in folder.glob("*.csv"))
        check_space(folder, stored + ROW_BYTES * len(runs))


def _of_a_kind(runs: Sequence[Run]) -> list[Run]:
    """One run for each choice of network and rules; of its densities the lowest."""
    kinds: dict[object, Run] = {}
    for run in sorted(runs, key=lambda run: run.density):
        rules = (run.prune, run.redistribution, run.growth, run.schedule, run.init, run.options)
        network = (run.dataset, run.model, run.dropout, run.keep_dense)
        kinds.setdefault((network, run.method, rules, run.momentum > 0), run)
    return list(kinds.values())


def check_network(run: Run) -> int:
    """Build the network and its masks; its number of weights. ValueError says what is wrong."""
    import torch

    from lib.methods.masks import maskable_parameters
    from lib.models import MODELS, model_spec
    from lib.training import start

    spec = model_spec(run.model)
    if spec.dataset != run.dataset:
        others = [name for name, other in MODELS.items() if other.dataset == run.dataset]
        raise ValueError(
            f"{run.model} is a network for {spec.dataset}, not for {run.dataset}: there are "
            f"{', '.join(others)}"
        )
    model = start.network(run)
    masks = None
    if run.method == "snip":  # its own need the data
        weights = maskable_parameters(model, run.keep_dense)
        masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    start.masking(run, model, start.optimizer(run, model), total_steps=run.epochs, masks=masks)
    return sum(parameter.numel() for parameter in model.parameters())
