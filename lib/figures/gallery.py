"""The registry of figures and tables: declared with a name and an experiment, drawn, saved, shown.

A figure is a function (Source) -> Plot under `@figure`, a table one to a Table under `@table`. It
raises `NoRuns` where there is nothing to draw. `draw_all` saves all of them; a notebook has `show`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl

from lib import paths
from lib.config import unknown
from lib.figures.plots import STYLE, Plot
from lib.figures.tables import Table
from lib.results.reading import NoRuns, Source

BENCH = "bench"  # the place of figures of the clock, which no profile changes: stored once


@dataclass(frozen=True)
class Entry:
    """A registered figure or table: called with a `Source` it is made in our style, whoever calls.

    `experiment`: whose rows it shows; empty for what is about all of them. `place`: the folder of
    its file, where that is not the profile.
    """

    name: str
    experiment: str
    make: Callable[..., Any]
    place: str = ""

    def __call__(self, source: Source, **more: Any) -> Any:
        """The Plot or Table; NoRuns where there is nothing to show."""
        with mpl.rc_context(fname=STYLE):
            made = self.make(source, **more)
        if isinstance(made, Plot):
            made.caption = f"{self.caption} {made.caption}"
        return made

    @property
    def caption(self) -> str:
        """What it shows, in one line."""
        return " ".join((self.make.__doc__ or "").split())


FIGURES: dict[str, Entry] = {}
TABLES: dict[str, Entry] = {}


def figure(name: str, experiment: str = "", place: str = "") -> Callable[..., Entry]:
    """Register a function (Source) -> Plot; its docstring begins the caption."""
    return functools.partial(_register, FIGURES, name, experiment, place)


def table(name: str, experiment: str = "", place: str = "") -> Callable[..., Entry]:
    """Register a function (Source) -> Table."""
    return functools.partial(_register, TABLES, name, experiment, place)


def _register(
    into: dict[str, Entry], name: str, experiment: str, place: str, make: Callable[..., Any]
) -> Entry:
    into[name] = Entry(name, experiment, make, place)
    return into[name]


@dataclass(frozen=True)
class Absent:
    """In place of a figure or table that has no runs: the reason, shown in a notebook."""

    reason: str

    def _repr_markdown_(self) -> str:
        return f"**Nothing to show yet.** {self.reason}."


def show(
    name: str, source: Source, kind: Literal["figure", "table"] | None = None, **more: Any
) -> Plot | Table | Absent:
    """The figure or table of this name, or why there is none yet, so that a notebook goes on.

    Without `kind` the figure, where there is one, else the table. Raises ValueError for a name
    that is neither.
    """
    known = {"figure": FIGURES, "table": TABLES}.get(kind or "", {**TABLES, **FIGURES})
    if name not in known:
        raise ValueError(unknown(kind or "figure or table", name, known))
    try:
        made: Plot | Table = known[name](source, **more)
    except NoRuns as reason:
        return Absent(str(reason))
    return made


def output_dir(source: Source) -> Path:
    """figures/<profile>; for results elsewhere <root>/<profile>/figures beside them."""
    if source.root is None:
        return paths.figures_dir() / paths.results_dir(source.profile).name
    return paths.results_dir(source.profile, source.root) / "figures"


def draw_all(
    source: Source, only: Iterable[str] = (), say: Callable[[str], None] = print
) -> list[Path]:
    """Draw and save every figure (PDF, PNG) and table (Markdown, LaTeX), and of all of them a page
    README.md with the captions; the files written.

    What has no runs yet is skipped with one line. Equal rows give equal bytes: no time, no path in
    a file. Raises ValueError for an unknown profile or name, ResultsError for a damaged CSV.
    """
    names = set(only)
    for name in names - {*FIGURES, *TABLES}:
        raise ValueError(unknown("figure or table", name, {**FIGURES, **TABLES}))
    jobs = [
        (kind, name, source)
        for kind, registry in (("figure", FIGURES), ("table", TABLES))
        for name in registry
        if not names or name in names
    ]
    written: list[Path] = []
    captions = []
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        for files, caption, skipped in pool.map(_draw_one, *zip(*jobs, strict=True)):
            written += files
            if skipped:
                say(skipped)
            elif caption:
                at = os.path.relpath(files[-1], output_dir(source))
                captions.append(f"![{files[-1].stem}]({at})\n\n{caption}\n")
    if captions and not names:
        page = f"# Figures of profile {source.profile}\n\n" + "\n".join(captions)
        written.append(_write(output_dir(source) / "README.md", page.encode()))
    return written


def _draw_one(kind: str, name: str, source: Source) -> tuple[list[Path], str, str]:
    """In a process of its own: the files of one figure or table, the caption of a figure, or the
    line that says why there is none.
    """
    entry = FIGURES[name] if kind == "figure" else TABLES[name]
    try:
        made = entry(source)
    except NoRuns as reason:
        return [], "", f"skipped {kind} {name}: {reason}"
    folder = output_dir(source.at(entry.place) if entry.place else source)
    return save(made, folder / name), made.caption if kind == "figure" else "", ""


def save(made: Plot | Table, stem: Path) -> list[Path]:
    """Write a figure as `stem`.pdf and .png or a table as .md and .tex, each in one step."""
    if isinstance(made, Table):
        contents = {"md": made.markdown().encode(), "tex": made.latex().encode()}
    else:
        contents = {kind: made.content(kind) for kind in ("pdf", "png")}
    return [_write(stem.with_name(f"{stem.name}.{k}"), data) for k, data in contents.items()]


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
    return path
