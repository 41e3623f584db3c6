"""The experiments as data: which runs, at which profile. The only place where grids are written.

A new experiment is an entry of EXPERIMENTS. A block is a dict of fields of `Run`; a list is an
axis, and the block stands for all combinations. `seeds` is the number of seeds, 0 to n-1, shared
by all cells so that tests can be paired.

Profiles: `paper` is the paper's scale; `quick` a reduced one for two CPU cores, with the learning
rate decays at the same fractions of the training; `smoke` walks the same code in seconds. What is
reduced is said on every figure.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lib.config import Run, parse_field, unknown

PROFILES = ("smoke", "quick", "paper")

Block = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """A question, the notebook that answers it, and its blocks of runs at each profile."""

    title: str
    notebook: str
    blocks: dict[str, tuple[Block, ...]]


# The paper's MNIST protocol is Run's default. A step of an epoch of 54,000 images at batch 100 is
# one of 540; decays at 25,000 of 54,000 and 50,000 of 54,000 steps in the paper.
_MNIST_QUICK: Block = {"epochs": 10, "lr_decay_every_steps": 2_500}
_MNIST_SMOKE: Block = {"epochs": 2, "lr_decay_every_steps": 30, "train_samples": 3_000}

# DeepR replaces weight decay by its own L1 (Bellec et al. 2018; the DSR authors' runs do the same).
_DEEPR: Block = {"method": "deepr", "weight_decay": 0.0}

_OTHERS = ["set", "dsr", "static"]


def _curve(scale: Block, seeds: int, densities: list[float]) -> tuple[Block, ...]:
    return (
        {**scale, "method": "dense", "seeds": seeds},
        {**scale, "method": ["sparse_momentum", *_OTHERS], "density": densities, "seeds": seeds},
        {**scale, **_DEEPR, "density": densities, "seeds": seeds},
    )


EXPERIMENTS: dict[str, Experiment] = {
    "main_results": Experiment(
        title="Test accuracy against the share of weights",
        notebook="01_main_results",
        blocks={
            "smoke": _curve(_MNIST_SMOKE, 2, [0.02, 0.05]),
            "quick": _curve(_MNIST_QUICK, 3, [0.01, 0.02, 0.05, 0.10]),
            "paper": _curve({}, 10, [0.01, 0.02, 0.03, 0.04, 0.05, 0.10]),
        },
    ),
}


def experiment(name: str) -> Experiment:
    """The experiment of this name; ValueError with the close matches otherwise."""
    if name not in EXPERIMENTS:
        raise ValueError(unknown("experiment", name, EXPERIMENTS))
    return EXPERIMENTS[name]


def runs(name: str, profile: str) -> list[Run]:
    """All runs of an experiment at a profile, every cell at one seed before the second seed."""
    if profile not in PROFILES:
        raise ValueError(unknown("profile", profile, PROFILES))
    cells: list[tuple[int, Run]] = []
    for block in experiment(name).blocks.get(profile, ()):
        fields = {k: v for k, v in block.items() if k != "seeds"}
        axes = {k: v for k, v in fields.items() if isinstance(v, list)}
        fixed = {k: v for k, v in fields.items() if k not in axes}
        for values in itertools.product(*axes.values()):
            for seed in range(block["seeds"]):
                cells.append(
                    (seed, Run(**fixed, **dict(zip(axes, values, strict=True)), seed=seed))
                )
    return unique(run for _, run in sorted(cells, key=lambda cell: cell[0]))


def unique(found: Iterable[Run]) -> list[Run]:
    """Runs without repetitions, in order."""
    return list({run.run_id: run for run in found}.values())


def select(found: Sequence[Run], only: Sequence[str]) -> list[Run]:
    """The runs with all the given "field=value"; several values of one field mean any of them."""
    wanted: dict[str, list[Any]] = {}
    for text in only:
        name, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"--only {text!r}: write field=value, for instance seed=0")
        wanted.setdefault(name, []).append(parse_field(name, value))
    kept = [r for r in found if all(getattr(r, n) in values for n, values in wanted.items())]
    if only and not kept:
        offered = {n: sorted({str(getattr(r, n)) for r in found}) for n in wanted}
        listed = "; ".join(f"{n}: {', '.join(values)}" for n, values in offered.items())
        raise ValueError(f"no run has {' and '.join(only)}; there are {listed}")
    return kept
