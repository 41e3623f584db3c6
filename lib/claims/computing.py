"""Whether the way of computing a run changes its error.  Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lib.claims.claim import TABLE_MARGIN, TEN_IMAGES, Found, Measure, PaperValue
from lib.claims.compare import compared
from lib.results.reading import NoRuns, Runs, Source, Where, load, model_name
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
    network that has both; of seeds that learned in both.
    """
    found = {}
    for model in dict.fromkeys(run.model for run in runs.planned):
        here = runs.where(model=model)
        other, base = (computed(here, one).learned().by_seed() for one in (way, "masked"))
        pair = paired_difference(other, base)
        if pair.n:
            found[model] = pair
    return found


def spread(runs: Runs, model: str) -> float:
    """Standard deviation of the test error over the seeds that learned, masked dense float32, in
    points; NaN where fewer than two did.
    """
    errors = computed(runs.where(model=model), "masked").learned().by_seed()
    return t_interval(errors).sd if len(errors) > 1 else math.nan


@dataclass(frozen=True)
class SameError(Measure):
    """Test error of a way of computing minus that of masked dense float32, in points; one part per
    network.
    """

    dataset: str
    way: str
    experiment: str = EXPERIMENT

    def measure(self, source: Source, papers: Mapping[str, PaperValue], margin: float) -> Found:
        """The differences, and the spread over seeds in the notes."""
        every = load(self.experiment, source, dataset=self.dataset)
        sides = [computed(every, way) for way in ("masked", self.way)]
        for side in sides:
            side.needed()
        parts, missing = [], []
        for model in dict.fromkeys(run.model for run in every.planned):
            base, other = (side.where(model=model) for side in sides)
            part = compared(model_name(model), other, base, "", margin)
            if part is None:
                missing.append(model_name(model))
                continue
            sd = spread(every, model)
            note = f"standard deviation over seeds {sd:.2f}" * (not math.isnan(sd))
            parts.append(replace(part, note="; ".join(filter(None, (note, part.note)))))
        if not parts:
            raise NoRuns(f"{self.experiment} ({source.profile}): no seed was computed in both ways")
        runs = every.only(run for side in sides for run in side.planned)
        lost = len(runs.rows) - sum(len(side.rows) for side in sides)
        note = f"{lost} runs that asked for the kernels were computed by torch" * bool(lost)
        return Found(tuple(parts), runs, tuple(missing), note)
