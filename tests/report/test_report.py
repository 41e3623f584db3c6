"""The report from made-up rows: sections, one scale an experiment, and both renderings."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from lib import experiments, figures
from lib.__main__ import main
from lib.figures import TABLES, Table
from lib.report import compose, readme, report
from lib.report.blocks import Block, Heading, Numbers, Picture, Prose
from lib.report.page import to_html
from lib.report.typeset import to_pdf
from lib.results.reading import Source
from tests.support.made_up_grid import write_grid

SECTIONS = 10


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One experiment at two scales, one at the reduced one only."""
    folder = tmp_path_factory.mktemp("report")
    write_grid(folder, "main_results", "quick")
    write_grid(folder, "main_results", "paper", error=lambda run: 11.0 + run.seed / 10)
    write_grid(folder, "sensitivity", "quick")
    return folder


@pytest.fixture(scope="module")
def blocks(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Block]:
    return compose.compose(Source("quick", root), tmp_path_factory.mktemp("scratch"))


def test_ten_sections_and_an_appendix(blocks: list[Block]) -> None:
    numbers = [b.number for b in blocks if isinstance(b, Heading) and b.level == 1]
    assert numbers == [*map(str, range(1, SECTIONS + 1)), "A"]


def test_each_experiment_is_shown_once_at_its_largest_scale(blocks: list[Block]) -> None:
    pictures = Counter(b.file.name for b in blocks if isinstance(b, Picture))
    assert max(pictures.values()) == 1
    assert pictures.keys() == {"paper_main_results_lenet300-100.svg", "quick_sensitivity.svg"}
    table = next(b.table for b in blocks if isinstance(b, Numbers) and "by share" in b.caption)
    assert table.frame["SET"].tolist()[0].startswith("11.45 [")
    heads = [b.text for b in blocks if isinstance(b, Heading) and b.level == 2]
    assert any(text.endswith("(the reduced scale quick)") for text in heads)


def test_figures_and_tables_are_numbered_in_order(blocks: list[Block]) -> None:
    for kind, name in ((Picture, "Figure"), (Numbers, "Table")):
        found = [b.name for b in blocks if isinstance(b, kind)]
        assert found == [f"{name} {i}" for i in range(1, len(found) + 1)]


def test_what_is_missing_is_said_with_its_number(blocks: list[Block]) -> None:
    said = " ".join(b.markdown for b in blocks if isinstance(b, Prose))
    planned = len(experiments.runs("trainability", "paper"))
    assert f"`trainability`, {planned} runs" in said
    assert "`main_results`" not in said  # complete at the paper's scale
    costs = next(b.table.frame for b in blocks if isinstance(b, Numbers) and "take" in b.caption)
    missing = costs.set_index("experiment")["runs missing"]
    every = len(experiments.runs("sensitivity", "paper"))
    assert missing["sensitivity"] == f"{every:,} of {every:,}" and "main_results" not in missing


def test_every_table_of_an_experiment_with_rows_is_in_the_appendix(blocks: list[Block]) -> None:
    start = next(i for i, b in enumerate(blocks) if isinstance(b, Heading) and b.number == "A")
    captions = {b.caption for b in blocks[start:] if isinstance(b, Numbers)}
    assert len(captions) >= 1 + sum(table.experiment == "main_results" for table in TABLES.values())


class _Tags(HTMLParser):
    """Checks nesting and collects what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.targets: set[str] = set()
        self.anchors: list[str | None] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)
        if "id" in dict(attrs):
            self.anchors.append(dict(attrs)["id"])
        self.targets.add(dict(attrs).get("href") or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_both_files_through_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_grid(tmp_path, "main_results", "smoke")
    assert main(["report", "--profile", "smoke", "--results", str(tmp_path)]) == 0
    folder = figures.output_dir(Source("smoke", tmp_path))
    written = [folder / "report.html", folder / "report.pdf"]
    said = capsys.readouterr().out.splitlines()
    assert [Path(line) for line in said] == written
    page = _Tags()
    text = written[0].read_text(encoding="utf-8")
    page.feed(text)
    assert page.open == [] and len(page.images) >= 1
    for image in page.images:
        assert image["alt"] and (image["src"] or "").startswith("data:image/svg+xml;base64,")
    pdf = written[1].read_bytes()
    assert pdf.startswith(b"%PDF-") and len(pdf) > 50_000
    before = [path.read_bytes() for path in written]
    report.report(Source("smoke", tmp_path))
    assert [path.read_bytes() for path in written] == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_texts_are_no_markup(tmp_path: Path) -> None:
    nasty = '#panic("x") $a$ <d> & \\ "e" [f] @g // h'
    table = Table(pd.DataFrame({nasty: [nasty, "1"]}), nasty, nasty)
    found: list[Block] = [
        Heading(1, nasty, "1"),
        Prose(f"{nasty} `{nasty}`\n\n- {nasty}\n- **{nasty}**"),
        Prose("| a | b |\n|---|---|\n| $c$ | <d> |"),
        Numbers(table, nasty, "Table 1"),
    ]
    assert to_pdf(nasty, nasty, found, tmp_path).startswith(b"%PDF-")
    text = to_html(nasty, nasty, found)
    page = _Tags()
    page.feed(text)
    assert page.open == []
    # title three times, heading and contents, prose four times, caption, and four of the table
    assert page.words.count(nasty.split("\\", maxsplit=1)[0]) == 13
    assert "<d>" not in text


def test_without_runs_it_says_so(tmp_path: Path) -> None:
    found = compose.compose(Source("smoke", tmp_path), tmp_path)
    assert not [b for b in found if isinstance(b, Picture)]
    said = " ".join(b.markdown for b in found if isinstance(b, Prose))
    assert said.count("Not yet computed at the reduced scale smoke") >= 5
    assert to_pdf("t", "s", found, tmp_path).startswith(b"%PDF-")


def test_numbers_stand_to_the_right_whatever_brackets_follow() -> None:
    """One cell with runs that failed turned its whole column into text."""
    cells = ["18.41 [15.20, 21.62] (9 of 10 learned)", "1.78 [1.73, 1.83]", "–"]
    claims = [f"a claim in {n} words that fill more than one line" for n in range(3)]
    table = Table(pd.DataFrame({"claim": claims, "SET": cells}), "")
    page = to_html("t", "s", [Numbers(table, "c", "Table 1")])
    assert '<td class="words">a claim in 0 words' in page
    held = "18.41 [15.20,\u00a021.62] (9\u00a0of\u00a010\u00a0learned)"
    assert f'<td class="number">{held}</td>' in page


def test_an_unknown_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown profile 'smok': did you mean 'smoke'"):
        report.report(Source("smok", tmp_path))


def test_findings_stand_between_the_comments_of_the_readme() -> None:
    before = "a\n<!-- findings: written by `make report` from the rows -->\nold\n"
    end = "<!-- end of findings -->\nb\n"
    text = readme.with_findings(before + end, "- one\n  two \\1\n\n- " + "long " * 40)
    assert "old" not in text and text.startswith("a\n<!--") and text.endswith(end)
    assert "- one two \\1\n- long" in text
    assert max(map(len, text.splitlines())) <= 108
    with pytest.raises(ValueError, match="one pair of comments"):
        readme.with_findings("a\nb\n", "- one")
