"""What figures, tables and claims read: the planned runs of an experiment that are done, their
means and intervals, and the published numbers beside them.  Imports no torch.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib import experiments, paths
from lib.config import Run, unknown
from lib.results import store as results
from lib.results.published import published
from lib.stats import t_interval, wilson

Where = dict[str, Any]  # column -> value, or several values of which any will do

# In this order in every figure and table.
METHOD_NAMES = {
    "dense": "Dense",
    "sparse_momentum": "Sparse momentum",
    "dsr": "DSR",
    "set": "SET",
    "deepr": "DeepR",
    "rigl": "RigL",
    "snip": "SNIP",
    "static": "Static mask",
    "small_dense": "Small dense",
}
MODEL_NAMES = {
    "lenet300-100": "LeNet-300-100",
    "lenet5": "LeNet-5",
    "lenet300-100-bn": "LeNet-300-100 with batch norm (DSR's)",
    "alexnet-s": "AlexNet-s",
    "alexnet-b": "AlexNet-b",
    "vgg16-c": "VGG16-C",
    "vgg16-d": "VGG16-D",
    "vgg16-like": "VGG16-like",
    "wrn-28-2": "WRN-28-2",
    "wrn-16-8": "WRN-16-8",
    "wrn-16-10": "WRN-16-10",
    "wrn-22-8": "WRN-22-8",
    "resnet50": "ResNet-50",
}


@dataclass(frozen=True)
class Source:
    """Where rows are read from: the scale of the runs, and the folder of results that isn't the
    repository's own (None or "": results/).
    """

    profile: str
    root: str | Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root) if self.root else None)

    @property
    def reduced(self) -> bool:
        """Whether the scale is a reduced one, not the paper's."""
        return self.profile != "paper"

    def at(self, profile: str) -> Source:
        """The same results at another scale."""
        return replace(self, profile=profile)

    def csv(self, experiment: str) -> Path:
        """The file with one row per run of the experiment."""
        return paths.results_csv(self.profile, experiment, self.root)


class NoRuns(ValueError):
    """None of the runs that a figure or claim needs is there; the message says how to get them."""


CHANCE = 80.0  # %: of ten classes guessing errs in 90
_GUESSING = {"mnist": math.log(10), "cifar10": math.log(10), "imagenet": math.log(1000)}  # loss


def at_chance(rows: pd.DataFrame) -> pd.Series:
    """Which runs did not learn, at their end: test error above CHANCE, or a training loss of at
    least 98 % of guessing's. The only such rule here; diverged runs (NaN) are kept apart.
    """
    loss = rows["train_loss"] >= 0.98 * rows["dataset"].map(_GUESSING)
    return (rows["test_error_pct"] > CHANCE) | loss


@dataclass(frozen=True)
class Runs:
    """The planned runs of an experiment at a profile, and the rows of those that are done.

    Rows of other runs in the same CSV (other settings through --set, earlier versions of a method)
    are not part of it. `rows` has the columns of lib/results/store.py and is sorted by method,
    density and seed; `diverged` has the rows without errors.
    """

    experiment: str
    profile: str
    csv: Path
    planned: tuple[Run, ...]
    rows: pd.DataFrame
    diverged: pd.DataFrame

    @property
    def missing(self) -> int:
        """How many planned runs have no row yet."""
        return len(self.planned) - len(self.rows) - len(self.diverged)

    @property
    def methods(self) -> list[str]:
        """Methods with at least one finished run, in the order used everywhere."""
        present = set(self.rows["method"])
        return [name for name in METHOD_NAMES if name in present]

    def where(self, **wanted: Any) -> Runs:
        """The part whose runs have these fields (any field of Run; several values: any of them)."""
        return self.only(select(self.planned, **wanted))

    def only(self, planned: Iterable[Run]) -> Runs:
        """The part with these of the planned runs."""
        kept = tuple(planned)
        ids = set(map(_id, kept))
        return replace(
            self, planned=kept, rows=_of(self.rows, ids), diverged=_of(self.diverged, ids)
        )

    def learned(self) -> Runs:
        """The part without the runs that stayed at chance."""
        return replace(self, rows=self.rows[~at_chance(self.rows)])

    def outcomes(self) -> pd.DataFrame:
        """One row per run that is done, also the diverged ones (NaN errors), and beside the columns
        of the store `weights` (density in per cent) and whether it `learned`: neither diverged nor
        ended at chance.
        """
        every = pd.concat([one for one in (self.rows, self.diverged) if len(one)] or [self.rows])
        learned = every["test_error_pct"].notna() & ~at_chance(every)
        return every.assign(weights=100 * every["density"], learned=learned).reset_index(drop=True)

    def errors(self) -> pd.DataFrame:
        """The outcomes of the runs that learned: no mean is over both."""
        return self.learned().outcomes().query("learned")

    def shares(self, by: Sequence[str] = ("method", "density")) -> pd.DataFrame:
        """How many of the runs that are done learned, with Wilson's 95 % interval, by cell: the
        columns `by`, k, n, share, low, high.
        """
        found = [
            {**dict(zip(by, key, strict=True)), **wilson(int(one.sum()), len(one))._asdict()}
            for key, one in self.outcomes().groupby(list(by), sort=False)["learned"]
        ]
        return pd.DataFrame(found, columns=[*by, "k", "n", "share", "low", "high"])

    def needed(self) -> Runs:
        """These runs; NoRuns if none of them is done, saying how to get them."""
        if self.rows.empty:
            if not self.planned:
                raise NoRuns(f"{self.experiment} ({self.profile}): no such runs in this profile")
            lost = f", {len(self.diverged)} diverged" if len(self.diverged) else ""
            command = f"python -m lib run {self.experiment} --profile {self.profile}"
            raise NoRuns(
                f"{self.experiment} ({self.profile}): none of {len(self.planned)} runs in "
                f"{_short(self.csv)}{lost}; {command}"
            )
        return self

    def curves(self) -> pd.DataFrame:
        """Per-epoch values of the finished runs (CURVE_COLUMNS of lib/results/store.py)."""
        table = _curves(self.csv.parent, _version_of(self.csv.parent))
        return _of(table, set(self.rows["run_id"]))

    def layers(self) -> pd.DataFrame:
        """Per-layer values of the finished runs (LAYER_COLUMNS of lib/results/store.py)."""
        table = _layers(self.csv.parent, _version_of(self.csv.parent))
        return _of(table, set(self.rows["run_id"]))

    def by_seed(self, value: str = "test_error_pct", **wanted: Any) -> pd.Series:
        """One column of the runs with these fields, indexed by seed.

        Raises ValueError if a seed comes twice, so that two cells never mix.
        """
        ids = set(map(_id, select(self.planned, **wanted)))
        rows = _of(self.rows, ids)
        if rows["seed"].duplicated().any():
            twice = rows.loc[rows["seed"].duplicated(), "seed"].iloc[0]
            raise ValueError(
                f"{self.experiment}: {wanted} is not one cell, seed {twice} comes twice; name more "
                "fields."
            )
        return pd.Series(rows[value].to_numpy(), index=rows["seed"].to_numpy())

    def cells(self) -> Counter[Run]:
        """Of each planned cell, named by its run of seed 0, how many seeds are done (diverged ones
        too). By the settings of the runs, not by columns: `kernels` there says what computed a row.
        """
        done = {*self.rows["run_id"], *self.diverged["run_id"]}
        found = Counter({replace(run, seed=0): 0 for run in self.planned})
        found.update(replace(run, seed=0) for run in self.planned if _id(run) in done)
        return found

    def reduced(self) -> bool:
        """Whether the profile is a reduced one, not the paper's."""
        return self.profile != "paper"

    def cut_from(self) -> int:
        """Epochs of the paper's protocol, where these runs at its scale have fewer; 0 otherwise."""
        rows = self.outcomes()
        full = rows["dataset"].map(experiments.PAPER_EPOCHS)
        cut = not self.reduced() and len(rows) and (rows["epochs"] < full).all()
        return int(full.max()) if cut else 0

    def scale(self) -> str:
        """Profile, epochs, images, seeds, hardware, and what is missing, in one line."""
        rows = self.outcomes()
        said = f"profile {self.profile}"
        if self.reduced():
            said += " (reduced scale, not the paper's)"
        if rows.empty:
            return f"{said}: no runs yet"
        ids = set(rows["run_id"])
        seeds = +self.cells()  # those of cells with runs
        cut = self.cut_from()
        images = [f"{n:,}" if n else "all" for n in sorted(set(rows["train_samples"].fillna(0)))]
        tested = {getattr(run, "test_samples", 0) for run in self.planned if _id(run) in ids}
        test = [f"{n:,}" if n else "all" for n in sorted(tested)] if tested - {0} else []
        parts = [
            _range(rows["epochs"]) + f" of the paper's {cut}" * bool(cut) + " epochs",
            f"{' or '.join(images)} training images",
            f"{' or '.join(test)} test images" if test else "",
            f"{_range(seeds.values())} {'seed' if set(seeds.values()) == {1} else 'seeds'}",
            " and ".join(sorted(set(rows["device"]))),
        ]
        if self.missing:
            parts.append(f"{self.missing} of {len(self.planned)} runs missing")
        if len(self.diverged):
            parts.append(f"{len(self.diverged)} diverged")
        return f"{said}: {', '.join(filter(None, parts))}"


def select(runs: Iterable[Run], **wanted: Any) -> tuple[Run, ...]:
    """The runs with these fields (several values: any of them); ValueError for an unknown field."""
    known = Run.__dataclass_fields__
    for name in wanted:
        if name not in known:
            raise ValueError(unknown("field of a run", name, known))
    return tuple(run for run in runs if all(_is(getattr(run, k), v) for k, v in wanted.items()))


def load(experiment: str, source: Source, **wanted: Any) -> Runs:
    """The runs of an experiment with these fields, finished or not; `.needed()` insists on some.

    Raises ValueError for an unknown experiment, profile or field, ResultsError for a damaged file.
    """
    csv = source.csv(experiment)
    planned = planned_runs(experiment, source.profile)
    rows = _sorted_rows(csv.parent, _version_of(csv.parent))
    ok = rows["status"] == "ok"
    runs = Runs(experiment, source.profile, csv, planned, rows[ok], rows[~ok])
    return runs.only(select(planned, **wanted))


def planned_runs(experiment: str, profile: str) -> tuple[Run, ...]:
    """The runs of an experiment at a profile (lib/experiments.py), built once per process."""
    return _planned(experiment, profile, id(experiments.EXPERIMENTS.get(experiment)))


# A figure and a dozen claims ask for the same grid and files: built and read once, and read again
# when a file has changed. A run is in the file of one experiment of the profile.


def _version_of(folder: Path) -> tuple[tuple[str, int, int], ...]:
    found = [(path.name, path.stat()) for path in sorted(folder.glob("*.csv"))]
    return tuple((name, status.st_size, status.st_mtime_ns) for name, status in found)


@functools.lru_cache(maxsize=64)
def _planned(experiment: str, profile: str, _version: int) -> tuple[Run, ...]:
    return tuple(experiments.runs(experiment, profile))


@functools.lru_cache(maxsize=8)
def _sorted_rows(folder: Path, _version: object) -> pd.DataFrame:
    order = {name: i for i, name in enumerate(METHOD_NAMES)}
    return results.read_runs(folder).sort_values(
        ["dataset", "model", "method", "density", "seed", "run_id"],
        key=lambda column: column.map(order) if column.name == "method" else column,
        ignore_index=True,
    )


@functools.lru_cache(maxsize=4)
def _curves(folder: Path, _version: object) -> pd.DataFrame:
    return results.read_curves(folder)


@functools.lru_cache(maxsize=4)
def _layers(folder: Path, _version: object) -> pd.DataFrame:
    return results.read_layers(folder)


@functools.cache
def _id(run: Run) -> str:
    return run.run_id


def summarise(rows: pd.DataFrame, by: Sequence[str], value: str = "test_error_pct") -> pd.DataFrame:
    """Mean, Student-t 95 % interval (low, high; NaN at n = 1), n and sd of each group, in order."""
    found = []
    for key, group in rows.groupby(list(by), sort=False, dropna=False):
        names = key if isinstance(key, tuple) else (key,)
        found.append({**dict(zip(by, names, strict=True)), **t_interval(group[value])._asdict()})
    return pd.DataFrame(found, columns=[*by, "mean", "low", "high", "n", "sd"])


def published_rows(table: str, **wanted: Any) -> pd.DataFrame:
    """Rows of results/published/<table>.csv with these values.

    Raises ValueError for an unknown column or a selection without rows: a number that a figure or
    claim counts on must not go missing in silence.
    """
    rows = published(table)
    for name, value in wanted.items():
        if name not in rows:
            raise ValueError(unknown(f"column of {table}", name, rows.columns))
        rows = rows[np.fromiter((_is(v, value) for v in rows[name]), bool, len(rows))]
    if rows.empty:
        raise ValueError(f"results/published/{table}.csv has no row with {wanted}")
    return rows.reset_index(drop=True)


def model_name(model: str) -> str:
    """Display name of a model; the families' members ("wrn-10-1", "mlp-100x4") by their form."""
    family, _, size = model.partition("-")
    if family in ("mlp", "mlpbn"):
        width, _, layers = size.partition("x")
        return f"MLP{'-BN' if family == 'mlpbn' else ''} {layers} × {width}"
    return MODEL_NAMES.get(model) or model.upper()


def interval_text(mean: float, low: float, high: float, digits: int = 2, sign: bool = False) -> str:
    """ "1.47 [1.40, 1.54]"; without the interval where there is none."""
    form = f"{'+' if sign else ''}z.{digits}f"  # z: no "−0.00"
    if math.isnan(mean):
        return "–"
    text = f"{mean:{form}}"
    if not (math.isnan(low) or math.isnan(high)):
        text += f" [{low:{form}}, {high:{form}}]"
    return text.replace("-", "−")


def range_text(low: float, high: float, digits: int = 2, sign: bool = False) -> str:
    """ "+0.10 to +0.23"; a dash where an end is unknown."""
    if math.isnan(low) or math.isnan(high):
        return "–"
    return " to ".join(interval_text(v, math.nan, math.nan, digits, sign) for v in (low, high))


def p_text(p: float) -> str:
    """A p-value with three digits: "0.012", "< 0.001"; a dash where there was no test."""
    return "–" if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def published_text(row: Any) -> str:
    """A published error in %: "1.47 ± 0.04" (standard error)."""
    value, error = float(row["test_error_pct"]), float(row["standard_error"])
    return f"{value:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")


def sentence(text: str) -> str:
    """The text with a capital and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def _is(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Collection) and not isinstance(wanted, (str, tuple)):
        return any(_is(value, one) for one in wanted)
    return bool(value == wanted)


def _of(rows: pd.DataFrame, run_ids: Collection[str]) -> pd.DataFrame:
    kept = np.fromiter((run_id in run_ids for run_id in rows["run_id"]), bool, len(rows))
    return rows[kept].reset_index(drop=True)


def _short(path: Path) -> str:
    """Relative to the repository where it lies in it: the text goes into committed notebooks."""
    return str(path.relative_to(paths.REPO) if path.is_relative_to(paths.REPO) else path)


def _range(values: Any) -> str:
    low, high = int(min(values)), int(max(values))
    return f"{low}" if low == high else f"{low}–{high}"
