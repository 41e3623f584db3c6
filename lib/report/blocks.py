"""What a report consists of; both renderings set a list of these."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lib.figures import Table


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is a section. `number` is printed before it ("" for none)."""

    level: int
    text: str
    number: str = ""


@dataclass(frozen=True)
class Prose:
    """Paragraphs and lists in Markdown."""

    markdown: str


@dataclass(frozen=True)
class Picture:
    """A drawn figure: its SVG file, its size in inches, and what it shows (Markdown)."""

    file: Path
    size: tuple[float, float]
    caption: str
    name: str


@dataclass(frozen=True)
class Numbers:
    """A table and what it shows (Markdown); `name` is its number ("Table 3"). `whole`: on one
    page, where there is room.
    """

    table: Table
    caption: str
    name: str
    whole: bool = False


Block = Heading | Prose | Picture | Numbers


# "[2.49, 2.65]", "(9 of 10 learned)"
_BRACKETS = re.compile(r"[\[(][^\])]*[\])]")


def is_number(column: pd.Series) -> bool:
    """Whether a column of a table is set to the right: short numbers, whatever brackets follow."""
    texts = [str(v) for v in column if str(v) not in ("", "–")]
    return bool(texts) and all(
        re.match(r"[+−<-]?\s?[0-9]", t) and len(_BRACKETS.sub("", t)) < 24 for t in texts
    )


def cell(value: object, number: bool) -> str:
    """A cell as it is set; one of numbers breaks before its brackets, not within them."""
    text = str(value)
    return _BRACKETS.sub(lambda m: m[0].replace(" ", "\u00a0"), text) if number else text
