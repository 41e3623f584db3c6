"""The report is the notebooks, bound: what their cells tagged `report` say and show, in order.

Runs the cells of the notebooks in this process, without a kernel, as one Markdown, HTML and PDF.
Imports no torch.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mistune
import pandas as pd
from IPython.core.displayhook import CapturingDisplayHook
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import Markdown, display
from traitlets.config import Config

from lib import drawing as figures
from lib.results import claims

HERE = Path(__file__).parent


def say(text: str) -> None:
    """A paragraph of the notebook and of the report."""
    display(Markdown(text))


def run(notebook: Path, **parameters: Any) -> list[str]:
    """The report's blocks, in Markdown; raises what a cell raises, noting notebook and cell."""
    shell: Any = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    shell.display_formatter.formatters["text/markdown"].for_type(pd.DataFrame, markdown_table)
    shell.reset(new_session=False)
    shell.showtraceback = lambda *_, **__: None  # it is raised below
    blocks: list[str] = []
    for number, cell in enumerate(json.loads(notebook.read_text("utf-8"))["cells"]):
        source, tags = "".join(cell["source"]), cell["metadata"].get("tags", [])
        if cell["cell_type"] == "markdown":
            blocks += [source] * ("report" in tags)
            continue
        if "parameters" in tags:
            source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
        shell.display_pub = CapturingDisplayPublisher()  # of display(), and of last expressions:
        shell.display_trap.hook = CapturingDisplayHook(shell, shell.display_pub.outputs)
        result = shell.run_cell(source)
        error = result.error_before_exec or result.error_in_exec
        if error:
            error.add_note(f"{notebook.name}, cell {number}:\n{source}")
            raise error
        if "report" in tags:
            blocks += filter(None, map(block, shell.display_pub.outputs))
    return blocks


def block(output: dict[str, Any]) -> str:
    """An output in Markdown: a figure with its caption, a paragraph, a table; "" for another."""
    about = output.get("metadata") or {}
    if "figure" in about:
        return f"![{about['caption']}](figures/{about['figure']}.png)"
    return "" if "caption" in about else output["data"].get("text/markdown", "")


def markdown_table(frame: pd.DataFrame) -> str:
    """A DataFrame as a table of Markdown; a named index becomes a column."""
    if frame.empty:
        return "No rows yet."
    frame = frame.reset_index() if frame.index.names != [None] else frame
    lines = [list(frame.columns), ["---"] * frame.shape[1], *frame.fillna("").to_numpy(object)]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def html(text: str) -> str:
    """The whole page; an image alone in its paragraph becomes a figure with its caption."""
    body = str(mistune.create_markdown(plugins=["table"])(text))
    figure = r'<figure><img src="\1" alt=""><figcaption>\2</figcaption></figure>'
    body = re.sub(r'<p><img src="([^"]+)" alt="([^"]*)" ?/></p>', figure, body)
    style = (HERE / "page.css").read_text("utf-8")
    head = f'<meta charset="utf-8"><title>Report</title><style>{style}</style>'
    return f'<!doctype html><html lang="en">{head}\n{body}</html>\n'


def typst(token: dict[str, Any]) -> str:
    """One of mistune's tokens as typst; text as a string, so that nothing in it is markup.

    KeyError for markup that the report does not use.
    """
    kind, inner = token["type"], token.get("children") or []
    attrs, raw = token.get("attrs", {}), json.dumps(token.get("raw", ""), ensure_ascii=False)
    if kind == "paragraph" and [child["type"] for child in inner] == ["image"]:
        path = inner[0]["attrs"]["url"].removesuffix(".png") + ".pdf"
        caption = "".join(map(typst, inner[0]["children"]))
        return f'#figure(image("{path}", width: 100%), caption: [{caption}])\n\n'
    if kind == "table":
        head, *body = inner
        rows = [row["children"] for part in body for row in part["children"]]
        cells = [f"[{''.join(map(typst, c['children']))}]" for row in rows for c in row]
        top = [f"[{''.join(map(typst, cell['children']))}]" for cell in head["children"]]
        header = f"table.header({', '.join(top)})"
        return f"#table(columns: {len(top)}, {', '.join([header, *cells])})\n\n"
    text, level = "".join(map(typst, inner)), attrs.get("level", 1)
    return {
        "text": f"#{raw};",
        "codespan": f"#raw({raw});",
        "softbreak": " ",
        "blank_line": "",
        "block_text": text,
        "paragraph": f"{text}\n\n",
        "emphasis": f"#emph[{text}];",
        "strong": f"#strong[{text}];",
        "heading": f"{'#pagebreak(weak: true)' if level == 1 else ''}\n\n{'=' * level} {text}\n\n",
        "list": f"#{'enum' if attrs.get('ordered') else 'list'}({text})\n\n",
        "list_item": f"[{text}],",
        "link": f"#link({json.dumps(attrs.get('url', ''))})[{text}];",
    }[kind]


def build(notebooks: Iterable[Path], folder: Path, **parameters: Any) -> None:
    """Write report.md, .html and .pdf into the folder, with figures/ and verdicts in results/."""
    import typst as compiler

    figures.FOLDER, claims.FOLDER = folder / "figures", folder / "results"
    blocks = [block for notebook in notebooks for block in run(notebook, **parameters)]
    text = "\n\n".join(blocks).replace(" %", "\N{NO-BREAK SPACE}%") + "\n"
    tokens: Any = mistune.create_markdown(renderer="ast", plugins=["table"])(text)
    source = folder / "report.typ"
    source.write_text((HERE / "page.typ").read_text("utf-8") + "".join(map(typst, tokens)), "utf-8")
    (folder / "report.md").write_text(text, "utf-8")
    (folder / "report.html").write_text(html(text), "utf-8")
    (folder / "report.pdf").write_bytes(compiler.compile(str(source), timestamp=0))


if __name__ == "__main__":
    chosen = sorted((HERE.parent / "notebooks").glob("*.ipynb"))
    build(chosen, Path(sys.argv[2]), profile=sys.argv[1])
