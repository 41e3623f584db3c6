"""Which engine computes a run."""

from __future__ import annotations

import torch
from torch import nn

from lib.config import UNMASKED, Run
from lib.cpu import bf16_engine
from lib.data import Dataset
from lib.engines.base import Engine
from lib.engines.chain import perceptron_layers
from lib.engines.convolutions import SparseEngine
from lib.engines.eager import TorchEngine
from lib.engines.perceptron import PerceptronEngine
from lib.engines.step_cost import step_cost
from lib.engines.trainer import MAX_SAMPLES
from lib.kernels.library import available
from lib.masking import EVERY_STEP
from lib.training.schedule import Schedule

# Convolutional networks up to this density go through the sparse kernels where those are faster,
# unless training is so short that finding out would cost more than it gains.
SPARSE_NETWORK_UP_TO = 0.5
WORTH_CALIBRATING_STEPS = 1_000


def choose(
    run: Run, schedule: Schedule, data: Dataset, model: nn.Module, device: torch.device
) -> type[Engine]:
    """The engine of the run: what `run.kernels` asks for, as far as it knows this network, these
    settings and this machine; "auto" takes the fastest.
    """
    if run.kernels == "sparse" and run.precision == "bf16" and device.type == "cpu":
        learns = run.method not in (*UNMASKED, *EVERY_STEP) and run.momentum > 0
        convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
        known = learns and convolutional and bf16_engine.knows(model)
        return bf16_engine.Bf16Engine if known else TorchEngine
    if run.kernels == "torch" or device.type != "cpu" or run.precision != "fp32" or not available():
        return TorchEngine
    if perceptron_layers(model):
        known = run.batch_size <= MAX_SAMPLES and run.momentum > 0 and not run.label_smoothing
        known = known and not (run.augment and data.augment is not None)
        return PerceptronEngine if known else TorchEngine
    if run.method in (*UNMASKED, *EVERY_STEP):
        return TorchEngine
    if run.kernels == "sparse" or _sparse_pays(run, schedule, data, model):
        return SparseEngine
    return TorchEngine


def memory_format(engine: type[Engine], run: Run, model: nn.Module) -> torch.memory_format:
    """In which the engine has images and weights: convolutions run faster with channels last
    (`make bench`), but DeepR and the kernels index flat weights.
    """
    convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
    if convolutional and engine is TorchEngine and run.method != "deepr":
        return torch.channels_last
    return torch.contiguous_format


def _sparse_pays(run: Run, schedule: Schedule, data: Dataset, model: nn.Module) -> bool:
    """Whether a convolutional network trains faster by the sparse kernels, as measured here."""
    if (
        run.density > SPARSE_NETWORK_UP_TO
        or run.dataset == "imagenet"  # its images are read as they come
        or schedule.total_steps < WORTH_CALIBRATING_STEPS
    ):
        return False
    what = f"step model={run.model} density={run.density:g} batch={run.batch_size}"
    cost = step_cost(what, model, run.density, data.train_x[: run.batch_size])
    share = 0.0 if run.prune == "none" else min(1.0, schedule.window / schedule.period)
    return cost.sparse_is_faster(share)
