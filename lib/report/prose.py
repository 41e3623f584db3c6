"""The prose of the report: Markdown in lib/report/text whose numbers are expressions over the rows.

    Sparse momentum errs {{ main_results.versus("sparse_momentum", "set") }}.

    {% claim main_results.minus("sparse_momentum", "set", 0.02).high < 0 %}So much for SET.
    {% endclaim %}

An expression can't be out of date; a conclusion can. So a conclusion stands in a `claim` with the
condition that makes it true, and a report whose rows no longer meet it is not built: `Outdated`
names file, line, sentence, condition and what its sides are now. (Rows below `hours` are a reader's
own: there the sentence is left out.) A paragraph, or a claim, that needs rows which aren't there is
left out; what is missing is said by `todo`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension

from lib.report.facts import Cells
from lib.results.reading import NoRuns

TEXTS = Path(__file__).with_name("text")
COMMITTED = ("paper", "hours")  # profiles whose rows are part of the repository's conclusions


class Outdated(ValueError):
    """A sentence that the rows no longer support; the message has its place and the values."""


class _Claim(Extension):
    """{% claim CONDITION %}sentence{% endclaim %}; without a condition the sentence is left out
    where rows are missing, and nothing else.
    """

    tags = {"claim"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body: list[nodes.Node] = []
        if not parser.stream.current.test("block_end"):
            condition = parser.parse_expression()
            sides = [
                nodes.List([c.expr, *(operand.expr for operand in c.ops)])
                for c in [condition, *condition.find_all(nodes.Compare)]
                if isinstance(c, nodes.Compare)
            ]
            check = self.call_method("_check", [condition, nodes.List(sides), nodes.Const(line)])
            body.append(nodes.Output([check]).set_lineno(line))
        body += parser.parse_statements(("name:endclaim",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_say"), [], [], body).set_lineno(line)

    def _check(self, holds: object, sides: list[list[Any]], line: int) -> str:
        if not holds:
            raise _Fails(line, "; ".join(" and ".join(map(_value, side)) for side in sides))
        return ""

    def _say(self, caller: Callable[[], str]) -> str:
        try:
            return caller()
        except NoRuns:
            return ""


class _Fails(Exception):
    """A condition that is false: its line in the paragraph, and the values compared."""

    def __init__(self, line: int, values: str) -> None:
        super().__init__(line, values)
        self.line, self.values = line, values


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Author:
    """Writes the texts from `names`: the experiments as `Cells`, and whatever else they may use."""

    def __init__(self, names: dict[str, Any], folder: Path = TEXTS) -> None:
        self.folder = folder
        self.names = names
        self._jinja = jinja2.Environment(
            extensions=[_Claim], undefined=jinja2.StrictUndefined, autoescape=False
        )
        self._jinja.globals.update(names)

    def paragraphs(self, file: str) -> Iterator[str]:
        """The paragraphs of a text that can be said with the rows there are, in Markdown.

        Raises Outdated, or ValueError for a template that is wrong, with file and line.
        """
        path = self.folder / file
        source = path.read_text(encoding="utf-8")
        for found in re.finditer(r"\S.*?(?=\n\s*\n|\s*\Z)", source, re.DOTALL):
            first = source.count("\n", 0, found.start()) + 1
            if text := self._paragraph(found[0], path, first).strip():
                yield text

    def _paragraph(self, source: str, path: Path, first: int) -> str:
        cells = [value for value in self.names.values() if isinstance(value, Cells)]
        for one in cells:
            one.seen.clear()
        place = f"lib/report/text/{path.name}"
        try:
            return self._jinja.from_string(source).render()
        except NoRuns:
            return ""
        except _Fails as failed:
            seen = {profile for one in cells for profile in one.seen}
            if seen and not seen & set(COMMITTED):
                return self._paragraph(_without_claim(source, failed.line), path, first)
            line = source.splitlines()[failed.line - 1 :]
            raise Outdated(
                f"{place}, line {first + failed.line - 1}: the rows no longer say this: "
                f"{' '.join(' '.join(line).split())[:300]!r}. The sides of its condition are now "
                f"{failed.values}; change the sentence and its condition."
            ) from None
        except Outdated:  # of a text within this one
            raise
        except jinja2.TemplateError as error:
            line_of = getattr(error, "lineno", None) or 1
            raise ValueError(f"{place}, line {first + line_of - 1}: {error}") from error
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{place}, paragraph at line {first}: {error}") from error


def _without_claim(source: str, line: int) -> str:
    """The paragraph without the claim that begins on this line of it."""
    start = sum(len(text) for text in source.splitlines(keepends=True)[: line - 1])
    return source[:start] + re.sub(
        r"\{% claim .*?%\}.*?\{% endclaim %\}", "", source[start:], count=1, flags=re.DOTALL
    )
