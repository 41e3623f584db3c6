"""What the grids of lib/experiments.py are made of, as data: how large the runs are at each
profile, the variants of the algorithm, and what the official code left dense.

Profiles: `paper` is the paper's scale; `quick` a reduced one for two CPU cores, with the learning
rate decays at the same fractions of the training; `hours`, for hours of two cores, has networks
that learn CIFAR-10; `smoke` walks the same code in seconds. What is reduced is said on every
figure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Fields of `Run`; a list is an axis, and the block stands for all combinations. `seeds` is the
# number of seeds, 0 to n-1, shared by all cells so that tests can be paired.
Block = dict[str, Any]
Blocks = tuple[Block, ...]

SEEDS = {"smoke": 2, "quick": 3, "hours": 3, "paper": 10}

# The paper's MNIST protocol is Run's default. A step of an epoch of 54,000 images at batch 100 is
# one of 540; decays at 25,000 and 50,000 of 54,000 steps in the paper.
_MNIST: dict[str, Block] = {
    # 240 steps with decays at 111 and 222: enough for every method to leave chance behind.
    "smoke": {"epochs": 4, "lr_decay_every_steps": 111, "train_samples": 6_000},
    "quick": {"epochs": 10, "lr_decay_every_steps": 2_500},
    "hours": {"epochs": 10, "lr_decay_every_steps": 2_500},
    "paper": {},
}
# LeNet-5 costs nine times as much as LeNet-300-100: fewer images, as many mask updates.
_LENET5: dict[str, Block] = {
    "smoke": {"epochs": 2, "lr_decay_every_steps": 3, "train_samples": 300}
    | {"val_fraction": 0.01, "test_samples": 1_000},
    "quick": {"epochs": 10, "lr_decay_every_steps": 463, "train_samples": 10_000},
    "paper": {},
}
# 250 epochs of 352 steps with decays at 30,000 and 60,000 of 88,000 steps. The other reading of
# the protocol, 100 epochs with a decay at 25,000, is a `--set epochs=100
# --set lr_decay_every_steps=25000` away. A tenth of a training set this small is too little to
# learn from and too much to evaluate in each epoch: the reduced profiles hold out less, and read a
# part of the test set. What has learned nothing yet is no evidence: there they have one seed.
_CIFAR: dict[str, Block] = {
    "smoke": {"epochs": 2, "lr_decay_every_steps": 2, "train_samples": 128, "batch_size": 64}
    | {"val_fraction": 0.004, "test_samples": 200, "seeds": 1},
    # Batches of 25: 320 steps out of few images, and activations that stay in the cache.
    "quick": {"epochs": 8, "lr_decay_every_steps": 107, "train_samples": 1_000, "batch_size": 25}
    | {"val_fraction": 0.004, "test_samples": 5_000, "seeds": 1},
    # All 45,000 images, an epoch of 352 steps: 30 of them in place of 250.
    "hours": {"epochs": 30, "lr_decay_every_steps": 3_600, "batch_size": 128},
    "paper": {"epochs": 250, "lr_decay_every_steps": 30_000, "batch_size": 128},
}
# AlexNet's five million weights make small batches dear: larger ones, and fewer passes.
_ALEXNET_QUICK: Block = {"epochs": 5, "lr_decay_every_steps": 34, "batch_size": 50}

# ImageNet: 5,004 steps an epoch, decays at epochs 30, 60 and 90; trained by `torchrun -m
# lib.runs.imagenet`. Three seeds: the paper's number isn't known, and a run takes GPU days.
IMAGENET: Block = {"dataset": "imagenet", "model": "resnet50", "batch_size": 256, "epochs": 100}
IMAGENET |= {"lr_decay_every_steps": 150_120, "weight_decay": 1e-4, "seeds": 3}


def scale(profile: str, model: str = "lenet300-100", **fields: Any) -> Block:
    """The protocol of a network at a profile, with these fields, the profile's seeds by default."""
    if model == "lenet5":
        of_model = _LENET5[profile]
    elif model.startswith(("lenet", "mlp")):
        of_model = _MNIST[profile]
    else:
        short = profile == "quick" and model.startswith("alexnet")
        of_model = {"dataset": "cifar10", **_CIFAR[profile], **(_ALEXNET_QUICK if short else {})}
    return {"seeds": SEEDS[profile], **of_model, "model": model, **fields}


# Variants of the algorithm between which paper and official code leave a choice
# (lib/methods), "ours" first; each of the others departs from it in one thing. A variant is one
# block.
_OURS: Block = {
    "prune": "magnitude",
    "prune_rate": 0.2,
    "redistribution": "momentum",
    "schedule": "cosine",
    "options": (),
    "dense_window_steps": 0,
    "kernels": "auto",
}
# Whether an inactive weight has any momentum decides: gathered in each of the epoch's 540 steps, as
# the kernels gather it only in the last ones before an update otherwise.
_ANYWHERE: Block = {**_OURS, "dense_window_steps": 540}
_FEEDBACK, _KEEP, _ELSEWHERE = ((k, 1.0) for k in ("feedback", "keep_regrown", "grow_anywhere"))
READINGS: dict[str, Block] = {
    "ours": _OURS,
    "feedback": {**_OURS, "prune": "magnitude_up", "options": (_FEEDBACK,)},
    "keep": {**_OURS, "options": (_KEEP,)},
    "anywhere": {**_ANYWHERE, "options": (_ELSEWHERE,)},
    "floor": {**_OURS, "schedule": "cosine_floor"},
    "official": {**_ANYWHERE, "prune": "magnitude_up", "schedule": "cosine_floor"}
    | {"options": (_FEEDBACK, _KEEP, _ELSEWHERE)},
    "per_epoch": {**_OURS, "options": (("anneal_every_steps", 540.0),)},
    "after": {**_OURS, "redistribution": "momentum_after", "prune": "magnitude_before"},
    "plain": {**_OURS, "prune": "magnitude_plain"},
    # Of 9 July 2019. By torch's operators: the kernels gather the momentum of inactive weights from
    # zero, so that nothing would be left to be reset.
    "reset": {**_OURS, "options": (("reset_momentum", 1.0),), "kernels": "torch"},
    "half": {**_OURS, "prune_rate": 0.5},  # the official command line's default
    "layer_size": {**_OURS, "redistribution": "layer_size"},
}


@dataclass(frozen=True)
class KeptDense:
    """The layers that the official code of July 2019 left dense by accident, and their size."""

    layers: tuple[str, ...]
    kept: int
    weights: int

    def real_density(self, nominal: float) -> float:
        """Share of all weights that is active when the other layers have the nominal one."""
        return (self.kept + nominal * (self.weights - self.kept)) / self.weights


# Names of batch-norm layers to be left out of the masks ("features.1", "features.4") were matched
# as substrings, and so took convolutions along.
_VGG_LAYERS = ("features.10", "features.14", "features.17", "features.40")
KEPT_DENSE = {
    "vgg16-c": KeptDense(_VGG_LAYERS, 1_294_336, 11_307_712),
    "vgg16-d": KeptDense(_VGG_LAYERS, 3_391_488, 15_239_872),
    "vgg16-like": KeptDense(_VGG_LAYERS, 3_391_488, 14_977_728),
    "alexnet-s": KeptDense(("features.12",), 884_736, 5_066_784),
    "alexnet-b": KeptDense(("features.12",), 884_736, 8_484_896),
}


# ------------------------------------------------------------------ blocks that several grids have

DENSE: Block = {"method": "dense", "density": 1.0}
# DeepR replaces weight decay by its own L1 (Bellec et al. 2018; the DSR authors' runs do the same).
DEEPR: Block = {"method": "deepr", "weight_decay": 0.0}
OTHERS = ["set", "dsr", "static"]
STARTS = ["uniform", "erk"]
# "none": each layer gets back what it lost (the official code of July 2019); "layer_size": what
# the official code calls none since August 2019.
ALL_RULES: Block = {
    "redistribution": ["momentum", "magnitude", "nonzeros", "layer_size", "none"],
    "growth": ["momentum", "random", "gradient"],
}
# the paper's ablation
TWO_BY_TWO: Block = {"redistribution": ["momentum", "none"], "growth": ["momentum", "random"]}
# The settings that the rule of `tuned_baselines` chose on 2026-11-30 from three seeds.
TUNED: Blocks = tuple(
    {"method": method, "density": density, "update_every_steps": steps, "prune_rate": rate}
    for method, density, steps, rate in (
        ("set", 0.01, 0, 0.4),
        ("set", 0.05, 100, 0.2),
        ("dsr", 0.01, 100, 0.4),
        ("dsr", 0.05, 100, 0.4),
        ("rigl", 0.01, 0, 0.2),
        ("rigl", 0.05, 0, 0.2),
    )
)


def alexnet(**fields: Any) -> Block:
    """AlexNet-s at 10 % of the weights for hours of two cores."""
    return scale("hours", "alexnet-s", **{"density": 0.1, **fields})


def curve(here: Block, densities: list[float]) -> Blocks:
    """Dense, and the five sparse methods at each density."""
    return (
        {**here, "method": "dense"},
        {**here, "method": ["sparse_momentum", *OTHERS], "density": densities},
        {**here, **DEEPR, "density": densities},
    )


def table(here: Block, snip: list[float], sparse_momentum: list[float]) -> Blocks:
    """Dense, SNIP and sparse momentum, each at its densities."""
    return (
        {**here, "method": "dense"},
        {**here, "method": "snip", "density": snip},
        {**here, "density": sparse_momentum},
    )
