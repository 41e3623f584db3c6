"""The report is the notebooks, bound: what their cells tagged `report` say and show, in order.

The cells run without a kernel, a notebook in a process; one without such a cell is left out.  Each
experiment is shown at the largest scale that has rows, and nothing is trained.  Imports no torch.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import mistune
import pandas as pd
from IPython.core.displayhook import CapturingDisplayHook
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import Markdown, display
from traitlets.config import Config

from lib import figures, paths
from lib.paths import REPO
from lib.results import claims
from lib.results.rows import SCALES
from lib.results.store import run_paths

HERE = Path(__file__).parent
FINDINGS = re.compile(r"(<!-- findings:[^>]*-->\n).*?(<!-- end of findings -->)", re.DOTALL)


def say(text: str) -> None:
    """A paragraph of the notebook and of the report."""
    display(Markdown(text))


def chapters() -> list[Path]:
    """The notebooks that have cells for the report: the opening page, then by number."""
    found = [p for p in (REPO / "notebooks").glob("*.ipynb") if '"report"' in p.read_text("utf-8")]
    return sorted(found, key=lambda path: (path.stem != "findings", path.stem))


def execute(notebook: Path, **parameters: Any) -> dict[str, Any]:
    """The notebook with the outputs of its cells, run without a kernel.

    Raises what a cell raises, with a note of notebook and cell.
    """
    shell: Any = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    shell.display_formatter.formatters["text/markdown"].for_type(pd.DataFrame, markdown_table)
    shell.reset(new_session=False)
    shell.showtraceback = lambda *_, **__: None  # it is raised below
    book: dict[str, Any] = json.loads(notebook.read_text("utf-8"))
    for number, cell in enumerate(book["cells"]):
        source = cell["source"] = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            continue
        if "parameters" in cell["metadata"].get("tags", []):
            source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
        shell.display_pub = CapturingDisplayPublisher()  # of display(), and of last expressions:
        shell.display_trap.hook = CapturingDisplayHook(shell, shell.display_pub.outputs)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            result = shell.run_cell(source)
        if error := result.error_before_exec or result.error_in_exec:
            error.add_note(f"{notebook.name}, cell {number}:\n{source}")
            raise error
        text = {"output_type": "stream", "name": "stdout", "text": printed.getvalue()}
        cell["source"], cell["outputs"] = source, [text] if text["text"] else []
        cell["outputs"] += [
            {"output_type": "display_data", "data": one["data"], "metadata": one["metadata"] or {}}
            for one in shell.display_pub.outputs
        ]
    return book


def said(book: dict[str, Any], tag: str = "report") -> list[str]:
    """What cells with this tag say, in Markdown, one block a paragraph, figure or table."""
    cells = [cell for cell in book["cells"] if tag in cell["metadata"].get("tags", [])]
    every = (map(block, c["outputs"]) if "outputs" in c else [c["source"]] for c in cells)
    return [one for blocks in every for one in blocks if one]


def keep(book: dict[str, Any], path: Path) -> None:
    """Write an executed notebook to figures/notebooks, its figures by the names of their files."""
    cells: list[dict[str, Any]] = []
    for cell in book["cells"]:
        drawn = [o for o in cell.get("outputs", []) if "figure" in o.get("metadata", {})]
        rest = {k: [o for o in v if o not in drawn] for k, v in cell.items() if k == "outputs"}
        cells.append(cell | rest)
        for name in (output["metadata"]["figure"] for output in drawn):
            about = {"cell_type": "markdown", "id": Path(name).name, "metadata": {}}
            cells.append(about | {"source": f"![](../{name}.png)"})
    text = json.dumps(book | {"cells": cells}, indent=1, ensure_ascii=False)
    paths.write(path, f"{text}\n".encode())


def block(output: dict[str, Any]) -> str:
    """An output in Markdown: a figure with its caption, a paragraph, a table; "" for another."""
    about = output.get("metadata", {})
    if "figure" in about:
        return f"![{about['caption']}]({about['figure']}.png)"
    return "" if "caption" in about else output.get("data", {}).get("text/markdown", "")


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
    body = re.sub("(?s)<table>.*?</table>", r'<div class="scroll">\g<0></div>', body)
    head = '<meta charset="utf-8"><title>Sparse Networks from Scratch, reproduced</title>'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<style>\n{(HERE / 'page.css').read_text('utf-8')}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}</body></html>\n'


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
        rows = [head, *(row for part in body for row in part["children"])]
        cells = [
            [f"[{''.join(map(typst, c['children']))}]" for c in row["children"]] for row in rows
        ]
        longest = [max(map(len, column)) for column in zip(*cells, strict=True)]
        sizes = ", ".join(f"{min(n, 80) + 12}fr" if max(longest) > 60 else "auto" for n in longest)
        top, *lines = map(", ".join, cells)
        return f"#table(columns: ({sizes},), table.header({top}), {', '.join(lines)})\n\n"
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
        "heading": f"#heading(level: {level})[{text}]\n\n",
        "list": f"#{'enum' if attrs.get('ordered') else 'list'}({text})\n\n",
        "list_item": f"[{text}],",
        "link": f"#link({json.dumps(attrs.get('url', ''))})[{text}];",
    }[kind]


def _chapter(
    folder: Path | None, verdicts: Path, profile: str, results: str, path: Path
) -> dict[str, Any]:
    """A chapter's notebook, executed in a process of the pool, whose globals these are."""
    figures.FOLDER, figures.DRAW, claims.FOLDER = folder, folder is not None, verdicts
    book = execute(path, profile=profile, results=results)
    if folder is not None:
        keep(book, folder / "notebooks" / path.name)
    return book


def build(folder: Path | None, verdicts: Path, results: str = "", profile: str = "") -> str:
    """Run the cells of all chapters; the report in Markdown.  After the opening page come the
    figures of the cells tagged picture-1 to picture-5.

    Figures go to `folder`/<profile>/ (None: nowhere), executed notebooks to `folder`/notebooks/,
    verdicts.csv and verdicts.parts.csv to `verdicts`/<profile>/.  `profile`: of all; empty: the
    largest of each experiment that has rows.
    """
    chapter = functools.partial(_chapter, folder, verdicts, profile, results)
    opening, *middle, appendix = chapters()
    with ProcessPoolExecutor() as pool:
        books = list(pool.map(chapter, middle))
        first_book, last_book = pool.map(chapter, (opening, appendix))  # show all verdicts
    books.append(last_book)
    shown = [one for n in range(1, 6) for book in books for one in said(book, f"picture-{n}")]
    first = [one for one in shown if one.startswith("![")]
    rest = [one for book in books for one in said(book) if one not in first]
    blocks = [*said(first_book), *first, *rest]
    return re.sub(" (?=%|= )|(?<= =) ", "\N{NO-BREAK SPACE}", "\n\n".join(blocks)) + "\n"


def bind(profile: str = "", results: str | None = None, draw: bool = True) -> tuple[Path, str]:
    """The folder of the figures, and the report in Markdown, from the rows of all experiments.

    Only all committed rows change committed files: from one profile, or from other results,
    everything goes to figures/ beside those rows.  ValueError where there are none.
    """
    root, own = Path(results or REPO / "results"), bool(profile or results)
    if own and not any(run_paths(root / scale) for scale in ([profile] if profile else SCALES)):
        raise ValueError(
            f"{root / profile} holds no results: python -m lib run all --profile "
            f"{profile or 'paper'} trains what is missing"
        )
    folder = root / profile / "figures" if own else REPO / "figures"
    text = build(folder if draw else None, root, results or "", profile)
    if draw and not own:
        findings = json.loads((folder / "notebooks" / "findings.ipynb").read_text("utf-8"))
        into_readme(REPO / "README.md", said(findings, "findings"))
    return folder, text


def write(text: str, folder: Path) -> list[Path]:
    """Write report.md, .html and .pdf beside the figures that the Markdown names; their paths."""
    import typst as compiler

    tokens: Any = mistune.create_markdown(renderer="ast", plugins=["table"])(text)
    source = (HERE / "page.typ").read_text("utf-8") + "".join(map(typst, tokens))
    how: dict[str, Any] = {"root": folder, "timestamp": 0, "ignore_system_fonts": True}
    pdf = compiler.compile(source.encode(), **how)
    made = {"md": text.encode(), "html": html(text).encode(), "pdf": pdf}
    for kind, content in made.items():
        paths.write(folder / f"report.{kind}", content)
    return [folder / f"report.{kind}" for kind in made]


def into_readme(readme: Path, findings: Iterable[str]) -> None:
    """Write the findings between their markers; ValueError without the two comments."""
    lines = [f"\n{one}" if one.startswith("|") else one for one in findings]  # a table stands alone
    text, found = FINDINGS.subn(
        lambda at: "\n".join([at[1].rstrip(), *lines, at[2]]), readme.read_text("utf-8")
    )
    if found != 1:
        raise ValueError(f"{readme} must have one pair of comments around its findings, see git")
    readme.write_text(text, "utf-8")
