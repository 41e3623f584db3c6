"""Claims are lines of claims.csv; a notebook's cell judges one by what it computed.

`judge` collects, `verdicts` adjusts the authors' claims of one experiment by Holm, shows the table
and, in the report's run, keeps it in verdicts.csv.  The rule is `stats.verdict`.  Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd

from lib import paths
from lib.results.rows import SCALES
from lib.results.stats import NAN, PAPER_ONLY, Interval, holm, p_value, verdict

TABLE = paths.results_dir("published") / "claims.csv"
# Where verdicts are kept; None, as in a notebook opened by hand: nowhere.
FOLDER: Path | None = None
NO_ROWS = "no rows yet"
_ORDER = ["not reproduced", "inconclusive", "not comparable", "reproduced"]  # the weakest first
_PART = ["id", "part", "decides", "mean", "low", "high", "unit", "n", "p", "p_holm", "verdict"]
_ROW = ["id", "verdict", "part", "mean", "low", "high", "unit", "n", "p", "p_holm", "missing"]
_judged: dict[tuple[str, str], Judged] = {}  # by profile and id, of this process


@cache
def claims() -> pd.DataFrame:
    """claims.csv by id: experiment, whose, statement, source, kind, margin, unit, when, value."""
    return pd.read_csv(TABLE, index_col="id", keep_default_na=False)


@dataclass
class Judged:
    """What the rows say about one claim, before Holm; shows itself in a notebook."""

    row: dict[str, Any]  # a line of verdicts.csv; its part decides: what speaks least for the claim
    parts: pd.DataFrame  # lines of verdicts.parts.csv

    def _repr_markdown_(self) -> str:
        lines = [f"*{claims().loc[self.row['id']].statement}*: **{self.row['verdict']}**.", ""]
        part: Any
        for part in self.parts.itertuples():
            said = f"{_ci(part)} {part.unit}, n = {part.n}, {part.verdict}"
            lines.append(f"- {part.part}: {said}{'' if part.decides else ', listed only'}")
        lines += [f"- no rows yet: {self.row['missing']}"] if self.row["missing"] else []
        return "\n".join(lines)


def _ci(line: Any) -> str:
    return Interval(line.mean, line.low, line.high, line.n, NAN).ci


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
    comparable = profile == "paper" or (profile != "smoke" and claim.kind not in PAPER_ONLY)
    found = {name: one for name, one in parts.items() if one is not None}
    lines = pd.DataFrame(
        [
            [ident, name, decides, *one[:3], one.unit, one.n,
             p_value(claim.kind, one, claim.margin), NAN,
             verdict(claim.kind, one, claim.margin) if comparable else "not comparable"]
            for decides, ones in ((True, found), (False, alone if found else {}))
            for name, one in ones.items() if one
        ],
        columns=_PART,
    )  # fmt: skip
    listed = ~lines.decides.astype(bool)
    lines.loc[listed, "p_holm"] = holm(lines.p[listed])
    missing = [name for name in parts if name not in found]
    row = dict.fromkeys(_ROW, NAN) | {"id": ident, "verdict": NO_ROWS, "part": "", "n": 0}
    row |= {"unit": "points", "missing": "; ".join(missing)}
    if found:
        mine = lines[~listed]
        ranks = mine.assign(rank=mine.verdict.map(_ORDER.index), p=-mine.p.fillna(1))
        weakest = mine.loc[ranks.sort_values(["rank", "p"], kind="stable").index[0]]
        said = set(mine.verdict)
        one_voice = len(said) == 1 and (not missing or "not comparable" in said)
        whole = said.pop() if one_voice else "inconclusive"
        if weakest.verdict == "not reproduced":
            strict = [verdict(claim.kind, one, claim.margin, len(found)) for one in found.values()]
            whole = "not reproduced" if "not reproduced" in strict else "inconclusive"
        row |= weakest[["part", "mean", "low", "high", "unit", "n"]].to_dict()
        row |= {"verdict": whole, "p": max(mine.p)}
    _judged[profile, ident] = Judged(row, lines)
    return _judged[profile, ident]


def verdicts(profile: str, *experiments: str) -> pd.DataFrame:
    """The claims of these experiments as judged, with Holm over the authors' claims of each; with
    FOLDER into <profile>/verdicts.csv, and by part verdicts.parts.csv; returns a table.

    ValueError for a claim of these experiments that no cell has judged.
    """
    wanted = claims()[claims().experiment.isin(experiments)]
    if unjudged := [ident for ident in wanted.index if (profile, ident) not in _judged]:
        raise ValueError(f"not judged: {', '.join(unjudged)}")
    found = [_judged[profile, ident] for ident in wanted.index]
    rows: Any = pd.DataFrame([judged.row for judged in found], index=list(wanted.index))
    for _, mine in wanted[wanted.whose.str.startswith("authors")].groupby("experiment"):
        tested = rows.p[mine.index].where(rows.verdict[mine.index] != "not comparable")
        rows.loc[mine.index, "p_holm"] = holm(tested)
    rows.loc[(rows.verdict == "reproduced") & (rows.p_holm >= 0.05), "verdict"] = "inconclusive"
    parts = [judged.parts for judged in found if len(judged.parts)]
    if FOLDER:
        _put(rows, FOLDER / profile / "verdicts.csv")
    if FOLDER and parts:
        _put(pd.concat(parts), FOLDER / profile / "verdicts.parts.csv")
    told = [f"{r.part}: {_ci(r)} {r.unit}" if r.n else "–" for r in rows.itertuples()]
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
    scales = [profile] if profile else SCALES
    files = [paths.results_dir(scale, results) / "verdicts.csv" for scale in scales]
    parts = [pd.read_csv(f).assign(scale=f.parent.name) for f in files if f.exists()]
    found = pd.concat(parts or [pd.DataFrame(columns=[*_ROW, "scale"])])
    found = found[found.verdict != NO_ROWS].drop_duplicates("id").set_index("id")
    table: Any = claims().drop(columns="unit").join(found, how="left" if whole else "inner")
    ours = [
        f"{_ci(line)}\N{NO-BREAK SPACE}{line.unit}, n = {line.n:.0f}" if line.n > 0 else ""
        for line in table.itertuples()
    ]
    return pd.DataFrame({
        "claim": table.statement, "whose": table.whose, "verdict": table.verdict.fillna(NO_ROWS),
        "difference [95 %]": ours, "decided by": table.part.fillna(""),
        "scale": table.scale.fillna(""),
    })  # fmt: skip


def _put(rows: pd.DataFrame, file: Path) -> None:
    """Replace the lines of these claims, in the order of claims.csv, at 12 significant digits."""
    order = {ident: i for i, ident in enumerate(claims().index)}
    with paths.locked(file.with_name(f".{file.name}.lock")):  # others judge too
        if file.exists():
            numbers = dict.fromkeys(("mean", "low", "high", "p", "p_holm"), "")
            old = pd.read_csv(file, keep_default_na=False, na_values=numbers)
            rows = pd.concat([old[old.id.isin(set(order) - set(rows.id))], rows])
        rows = rows.sort_values("id", key=lambda ids: ids.map(order), kind="stable")
        text = rows.to_csv(index=False, float_format="%.12g", lineterminator="\n")
        paths.write(file, text.encode())
