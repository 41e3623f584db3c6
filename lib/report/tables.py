"""The tables that only the report has, and what is not computed yet and what it costs."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lib import claims, experiments, paths
from lib.config import Run
from lib.figures import Table
from lib.report.facts import Cells, Value, scale_name
from lib.results.clock import window_counts, window_flops
from lib.results.reading import METHOD_NAMES, NoRuns, Runs, Source, load, published_rows
from lib.runs import cost

Names = dict[str, Any]
TABLES: dict[str, Callable[[Names], Table]] = {}

_SPARSE = ("sparse_momentum", "dsr", "set", "deepr", "static")


def table(name: str) -> Callable[[Callable[[Names], Table]], Callable[[Names], Table]]:
    """Register a table by the name that the texts call it."""

    def register(tell: Callable[[Names], Table]) -> Callable[[Names], Table]:
        TABLES[name] = tell
        return tell

    return register


# ------------------------------------------------------------------------------------ verdicts


class Verdicts:
    """What the rows say about the authors' claims, about what we add, and about single values; each
    at the largest scale that has its rows.
    """

    def __init__(self, scales: Sequence[str], root: str | Path | None) -> None:
        every = [Source(scale, root) for scale in scales]
        self.sources = [
            source
            for source in every
            if source == every[0] or any(paths.results_dir(source.profile, root).glob("*.csv"))
        ]

    @functools.cached_property
    def authors(self) -> pd.DataFrame:
        """The authors' own claims (`claims.scorecard`)."""
        return self._chosen(claims.scorecard)

    @functools.cached_property
    def extensions(self) -> pd.DataFrame:
        """What this reproduction adds (`claims.extensions`)."""
        return self._chosen(claims.extensions)

    @functools.cached_property
    def values(self) -> pd.DataFrame:
        """Published values that our runs can be held against: at the paper's scale only."""
        return claims.published_values(self.sources[0]).assign(profile=self.sources[0].profile)

    def of(self, ident: str) -> str:
        """The verdict on one of the extensions."""
        found = self.extensions.set_index("id")["verdict"]
        return str(found[ident])

    def _chosen(self, table: Callable[[Source], pd.DataFrame]) -> pd.DataFrame:
        first, *others = [table(source).assign(profile=source.profile) for source in self.sources]
        for frame in others:
            without = (first["verdict"] == claims.NO_RUNS) & (frame["verdict"] != claims.NO_RUNS)
            first = first.where(~without, frame)
        return first

    @property
    def counted(self) -> str:
        """ "Of the authors' 25 claims 3 are reproduced, ..."."""
        found = [f"{n} {verdict}" for verdict, n in claims.counts(self.authors).items()]
        return f"Of the authors' {len(self.authors)} claims: {', '.join(found)}"

    @property
    def values_counted(self) -> str:
        """The same for single published values."""
        found = [f"{n} {verdict}" for verdict, n in claims.counts(self.values).items()]
        return f"{len(self.values)} published values: {', '.join(found)}"


@table("scorecard")
def scorecard(names: Names) -> Table:
    """The authors' claims, each with its place, the paper's value, ours and the verdict."""
    return _judged(names["verdicts"].authors, "place in the paper")


@table("extensions")
def extensions(names: Names) -> Table:
    """What this reproduction adds, never counted with the authors' claims."""
    found = names["verdicts"].extensions
    return _judged(found[found["verdict"] != claims.NO_RUNS], "about")


@table("values")
def values(names: Names) -> Table:
    """Published values that our runs can be held against, those with rows."""
    found = names["verdicts"].values
    found = found[found["verdict"] != claims.NO_RUNS]
    return _judged(found, "file")


def _judged(found: pd.DataFrame, place: str) -> Table:
    if found.empty:
        raise NoRuns("no claim has rows")
    lines = [
        {
            "claim": row["claim"],
            place: row["source"],
            "paper": row["paper"],
            "ours [95 % interval]": row["ours"],
            "n": str(row["n"] or "–"),
            "verdict": row["verdict"] + _at(row),
        }
        for row in found.to_dict("records")
    ]
    return Table(pd.DataFrame(lines), "")


def _at(row: Any) -> str:
    small = row["profile"] != "paper" and row["verdict"] != claims.NO_RUNS
    return f" ({row['profile']})" * small


# --------------------------------------------------------------------------------------- MNIST


@table("curve")
def curve(names: Names) -> Table:
    """LeNet-300-100 by share of weights: five methods here, and both published files."""
    cells: Cells = names["main_results"]
    shares = sorted({run.density for run in cells.runs.planned} - {1.0})
    files = {
        "published, July 9": "mnist_sparse_summary",
        "published, July 29": "mnist_lenet300-100",
    }
    if cells.profile != "paper":  # a reduced run is not set beside a published value
        files = {}
    lines = [
        {
            "weights (%)": f"{100 * share:g}",
            **{METHOD_NAMES[m]: _said(cells, m, share) for m in _SPARSE},
            **({title: _published(file, share) for title, file in files.items()}),
        }
        for share in shares
    ]
    note = (
        "Test error in %, mean [95 % interval] over the seeds that learned."
        + " Published: sparse momentum in MNIST_sparse_summary.csv and in "
        "MNIST_compression_comparison of the official code, named by the days of 2019 when they "
        "entered." * bool(files)
    )
    return Table(pd.DataFrame(lines), "", note)


@table("networks")
def networks(names: Names) -> Table:
    """Both networks and the published values of each baseline."""
    sides: dict[str, Cells] = {
        "paper's network": names["plain_network"],
        "DSR authors' network": names["normed_network"],
        "trained their way": names["their_way"],
        "half of the output layer": names["half_output"],
    }
    lines = []
    for method in _SPARSE:
        for share in (0.01, 0.02, 0.05, 0.1):
            line = {"method": METHOD_NAMES[method], "weights (%)": f"{100 * share:g}"}
            if names["baseline_network"].profile == "paper":
                line["published"] = _published("mnist_sparse_summary", share, method)
            lines.append(
                line | {title: _said(side, method, share) for title, side in sides.items()}
            )
    if not any(side.profile for side in sides.values()):
        raise NoRuns("baseline_network: no runs of sparse momentum")
    return Table(pd.DataFrame(lines), "", "Test error in %, mean [95 % interval].")


def _said(cells: Cells, method: str, share: float, **more: Any) -> str:
    try:
        value: Value = cells.error(method, share, **more)
    except NoRuns:
        return "–"
    text = value.ci
    with contextlib.suppress(NoRuns):
        learned = cells.learned(method, share, **more)
        text += f" ({learned} learned)" * (learned.k < learned.n)
    return text


def _published(name: str, share: float, method: str = "sparse_momentum") -> str:
    try:
        row = published_rows(name, method=method, density=share, model="lenet300-100").iloc[0]
    except ValueError:
        return "–"
    return f"{row['test_error_pct']:.2f}"


# --------------------------------------------------------------------------------------- speed


@table("speed")
def speed(names: Names) -> Table:
    """Whole training steps and inference by share of weights, dense over sparse."""
    steps = names["clock"].steps
    lines = []
    for model, group in steps.groupby("model", sort=False):
        for what, column in (("training", "training"), ("inference", "inference")):
            line = {"network": experiments_name(str(model)), "step": what}
            for row in group.to_dict("records"):
                line[f"{100 * row['density']:g} %"] = f"{row[column]:.1f}"
            lines.append(line)
    note = f"Dense float32 over sparse float32, medians. Machine: {names['clock'].machine}."
    return Table(pd.DataFrame(lines), "", note)


def experiments_name(model: str) -> str:
    """Display name of a network."""
    from lib.results.reading import model_name

    return model_name(model)


# ------------------------------------------------------------------------- what there is, and not


@table("cost")
def missing(names: Names) -> Table:
    """What is missing at the paper's scale, and the hours it would take."""
    lines = []
    for name, this in experiments.EXPERIMENTS.items():
        cells: Cells = names[name]
        runs = load(name, Source(cells.profiles[0], cells.root))
        if runs.missing:
            lines.append(
                {
                    "experiment": name,
                    "question": this.title,
                    "runs missing": f"{runs.missing:,} of {len(runs.planned):,}",
                    "shown here": scale_name(cells.profile) if cells.profile else "not at all",
                    "core-hours": names["cost"].hours(runs),
                }
            )
    if not lines:
        raise NoRuns("nothing is missing")
    return Table(pd.DataFrame(lines), "", names["cost"].note)


@table("soak")
def soak(names: Names) -> Table:
    """What `make soak` found: kills, writers, bad inputs, memory, other places."""
    file = paths.results_dir("bench", names["clock"].root) / "soak.csv"
    if not file.exists():
        raise NoRuns(f"no {file}: make soak writes it")
    rows = pd.read_csv(file, dtype=str)
    note = f"make soak, {rows['date'].iloc[0]}, commit {rows['commit'].iloc[0]}."
    rows["as wanted"] = rows["passed"].map({"true": "yes", "false": "no"})
    return Table(rows[["what", "wanted", "found", "n", "as wanted"]], "", note)


@table("experiments")
def scope(names: Names) -> Table:
    """Every experiment: notebook, runs planned and done at each scale, and where they were made."""
    lines, done = [], []
    root = names["clock"].root
    for name, this in experiments.EXPERIMENTS.items():
        line = {"experiment": name, "notebook": this.notebook.split("_")[0]}
        for profile in ("quick", "hours", "paper"):
            runs = load(name, Source(profile, root))
            rows = pd.concat([runs.rows, runs.diverged])
            done.append(rows)
            line[f"{profile}: runs"] = (
                f"{len(rows)} of {len(runs.planned)}" if runs.planned else "–"
            )
            line[f"{profile}: hours"] = (
                f"{rows['train_seconds'].sum() / 3600:.2g}" if len(rows) else "–"
            )
        lines.append(line)
    rows = pd.concat(done).drop_duplicates("run_id")
    if rows.empty:
        raise NoRuns("no runs at any scale")
    where = {
        "processors": rows["device"],
        "torch": rows["torch"],
        "Python": rows["python"],
        "commits": rows["commit"].str[:10],
    }
    changed = int(rows["dirty"].fillna(False).astype(bool).sum())
    note = (
        f"{len(rows):,} different runs, {rows['train_seconds'].sum() / 3600:.2g} hours of training "
        "(a run of several experiments is trained once). "
        + ". ".join(f"{what[0].upper()}{what[1:]}: {_list(said)}" for what, said in where.items())
        + (f"; {changed} runs with changes that were not committed." if changed else ".")
    )
    return Table(pd.DataFrame(lines), "", note)


def _list(values: pd.Series) -> str:
    return ", ".join(sorted({str(v) for v in values}))


def todo(wanted: Iterable[Cells], costs: Cost) -> str:
    """What of these experiments is not computed at the paper's scale, in one paragraph; or ""."""
    parts = []
    for cells in wanted:
        runs = load(cells.experiment, Source(cells.profiles[0], cells.root), **dict(cells.wanted))
        if not runs.missing:
            continue
        done = len(runs.planned) - runs.missing
        state = f"{runs.missing:,} of its {len(runs.planned):,}" if done else f"{runs.missing:,}"
        parts.append(f"`{cells.experiment}`, {state} runs{costs.text(runs)}")
    if not parts:
        return ""
    return f"*Not yet computed at {scale_name(cells.profiles[0])}:* {'; '.join(parts)}."


class Cost:
    """Core-hours that missing runs would take, by the rows of the processor that has most of them.

    Equal rows give equal hours, on whatever machine the report is built.
    """

    def __init__(self, root: str | Path | None) -> None:
        self.root = Path(root) if root else paths.REPO / "results"
        self._found: dict[tuple[Any, ...], float] = {}

    @functools.cached_property
    def _known(self) -> tuple[str, cost.Estimator] | None:
        rows = cost.rows_under(self.root)
        rows = rows[rows["train_seconds"] > 0]
        if rows.empty:
            return None
        processor = str(rows["device"].value_counts().idxmax())
        return processor, cost.Estimator(rows[rows["device"] == processor], "cpu")

    @property
    def note(self) -> str:
        """Whose hours these are."""
        if self._known is None:
            return ""
        return (
            f"Core-hours of {self._known[0]} by the rows in the repository; for a network without "
            "rows by those of the network with the nearest FLOPs."
        )

    def hours(self, runs: Runs) -> str:
        """ "12", two digits, of the missing ones among these runs."""
        if self._known is None:
            return "–"
        done = {*runs.rows["run_id"], *runs.diverged["run_id"]}
        left = [run for run in runs.planned if run.run_id not in done]
        return _two_digits(sum(map(self._seconds, left)) / 3600)

    def _seconds(self, run: Run) -> float:
        """Of one run; runs that differ in nothing that costs are looked up once."""
        key = tuple(getattr(run, name) for name in _COSTS)
        if key not in self._found and self._known is not None:
            self._found[key] = self._known[1].seconds(run)
        return self._found[key]

    def text(self, runs: Runs) -> str:
        """ " (12 core-hours)"."""
        hours = self.hours(runs)
        return f" ({hours} core-hours)" if hours != "–" else ""


_COSTS = ["dataset", "model", "method", "density", "kernels", "precision", "epochs"]
_COSTS += ["train_samples", "val_fraction"]


def _two_digits(value: float) -> str:
    digits = 1 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{round(value, digits):,.{max(0, digits)}f}"


def really_dense() -> str:
    """ "15.9 to 26.5": what a nominal 5 % of the weights was, with the layers left dense."""
    found = [100 * kept.real_density(0.05) for kept in experiments.KEPT_DENSE.values()]
    return f"{min(found):.1f} to {max(found):.1f}"


class Window:
    """Training FLOPs in % of dense, by network and K mini-batches of dense gradients (0: all)."""

    def __init__(self, root: str | Path | None) -> None:
        self.root = root

    def __getitem__(self, at: tuple[str, int]) -> float:
        return window_flops(self.root)[at]

    def differing(self, window: int) -> int:
        """Grown positions that differ from full tracking with this window, over all networks."""
        counts = window_counts(self.root)
        return int(counts.loc[counts["window"] == window, "differing"].sum())
