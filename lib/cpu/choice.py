"""Which engine computes a run."""

from __future__ import annotations

from torch import nn

from lib.config import UNMASKED, Run
from lib.cpu import bf16_engine
from lib.cpu.chain import perceptron_layers
from lib.cpu.convolutions import SparseEngine
from lib.cpu.library import available
from lib.cpu.perceptron import PerceptronEngine
from lib.cpu.trainer import MAX_SAMPLES
from lib.data import Dataset
from lib.engine import Engine
from lib.masking import EVERY_STEP

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
    if run.kernels == "sparse" and run.precision == "bf16":
        learns = run.method not in (*UNMASKED, *EVERY_STEP) and run.momentum > 0
        convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
        known = learns and convolutional and bf16_engine.knows(model)
        return bf16_engine.Bf16Engine if known else None
    if run.precision != "fp32" or not available():
        return None
    if perceptron_layers(model):
        known = run.batch_size <= MAX_SAMPLES and run.momentum > 0 and not run.label_smoothing
        known = known and not (run.augment and data.augment is not None)
        return PerceptronEngine if known else None
    if run.method in (*UNMASKED, *EVERY_STEP):
        return None
    if run.kernels == "sparse" or sparse_pays(run):
        return SparseEngine
    return None


def sparse_pays(run: Run) -> bool:
    """Whether a convolutional network trains faster by the sparse kernels than by torch."""
    return (
        run.model.startswith(SPARSE_FAMILIES)
        and run.density <= SPARSE_NETWORK_UP_TO
        and run.batch_size >= SPARSE_BATCH_FROM
    )
