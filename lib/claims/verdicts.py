"""The paper's claims as data, and what the runs say about each.  Imports no torch.

A new claim is one `Claim` in CLAIMS: how to get ours (`Difference`, `Level`, `Reduction`, or any
object with `experiment` and `measure`) and how to read the paper's value from results/published
(`Published` or None). Margins and kinds stand here before the numbers do; the rule from an interval
to a verdict is `lib.stats.verdict`.

Where a claim speaks of several shares of weights, the verdict rests on one test: the mean over the
shares, taken seed by seed. What each share says alone is listed beside it, with p-values of the
paired t-tests adjusted by Holm over the shares of that claim, and decides nothing.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import pandas as pd

from lib.claims.effects import untrained
from lib.results.reading import (
    METHOD_NAMES,
    NoRuns,
    Runs,
    Source,
    Where,
    interval_text,
    load,
    planned_runs,
    published_rows,
    select,
)
from lib.stats import (
    Interval,
    Verdict,
    holm,
    paired_difference,
    t_interval,
    value_difference,
    verdict,
)

NAN = math.nan
NO_RUNS = "no runs"  # in place of a verdict
LEVEL = 0.05  # of the adjusted p-values that are called a difference

RULE = (
    "Rule: the verdict rests on the 95 % Student-t interval of the difference, paired by seed. "
    "'lower' is reproduced if the interval lies below 0 and not reproduced if it lies above 0 or "
    "inside the margin; 'match' is reproduced if nothing in it is worse than the margin and not "
    "reproduced if all of it is; 'value' is reproduced if it lies inside the margin around the "
    "paper's value, not reproduced if outside, and only compared at the paper's scale. Else: "
    "inconclusive at this n."
)


@dataclass(frozen=True)
class Measured:
    """What the runs say: the interval that decides, and the one to show (both in `unit`)."""

    decides: Interval
    shown: Interval
    runs: Runs
    detail: str = ""


@dataclass(frozen=True)
class PaperValue:
    """A published number with its standard error (NaN: none printed) and what to know about it."""

    value: float
    standard_error: float = NAN
    n: int | None = None
    note: str = ""


class Measure(Protocol):
    """How to get our side of a claim."""

    @property
    def experiment(self) -> str:
        """Name of the experiment in lib/experiments.py."""
        ...

    def cells(self, profile: str) -> list[Any] | None:
        """The values (shares of weights) that are averaged over; None where nothing is."""
        ...

    def measure(self, source: Source, paper: PaperValue | None) -> Measured:
        """Our numbers; NoRuns if the runs that it needs aren't there."""
        ...


class PaperSource(Protocol):
    """How to read the paper's value."""

    @property
    def says(self) -> str:
        """How the value is printed, with {value}; empty: as a number."""
        ...

    def read(self, only: Iterable[Any] | None = None) -> PaperValue:
        """The value; `only` restricts what it is averaged over to the cells that we ran."""
        ...


@dataclass(frozen=True)
class Published:
    """A value of results/published/<table>.csv: of row `a`, or of `a` minus `b` (row of `b_table`,
    by default the same), the mean over the values of `over` that both have.

    Values that are probably slips of the source (column `suspect`) are replaced by those of the
    table `raw`, the single runs behind them, or left out where there is none. `says` is how the
    value is printed, for instance "dense level at {value:g} % weights".
    """

    table: str
    a: Where
    b: Where | None = None
    over: str = ""
    b_table: str = ""
    raw: str = ""
    column: str = "test_error_pct"
    says: str = ""

    def read(self, only: Iterable[Any] | None = None) -> PaperValue:
        """The value; `only` restricts it to these values of `over` (the ones that we ran)."""
        a, note = self._rows(self.table, self.a)
        if self.b is None:
            if len(a) != 1:
                raise ValueError(f"{self.table}: {self.a} is {len(a)} rows, expected one")
            row = a.iloc[0]
            n = None if pd.isna(row["n"]) else int(row["n"])
            return PaperValue(float(row[self.column]), float(row["standard_error"]), n, note)
        b, more = self._rows(self.b_table or self.table, self.b)
        key = self.over or "dataset"  # alike in both rows where a single pair is compared
        pairs = pd.DataFrame(
            {"a": a.set_index(key)[self.column], "b": b.set_index(key)[self.column]}
        ).dropna()
        if self.over and only is not None:
            pairs = pairs[pairs.index.isin(set(only))]
        difference = float((pairs["a"] - pairs["b"]).mean()) if len(pairs) else NAN
        return PaperValue(difference, note="; ".join(filter(None, (note, more))))

    def _rows(self, table: str, wanted: Where) -> tuple[pd.DataFrame, str]:
        rows = published_rows(table, **wanted)
        notes = []
        for i, row in enumerate(rows.to_dict("records")):
            if not row["suspect"]:
                continue
            at = f"published {row['label']} at {100 * row['density']:g} %"
            if self.raw:
                same = {name: row[name] for name in ("method", "model", "dataset", "density")}
                value = float(published_rows(self.raw, **same)[self.column].iloc[0])
                notes.append(f"{at} from its raw runs")
            else:
                value = NAN
                notes.append(f"{at} left out")
            rows.loc[i, self.column] = value
        return rows, "; ".join(notes)


@dataclass(frozen=True)
class Difference:
    """Test error of A minus that of B in percentage points, paired by seed.

    With `over` (a field of Run) the mean over its values that are planned for both; a seed counts
    when it has them all, so that a partly finished grid doesn't mix shares.
    """

    experiment: str
    a: Where
    b: Where
    over: str = ""

    def cells(self, profile: str) -> list[Any] | None:
        """The values of `over` planned for both sides."""
        return (
            shared_cells(self.experiment, profile, self.over, self.a, self.b) if self.over else None
        )

    def measure(self, source: Source, paper: PaperValue | None) -> Measured:
        """The difference, and with `over` what each of its values says alone."""
        every = load(self.experiment, source)
        a, b = every.where(**self.a), every.where(**self.b)
        cells = self.cells(source.profile)
        if cells is not None:
            a, b = a.where(**{self.over: cells}), b.where(**{self.over: cells})
        both = every.only((*a.planned, *b.planned))
        pooled = paired_difference(mean_by_seed(a, self.over), mean_by_seed(b, self.over))
        if pooled.n == 0:
            a.needed()
            b.needed()
            raise NoRuns(f"{self.experiment} ({source.profile}): no seed has finished both sides")
        details = [_each(differences(a, b, self.over), self.over)] if self.over else []
        if pooled.left_out:
            details.append(f"not yet whole: seeds {', '.join(map(str, pooled.left_out))}")
        if len(both.diverged):
            details.append(f"{len(both.diverged)} runs diverged")
        details.append(untrained(both))
        return Measured(pooled.interval, pooled.interval, both, "; ".join(filter(None, details)))


@dataclass(frozen=True)
class Level:
    """Test error of A in per cent, against the paper's value with its standard error.

    `of_one`: the paper printed no standard error, and the interval is that of our seeds alone.
    """

    experiment: str
    a: Where
    of_one: bool = False

    def cells(self, profile: str) -> list[Any] | None:
        """One cell: nothing is averaged over."""
        return None

    def measure(self, source: Source, paper: PaperValue | None) -> Measured:
        """Ours minus the paper's (Welch), and our mean with its own interval."""
        if paper is None:
            raise ValueError(f"{self.a}: a value is compared with a published one, but none given")
        runs = load(self.experiment, source, **self.a).needed()
        errors = runs.by_seed()
        detail = f"{len(runs.diverged)} runs diverged" if len(runs.diverged) else ""
        ours = t_interval(errors)
        if self.of_one:
            mean, low, high = (value - paper.value for value in ours[:3])
            off = ours._replace(mean=mean, low=low, high=high)
        else:
            off = value_difference(errors, paper.value, paper.standard_error, paper.n)
        return Measured(off, ours, runs, detail)


@dataclass(frozen=True)
class Reduction:
    """Relative reduction of the test error by A against others, in per cent of theirs: per seed
    the mean over the others and over the values of `over` of 100 (1 - A / other).

    The paper prints no standard error for its number, so that the interval is that of our seeds.
    `curves`: published table with the same methods, of which the same is computed beside it.
    """

    experiment: str
    a: Where
    others: tuple[Where, ...]
    over: str
    curves: str = ""

    def cells(self, profile: str) -> list[Any] | None:
        """The values of `over` planned for all sides."""
        return shared_cells(self.experiment, profile, self.over, self.a, *self.others)

    def measure(self, source: Source, paper: PaperValue | None) -> Measured:
        """Ours minus the paper's, and ours."""
        every = load(self.experiment, source)
        cells = {self.over: self.cells(source.profile)}
        a = every.where(**self.a, **cells)
        others = [every.where(**other, **cells) for other in self.others]
        runs = every.only(run for side in (a, *others) for run in side.planned)
        ours = a.rows.pivot(index="seed", columns=self.over, values="test_error_pct")
        ratios = [
            100
            * (1 - ours / b.rows.pivot(index="seed", columns=self.over, values="test_error_pct"))
            for b in others
        ]
        whole = len(cells[self.over] or ()) * len(others)
        table = pd.concat(ratios, axis=1)
        by_seed = table[table.notna().sum(axis=1) == whole].mean(axis=1)
        if by_seed.empty:
            for side in (a, *others):
                side.needed()
            raise NoRuns(f"{self.experiment} ({source.profile}): no seed has finished every side")
        shown = t_interval(by_seed)
        off = paper.value if paper else 0.0
        decides = shown._replace(mean=shown.mean - off, low=shown.low - off, high=shown.high - off)
        detail = ""
        if self.curves:
            value, kept = self.from_curves(cells[self.over] or ())
            detail = f"the published curves give {value:.1f} % (weights {_percents(kept)})"
        return Measured(decides, shown, runs, detail)

    def from_curves(self, cells: Iterable[Any]) -> tuple[float, list[Any]]:
        """The same from the published curves as printed, and the cells they have."""
        a, *others = (
            published_rows(self.curves, **side).set_index(self.over)["test_error_pct"]
            for side in (self.a, *self.others)
        )
        kept = [at for at in sorted(cells) if all(at in side.index for side in (a, *others))]
        ratios = [100 * (1 - a[at] / b[at]) for b in others for at in kept]
        return (sum(ratios) / len(ratios) if ratios else NAN), kept


@dataclass(frozen=True)
class Claim:
    """One claim of the paper: its words, where it stands, how ours and the paper's value come.

    `margin`: what counts as no difference in practice, in `unit`; chosen before the numbers.
    """

    id: str
    statement: str
    source: str
    kind: Literal["lower", "match", "value"]
    margin: float
    ours: Measure
    paper: PaperSource | None
    notebook: str
    unit: str = "points"


# ------------------------------------------------------------------------ MNIST, LeNet-300-100

_NET: Where = {"dataset": "mnist", "model": "lenet300-100"}
_CURVES = "mnist_sparse_summary"
_RAW = "dsr_authors_raw_runs_wrn28-2_and_mnist"
_HEADLINES = "headline_and_speedup_claims"
_FIGURE = "MNIST figure (official code, results/MNIST_sparse_summary.csv)"

TEN_IMAGES = 0.1  # points: ten of the 10,000 test images
# Points: the official code's own two files differ by 0.19 in one cell (sparse momentum at 2 % of
# the weights: 1.80 in MNIST_sparse_summary.csv, 1.99 in the data of the compression figure).
_BETWEEN_FILES = 0.2
_HALF_OF_8_PERCENT = 4.0


def _side(method: str, **more: Any) -> Where:
    return {**_NET, "method": method, **more}


def _mnist_lower(method: str) -> Claim:
    a, b = _side("sparse_momentum"), _side(method)
    raw_only = method == "static"
    return Claim(
        id=f"mnist_lower_than_{method}",
        statement=f"MNIST: lower error than {METHOD_NAMES[method]}, mean over the weights",
        source=_FIGURE + ("; static: raw runs of the DSR authors" if raw_only else ""),
        kind="lower",
        margin=TEN_IMAGES,
        ours=Difference("main_results", a, b, over="density"),
        paper=Published(_CURVES, a, b, over="density", b_table=_RAW if raw_only else "", raw=_RAW),
        notebook="01_main_results",
    )


def _mnist_match(experiment: str, density: float, source: str, paper: Published) -> Claim:
    return Claim(
        id=f"mnist_matches_dense_at_{density:g}",
        statement=f"MNIST: matches dense with {100 * density:g} % of the weights",
        source=source,
        kind="match",
        margin=TEN_IMAGES,
        ours=Difference(experiment, _side("sparse_momentum", density=density), _side("dense")),
        paper=paper,
        notebook="01_main_results",
    )


def _mnist_value(method: str, density: float) -> Claim:
    side = _side(method, density=density)
    weights = "" if method == "dense" else f" with {100 * density:g} % of the weights"
    return Claim(
        id=f"mnist_error_{method}_{density:g}",
        statement=f"MNIST: error of {METHOD_NAMES[method].lower()}{weights}",
        source=_FIGURE,
        kind="value",
        margin=_BETWEEN_FILES,
        ours=Level("main_results", side),
        paper=Published(_CURVES, side),
        notebook="01_main_results",
        unit="%",
    )


def _dense_level(setting: str) -> Published:
    quantity = "weights_for_dense_level_pct"
    return Published(
        _HEADLINES,
        {"dataset": "mnist", "quantity": quantity, "setting": setting},
        column="value",
        says="dense level at {value:g} % weights",
    )


_MNIST = (
    *(_mnist_lower(method) for method in ("dsr", "set", "deepr", "static")),
    Claim(
        id="mnist_relative_reduction",
        statement="MNIST: error reduced by 8 % against other sparse algorithms "
        "(against DSR, mean over the weights)",
        source="abstract, versions 1 and 2; which algorithms and weights is not said",
        kind="value",
        margin=_HALF_OF_8_PERCENT,
        ours=Reduction(
            "main_results", _side("sparse_momentum"), (_side("dsr"),), "density", _CURVES
        ),
        paper=Published(
            _HEADLINES,
            {"dataset": "mnist", "quantity": "relative_error_decrease_pct"},
            column="value",
            says="{value:g} %",
        ),
        notebook="01_main_results",
        unit="%",
    ),
    _mnist_match(
        "mnist_compression", 0.08, "a reader's public notes on the paper", _dense_level("")
    ),
    _mnist_match(
        "main_results",
        0.1,
        _FIGURE,
        Published(_CURVES, _side("sparse_momentum", density=0.1), _side("dense")),
    ),
    _mnist_match(
        "mnist_compression",
        0.2,
        "the author's blog, quoted elsewhere",
        _dense_level("match or exceed"),
    ),
    Claim(
        id="mnist_dsr_lower_at_0.01",
        statement="MNIST, 1 % of the weights: DSR has lower error than sparse momentum "
        "(raw runs; the figure's file has a slip)",
        source="official code, results/dynamic_sparse/results.zip",
        kind="lower",
        margin=TEN_IMAGES,
        ours=Difference(
            "main_results", _side("dsr", density=0.01), _side("sparse_momentum", density=0.01)
        ),
        paper=Published(
            _CURVES,
            _side("dsr", density=0.01),
            _side("sparse_momentum", density=0.01),
            raw=_RAW,
        ),
        notebook="01_main_results",
    ),
    _mnist_value("dense", 1.0),
    *(_mnist_value("sparse_momentum", share) for share in (0.01, 0.02, 0.03, 0.04, 0.05, 0.1)),
)

CLAIMS: list[Claim] = [*_MNIST]


def add(*claims: Claim) -> None:
    """Append the claims of another topic (lib/claims/*.py); ValueError for an id that is taken."""
    for claim in claims:
        if any(claim.id == other.id for other in CLAIMS):
            raise ValueError(f"two claims have the id {claim.id!r}")
        CLAIMS.append(claim)


# ---------------------------------------------------------------------------------- evaluation


def differences(a: Runs, b: Runs, over: str) -> pd.DataFrame:
    """A minus B (points of test error) at each value of `over` that both have, paired by seed.

    Columns: `over`, mean, low, high (95 %), n, p (paired t-test), p_holm (adjusted over the rows).
    """
    found = []
    for at in sorted(set(a.rows[over]) & set(b.rows[over])):
        pair = paired_difference(a.by_seed(**{over: at}), b.by_seed(**{over: at}))
        if pair.n:
            found.append((at, pair.mean, pair.low, pair.high, pair.n, pair.p_t))
    table = pd.DataFrame(found, columns=[over, "mean", "low", "high", "n", "p"])
    table["p_holm"] = holm(table["p"])
    return table


def verdict_table(source: Source, notebook: str = "") -> pd.DataFrame:
    """One row per claim (of one notebook), also where there are no runs yet.

    Columns: id, claim, paper, ours (texts, with unit and interval), n, verdict, detail, scale, and
    as numbers paper_value, ours_mean, ours_low, ours_high (the interval shown), kind, margin, unit,
    experiment, source, notebook.
    """
    claims = [claim for claim in CLAIMS if notebook in ("", claim.notebook)]
    if not claims:
        known = ", ".join(sorted({claim.notebook for claim in CLAIMS}))
        raise ValueError(f"no claim has the notebook {notebook!r}: known are {known}")
    return pd.DataFrame([_judged(claim, source) for claim in claims])


def _judged(claim: Claim, source: Source) -> dict[str, Any]:
    paper = claim.paper.read(claim.ours.cells(source.profile)) if claim.paper else None
    row: dict[str, Any] = {
        "id": claim.id,
        "claim": claim.statement,
        "paper": _paper_text(claim, paper),
        "ours": "–",
        "n": 0,
        "verdict": NO_RUNS,
        "detail": "",
        "scale": "",
        "paper_value": paper.value if paper else NAN,
        "ours_mean": NAN,
        "ours_low": NAN,
        "ours_high": NAN,
        "kind": claim.kind,
        "margin": claim.margin,
        "unit": claim.unit,
        "experiment": claim.ours.experiment,
        "source": claim.source,
        "notebook": claim.notebook,
    }
    try:
        measured = claim.ours.measure(source, paper)
    except NoRuns as reason:
        return {**row, "detail": str(reason)}
    shown = measured.shown
    said = verdict(claim.kind, measured.decides, claim.margin, source.profile)
    if source.profile == "smoke":
        said = Verdict.NOT_COMPARABLE
    notes = (measured.detail, paper.note if paper else "")
    return {
        **row,
        "ours": f"{_number(claim, *shown[:3])} {claim.unit}",
        "n": shown.n,
        "verdict": str(said),
        "detail": "; ".join(filter(None, notes)),
        "scale": measured.runs.scale(),
        "ours_mean": shown.mean,
        "ours_low": shown.low,
        "ours_high": shown.high,
    }


def verdict_text(source: Source, width: int = 110) -> str:
    """The verdict table for a terminal: claim, the paper's value, ours with interval and n,
    verdict; the scale of the runs and the rule below.
    """
    table = verdict_table(source)
    widths = {"claim": width - 73, "paper": 20, "ours": 28, "n": 3, "verdict": 14}
    titles = {name: name for name in widths} | {"ours": "ours [95 % interval]"}
    rule = "-" * width
    lines = [_line(titles, widths), rule]
    if source.profile != "paper":
        lines.insert(0, f"Profile {source.profile}: reduced scale, not the paper's\n")
    for row in table.to_dict("records"):
        lines.append(_line(row, widths))
        if row["detail"] and row["verdict"] != NO_RUNS:  # the scale below says what is missing
            lines += textwrap.wrap(
                _unbroken(row["detail"]), width, initial_indent="    ", subsequent_indent="    "
            )
    lines.append(rule)
    for scale in scales(source, table):
        lines += textwrap.wrap(scale, width)
    lines += textwrap.wrap(_unbroken(RULE), width)
    return "\n".join(lines)


def scales(source: Source, table: pd.DataFrame) -> list[str]:
    """One line per experiment that the claims of a verdict table rest on: its scale."""
    names = dict.fromkeys(table["experiment"])
    return [f"{name}: {load(name, source).scale()}" for name in names]


def sentences(source: Source, notebook: str = "") -> list[str]:
    """Each claim as one Markdown sentence with its numbers, for a notebook's conclusion."""
    said = []
    for row in verdict_table(source, notebook).to_dict("records"):
        text = f"**{row['verdict']}**: {row['claim']}. Paper: {row['paper']}; ours: {row['ours']}"
        text += f", n = {row['n']}." if row["n"] else "."
        if row["detail"]:
            text += f" ({row['detail'][0].upper()}{row['detail'][1:]}.)"
        said.append(text)
    return said


def shared_cells(experiment: str, profile: str, over: str, *sides: Where) -> list[Any]:
    """The values of `over` that are planned for all sides."""
    runs = planned_runs(experiment, profile)
    values = [{getattr(run, over) for run in select(runs, **side)} for side in sides]
    return sorted(set.intersection(*values))


def mean_by_seed(runs: Runs, over: str) -> pd.Series:
    """Test error by seed; with `over` the mean over all its planned values, NaN where one lacks."""
    if not over:
        return runs.by_seed()
    cells = [runs.by_seed(**{over: at}) for at in sorted({getattr(r, over) for r in runs.planned})]
    if not cells:
        return pd.Series(dtype=float)
    return pd.concat(cells, axis=1).mean(axis=1, skipna=False)


def _each(table: pd.DataFrame, over: str) -> str:
    """What each cell says alone: "lower at 1, 2 %; no difference shown at 5 %"."""
    groups: dict[str, list[Any]] = {"lower at": [], "higher at": [], "no difference shown at": []}
    for row in table[table["p_holm"].notna()].to_dict("records"):
        sure = row["p_holm"] < LEVEL
        side = "lower at" if row["mean"] < 0 else "higher at"
        groups[side if sure else "no difference shown at"].append(row[over])
    texts = [
        f"{name} {_percents(values) if over == 'density' else ', '.join(map(str, values))}"
        for name, values in groups.items()
        if values
    ]
    return "; ".join(texts) + (" (Holm)" if texts else "")


def _percents(shares: Iterable[float]) -> str:
    return f"{', '.join(f'{100 * share:g}' for share in shares)} %"


def _number(claim: Claim, mean: float, low: float = NAN, high: float = NAN) -> str:
    whole = claim.unit == "%" and claim.margin >= 1
    sign = claim.kind != "value" and claim.unit != "×"  # times faster is no difference
    return interval_text(mean, low, high, 1 if whole else 2, sign=sign)


def _paper_text(claim: Claim, paper: PaperValue | None) -> str:
    if paper is None:
        return "not published"
    if math.isnan(paper.value):
        return "–"
    if claim.paper is not None and claim.paper.says:
        return claim.paper.says.format(value=paper.value)
    text = _number(claim, paper.value)
    if not math.isnan(paper.standard_error):
        text += f" ± {paper.standard_error:.2f}"
    return f"{text} {claim.unit}"


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
