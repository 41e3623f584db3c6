"""Sections, figures and tables of the report, in order: the texts of lib/report/text, composed."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from lib import claims, experiments
from lib.claims.effects import rules
from lib.claims.learning import VARIANTS
from lib.figures import FIGURES, TABLES, Plot, Table
from lib.report import facts, tables
from lib.report.blocks import Block, Heading, Numbers, Picture, Prose
from lib.report.facts import Cells, Clock
from lib.report.prose import TEXTS, Author
from lib.results.reading import NoRuns, Source

# ![caption](figure:NAME), or figure:NAME@DATASET for the scale that has rows of that data set.
_SHOWN = re.compile(r"!\[(.*)\]\((figure|table):([\w-]+)(?:@(\w+))?\)", re.DOTALL)


def compose(source: Source, scratch: Path, folder: Path = TEXTS) -> list[Block]:
    """The blocks of the report; its figures are saved in the directory `scratch`."""
    return _Composer(source, scratch, folder).blocks()


def findings(source: Source) -> str:
    """The main findings in Markdown: the same in the report's first section and in README."""
    author = Author(names(source))
    return "\n\n".join(author.paragraphs("findings.md"))


def names(source: Source) -> dict[str, Any]:
    """What the texts may use: the experiments, parts of them, other rows, and words."""
    scales, root = facts.scales(source.profile), source.root
    cells = {name: Cells(name, scales, root) for name in experiments.EXPERIMENTS}
    costs = tables.Cost(root)
    return {
        **cells,
        **_parts(cells),
        "depth": facts.Depth(cells["depth_scaling"], "mlpbn"),
        "depth_erk": facts.Depth(cells["depth_scaling"], "mlpbn", "erk"),
        "depth_plain": facts.Depth(cells["depth_scaling"], "mlp"),
        "depth_plain_erk": facts.Depth(cells["depth_scaling"], "mlp", "erk"),
        "clock": Clock(root),
        "window": tables.Window(root),
        "verdicts": tables.Verdicts(scales, root),
        "cost": costs,
        "todo": lambda *wanted: tables.todo(wanted, costs),
        "paper": facts.paper,
        "gap": facts.gap,
        "really": tables.really_dense(),
        "rule": claims.RULE,
    }


def _parts(cells: dict[str, Cells]) -> dict[str, Any]:
    """Parts of experiments, and sides to compare, by short names."""
    networks = cells["baseline_network"]
    start = {"method": "sparse_momentum", "prune_rate": 0.2, "schedule": "cosine", "momentum": 0.9}
    return {
        "closer": lambda method: facts.closer(networks, method),
        "plain_network": networks.of(model="lenet300-100"),
        "normed_network": networks.of(
            model="lenet300-100-bn", init="uniform", update_every_steps=0
        ),
        "half_output": networks.of(model="lenet300-100-bn", init="half_output"),
        "their_way": networks.of(model="lenet300-100-bn", update_every_steps=300),
        "lenet_starts": cells["initial_densities"].of(model="lenet300-100"),
        "erk_start": cells["initial_densities"].of(model="lenet300-100", init="erk"),
        "lenet5": cells["mnist_compression"].of(model="lenet5"),
        "lenet5_starts": cells["initial_densities"].of(model="lenet5"),
        "alexnet": cells["cifar10_table"].of(model="alexnet-s"),
        "mnist_parts": cells["ablations"].of(
            dataset="mnist",
            model="lenet300-100",
            redistribution=["momentum", "none"],
            growth=["momentum", "random"],
        ),
        "full": rules("momentum", "momentum"),
        "unshared": rules("none", "momentum"),
        "random": rules("momentum", "random"),
        "mnist_settings": cells["sensitivity"].of(dataset="mnist"),
        "start": start,
        "rate": lambda rate: {**start, "prune_rate": rate},
        "momentum": lambda value, method="sparse_momentum": (
            {**start, "momentum": value}
            if method == "sparse_momentum"
            else {"method": method, "momentum": value}
        ),
        "at_step": lambda momentum, lr, method="sparse_momentum": {
            "method": method,
            "momentum": momentum,
            "lr": lr,
        },
        "specialisation": lambda a, b: facts.specialisation(
            cells["features"].of(model="alexnet-s"), a, b
        ),
        "readings": experiments.READINGS,
        "lowest_reading": lambda density: min(
            (
                cells["official_readings"].error(reading, density)
                for reading in experiments.READINGS.values()
            ),
            key=lambda error: error.mean,
        ),
        "first_epochs": VARIANTS,
        "p_learn": lambda variant, density: facts.p_learn(cells["trainability"], variant, density),
    }


class _Composer:
    """Numbers what it adds, and shows no figure twice."""

    def __init__(self, source: Source, scratch: Path, folder: Path) -> None:
        self.source, self.scratch = source, scratch
        self.names = names(source)
        self.names["findings"] = lambda: "\n\n".join(self.author.paragraphs("findings.md"))
        self.author: Author = Author(self.names, folder)
        self.folder = folder
        self.found: list[Block] = []
        self.count = {"Figure": 0, "Table": 0}
        self.appendix = False
        self.shown: set[tuple[str, str, str]] = set()

    def blocks(self) -> list[Block]:
        """All sections, then the appendix with the full tables."""
        for number, file in enumerate(sorted(self.folder.glob("[0-9]*.md")), 1):
            for text in self.author.paragraphs(file.name):
                self._add(text, str(number))
        self._appendix()
        return self.found

    def _add(self, text: str, number: str) -> None:
        if text.startswith("# "):
            self.found.append(Heading(1, text[2:], number))
        elif text.startswith("## "):
            self.found.append(Heading(2, text[3:]))
        elif match := _SHOWN.fullmatch(text):
            caption, kind, name, dataset = match.groups()
            self._show(kind, name, " ".join(caption.split()), dataset)
        elif "](figure:" in text or "](table:" in text:
            raise ValueError(f"a figure or table is a paragraph of its own, not part of {text!r}")
        else:
            self.found.append(Prose(text))

    def _show(self, kind: str, name: str, caption: str, dataset: str | None = None) -> None:
        """Add a figure or table at the largest scale of its experiment, unless it has no rows."""
        if kind == "table" and name in tables.TABLES:
            with contextlib.suppress(NoRuns):
                self._number(tables.TABLES[name](self.names), caption)
            return
        registry = FIGURES if kind == "figure" else TABLES
        if name not in registry:
            raise ValueError(f"the report asks for a {kind} {name!r} that lib/figures doesn't have")
        entry = registry[name]
        if entry.place:  # of the clock, which no scale changes
            profile = self.source.profile
        else:
            cells: Cells = self.names[entry.experiment]
            profile = (cells.of(dataset=dataset) if dataset else cells).profile
        if not profile or (kind, name, profile) in self.shown:
            return
        self.shown.add((kind, name, profile))
        try:
            made: Plot | Table = entry(self.source.at(profile))
        except NoRuns:
            return
        said = caption or _plain(made.caption or entry.caption)
        if isinstance(made, Table):
            self._number(made, said)
        else:
            self._picture(made, said, f"{profile}_{name}")

    def _number(self, table: Table, caption: str) -> None:
        if table.frame.empty:  # no network learned, at smoke
            return
        self.count["Table"] += 1
        number = f"Table {self.count['Table']}"
        whole = not self.appendix and len(table.frame) < 26
        self.found.append(Numbers(table, caption, number, whole))

    def _picture(self, plot: Plot, caption: str, stem: str) -> None:
        """Save a figure as vectors that both outputs take."""
        self.count["Figure"] += 1
        file = self.scratch / f"{stem}.svg"
        file.write_bytes(plot.content("svg"))
        width, height = plot.get_size_inches()
        size = float(width), float(height)
        self.found.append(Picture(file, size, caption, f"Figure {self.count['Figure']}"))

    def _appendix(self) -> None:
        """Every table of every experiment, once, at its largest scale."""
        self.appendix = True
        self.found.append(Heading(1, "Appendix: all tables", "A"))
        self._show("table", "extensions", "What we add to the paper's claims, and what came of it.")
        self._show("table", "values", "Published values and ours.")
        self._show("table", "experiments", "Every experiment: its runs, and where they were made.")
        self._show("table", "soak", "What happens to rows under kills, and to bad input.")
        for name, experiment in experiments.EXPERIMENTS.items():
            at = len(self.found)
            for entry in TABLES.values():
                if entry.experiment == name:
                    self._show("table", entry.name, "")
            if len(self.found) > at:
                profile = self.names[name].profile
                where = facts.scale_name(profile) if profile else "on a clock"
                self.found.insert(at, Heading(2, f"{experiment.title} ({where})"))


def _plain(text: str) -> str:
    """A text as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)
