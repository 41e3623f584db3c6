"""The runs that the grids (lib/grids) plan for an experiment at a profile, and selections."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from lib.config import Run, parse_field, unknown
from lib.grids import (
    CIFAR10_TABLE,
    EXPERIMENTS,
    KEPT_DENSE,
    PAPER_EPOCHS,
    PROFILES,
    READINGS,
    SEEDS,
    Experiment,
)

__all__ = [
    "CIFAR10_TABLE",
    "EXPERIMENTS",
    "KEPT_DENSE",
    "PAPER_EPOCHS",
    "PROFILES",
    "READINGS",
    "SEEDS",
    "NoSuchRunError",
    "experiment",
    "measures",
    "runs",
    "select",
    "unique",
]


class NoSuchRunError(ValueError):
    """No run of an experiment has the fields asked for."""


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


def measures(run: Run, name: str, profile: str) -> tuple[str, ...]:
    """The measures to take of a run of experiment `name`: its own, and those of all experiments
    at the profile that have the same run, so that it is never trained a second time for them.
    """
    wanted = {*experiment(name).measures, *_measures_by_run(profile).get(run.run_id, ())}
    return tuple(sorted(wanted))


@functools.lru_cache(maxsize=3)
def _measures_by_run(profile: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, this in EXPERIMENTS.items():
        if this.measures:
            for run in runs(name, profile):
                found.setdefault(run.run_id, set()).update(this.measures)
    return found


def unique(found: Iterable[Run]) -> list[Run]:
    """Runs without repetitions, in order."""
    return list({run.run_id: run for run in found}.values())


def select(found: Sequence[Run], only: str | Sequence[str]) -> list[Run]:
    """The runs with all the given "field=value"; several values of one field mean any of them."""
    only = [only] if isinstance(only, str) else only
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
        raise NoSuchRunError(f"no run has {' and '.join(only)}; there are {listed}")
    return kept
