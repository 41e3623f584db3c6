"""What can be known to fail is said before the first step: networks, rules, folders."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

from lib.config import Run
from lib.runs.single import Task


def check_before_training(tasks: Sequence[Task]) -> None:
    """Raise ValueError, one sentence, for networks that can't be built or masked as asked, and for
    folders that can't be written to.
    """
    for folder in {
        folder for task in tasks for folder in (task.csv.parent, task.checkpoint.parent)
    }:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(
                f"{folder} can't be written to ({error.strerror}): nothing was trained; name "
                "another folder with --results, or for checkpoints with CHECKPOINT_ROOT"
            ) from None
    kinds: dict[object, Run] = {}  # one run of each choice of network and rules, the sparsest
    for run in sorted((task.run for task in tasks), key=lambda run: run.density):
        rules = (run.method, run.prune, run.redistribution, run.growth, run.schedule, run.init)
        network = (run.dataset, run.model, run.dropout, run.keep_dense, run.options)
        kinds.setdefault((*network, *rules, run.momentum > 0), run)
    for run in kinds.values():
        check_network(run)


def check_network(run: Run) -> None:
    """Build the network and its masks; ValueError says what is wrong."""
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
