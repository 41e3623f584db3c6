"""README's findings: the same text as the report's, written between two comments."""

from __future__ import annotations

import re
import textwrap

_BETWEEN = re.compile(
    r"(<!-- findings: written by `make report` from the rows -->\n).*?(<!-- end of findings -->)",
    re.DOTALL,
)
_WIDTH = 108


def with_findings(readme: str, findings: str) -> str:
    """README with these findings (Markdown, a list); ValueError without the two comments."""
    items = [
        textwrap.fill(
            " ".join(item.split()),
            _WIDTH,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for item in findings.split("\n\n")
    ]
    block = "\n".join(items)
    text, found = _BETWEEN.subn(lambda at: f"{at[1]}{block}\n{at[2]}", readme)
    if found != 1:
        raise ValueError("README.md must have one pair of comments around its findings, see git")
    return text
