"""The paper's claims as data, and what the runs say about each.  Imports no torch.

`claim` says what a claim is, `statements` holds the authors' own, `values` the published numbers,
`extensions` what this reproduction adds; `judge` makes the tables of verdicts. The other files are
the measures that they use.
"""

from lib.claims.claim import Claim, Published
from lib.claims.compare import differences
from lib.claims.extensions import EXTENSIONS
from lib.claims.judge import (
    NO_RUNS,
    RULE,
    counts,
    details,
    extensions,
    published_values,
    scales,
    scorecard,
    sentences,
    verdict_table,
    verdict_text,
)
from lib.claims.learning import trainability
from lib.claims.statements import STATEMENTS

CLAIMS: tuple[Claim, ...] = (*STATEMENTS, *EXTENSIONS)

__all__ = [
    "CLAIMS",
    "EXTENSIONS",
    "NO_RUNS",
    "RULE",
    "STATEMENTS",
    "Claim",
    "Published",
    "counts",
    "details",
    "differences",
    "extensions",
    "published_values",
    "scales",
    "scorecard",
    "sentences",
    "trainability",
    "verdict_table",
    "verdict_text",
]
