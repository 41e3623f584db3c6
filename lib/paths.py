"""Every path of the repository, in one place.

The environment is read when a function is called, never at import, so that a test or a notebook
can point somewhere else.  A relative path in an environment variable counts from the repository
root, not from the working directory: notebooks run in another directory than `make`.
No function creates a directory; whoever writes does.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def results_dir(profile: str, root: str | Path | None = None) -> Path:
    """Directory of one profile's CSVs: `root`/`profile`, by default results/`profile`.

    Raises ValueError if `profile` is no plain name (it would lead out of the results).
    """
    return (Path(root) if root is not None else REPO / "results") / _name("profile", profile)


def results_csv(profile: str, experiment: str, root: str | Path | None = None) -> Path:
    """The CSV with one row per run; curves and layers lie beside it (see lib.results)."""
    return results_dir(profile, root) / f"{_name('experiment', experiment)}.csv"


def published_dir() -> Path:
    """Directory of the numbers taken from the literature."""
    return REPO / "results" / "published"


def figures_dir() -> Path:
    """Directory of figures, tables and the report."""
    return REPO / "figures"


def data_root() -> Path:
    """Root directory of the data sets: DATA_ROOT, by default data/."""
    return _from_environment("DATA_ROOT", REPO / "data")


def cache_dir() -> Path:
    """Directory for whatever can be rebuilt (compiled kernels, checkpoints)."""
    return REPO / ".cache"


def checkpoints_dir() -> Path:
    """Directory of the checkpoints of unfinished runs: CHECKPOINT_ROOT, else .cache/checkpoints."""
    return _from_environment("CHECKPOINT_ROOT", cache_dir() / "checkpoints")


def _from_environment(variable: str, default: Path) -> Path:
    value = os.environ.get(variable, "").strip()
    return (REPO / Path(value).expanduser()).resolve() if value else default


def _name(what: str, value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(
            f"{what} {value!r} is no plain name: use letters, digits, '-' and '_' only, "
            "for instance 'quick'."
        )
    return value
