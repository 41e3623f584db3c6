"""What a report consists of; both renderings set a list of these."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
