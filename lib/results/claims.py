"""Claims are lines of claims.csv; a notebook's cell judges one by what it computed.

`judge` collects, `verdicts` adjusts the authors' claims of one experiment by Holm, shows the table
and, in the report's run, keeps it in verdicts.csv.  The rule is `stats.verdict`.  Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from lib.paths import REPO
from lib.results.rows import SCALES
from lib.results.stats import NAN, PAPER_ONLY, Interval, holm, p_value, verdict

TABLE = REPO / "results" / "published" / "claims.csv"
# Where verdicts are kept; None, as in a notebook opened by hand: nowhere.
FOLDER: Path | None = None
NO_ROWS = "no rows yet"
_ORDER = ["not reproduced", "inconclusive", "not comparable", "reproduced"]  # the weakest first
_PART = ["id", "part", "decides", "mean", "low", "high", "unit", "n", "p", "p_holm", "verdict"]
_judged: dict[tuple[str, str], Judged] = {}  # by profile and id, of this process


@cache
def claims() -> pd.DataFrame:
    """claims.csv by id: experiment, whose, statement, source, kind, margin, unit, when, value."""
    return pd.read_csv(TABLE, index_col="id", keep_default_na=False)


@dataclass
class Judged:
    """What the rows say about one claim; shows itself in a notebook."""

    id: str
    verdict: str  # before Holm
    part: str = ""  # the one that decides: what speaks least for the claim
    one: Interval = field(default_factory=lambda: Interval(NAN, NAN, NAN, 0, NAN))
    p: float = NAN
    missing: tuple[str, ...] = ()
    parts: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=_PART))

    def _repr_markdown_(self) -> str:
        lines = [f"*{claims().loc[self.id].statement}*: **{self.verdict}**.", ""]
        part: Any
        for part in self.parts.itertuples():
            one = Interval(part.mean, part.low, part.high, part.n, NAN)
            said = f"{one.ci} {part.unit}, n = {part.n}, {part.verdict}"
            lines.append(f"- {part.part}: {said}{'' if part.decides else ', listed only'}")
        lines += [f"- no rows yet: {', '.join(self.missing)}"] if self.missing else []
        return "\n".join(lines)


def judge(
    ident: str,
    parts: Mapping[str, Interval | None],
    alone: Mapping[str, Interval | None] = MappingProxyType({}),
    *,
    profile: str,
) -> Judged:
    """Judge a claim by its parts; None: a part without rows.  `alone` are listed, decide nothing.

    Reproduced if every part is; not reproduced if one is not, at a level corrected for their
    number.  A cell that runs again judges again.  KeyError for an id that claims.csv lacks.
    """
    claim: Any = claims().loc[ident]
    found = {name: one for name, one in parts.items() if one is not None}
    lines = [_line(ident, name, one, profile, True) for name, one in found.items()]
    singles = [_line(ident, name, one, profile, False) for name, one in alone.items() if one]
    for line, p in zip(singles, holm(line["p"] for line in singles), strict=True):
        line["p_holm"] = p
    missing = tuple(name for name in parts if name not in found)
    result = Judged(ident, NO_ROWS, missing=missing)
    if lines:
        weakest = min(
            lines,
            key=lambda line: (_ORDER.index(line["verdict"]), -np.nan_to_num(line["p"], nan=1)),
        )
        said = {line["verdict"] for line in lines}
        one_voice = len(said) == 1 and (not missing or "not comparable" in said)
        whole = said.pop() if one_voice else "inconclusive"
        if weakest["verdict"] == "not reproduced":
            strict = [verdict(claim.kind, one, claim.margin, len(found)) for one in found.values()]
            whole = "not reproduced" if "not reproduced" in strict else "inconclusive"
        result = Judged(ident, whole, weakest["part"], found[weakest["part"]],
                        max(line["p"] for line in lines), missing,
                        pd.DataFrame([*lines, *singles], columns=_PART))  # fmt: skip
    _judged[profile, ident] = result
    return result


def _line(ident: str, name: str, one: Interval, profile: str, decides: bool) -> dict[str, Any]:
    claim: Any = claims().loc[ident]
    said = verdict(claim.kind, one, claim.margin)
    if profile == "smoke" or (claim.kind in PAPER_ONLY and profile != "paper"):
        said = "not comparable"
    p = p_value(claim.kind, one, claim.margin)
    values = [ident, name, decides, *one[:3], one.unit, one.n, p, NAN, said]
    return dict(zip(_PART, values, strict=True))


def verdicts(profile: str, *experiments: str) -> pd.DataFrame:
    """The claims of these experiments as judged, with Holm over the authors' claims of each; with
    FOLDER into <profile>/verdicts.csv, and by part verdicts.parts.csv; returns a table.

    ValueError for a claim of these experiments that no cell has judged.
    """
    wanted = claims()[claims().experiment.isin(experiments)]
    if unjudged := [ident for ident in wanted.index if (profile, ident) not in _judged]:
        raise ValueError(f"not judged: {', '.join(unjudged)}")
    found = [_judged[profile, ident] for ident in wanted.index]
    rows = pd.DataFrame(
        [{"id": j.id, "verdict": j.verdict, "part": j.part, "mean": j.one.mean, "low": j.one.low,
          "high": j.one.high, "unit": j.one.unit, "n": j.one.n, "p": j.p, "p_holm": NAN,
          "missing": "; ".join(j.missing)} for j in found],
        index=list(wanted.index),
    )  # fmt: skip
    for _, mine in wanted[wanted.whose.str.startswith("authors")].groupby("experiment"):
        tested = rows.p[mine.index].where(rows.verdict[mine.index] != "not comparable")
        rows.loc[mine.index, "p_holm"] = holm(tested)
    rows.loc[(rows.verdict == "reproduced") & (rows.p_holm >= 0.05), "verdict"] = "inconclusive"
    parts = [j.parts for j in found if len(j.parts)]
    if FOLDER:
        _put(rows, FOLDER / profile / "verdicts.csv")
    if FOLDER and parts:
        _put(pd.concat(parts), FOLDER / profile / "verdicts.parts.csv")
    told = [f"{j.part}: {j.one.ci} {j.one.unit}" if j.one.n else "–" for j in found]
    return pd.DataFrame({
        "claim": wanted.statement, "whose": wanted.whose, "difference [95 %]": told, "n": rows.n,
        "verdict": rows.verdict,
    }).set_index("claim")  # fmt: skip


def scorecard(
    profile: str = "", results: str | Path | None = None, whole: bool = True
) -> pd.DataFrame:
    """Each claim with its verdict at this profile, or at the largest of SCALES that has one, from
    verdicts.csv; without `whole` only those that have rows.
    """
    scales = [profile] if profile else list(SCALES)
    files = [Path(results or REPO / "results") / scale / "verdicts.csv" for scale in scales]
    parts = [pd.read_csv(f).assign(scale=f.parent.name) for f in files if f.exists()]
    if not parts:
        return pd.DataFrame(
            columns=["claim", "verdict", "whose", "difference [95 %]", "decided by", "scale"]
        )
    found = pd.concat(parts)
    found = found[found.verdict != NO_ROWS].drop_duplicates("id").set_index("id")
    table = claims().drop(columns="unit").join(found, how="left" if whole else "inner")
    numbers = table[["mean", "low", "high", "n", "unit"]].itertuples(index=False, name=None)
    ours = [
        f"{Interval(mean, low, high, n, NAN).ci}\N{NO-BREAK SPACE}{unit}, n = {n:.0f}"
        if n > 0
        else ""
        for mean, low, high, n, unit in numbers
    ]
    return pd.DataFrame({
        "claim": table.statement, "whose": table.whose, "verdict": table.verdict.fillna(NO_ROWS),
        "difference [95 %]": ours, "decided by": table.part.fillna(""),
        "scale": table.scale.fillna(""),
    })  # fmt: skip


def _put(rows: pd.DataFrame, file: Path) -> None:
    """Replace the lines of these claims, in the order of claims.csv, at 12 significant digits."""
    if file.exists():
        numbers = dict.fromkeys(("mean", "low", "high", "p", "p_holm"), "")
        old = pd.read_csv(file, keep_default_na=False, na_values=numbers)
        rows = pd.concat([old[~old.id.isin(rows.id)], rows])
    order = {ident: i for i, ident in enumerate(claims().index)}
    rows = rows.sort_values("id", key=lambda ids: ids.map(order), kind="stable")
    file.parent.mkdir(parents=True, exist_ok=True)
    rows.to_csv(file, index=False, float_format="%.12g", lineterminator="\n")
