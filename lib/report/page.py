"""The report as one HTML file that needs no other."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable
from pathlib import Path

import mistune

from lib.report.blocks import Block, Heading, Numbers, Picture, Prose

_CSS = Path(__file__).with_name("page.css")
_markdown = mistune.create_markdown(escape=True, plugins=["table"])


def to_html(title: str, subtitle: str, blocks: Iterable[Block]) -> str:
    """The report with a contents list that stays in sight; wide tables scroll in their own box, and
    those of the appendix open at a click.
    """
    body: list[str] = []
    appendix = False
    contents: list[str] = []
    for block in blocks:
        match block:
            case Heading(level, text, number):
                words = html.escape(f"{number} {text}" if number else text)
                anchor = f"s{number or len(contents) + 1}"
                appendix = appendix or number == "A"
                if level == 1:
                    contents.append(f'<a href="#{anchor}">{words}</a>')
                name = f' id="{anchor}"' if level == 1 or number else ""
                body.append(f"<h{level + 1}{name}>{words}</h{level + 1}>")
            case Prose(text):
                said = str(_markdown(text))
                said = said.replace("<table>", '<div class="scroll" tabindex="0"><table>')
                body.append(said.replace("</table>", "</table></div>"))
            case Picture(file, (width, _), caption, name):
                data = base64.b64encode(file.read_bytes()).decode()
                body.append(
                    f'<figure><div class="scroll" tabindex="0"><img alt="{_plain(caption)}" '
                    f'style="max-width:{width * 115:.0f}px" '
                    f'src="data:image/svg+xml;base64,{data}"></div>'
                    f"<figcaption><b>{html.escape(name)}.</b> {_inline(caption)}</figcaption>"
                    "</figure>"
                )
            case Numbers():
                body.append(_table(block, folded=appendix))
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en-GB">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{_CSS.read_text(encoding='utf-8')}</style>\n</head>\n<body>",
            f'<nav aria-label="Contents">{"".join(contents)}</nav>\n<main>',
            f"<h1>{html.escape(title)}</h1>\n<p>{_inline(subtitle)}</p>",
            *body,
            "</main>\n</body>\n</html>\n",
        ]
    )


def _table(block: Numbers, folded: bool) -> str:
    frame, note = block.table.frame, block.table.note
    kinds = []
    for column, right in zip(frame.columns, block.table.right(), strict=True):
        longest = max((len(str(v)) for v in frame[column]), default=0)
        kinds.append("number" if right else "words" if longest > 40 else "")

    def line(tag: str, texts: Iterable[str]) -> str:
        inside = []
        for text, kind in zip(texts, kinds, strict=True):
            name = f' class="{kind}"' if kind else ""
            inside.append(f"<{tag}{name}>{html.escape(text)}</{tag}>")
        return f"<tr>{''.join(inside)}</tr>"

    rows = "\n".join(line("td", row) for row in block.table.rows())
    below = f'<p class="note">{html.escape(note)}</p>' if note else ""
    said = f"<b>{html.escape(block.name)}.</b> {_inline(block.caption)}"
    table = (
        '<div class="scroll" tabindex="0"><table>\n'
        f"<thead>{line('th', frame.columns)}</thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
        f"{below}"
    )
    if folded:
        return f'<details><summary class="caption">{said}</summary>\n{table}</details>'
    return f'<p class="caption">{said}</p>\n{table}'


def _inline(text: str) -> str:
    return str(_markdown(text)).strip().removeprefix("<p>").removesuffix("</p>")


def _plain(text: str) -> str:
    """For an attribute: without Markdown's signs."""
    return html.escape(html.unescape(re.sub("<[^>]+>", "", _inline(text))), quote=True)
