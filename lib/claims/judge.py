"""From claims and rows to verdicts: the authors' scorecard, the published values, and what this
reproduction adds, apart from each other.  Imports no torch.

The rule from an interval to a verdict is `lib.stats.verdict`. A claim of several parts (methods,
networks, settings) speaks of all of them: it is reproduced if each part is, and not reproduced if
one part is not, at a level corrected for their number.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lib.claims.claim import NAN, Claim, Found, PaperValue, Part
from lib.claims.extensions import EXTENSIONS
from lib.claims.statements import STATEMENTS
from lib.claims.values import FILES, speedup_claims, value_claims
from lib.results.reading import NoRuns, Source, interval_text, load
from lib.stats import Verdict, holm, n_needed, p_reproduced, verdict, widened

NO_RUNS = "no rows yet"  # in place of a verdict
LEVEL = 0.05  # of the adjusted p-values that are called a difference

RULE = (
    "Rule: the verdict rests on the 95 % Student-t interval of the difference, paired by seed. "
    "'lower' is reproduced if the interval lies below 0 and not reproduced if it lies above 0 or "
    "inside the margin; 'match' is reproduced if nothing in it is worse than the margin and not "
    "reproduced if all of it is; 'at least' is reproduced if nothing in it falls short by more "
    "than the margin; 'same' if it lies inside the margin, not if outside; 'value' likewise "
    "around the paper's value; it and 'at least' at the paper's scale only. Else: inconclusive at"
    " this n. A claim of several parts is reproduced if every part is, and not reproduced if one "
    "is not (its interval widened by Bonferroni for their number). The p-values of the authors' "
    "claims on one experiment are adjusted by Holm, and 'reproduced' needs p < 0.05. Seeds that "
    "end at chance (error above 80 %, or a training loss of at least 98 % of guessing's) are in no "
    "mean; where some did, logarithms of the errors are compared among seeds that learned in both, "
    "and a side that learned less often has nothing reproduced. The rules on parts, Holm and seeds "
    "that fail are of 2026-11-24 to 29, after rows existed."
)

_ORDER = (Verdict.NOT_REPRODUCED, Verdict.INCONCLUSIVE, Verdict.NOT_COMPARABLE, Verdict.REPRODUCED)


@dataclass(frozen=True)
class _Judged:
    """A claim's row of the table, and the rows of its parts."""

    row: dict[str, Any]
    parts: list[dict[str, Any]]


def scorecard(source: Source, notebook: str = "") -> pd.DataFrame:
    """The authors' own claims (of one notebook), one row each, also where there are no rows yet.

    Columns: id, claim, source (its place), paper, ours (texts, with unit and interval), n, verdict,
    p and p_holm (adjusted over the authors' claims of the same experiment), size (the difference in
    margins), detail, scale, kind, margin, unit, when (the margin was set), experiment, notebook,
    and as numbers paper_value, ours_mean, ours_low, ours_high.
    """
    return _table(STATEMENTS, source, notebook, adjust=True)


def extensions(source: Source, notebook: str = "") -> pd.DataFrame:
    """What this reproduction adds, judged by the same rule but never counted with the authors'
    claims; columns as in `scorecard` (p_holm is NaN).
    """
    return _table(EXTENSIONS, source, notebook)


def published_values(source: Source, notebook: str = "") -> pd.DataFrame:
    """Every published value that a run here can be held against, one row each.

    Columns: those of `scorecard`, and file (table of results/published), code (version of the code
    behind it), network (ours), method, density, difference (ours minus the paper's, with interval).
    """
    found = []
    for claim, about in itertools.chain(*map(value_claims, FILES), speedup_claims()):
        if notebook in ("", claim.notebook):
            row = _judged(claim, source).row
            found.append({**about, **row, "difference": row.pop("difference_text")})
    return pd.DataFrame(found)


def details(source: Source, notebook: str = "") -> pd.DataFrame:
    """Every part of every claim, and what each share of weights says alone (`decides` false).

    Columns: id, claim, part, paper, ours, n, p, p_holm (over the single rows of the claim),
    verdict, decides, note.
    """
    claims = [c for c in (*STATEMENTS, *EXTENSIONS) if notebook in ("", c.notebook)]
    return pd.DataFrame([row for claim in claims for row in _judged(claim, source).parts])


def verdict_table(source: Source, notebook: str = "") -> pd.DataFrame:
    """`scorecard` followed by `extensions`."""
    tables = [scorecard(source, notebook), extensions(source, notebook)]
    return pd.concat([table for table in tables if len(table)], ignore_index=True)


def counts(table: pd.DataFrame) -> dict[str, int]:
    """How many rows of a table have each verdict, NO_RUNS included, in a fixed order."""
    order = [Verdict.REPRODUCED, Verdict.NOT_REPRODUCED, Verdict.INCONCLUSIVE]
    names = [*map(str, order), str(Verdict.NOT_COMPARABLE), NO_RUNS]
    found = table["verdict"].value_counts().to_dict() if len(table) else {}
    return {name: int(found[name]) for name in names if name in found}


# ------------------------------------------------------------------------------------ one claim


def _table(
    claims: Sequence[Claim], source: Source, notebook: str, adjust: bool = False
) -> pd.DataFrame:
    chosen = [claim for claim in claims if notebook in ("", claim.notebook)]
    rows = [_judged(claim, source).row for claim in chosen]
    for row in rows:
        row.pop("difference_text")
    if adjust:
        _adjust(rows)
    return pd.DataFrame(rows)


def _adjust(rows: list[dict[str, Any]]) -> None:
    """Holm over the claims of one experiment; what does not hold then is inconclusive."""
    for name in dict.fromkeys(row["experiment"] for row in rows):
        mine = [row for row in rows if row["experiment"] == name]
        tested = [NAN if row["verdict"] == Verdict.NOT_COMPARABLE else row["p"] for row in mine]
        for row, p in zip(mine, holm(tested), strict=True):
            row["p_holm"] = p
            if row["verdict"] == Verdict.REPRODUCED and not p < LEVEL and not math.isnan(p):
                row["verdict"] = str(Verdict.INCONCLUSIVE)
                said = f"p = {row['p']:.3f} alone, {p:.3f} by Holm over {len(mine)} claims"
                row["detail"] = "; ".join(filter(None, (row["detail"], said)))


def _judged(claim: Claim, source: Source) -> _Judged:
    papers = claim.papers(source.profile)
    row: dict[str, Any] = {
        "id": claim.id,
        "claim": claim.statement,
        "source": claim.source,
        "paper": _paper_texts(claim, papers),
        "ours": "–",
        "n": 0,
        "verdict": NO_RUNS,
        "p": NAN,
        "p_holm": NAN,
        "size": NAN,
        "detail": "",
        "scale": "",
        "kind": claim.rule.kind,
        "margin": claim.rule.margin,
        "unit": claim.rule.unit,
        "when": claim.rule.when,
        "experiment": claim.ours.experiment,
        "notebook": claim.notebook,
        "paper_value": next(iter(papers.values())).value if papers else NAN,
        "ours_mean": NAN,
        "ours_low": NAN,
        "ours_high": NAN,
        "difference_text": "–",
    }
    try:
        found = claim.ours.measure(source, papers, claim.rule.margin)
    except NoRuns as reason:
        return _Judged({**row, "detail": str(reason)}, [])
    parts = _parts(claim, found, source, papers)
    deciding = [(part, line) for part, line in zip(found.parts, parts, strict=True) if part.counts]
    notes = [found.note, *(paper.note for paper in papers.values())]
    if found.missing:
        notes.insert(0, f"no rows yet: {', '.join(filter(None, found.missing)) or 'no whole seed'}")
    row["scale"] = found.scale or found.runs.scale()
    if not deciding:
        notes.append(_singles(parts))
        return _Judged({**row, "detail": "; ".join(filter(None, notes))}, parts)
    said = _conjunction(claim, deciding, found, source)
    part, _ = min(deciding, key=lambda one: _clearness(one[1]))
    several = len(deciding) > 1
    if several:
        notes.insert(0, "; ".join(_of_part(p, item) for p, item in deciding))
    else:
        notes.insert(0, part.note)
        notes.append(_singles(parts))
    undecided = [item for _, item in deciding if item["verdict"] == Verdict.INCONCLUSIVE]
    if said == Verdict.INCONCLUSIVE and undecided:
        needed = [item["needed"] for item in undecided]
        if all(needed):
            notes.append(f"would need n = {max(needed)}")
    unit = part.unit or claim.rule.unit
    ours = f"{_number(claim, part.shown, unit)} {unit}"
    if math.isnan(part.shown.mean):
        ours = part.note or "–"
    elif part.less_often:
        ours += ", learning less often"
    elif found.missing and {item["verdict"] for _, item in deciding} == {Verdict.REPRODUCED}:
        ours += "; others: no rows yet"
    limit = claim.rule.margin if part.margin is None else part.margin
    size = abs(part.decides.mean) / limit if limit else NAN
    if claim.rule.kind == "lower" and not math.isnan(size):
        notes.append(f"{size:.1f} times the margin")
    row |= {
        "ours": f"{part.name and part.name + ': '}{ours}",
        "n": part.shown.n,
        "verdict": str(said),
        "p": max((item["p"] for _, item in deciding), default=NAN),
        "size": size,
        "detail": "; ".join(dict.fromkeys(filter(None, notes))),
        "ours_mean": part.shown.mean,
        "ours_low": part.shown.low,
        "ours_high": part.shown.high,
        "difference_text": interval_text(*part.decides[:3], sign=True),
    }
    return _Judged(row, parts)


def _parts(
    claim: Claim, found: Found, source: Source, papers: Mapping[str, PaperValue]
) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for part in found.parts:
        limit = claim.rule.margin if part.margin is None else part.margin
        unit = part.unit or claim.rule.unit
        said = verdict(claim.rule.kind, part.decides, limit, source.profile)
        needed = n_needed(claim.rule.kind, part.decides, limit)
        if part.less_often:
            needed = None  # more seeds do not help
            said = Verdict.INCONCLUSIVE if said == Verdict.REPRODUCED else said
        if source.profile == "smoke":
            said = Verdict.NOT_COMPARABLE
        lines.append(
            {
                "id": claim.id,
                "claim": claim.statement,
                "part": part.name,
                "paper": _paper_text(claim, part.name, papers.get(part.name)),
                "ours": f"{_number(claim, part.shown, unit)} {unit}",
                "n": part.shown.n,
                "p": p_reproduced(claim.rule.kind, part.decides, limit),
                "p_holm": NAN,
                "verdict": str(said),
                "decides": part.counts,
                "note": part.note,
                "needed": needed,
                "mean": part.decides.mean,
            }
        )
    singles = [line for line in lines if not line["decides"]]
    for line, p in zip(singles, holm(line["p"] for line in singles), strict=True):
        line["p_holm"] = p
    return lines


def _conjunction(
    claim: Claim,
    deciding: Sequence[tuple[Part, dict[str, Any]]],
    found: Found,
    source: Source,
) -> Verdict:
    """The verdict on all parts together."""
    verdicts = {item["verdict"] for _, item in deciding}
    if verdicts == {Verdict.NOT_COMPARABLE}:
        return Verdict.NOT_COMPARABLE
    for part, item in deciding:
        limit = claim.rule.margin if part.margin is None else part.margin
        wide = widened(part.decides, len(deciding))
        if (
            item["verdict"] == Verdict.NOT_REPRODUCED
            and verdict(claim.rule.kind, wide, limit, source.profile) == Verdict.NOT_REPRODUCED
        ):
            return Verdict.NOT_REPRODUCED
    if verdicts == {Verdict.REPRODUCED} and not found.missing:
        return Verdict.REPRODUCED
    return Verdict.INCONCLUSIVE


def _clearness(line: Mapping[str, Any]) -> tuple[int, float]:
    """Least first: not reproduced before inconclusive before reproduced, then the larger p."""
    p = line["p"]
    return _ORDER.index(Verdict(line["verdict"])), -1.0 if math.isnan(p) else -p


# --------------------------------------------------------------------------------------- texts


def _of_part(part: Part, line: Mapping[str, Any]) -> str:
    said = f"{part.name or 'all'}: {line['ours']}, n = {line['n']}, {line['verdict']}"
    return f"{said} ({part.note})" if part.note else said


def _singles(parts: Iterable[Mapping[str, Any]]) -> str:
    """What each listed row says alone: "as claimed at 1, 2 %; not shown at 5 % (Holm)"."""
    groups: dict[str, list[str]] = {"as claimed alone": [], "the other way": [], "not shown": []}
    for line in parts:
        if line["decides"] or math.isnan(line["p_holm"]):
            continue
        if line["p_holm"] < LEVEL:
            groups["as claimed alone"].append(line["part"])
        else:
            other = line["verdict"] == Verdict.NOT_REPRODUCED and line["mean"] > 0
            groups["the other way" if other else "not shown"].append(line["part"])
    texts = [f"{name}: {', '.join(found)}" for name, found in groups.items() if found]
    return "; ".join(texts) + (" (each alone, Holm)" if texts else "")


def _number(claim: Claim, one: Sequence[float], unit: str) -> str:
    whole = claim.rule.unit == "%" and claim.rule.margin >= 1
    sign = claim.rule.kind not in ("value", "at_least") and not unit.startswith(
        "×"
    )  # times faster: no difference
    mean, low, high = one[:3]
    return interval_text(mean, low, high, 1 if whole else 2, sign=sign)


def _paper_text(claim: Claim, name: str, paper: PaperValue | None, unit: bool = True) -> str:
    if paper is None:
        return "not published"
    if math.isnan(paper.value):
        return "–"
    if says := claim.by_part()[name].says:
        return says.format(value=paper.value)
    text = _number(claim, (paper.value, NAN, NAN), claim.rule.unit)
    if not math.isnan(paper.standard_error):
        text += f" ± {paper.standard_error:.2f}"
    return f"{text} {claim.rule.unit}" if unit else text


def _paper_texts(claim: Claim, papers: Mapping[str, PaperValue]) -> str:
    """One value; up to three by name; of more the range."""
    if not papers:
        return "not published"
    if len(papers) == 1:
        return _paper_text(claim, *next(iter(papers.items())))
    if len(papers) > 3:
        by_value = sorted(papers, key=lambda name: papers[name].value)
        low, high = (_paper_text(claim, n, papers[n], False) for n in (by_value[0], by_value[-1]))
        return f"{low} to {high} {claim.rule.unit}"
    texts = [f"{n} {_paper_text(claim, n, paper, False)}" for n, paper in papers.items()]
    return f"{', '.join(texts)} {claim.rule.unit}"


def scales(source: Source, table: pd.DataFrame) -> list[str]:
    """One line per experiment that the claims of a verdict table rest on: its scale."""
    names = dict.fromkeys(table["experiment"])
    return [f"{name}: {load(name, source).scale()}" for name in names]


def sentences(source: Source, notebook: str = "") -> list[str]:
    """Each claim as one Markdown sentence with its numbers, for a notebook's conclusion; what this
    reproduction adds is called so.
    """
    said = []
    for table, kind in ((scorecard(source, notebook), ""), (extensions(source, notebook), "ours")):
        for row in table.to_dict("records"):
            text = f"**{row['verdict']}**: {row['claim']}."
            text += f" Paper: {row['paper']}; ours: {row['ours']}"
            text += f", n = {row['n']}." if row["n"] else "."
            if row["detail"]:
                text += f" ({row['detail'][0].upper()}{row['detail'][1:]}.)"
            said.append(f"Extension, {text}" if kind else text)
    return said


def verdict_text(source: Source, width: int = 120, whole: bool = True) -> str:
    """For a terminal: the authors' scorecard, then the published values, then what this
    reproduction adds, each counted for itself; the scale of the runs and the rule below. Not
    `whole`, for one screen: all the counts, and those of the authors' claims that have rows.
    """
    ours = "ours [95 % interval]"
    wide = {"claim": width - 75, "paper": 18, ours: 32, "n": 3, "verdict": 14}
    narrow = {"claim": width - 75, "paper": 18, "difference": 32, "n": 3, "verdict": 14}
    authors, more, values = scorecard(source), extensions(source), published_values(source)
    lines = []
    if source.reduced:
        lines.append(f"Profile {source.profile}: reduced scale, not the paper's\n")
    shown = authors if whole else _with_rows(authors)
    lines += _section("The authors' claims", shown.rename(columns={"ours": ours}), wide, authors)
    title = "Published values (those with rows)"
    lines += _section(title, _with_rows(values) if whole else None, narrow, values)
    title = "Added by this reproduction (those with rows)"
    known = _with_rows(more).rename(columns={"ours": ours}) if whole else None
    lines += _section(title, known, wide, more)
    lines += [] if whole else [""]
    for scale in scales(source, pd.concat([authors, more]) if whole else shown):
        lines += textwrap.wrap(scale, width)
    lines += textwrap.wrap(_unbroken(RULE), width) if whole else []
    return "\n".join(lines)


def _with_rows(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["verdict"] != NO_RUNS]


def _section(
    title: str, shown: pd.DataFrame | None, widths: Mapping[str, int], every: pd.DataFrame
) -> list[str]:
    said = ", ".join(f"{number} {name}" for name, number in counts(every).items())
    lines = [f"{title}: {len(every)}, of them {said}"]
    rows = [] if shown is None else shown.to_dict("records")
    if rows:
        lines += [_line({name: name for name in widths}, widths), "-" * sum(widths.values())]
        lines += [_line(row, widths) for row in rows]
    return lines if shown is None else [*lines, ""]


def _line(row: Mapping[Any, Any], widths: Mapping[str, int]) -> str:
    """One row of the terminal's table, texts wrapped within their columns."""
    cells = [textwrap.wrap(_unbroken(str(row[name])), w) or [""] for name, w in widths.items()]
    lines = []
    for i in range(max(map(len, cells))):
        parts = [c[i] if i < len(c) else "" for c in cells]
        padded = [part.ljust(w) for part, w in zip(parts, widths.values(), strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _unbroken(text: str) -> str:
    """With the space between a number and its per cent sign kept on one line."""
    return text.replace(" %", "\u00a0%")
