"""Writes the report: report.pdf and report.html.  Imports no torch; equal rows give equal bytes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lib import figures, paths
from lib.report.compose import compose, findings
from lib.report.facts import scales
from lib.report.page import to_html
from lib.report.readme import with_findings
from lib.report.typeset import to_pdf
from lib.results.reading import Source

TITLE = "Sparse Networks from Scratch, reproduced"
SUBTITLE = (
    "Sparse momentum (Dettmers and Zettlemoyer 2019, "
    "[arXiv 1907.04840](https://arxiv.org/abs/1907.04840)): what holds, what does not, "
    "and what could not be tested"
)


def report(source: Source) -> list[Path]:
    """Write report.html and report.pdf, each experiment at its largest scale.

    They go to figures/, and the findings into README.md; for smoke and for results elsewhere to
    figures/ beside or below the results (`figures.output_dir`). The files written.

    Raises ValueError for an unknown profile, Outdated for a sentence that the rows no longer
    support, ResultsError for a damaged CSV.
    """
    scales(source.profile)
    folder = figures.output_dir(source)
    committed = source.root is None and source.profile != "smoke"
    if committed:
        folder = paths.figures_dir()
    with tempfile.TemporaryDirectory() as scratch:
        blocks = compose(source, Path(scratch))
        contents = {
            "html": to_html(TITLE, SUBTITLE, blocks).encode(),
            "pdf": to_pdf(TITLE, SUBTITLE, blocks, Path(scratch)),
        }
    folder.mkdir(parents=True, exist_ok=True)
    written = {folder / f"report.{kind}": content for kind, content in contents.items()}
    if committed:
        readme = paths.REPO / "README.md"
        text = with_findings(readme.read_text(encoding="utf-8"), findings(source))
        written[readme] = text.encode()
    for path, content in written.items():
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)
    return list(written)
