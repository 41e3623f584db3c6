"""The report as PDF, typeset by typst.  Every text is a string there, so that none is markup."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mistune
import pandas as pd

from lib.report.blocks import Block, Heading, Numbers, Picture, Prose

_PAGE = 17.0, 17.0  # cm: width of the text, and the most a figure may take of its height
_TALL = 7.0  # cm
_PREAMBLE = Path(__file__).with_name("paper.typ")
_markdown = mistune.create_markdown(renderer="ast", plugins=["table"])


def to_pdf(title: str, subtitle: str, blocks: Iterable[Block], folder: Path) -> bytes:
    """The report as PDF; `folder` holds the files of the figures, and gets the source."""
    import typst

    source = folder / "report.typ"
    source.write_text(to_typst(title, subtitle, blocks), encoding="utf-8")
    how: dict[str, Any] = {"root": str(folder), "format": "pdf", "ignore_system_fonts": True}
    try:
        pdf = typst.compile(str(source), timestamp=0, **how)
    except typst.TypstError as error:
        # Its tags for screen readers fail where floats fall at some page breaks (typst issue 8776).
        if "internal error" not in str(error):
            raise
        pdf = typst.compile(str(source), timestamp=0, pdf_tags=False, **how)
    assert isinstance(pdf, bytes)
    return pdf


def to_typst(title: str, subtitle: str, blocks: Iterable[Block]) -> str:
    """The report in typst's language."""
    parts = [
        f"#set document(title: {_quoted(title)}, date: none)",
        _PREAMBLE.read_text(encoding="utf-8"),
        f'#align(center)[#text(size: 19pt, weight: "bold", {_quoted(title)})'
        f"#v(-0.5em)#text(size: 11pt, {{{_inline(subtitle)}}})]",
    ]
    for block in blocks:
        match block:
            case Heading(level, text, number):
                words = f"{number} {text}" if number else text
                if number == "A":  # the appendix
                    parts.append("#pagebreak()")
                parts.append(f"#heading(level: {level}, {_quoted(words)})")
            case Prose(text):
                parts.append(f"#{{{_blocks(_parsed(text))}}}")
            case Picture(file, (width, height), caption, name):
                shown = min(0.92 * 2.54 * width, _PAGE[0], _PAGE[1] * width / height)
                parts.append(
                    f"#picture({_quoted(name + '.')}, {{{_inline(caption)}}}, "
                    f"{_quoted(file.name)}, {shown:.2f}cm, "
                    f"{str(shown * height / width > _TALL).lower()})"
                )
            case Numbers():
                parts.append(_table(block))
    return "\n".join(parts) + "\n"


def _table(block: Numbers) -> str:
    frame = block.table.frame
    wide = len(frame.columns)
    size = 8.2 if wide < 6 else 7.4 if wide < 8 else 6.6
    align = ", ".join("right" if right else "left" for right in block.table.right())
    cells = [_quoted(text) for row in block.table.rows() for text in row]
    said = [
        _quoted(f"{block.name}."),
        f"{{{_inline(block.caption)}}}",
        f"{size}pt",
        _quoted(block.table.note),
        f"({', '.join(_width(frame[c], 28 if wide < 8 else 45) for c in frame.columns)},)",
        f"({align},)",
        f"({', '.join(map(_quoted, frame.columns))},)",
        *cells,
    ]
    whole = str(block.whole).lower()
    return f"#numbers(whole: {whole}, {', '.join(said)})"


def _width(column: pd.Series, long: int) -> str:
    """As wide as the texts, or a share of what is left where they have more than `long` letters."""
    lengths = column.astype(str).str.len()
    if lengths.max() <= long:
        return "auto"
    return f"{max(lengths.mean(), 0.6 * lengths.max()) / 10:.2f}fr"


def _parsed(text: str) -> list[dict[str, Any]]:
    found = _markdown(text)
    assert isinstance(found, list)
    return found


def _inline(text: str) -> str:
    """One paragraph of Markdown as typst content, without being a paragraph there."""
    return "; ".join(_pieces(token.get("children", [])) for token in _parsed(text))


def _blocks(tokens: Iterable[Mapping[str, Any]]) -> str:
    found = []
    for token in tokens:
        inside = token.get("children", [])
        match token["type"]:
            case "paragraph" | "block_text":
                found.append(f"par({{{_pieces(inside)}}})")
            case "list":
                kind = "enum" if token["attrs"]["ordered"] else "list"
                items = ", ".join(
                    "{"
                    + "; ".join(_pieces(part.get("children", [])) for part in one["children"])
                    + "}"
                    for one in inside
                )
                found.append(f"{kind}({items})")
            case "block_code":
                found.append(f"raw({_quoted(token['raw'].rstrip(), keep_lines=True)}, block: true)")
            case "table":
                found.append(_markdown_table(inside))
            case "blank_line":
                pass
            case other:
                raise ValueError(f"the report's prose has no {other}: {token}")
    return "; ".join(found)


def _markdown_table(parts: list[dict[str, Any]]) -> str:
    head, body = parts
    names = [f"{{{_pieces(cell['children'])}}}" for cell in head["children"]]
    cells = [
        f"{{{_pieces(cell['children'])}}}" for row in body["children"] for cell in row["children"]
    ]
    columns = f"({', '.join(['auto'] * len(names))},)"
    align = f"({', '.join(['left'] * len(names))},)"
    table = f"rows({columns}, {align}, ({', '.join(names)},), {', '.join(cells)})"
    return f"block(breakable: false, small(8.2pt, {table}))"


def _pieces(tokens: Iterable[Mapping[str, Any]]) -> str:
    found = []
    for token in tokens:
        inside = token.get("children", [])
        match token["type"]:
            case "text" | "inline_html":
                found.append(_quoted(token["raw"]))
            case "softbreak" | "linebreak":
                found.append('" "')
            case "codespan":
                found.append(f"raw({_quoted(token['raw'])})")
            case "strong":
                found.append(f"strong({{{_pieces(inside)}}})")
            case "emphasis":
                found.append(f"emph({{{_pieces(inside)}}})")
            case "link":
                found.append(f"link({_quoted(token['attrs']['url'])}, {{{_pieces(inside)}}})")
            case other:
                raise ValueError(f"the report's prose has no {other}: {token}")
    return "; ".join(found)


def _quoted(value: Any, keep_lines: bool = False) -> str:
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text.replace(chr(10), chr(92) + "n" if keep_lines else " ")}"'
