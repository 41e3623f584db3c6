"""Tables: texts in a DataFrame with a caption and a note, as Markdown and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lib.claims.learning import share_text
from lib.results.reading import METHOD_NAMES, Runs, interval_text, model_name, published_text
from lib.stats import t_interval, value_difference, wilson

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "\n": " ",
    **{sign: f"\\{sign}" for sign in "%&#_${}"},
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "<": "$<$",
    ">": "$>$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
}

# "[2.49, 2.65]", "(9 of 10 learned)"
_BRACKETS = re.compile(r"[\[(][^\])]*[\])]")


@dataclass(frozen=True, repr=False)
class Table:
    """A table of texts: one caption, one row per line, and a note below (scale, how to read)."""

    frame: pd.DataFrame
    caption: str
    note: str = ""

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]], caption: str, *note: str) -> Table:
        """From one mapping per row, column -> text; what a row lacks is a dash."""
        frame = pd.DataFrame(list(lines)).astype(object).fillna("–").astype(str)
        return cls(frame, caption, " ".join(filter(None, note)))

    def markdown(self) -> str:
        """GitHub Markdown; numbers to the right."""
        head, *body = self._cells(lambda text: text.replace("|", "\\|").replace("\n", " "))
        rule = ["---:" if right else "---" for right in self.right()]
        lines = ["| " + " | ".join(row) + " |" for row in (head, rule, *body)]
        return (
            "\n\n".join(filter(None, (f"**{self.caption}**", "\n".join(lines), self.note))) + "\n"
        )

    def latex(self) -> str:
        """A table environment; needs the LaTeX package booktabs."""
        head, *body = (" & ".join(row) + r" \\" for row in self._cells(_latex))
        align = "".join("r" if right else "l" for right in self.right())
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex(self.caption)}}}",
            rf"\begin{{tabular}}{{{align}}}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\par\smallskip\footnotesize " + _latex(self.note) if self.note else "",
            r"\end{table}",
        ]
        return "\n".join(filter(None, lines)) + "\n"

    def _cells(self, escaped: Any) -> list[list[str]]:
        rows = [list(self.frame.columns), *self.frame.to_numpy().tolist()]
        return [[escaped(str(value)) for value in row] for row in rows]

    def rows(self) -> list[list[str]]:
        """The rows as a page sets them: numbers break before their brackets, not within them."""
        right = self.right()
        return [
            [_unbroken(text) if held else text for text, held in zip(row, right, strict=True)]
            for row in self._cells(str)[1:]
        ]

    def right(self) -> list[bool]:
        """Which columns are set to the right: short numbers, whatever brackets follow them."""
        return [
            _numbers([t for t in self.frame[name] if t not in ("", "–")]) for name in self.frame
        ]

    def __repr__(self) -> str:
        return f"Table({self.caption!r}, {len(self.frame)} rows)"

    def _repr_markdown_(self) -> str:
        return self.markdown()


def _numbers(texts: list[str]) -> bool:
    return bool(texts) and all(
        re.match(r"[+−<-]?\s?[0-9]", t) and len(_BRACKETS.sub("", t)) < 24 for t in texts
    )


def _unbroken(text: str) -> str:
    return _BRACKETS.sub(lambda found: found[0].replace(" ", "\u00a0"), text)


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)


def records(rows: pd.DataFrame) -> list[Any]:
    """The rows as named tuples, for a table's lines."""
    return list(rows.itertuples(index=False))


def groups(rows: pd.DataFrame, by: str | list[str]) -> list[tuple[Any, pd.DataFrame]]:
    """The groups of the rows with their keys, in the order in which they come."""
    return list(rows.groupby(by, sort=False))


INITS = {"uniform": "uniform", "erk": "ERK", "half_output": "output half dense"}


def difference(pair: Any) -> str:
    """A mean difference with its interval: "−0.12 [−0.20, −0.04]"."""
    return interval_text(pair.mean, pair.low, pair.high, sign=True)


def failures(runs: Runs, by: Sequence[str] = ("method", "density")) -> str:
    """For a caption: the share that learned of each cell where not all seeds did."""
    cells = runs.shares(by)
    telling = [name for name in by if cells[name].nunique() > 1] or ["method"]
    said = []
    for row in cells[cells["k"] < cells["n"]].to_dict("records"):
        texts = {name: _COLUMNS[name][1](row[name]) for name in telling}
        at = f"at {texts.pop('density')} %" if "density" in texts else ""
        if "momentum" in texts:
            texts["momentum"] = f"(momentum {texts['momentum']})"
        said.append(
            " ".join(filter(None, (*texts.values(), at, share_text(wilson(row["k"], row["n"])))))
        )
    if not said:
        return ""
    return (
        "Errors are those of the seeds that learned; not all did (Wilson's 95 % interval): "
        f"{', '.join(said)}."
    )


def error_lines(
    runs: Runs, theirs: pd.DataFrame | None = None, by: Sequence[str] = ("method", "density")
) -> list[dict[str, str]]:
    """One line per cell: what it is, the error of the seeds that learned, how many did, the
    published error (columns `by`, test_error_pct, standard_error) and, at the paper's scale, ours
    minus it (Welch).
    """
    known = {} if theirs is None else dict(_by_key(theirs, by))
    errors = dict(list(runs.errors().groupby(list(by))["test_error_pct"]))
    lines = []
    for cell in runs.shares(by).to_dict("records"):
        key = tuple(cell[name] for name in by)
        mine = errors.get(key)
        line = {}
        for name in by:
            title, text = _COLUMNS[name]
            line[title] = text(cell[name])
        line["test error (%)"] = "–" if mine is None else interval_text(*t_interval(mine)[:3])
        line["learned"] = f"{cell['k']} of {cell['n']}"
        if theirs is not None:
            row = known.get(key)
            line["published (%)"] = published_text(row) if row else "–"
            if not runs.reduced():
                off = None
                if row and mine is not None:
                    off = value_difference(mine, row["test_error_pct"], row["standard_error"])
                line["ours − published"] = difference(off) if off else "–"
        lines.append(line)
    return lines


def _by_key(rows: pd.DataFrame, by: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    for row in rows.to_dict("records"):
        yield tuple(row[name] for name in by), row


_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "model": ("network", model_name),
    "method": ("method", METHOD_NAMES.__getitem__),
    "density": ("weights (%)", lambda share: f"{100 * share:g}"),
    "momentum": ("momentum", lambda value: f"{value:g}"),
    "lr": ("learning rate", lambda value: f"{value:g}"),
    "epochs": ("epochs", lambda value: f"{value:g}"),
    "init": ("initial densities", lambda init: INITS.get(init, init)),
}
