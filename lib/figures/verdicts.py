"""Tables of verdicts: what the runs say about the claims."""

from __future__ import annotations

from lib import claims, experiments
from lib.figures.gallery import Absent, table
from lib.figures.tables import Table
from lib.results.reading import NoRuns, Source

_SHOWN = {"claim": "claim", "paper": "paper", "ours": "ours [95 % interval]", "n": "n",
          "verdict": "verdict"}  # fmt: skip


@table("verdicts")
def verdicts(source: Source, notebook: str = "") -> Table:
    """Each claim of the paper with its verdict; only those of one notebook where it is named."""
    judged = claims.verdict_table(source, notebook)
    if (judged["verdict"] == claims.NO_RUNS).all():
        raise NoRuns(f"none of the claims has runs at profile {source.profile}")
    scales = [f"{scale}." for scale in claims.scales(source, judged)]
    caption = f"The paper's claims and what the runs of profile {source.profile} say"
    reduced = " (reduced scale, not the paper's)" if source.reduced else ""
    frame = judged[list(_SHOWN)].rename(columns=_SHOWN).astype(str)
    return Table(frame, caption + reduced, " ".join([*scales, claims.RULE]))


def meaning(experiment: str, source: Source) -> Table | Absent:
    """The verdicts on the claims that rest on one experiment, those with runs."""
    judged = claims.verdict_table(source, experiments.experiment(experiment).notebook)
    mine = judged[judged["experiment"] == experiment]
    known = mine[mine["verdict"] != claims.NO_RUNS]
    if known.empty:
        return Absent(f"{experiment} ({source.profile}): no claim has runs")
    shown = {**_SHOWN, "detail": "detail"}
    frame = known[list(shown)].rename(columns=shown).astype(str)
    left = len(mine) - len(known)
    note = f"{left} further claims have no runs at this profile." if left else ""
    return Table(frame, f"What the runs of {experiment} say", note)
