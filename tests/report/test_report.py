"""The report from made-up rows: what it says, that scales stay apart, and both outputs."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from lib import claims, experiments, figures
from lib.__main__ import main
from lib.figures import Table
from lib.report import report
from lib.report.report import Heading, Items, Numbers, Picture, Text
from lib.results.reading import Source
from tests.support.made_up_grid import write_grid


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one experiment at two scales: errors of `paper` are 10 points higher."""
    root = tmp_path_factory.mktemp("report")
    write_grid(root, "main_results", "quick")
    write_grid(root, "cifar10_table", "quick", error=lambda run: 20.0 + run.seed)
    write_grid(
        root,
        "main_results",
        "paper",
        error=lambda run: 11.0 + run.seed / 10,
        keep=lambda run: run.seed < 2,
    )
    return root


@pytest.fixture(scope="module")
def blocks(both: Path, tmp_path_factory: pytest.TempPathFactory) -> list[report.Block]:
    return report.compose(Source("quick", both), tmp_path_factory.mktemp("scratch"))


def test_scales_have_chapters_of_their_own(blocks: list[report.Block]) -> None:
    chapters = [b.text for b in blocks if isinstance(b, Heading) and b.level == 1]
    assert chapters == [
        "What this is",
        "Scope and scale",
        "The rule from numbers to verdicts",
        "Verdicts at the paper's scale",
        "Experiments at the paper's scale",
        "Verdicts at reduced scale (quick)",
        "Experiments at reduced scale (quick)",
        "Guesses and departures from the paper",
        "What remains open",
    ]
    at = [i for i, b in enumerate(blocks) if isinstance(b, Heading) and b.level == 1]
    paper, quick = blocks[at[4] : at[5]], blocks[at[6] : at[7]]
    for part, mean in ((paper, 11.05), (quick, 1.3)):
        table = next(b.table for b in part if isinstance(b, Numbers))
        dense = table.frame.set_index("method").loc["Dense"]
        assert float(dense["test error (%)"]) == pytest.approx(mean, abs=0.1)
    assert any("profile paper" in b.text.lower() for b in paper if isinstance(b, Text))
    said = [b.text for b in quick if isinstance(b, Text)]
    assert any("reduced scale" in text for text in said)
    assert any(text.startswith("Not complete") and "ablations" in text for text in said)
    assert "Not run at this scale: imagenet." in said


def test_scope_counts_the_runs(blocks: list[report.Block]) -> None:
    scopes = [
        b.table for b in blocks if isinstance(b, Numbers) and "The runs at" in b.table.caption
    ]
    assert ["paper" in t.caption for t in scopes] == [True, False]
    planned = len(experiments.runs("main_results", "paper"))
    row = scopes[0].frame.set_index("experiment").loc["main_results"]
    assert row["runs"] == f"{planned // 5} of {planned}"  # two of ten seeds
    assert row["seeds"] == "2" and row["training images"] == "all"
    assert "made-up processor" in scopes[1].note


def test_every_claim_with_runs_is_said_with_its_numbers(
    blocks: list[report.Block], both: Path
) -> None:
    judged = claims.verdict_table(Source("quick", both))
    with_runs = judged[judged["verdict"] != claims.NO_RUNS]
    assert len(with_runs) > 5
    said = "\n".join(text for b in blocks if isinstance(b, Items) for text in b.texts)
    for row in with_runs.to_dict("records"):
        assert f"{row['verdict'].capitalize()}: {row['claim']}. Paper: {row['paper']}" in said
        assert row["ours"] in said
    tables = [b.table for b in blocks if isinstance(b, Numbers)]
    unspoken = next(t for t in tables if t.caption == "Claims that no run speaks to yet")
    assert not set(unspoken.frame["claim"]) & set(with_runs["claim"])


def test_what_is_open_counts_the_missing_runs(blocks: list[report.Block]) -> None:
    tables = [b.table for b in blocks if isinstance(b, Numbers)]
    table = next(t for t in tables if "not complete" in t.caption).frame.set_index("experiment")
    planned = len(experiments.runs("main_results", "paper"))
    assert table.loc["main_results", "runs missing"] == f"{planned - planned // 5} of {planned}"
    assert table.loc["main_results", "state"] == "partly computed"
    assert table.loc["ablations", "state"] == "not yet computed"


def test_an_experiment_without_own_tables_shows_its_errors_beside_the_published(
    both: Path,
) -> None:
    table = report._errors(report.load("cifar10_table", Source("quick", both)))
    row = table.frame[(table.frame["network"] == "AlexNet-s") & (table.frame["method"] == "Dense")]
    assert row["published (%)"].tolist() == ["12.95 ± 0.06"]
    assert row["n"].tolist() == ["3"]
    assert row["test error (%)"].tolist()[0].startswith("21.00 [")


def test_each_figure_belongs_to_an_experiment() -> None:
    every = {**figures.FIGURES, **figures.TABLES}
    assert {entry.experiment for entry in every.values()} <= {*experiments.EXPERIMENTS, ""}
    assert [name for name, entry in every.items() if not entry.experiment] == ["verdicts"]
    assert set(report.QUESTIONS) == set(experiments.EXPERIMENTS)


class _Tags(HTMLParser):
    """Checks nesting and collects what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.targets: set[str | None] = set()
        self.anchors: set[str | None] = set()
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)
        self.anchors.add(dict(attrs).get("id"))
        self.targets.add((dict(attrs).get("href") or "").removeprefix("#"))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_both_files_through_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_grid(tmp_path, "main_results", "smoke")
    assert main(["report", "--profile", "smoke", "--results", str(tmp_path)]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    folder = figures.output_dir(Source("smoke", tmp_path))
    assert written == [folder / "report.html", folder / "report.pdf"]
    page = _Tags()
    text = written[0].read_text(encoding="utf-8")
    page.feed(text)
    assert page.open == [] and len(page.images) >= 1
    for image in page.images:
        assert image["alt"] and (image["src"] or "").startswith("data:image/svg+xml;base64,")
    assert page.targets - {""} <= page.anchors
    assert "http" not in text.replace("http://www.w3.org", "")  # one file, nothing to load
    pdf = written[1].read_bytes()
    assert pdf.startswith(b"%PDF-") and len(pdf) > 50_000
    before = [path.read_bytes() for path in written]
    report.report(Source("smoke", tmp_path))
    assert [path.read_bytes() for path in written] == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_texts_are_no_markup(tmp_path: Path) -> None:
    nasty = '#panic("x") $a$ *b* _c_ <d> & \\ "e" [f] @g // h'
    table = Table(pd.DataFrame({nasty: [nasty, "1"]}), nasty, nasty)
    found: list[report.Block] = [
        Heading(1, nasty),
        Text(nasty + " `" + nasty + "`"),
        Items((nasty, nasty)),
        Numbers(table),
    ]
    assert report.to_pdf(found, tmp_path).startswith(b"%PDF-")
    page = _Tags()
    page.feed(report.to_html(found))
    assert page.open == [] and page.words.count(nasty) == 10  # the heading is also in the contents
    assert "<d>" not in report.to_html(found)


def test_without_runs_it_says_so(tmp_path: Path) -> None:
    blocks = report.compose(Source("smoke", tmp_path), tmp_path)
    said = " ".join(b.text for b in blocks if isinstance(b, Text))
    assert "python -m lib run all --profile smoke" in said
    assert not [b for b in blocks if isinstance(b, Picture)]


def test_an_unknown_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown profile 'fast': smoke, quick, hours, paper"):
        report.report(Source("fast", tmp_path))
