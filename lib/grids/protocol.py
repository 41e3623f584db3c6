"""The protocols: networks at each scale, and how an experiment is registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lib.config import Run

PROFILES = ("smoke", "quick", "hours", "paper")

Block = dict[str, Any]
Blocks = tuple[Block, ...]


@dataclass(frozen=True)
class Experiment:
    """A question, the notebook that answers it, and its blocks of runs at each profile.

    `measures` (lib/measures.py) are taken of each finished network.
    """

    title: str
    notebook: str
    blocks: dict[str, Blocks]
    measures: tuple[str, ...] = ()


class NoSuchRunError(ValueError):
    """No run of an experiment has the fields asked for."""


# ---------------------------------------------------------------------------------------- scales

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
_LENET5_QUICK: Block = {"epochs": 10, "lr_decay_every_steps": 463, "train_samples": 10_000}
_LENET5: dict[str, Block] = {
    "smoke": {"epochs": 2, "lr_decay_every_steps": 3, "train_samples": 300}
    | {"val_fraction": 0.01, "test_samples": 1_000},
    "quick": _LENET5_QUICK,
    "hours": _LENET5_QUICK,
    "paper": {},
}
# 250 epochs of 352 steps with decays at 30,000 and 60,000 of 88,000 steps. The other reading of
# the protocol, 100 epochs with a decay at 25,000, is a `--set epochs=100
# --set lr_decay_every_steps=25000` away. A tenth of a training set this small is too little to
# learn from and too much to evaluate in each epoch: the reduced profiles hold out less, and read a
# part of the test set. What has learned nothing yet is no evidence: there they have one seed.
CIFAR: dict[str, Block] = {
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

# Epochs of the paper's protocol, by data set.
PAPER_EPOCHS: dict[str, int] = {
    "mnist": Run().epochs,
    "cifar10": CIFAR["paper"]["epochs"],
    "imagenet": IMAGENET["epochs"],
}


def scale(profile: str, model: str = "lenet300-100", **fields: Any) -> Block:
    """The protocol of a network at a profile, with these fields, the profile's seeds by default."""
    if model == "lenet5":
        of_model = _LENET5[profile]
    elif model.startswith(("lenet", "mlp")):
        of_model = _MNIST[profile]
    else:
        short = profile == "quick" and model.startswith("alexnet")
        of_model = {"dataset": "cifar10", **CIFAR[profile], **(_ALEXNET_QUICK if short else {})}
    return {"seeds": SEEDS[profile], **of_model, "model": model, **fields}


EXPERIMENTS: dict[str, Experiment] = {}
Grid = Callable[[str], Blocks]


def grid(notebook: str, *profiles: str, measures: tuple[str, ...] = ()) -> Callable[[Grid], Grid]:
    """Registers an experiment of that name: its blocks at each profile, by default all but `hours`;
    the first line of the docstring is its title.
    """

    def register(make: Grid) -> Grid:
        blocks = {p: make(p) for p in profiles or ("smoke", "quick", "paper")}
        title = (make.__doc__ or "").splitlines()[0]
        EXPERIMENTS[make.__name__] = Experiment(title, notebook, blocks, measures)
        return make

    return register


# DeepR replaces weight decay by its own L1 (Bellec et al. 2018; the DSR authors' runs do the same).
DEEPR: Block = {"method": "deepr", "weight_decay": 0.0}
DENSE: Block = {"method": "dense", "density": 1.0}
OTHERS = ["set", "dsr", "static"]
STARTS = ["uniform", "erk"]


def alexnet(**fields: Any) -> Block:
    """AlexNet-s at 10 % of the weights for hours of two cores."""
    return scale("hours", "alexnet-s", **{"density": 0.1, **fields})
