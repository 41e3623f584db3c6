"""Whether the way of computing a run changes its error: the comparison and its claims.

The claims belong to CLAIMS of lib/claims/verdicts.py, which says what a claim is.
Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from lib.claims import verdicts as claims
from lib.claims.effects import decisive, untrained
from lib.claims.main_results import TABLE_MARGIN
from lib.claims.verdicts import TEN_IMAGES, Claim, Measured, PaperValue
from lib.results.reading import NoRuns, Runs, Source, Where, interval_text, load, model_name
from lib.stats import PairedDifference, paired_difference, t_interval

EXPERIMENT = "computing"

# As the settings of a run. What is compared with is the first: each layer dense, its weights zero
# outside the mask.
WAYS: dict[str, Where] = {
    "masked": {"precision": "fp32", "kernels": "torch"},
    "sparse": {"precision": "fp32", "kernels": "sparse"},
    "bf16": {"precision": "bf16"},
}
WAY_NAMES = {
    "masked": "Masked dense, float32",
    "sparse": "Sparse kernels, float32",
    "bf16": "Masked dense, bfloat16",
}
# Points of test error, those of the claims that a sparse network matches the dense one.
MARGINS = {"mnist": TEN_IMAGES, "cifar10": TABLE_MARGIN}


def computed(runs: Runs, way: str) -> Runs:
    """The runs that were asked for this way and were computed so.

    Where the kernels cannot work (on a GPU, or without a compiler) torch computes the runs that
    asked for them; such rows say nothing about the kernels and count as missing.
    """
    part = runs.where(**WAYS[way])
    if way != "sparse":
        return part
    by_kernels = part.rows["kernels"] != "torch"
    return replace(part, rows=part.rows[by_kernels].reset_index(drop=True))


def differences(runs: Runs, way: str) -> dict[str, PairedDifference]:
    """Test error of a way minus that of masked dense float32, in points and paired by seed, of each
    network that has both.
    """
    found = {}
    for model in dict.fromkeys(run.model for run in runs.planned):
        here = runs.where(model=model)
        pair = paired_difference(computed(here, way).by_seed(), computed(here, "masked").by_seed())
        if pair.n:
            found[model] = pair
    return found


def spread(runs: Runs, model: str) -> float:
    """Standard deviation of the test error over the seeds, masked dense float32, in points."""
    return t_interval(computed(runs.where(model=model), "masked").by_seed()).sd


@dataclass(frozen=True)
class SameError:
    """The difference between a way of computing and masked dense float32, in absolute value: of
    the network that decides (`effects.decisive`).
    """

    dataset: str
    way: str
    experiment: str = EXPERIMENT

    def cells(self, profile: str) -> list[Any] | None:
        """One cell: nothing is averaged over."""
        return None

    def measure(self, source: Source, paper: PaperValue | None) -> Measured:
        """The difference in the network that decides; each network, and the spread over seeds."""
        every = load(self.experiment, source, dataset=self.dataset)
        sides = [computed(every, way) for way in ("masked", self.way)]
        for side in sides:
            side.needed()
        pairs = differences(every, self.way)
        if not pairs:
            raise NoRuns(f"{self.experiment} ({source.profile}): no seed was computed in both ways")
        model, one = decisive(pairs, MARGINS[self.dataset])
        listed = ", ".join(
            f"{interval_text(pair.mean, math.nan, math.nan, sign=True)} in {model_name(at)} "
            f"(standard deviation over seeds {spread(every, at):.2f})"
            for at, pair in pairs.items()
        )
        detail = [f"decided by {model_name(model)}: {listed}" if len(pairs) > 1 else listed]
        runs = every.only(run for side in sides for run in side.planned)
        if lost := len(runs.rows) - sum(len(side.rows) for side in sides):
            detail.append(f"{lost} runs that asked for the kernels were computed by torch")
        if len(runs.diverged):
            detail.append(f"{len(runs.diverged)} runs diverged")
        detail.append(untrained(runs))
        return Measured(one, one, runs, "; ".join(filter(None, detail)))


_WORDS = {
    "sparse": "sparse layers over their non-zero weights (lib/kernels) have the error of masked "
    "dense ones",
    "bf16": "bfloat16 has the error of float32",
}
_NAMES = {"mnist": "MNIST", "cifar10": "CIFAR-10"}

claims.add(
    *(
        Claim(
            id=f"computing_{way}_{dataset}",
            statement=f"{_NAMES[dataset]}: {words}, seed by seed",
            source="not of the paper: a check of this reproduction",
            kind="match",
            margin=MARGINS[dataset],
            ours=SameError(dataset, way),
            paper=None,
            notebook="05_speedups",
        )
        for dataset in _NAMES
        for way, words in _WORDS.items()
    )
)
