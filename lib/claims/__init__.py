"""The paper's claims as data, and what the runs say about each.  Imports no torch.

`verdicts` says what a claim is; the other files add the claims of one topic each.
"""

from lib.claims import ablations, computing, main_results, measured  # noqa: F401
from lib.claims.verdicts import (
    CLAIMS,
    NO_RUNS,
    RULE,
    Claim,
    Difference,
    Level,
    Published,
    Reduction,
    add,
    differences,
    scales,
    sentences,
    verdict_table,
    verdict_text,
)

__all__ = [
    "CLAIMS",
    "NO_RUNS",
    "RULE",
    "Claim",
    "Difference",
    "Level",
    "Published",
    "Reduction",
    "add",
    "differences",
    "scales",
    "sentences",
    "verdict_table",
    "verdict_text",
]
