"""What a claim is: its words and place, how ours and the paper's value come, and its margin."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd

from lib.experiments import experiment
from lib.results.reading import Runs, Source, Where, published_rows
from lib.stats import Interval, Kind

NAN = math.nan

# When a margin or a rule was set, by the history of this repository. The first rows were committed
# on 2026-11-22 at 13:20 (quick) and 13:24 (paper).
BEFORE = "before rows (2026-11-22)"
AFTER = "after rows existed (2026-11-24)"

# Margins: what counts as no difference in practice, in points of test error.
TEN_IMAGES = 0.1  # ten of MNIST's 10,000 test images
# The official code's own two files differ by 0.19 in one cell (sparse momentum at 2 % of the
# weights: 1.80 in MNIST_sparse_summary.csv, 1.99 in the data of the compression figure).
BETWEEN_MNIST_FILES = 0.2
# Below the least difference that the paper's table shows between sparse momentum and SNIP (0.27).
TABLE_MARGIN = 0.2
# The paper's table and the official sensitivity data differ by 0.27 in one cell (AlexNet-s, dense).
BETWEEN_CIFAR10_FILES = 0.3
# Effects of a part: as TEN_IMAGES, and on CIFAR-10 the size of the differences by which the paper's
# table ranks methods.
EFFECT_MARGIN = {"mnist": 0.1, "cifar10": 0.5}
# A hyper-parameter may move the error on MNIST by as much as the weights that are left out cost at
# 5 % (published: 1.53 against 1.34 % dense).
SETTING_MARGIN = {"mnist": 0.2, "cifar10": 0.5}


@dataclass(frozen=True)
class Part:
    """One of the comparisons that a claim consists of: against one method, on one network, ...

    `decides` is what the verdict's rule speaks of, `shown` what is printed. A part that does not
    `count` is only listed, for instance one share of weights where the mean over them decides.
    `margin` and `unit` where they are not the claim's own (log-ratios). `less_often`: A learned in
    a smaller share of its runs than B, whatever those that did say.
    """

    name: str
    decides: Interval
    shown: Interval
    note: str = ""
    counts: bool = True
    margin: float | None = None
    unit: str = ""
    less_often: bool = False


@dataclass(frozen=True)
class Found:
    """What the runs say: the parts, those that have no rows yet, and the runs behind them."""

    parts: tuple[Part, ...]
    runs: Runs
    missing: tuple[str, ...] = ()
    note: str = ""
    scale: str = ""  # in place of that of the runs


@dataclass(frozen=True)
class PaperValue:
    """A published number with its standard error (NaN: none printed) and what to know about it."""

    value: float
    standard_error: float = NAN
    n: int | None = None
    note: str = ""


class Measure:
    """How to get our side of a claim; `experiment` is a name in lib/experiments.py."""

    experiment: str

    def cells(self, profile: str, part: str) -> list[Any] | None:
        """The values (shares of weights) a part is averaged over; None where nothing is."""
        return None

    def measure(self, source: Source, papers: Mapping[str, PaperValue], margin: float) -> Found:
        """Our numbers, given the paper's by part; NoRuns if no part has the runs it needs."""
        raise NotImplementedError


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
        a, note = corrected(self.table, self.a, self.raw, self.column)
        if self.b is None:
            if len(a) != 1:
                raise ValueError(f"{self.table}: {self.a} is {len(a)} rows, expected one")
            row = a.iloc[0]
            n = None if pd.isna(row["n"]) else int(row["n"])
            return PaperValue(float(row[self.column]), float(row["standard_error"]), n, note)
        b, more = corrected(self.b_table or self.table, self.b, self.raw, self.column)
        key = self.over or "dataset"  # alike in both rows where a single pair is compared
        pairs = pd.DataFrame(
            {"a": a.set_index(key)[self.column], "b": b.set_index(key)[self.column]}
        ).dropna()
        if self.over and only is not None:
            pairs = pairs[pairs.index.isin(set(only))]
        difference = float((pairs["a"] - pairs["b"]).mean()) if len(pairs) else NAN
        return PaperValue(difference, note="; ".join(filter(None, (note, more))))


def corrected(
    table: str, wanted: Where, raw: str = "", column: str = "test_error_pct"
) -> tuple[pd.DataFrame, str]:
    """Published rows with these values, slips replaced as `Published` says, and what was done."""
    rows = published_rows(table, **wanted)
    notes = []
    for i, row in enumerate(rows.to_dict("records")):
        if not row["suspect"]:
            continue
        at = f"published {row['label']} at {100 * row['density']:g} %"
        if raw:
            same = {name: row[name] for name in ("method", "model", "dataset", "density")}
            found = published_rows(raw, **same).iloc[0]
            for name in (column, "standard_error", "n"):
                rows.loc[i, name] = found[name]
            notes.append(f"{at} from its raw runs")
        else:
            rows.loc[i, column] = NAN
            notes.append(f"{at} left out")
    return rows, "; ".join(notes)


@dataclass(frozen=True)
class Rule:
    """How a claim is judged: its kind (`lib.stats.verdict`), what counts as no difference in
    practice (in `unit`), and whether that margin was set before there were rows.
    """

    kind: Kind
    margin: float
    unit: str = "points"
    when: str = BEFORE


@dataclass(frozen=True)
class Claim:
    """One claim: its words, its place in the paper, its rule, how ours and the paper's value come.

    `paper`: one value, one for each part by name, or None where none is published.
    """

    id: str
    statement: str
    source: str
    rule: Rule
    ours: Measure
    paper: PaperSource | Mapping[str, PaperSource] | None = None

    @property
    def notebook(self) -> str:
        """The notebook of the experiment that it rests on."""
        return experiment(self.ours.experiment).notebook

    def papers(self, profile: str) -> dict[str, PaperValue]:
        """The paper's values by part ("" where one value is for the whole claim)."""
        return {
            name: source.read(self.ours.cells(profile, name))
            for name, source in self.by_part().items()
        }

    def by_part(self) -> dict[str, PaperSource]:
        """The sources of the paper's values by part."""
        if self.paper is None:
            return {}
        return dict(self.paper) if isinstance(self.paper, Mapping) else {"": self.paper}
