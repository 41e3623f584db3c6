"""Training on the CPU through our own kernels, and which of them computes a run."""

from __future__ import annotations

from torch import nn

from lib.config import UNMASKED, Run
from lib.cpu.bf16_engine import Bf16Engine, accelerate, knows
from lib.cpu.library import available
from lib.cpu.network import SparseEngine
from lib.cpu.perceptron import MAX_SAMPLES, PerceptronEngine, perceptron_layers
from lib.data import Dataset
from lib.engine import Engine
from lib.masking import EVERY_STEP

__all__ = ["accelerate", "choose"]

# Convolutional networks go through the sparse kernels in these families, up to this density and
# from this batch size. A rule and no measurement, the same on every machine: whole steps of
# AlexNet-s, VGG16-D and WRN-16-8 at batch 128, dense windows counted, are 1.3 to 2.9 times as fast
# as dense ones at 1 to 20 % of the weights and 0.98 to 1.11 times at 50 %
# (results/bench/kernels.csv, sparse_steps). The committed rows' engines are those it gives.
SPARSE_FAMILIES = ("lenet5", "alexnet-", "vgg16-", "wrn-16-", "wrn-22-", "wrn-28-")
SPARSE_NETWORK_UP_TO = 0.2
SPARSE_BATCH_FROM = 64


def choose(run: Run, data: Dataset, model: nn.Module) -> type[Engine] | None:
    """The fast engine of a run on the CPU, None for torch: what `run.kernels` asks for, as far as
    these kernels know the network, the settings and the machine.
    """
    if run.momentum == 0:
        return None
    asked, learns = run.kernels == "sparse", run.method not in (*UNMASKED, *EVERY_STEP)
    if asked and run.precision == "bf16":
        convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
        return Bf16Engine if learns and convolutional and knows(model) else None
    if run.precision != "fp32" or not available():
        return None
    if perceptron_layers(model):
        known = run.batch_size <= MAX_SAMPLES and not run.label_smoothing
        known = known and not (run.augment and data.augment is not None)
        return PerceptronEngine if known else None
    pays = (
        run.model.startswith(SPARSE_FAMILIES)
        and run.density <= SPARSE_NETWORK_UP_TO
        and run.batch_size >= SPARSE_BATCH_FROM
    )
    return SparseEngine if learns and (asked or pays) else None
