"""One report from the saved CSVs: report.pdf (typeset by typst) and report.html.  Imports no torch.

A report is a list of blocks (headings, paragraphs, lists, figures, tables) that both outputs set.
The sentences stand here, the numbers come from the rows: what an experiment shows is whatever is
registered in lib/figures and lib/claims under its name. Runs at the paper's scale and reduced
ones have chapters of their own and are never put together. Equal rows give equal bytes.
"""

from __future__ import annotations

import base64
import html
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd

from lib import claims, experiments, figures, paths
from lib.figures import FIGURES, STYLE, TABLES, Plot, Table
from lib.results.reading import (
    METHOD_NAMES,
    MODEL_NAMES,
    NoRuns,
    Runs,
    Source,
    interval_text,
    load,
    published_rows,
    summarise,
)
from lib.stats import Verdict

TITLE = "Sparse Networks from Scratch, reproduced"
SUBTITLE = "Sparse momentum (Dettmers and Zettlemoyer 2019, arXiv 1907.04840)"

# --------------------------------------------------------------------------------------------------
# The sentences
# --------------------------------------------------------------------------------------------------

_WHAT = (
    "Sparse momentum trains a network that has a fixed, small number of non-zero weights from the "
    "first step to the last. Once per epoch it removes the active weights of smallest magnitude, "
    "shares the removed ones out among the layers by the mean magnitude of the momentum of their "
    "active weights, and lets the inactive weights with the largest momentum grow from zero. The "
    "paper claims that such networks reach the accuracy of dense ones with a few per cent of the "
    "weights, are more accurate than other sparsely trained ones, and could be several times "
    "faster.",
    "This report tests these claims with an implementation of its own. Every number in it is "
    "computed from the rows of results/, every published number is read from results/published/ "
    "with its source. The command `python -m lib report` writes it anew.",
)
_RULE = (
    "Margins and tests stood in the code before there were numbers (lib/claims, lib/stats.py). "
    "Seeds are shared by all methods, so that two methods are compared seed by seed."
)
_REDUCED = (
    "These runs are reduced: fewer epochs, images and seeds than in the paper, and on CIFAR-10 "
    "narrower networks. What they show holds at this scale. Values of the paper are printed beside "
    "them for orientation and are not judged."
)

QUESTIONS = {
    "main_results": "At equal weights, is LeNet-300-100 trained with sparse momentum more accurate "
    "than with SET, DSR, DeepR or a fixed mask, and with how many weights is it as good as dense?",
    "initial_densities": "At 1 or 2 % of the weights SET, DSR and DeepR err more here than "
    "published. Is that how the weights are shared out among the layers at the start, and what is "
    "left of the comparison when small layers start denser?",
    "mnist_compression": "How do the sparse LeNets compare with the results published by methods "
    "that compress a trained network?",
    "cifar10_table": "Is sparse momentum more accurate than SNIP, and how far below the dense "
    "network, for each network of the paper's CIFAR-10 table?",
    "wrn28_2_curve": "How does the error of a wide residual network on CIFAR-10 grow as weights "
    "are taken away, under each method?",
    "imagenet": "How accurate is ResNet-50 on ImageNet with 10 and 20 % of its weights, and what "
    "does it change to leave the first and the downsampling convolutions dense?",
    "ablations": "Which part of sparse momentum does the work: redistribution by momentum, growth "
    "by momentum, or neither?",
    "official_readings": "In places the official code departs from the paper, or its words leave a "
    "choice. Which reading moves the error of LeNet-300-100, and does one explain where our error "
    "differs from the published one?",
    "depth_scaling": "The paper says that both parts matter more the deeper and larger the network "
    "is, and prints no numbers. Do they, in families of networks that differ in one thing only?",
    "sensitivity": "How much does the error depend on the prune rate, its schedule and the "
    "momentum, and does a sparse network depend on the momentum more than a dense one?",
    "speedups": "How much faster could the convolutions be by the paper's two formulas, how much "
    "faster is a network really whose empty channels are taken out, and how much faster does it "
    "train on a clock when its kernels skip the zeros?",
    "computing": "A sparse layer can be computed as a masked dense one in float32, over its "
    "non-zero weights only, or in bfloat16. Is the error the same, seed by seed?",
    "features": "Do the channels of sparse networks answer to more classes than those of dense "
    "ones, and into which layers does redistribution move the weights?",
    "dense_layers": "The official code of July 2019 left layers of VGG and AlexNet dense by "
    "mistake. How many weights did its networks really have, and what did the mistake do to the "
    "error?",
}

# What was decided where the sources say nothing or disagree.
DEVIATIONS = (
    "The algorithm. The official code steers the number of weights back by feedback, so that it "
    "drifts, fills at most 99 % of a layer, lets a weight that is pruned and grown in one update "
    "keep its value, and stops when a layer is left empty. Here the number of weights is exact "
    "after every update, layers can fill, grown weights start at zero as in the paper, and every "
    "layer keeps a weight. The prune rate falls to 0, not to 0.005. What the code's way does to "
    "the error is measured by the experiment `official_readings`.",
    "Initial densities. Every layer starts with the same share of its weights, as in the official "
    "code, under all methods. The published runs of SET, DSR and DeepR are of another code base, "
    "whose initial densities are not at hand; what they decide is measured by the experiment "
    "`initial_densities`.",
    "Length of training. The sources at hand don't agree on epochs and batch sizes. Taken: MNIST "
    "100 epochs, batches of 100, learning rate decayed every 25,000 mini-batches; CIFAR-10 250 "
    "epochs, batches of 128, decays every 30,000. The number of seeds is not documented; 10 are "
    "planned.",
    "Settings that are not printed: the share of weights in the ablation and in the sensitivity "
    "figures, and the weights at which each network of the speed-up table reaches dense accuracy. "
    "The ablation and sensitivity runs use those of the CIFAR-10 table (5 % for VGG, 10 % for "
    "AlexNet and WRN) and 5 % on MNIST; speed-ups are given at stated weights.",
    "No redistribution has two meanings in the official code: each layer gets back what it lost "
    "(July 2019), or layers get weights by their size (since August 2019). Both are run; 'none' is "
    "the first.",
    "All methods run in one training loop. In the paper SET, DSR and DeepR are quoted from another "
    "code base, and SNIP from its own paper, so that differences between methods need not agree.",
    "SET prunes by magnitude. The official code's SET removes the wrong weights in both of its "
    "versions and is not followed; DeepR has its own L1 term in place of weight decay.",
    "Convolutions are timed one by one for the estimates, shortcuts included, on a sample of the "
    "mini-batches; the official code averages layers of equal width and mixes validation in.",
    "The 24 layers of WRN-28-2 in the official feature data are those of its blocks; the last ReLU "
    "is left out here too.",
    "The held-out part of the training set is the last tenth, as in the official code, and nothing "
    "is selected on it: the test set is read once, after the last epoch.",
)

# Tables of the literature that have the same cells as an experiment.
_PUBLISHED = {
    "cifar10_table": ("cifar10_table",),
    "wrn28_2_curve": ("wrn28-2_cifar10_summary",),
    "mnist_compression": ("mnist_lenet300-100", "mnist_lenet5"),
}

_UNPUBLISHED = (
    "Numbers of the paper that no public source has, so that nothing can be compared with them: "
    "the ablation, the table of weights and speed-ups per network, its ImageNet rows for DeepR, "
    "SET and static masks, and the number of seeds.",
)

# --------------------------------------------------------------------------------------------------
# Blocks
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is a chapter."""

    level: int
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph; words in backquotes are code."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of paragraphs."""

    texts: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """A drawn figure: its SVG file, its size in inches, and what it shows."""

    file: Path
    size: tuple[float, float]
    caption: str


@dataclass(frozen=True)
class Numbers:
    """A table; numbered in the output."""

    table: Table


Block = Heading | Text | Items | Picture | Numbers


# --------------------------------------------------------------------------------------------------
# What is said
# --------------------------------------------------------------------------------------------------


def report(source: Source) -> list[Path]:
    """Write report.pdf and report.html on the runs of `source`, at the paper's scale and at hours.

    They go to figures/, for smoke and for results elsewhere to figures/ beside or below the
    results (`figures.output_dir`). The files written. Raises ValueError for an unknown profile,
    ResultsError for a damaged CSV.
    """
    if source.profile not in experiments.PROFILES:
        known = ", ".join(experiments.PROFILES)
        raise ValueError(f"unknown profile {source.profile!r}: {known}")
    folder = figures.output_dir(source)
    if source.root is None and source.profile != "smoke":
        folder = paths.figures_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        blocks = compose(source, Path(scratch))
        contents = {"html": to_html(blocks).encode(), "pdf": to_pdf(blocks, Path(scratch))}
    written = []
    for kind, content in contents.items():
        path = folder / f"report.{kind}"
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)
        written.append(path)
    return written


def compose(source: Source, scratch: Path) -> list[Block]:
    """The blocks of the report; its figures are saved in the directory `scratch`."""
    names = dict.fromkeys(("paper", "hours", source.profile))
    scales = [name for name in names if _done(source.at(name))]
    judged = {scale: claims.verdict_table(source.at(scale)) for scale in scales}
    blocks: list[Block] = [Heading(1, "What this is"), *map(Text, _WHAT)]
    for scale in scales:
        name = _scale_name(scale)
        blocks.append(Text(f"At {name}: {_counts(judged[scale])}"))
    if "paper" not in scales:
        blocks.append(Text("At the paper's scale nothing has been computed yet."))
    blocks.append(Heading(1, "Scope and scale"))
    if scales:
        blocks += [Numbers(_scope(source.at(scale))) for scale in scales]
    else:
        blocks.append(
            Text(
                f"No run is done at the profiles {source.profile} and paper; "
                f"`python -m lib run all --profile {source.profile}` trains them."
            )
        )
    blocks += [Heading(1, "The rule from numbers to verdicts"), Text(_RULE), Text(claims.RULE)]
    for scale in scales:
        blocks += _chapter(source.at(scale), scratch, judged[scale])
    blocks += [Heading(1, "Guesses and departures from the paper"), Items(DEVIATIONS)]
    blocks += [Heading(1, "What remains open"), *_open(judged, source.at("paper"))]
    return blocks


def _scale_name(profile: str) -> str:
    return "the paper's scale" if profile == "paper" else f"reduced scale ({profile})"


def _done(source: Source) -> bool:
    return any(len(load(name, source).rows) for name in experiments.EXPERIMENTS)


def _scope(source: Source) -> Table:
    """What was trained, how much, how long and where, one row per experiment."""
    lines, every = [], []
    for name in experiments.EXPERIMENTS:
        runs = load(name, source)
        rows = pd.concat([runs.rows, runs.diverged])
        line = {
            "experiment": name,
            "runs": f"{len(rows)} of {len(runs.planned)}",
            "diverged": f"{len(runs.diverged)}",
            "seeds": f"{rows['seed'].nunique()}",
            "epochs": _spread(rows["epochs"]),
            "training images": _spread(rows["train_samples"].fillna(0), zero="all"),
            "hours": f"{rows['train_seconds'].sum() / 3600:.2g}" if len(rows) else "–",
        }
        lines.append(line)
        every.append(rows)
    rows = pd.concat(every).drop_duplicates("run_id")
    versions = {
        "Hardware": _list(rows["device"]),
        "Threads per run": _list(rows["threads"]),
        "torch": _list(rows["torch"]),
        "Python": _list(rows["python"]),
    }
    changed = int(rows["dirty"].fillna(False).astype(bool).sum())
    note = (
        f"{len(rows)} different runs, {rows['train_seconds'].sum() / 3600:.2g} hours of training "
        "in all (a run that belongs to several experiments is trained once). "
        + " ".join(f"{what}: {said}." for what, said in versions.items())
        + f" Commits: {_list(rows['commit'].str[:10])}"
        + (f"; {changed} runs with changes that were not committed." if changed else ".")
    )
    return Table(pd.DataFrame(lines), f"The runs at {_scale_name(source.profile)}", note)


def _spread(values: pd.Series, zero: str = "0") -> str:
    found = sorted({int(v) for v in values})
    texts = [f"{v:,}" if v else zero for v in found]
    if not texts:
        return "–"
    return ", ".join(texts) if len(texts) < 4 else f"{texts[0]}–{texts[-1]}"


def _list(values: pd.Series) -> str:
    return ", ".join(sorted({str(v) for v in values}))


def _chapter(source: Source, scratch: Path, judged: pd.DataFrame) -> list[Block]:
    """Verdicts and experiments at one profile."""
    blocks: list[Block] = [Heading(1, f"Verdicts at {_scale_name(source.profile)}")]
    if source.reduced:
        blocks.append(Text(_REDUCED))
    counts = _counts(judged)
    blocks.append(Text(f"{counts[0].upper()}{counts[1:]}"))
    columns = {n: n for n in ("claim", "paper", "ours", "n", "verdict")}
    columns["ours"] = "ours [95 % interval]"
    frame = judged.loc[judged["verdict"] != claims.NO_RUNS, list(columns)]
    frame = frame.rename(columns=columns).astype(str)
    caption = f"The paper's claims and what the runs at {_scale_name(source.profile)} say"
    if len(frame):
        blocks.append(Numbers(Table(frame, caption)))
    blocks.append(Heading(1, f"Experiments at {_scale_name(source.profile)}"))
    shown = {name: entry.experiment for name, entry in {**FIGURES, **TABLES}.items()}
    for name in [*experiments.EXPERIMENTS, ""]:
        own = [item for item, belongs in shown.items() if belongs == name and item != "verdicts"]
        mine = judged[(judged["experiment"] == name) & (judged["verdict"] != claims.NO_RUNS)]
        blocks += _section(name, source, scratch, own, mine)
    every = [load(name, source) for name in experiments.EXPERIMENTS]
    for said, names in (
        ("Not complete at this scale", [r.experiment for r in every if r.missing]),
        ("Not run at this scale", [r.experiment for r in every if not r.planned]),
    ):
        if names:
            blocks.append(Text(f"{said}: {', '.join(names)}."))
    return blocks


def _counts(judged: pd.DataFrame) -> str:
    counts = judged["verdict"].value_counts()
    texts = [
        f"{number} {'without runs' if verdict == claims.NO_RUNS else verdict}"
        for verdict, number in counts.items()
    ]
    return f"of {len(judged)} claims {', '.join(texts)}."


def _section(
    name: str,
    source: Source,
    scratch: Path,
    own: list[str],
    judged: pd.DataFrame,
) -> list[Block]:
    """One experiment: question, figures, tables, and each claim with its numbers; nothing where it
    has no runs.
    """
    if name and load(name, source).rows.empty:
        return []
    found: list[Block] = []
    for item in own:
        if item in FIGURES:
            try:
                plot = FIGURES[item](source)
            except NoRuns:
                continue
            found.append(
                _picture(plot, FIGURES[item].caption, scratch / f"{source.profile}_{item}.svg")
            )
    for item in own:
        if item in TABLES:
            try:
                found.append(Numbers(TABLES[item](source)))
            except NoRuns:
                continue
    if not name:
        return [Heading(2, "Further figures and tables"), *found] if found else []
    runs: Runs = load(name, source)
    this = experiments.experiment(name)
    head: list[Block] = [Heading(2, this.title), Text(QUESTIONS.get(name, f"{this.title}."))]
    scale = runs.scale()
    if not any(isinstance(block, Numbers) for block in found):
        found.append(Numbers(_errors(runs)))
    head.append(Text(f"{scale[0].upper()}{scale[1:]}. Notebook: `{this.notebook}`."))
    if len(judged):
        head.append(Items(tuple(map(_sentence_on, judged.to_dict("records")))))
    return head + found


def _errors(runs: Runs) -> Table:
    """Test error of each cell beside the published one: for experiments without own tables."""
    key = ["model", "method", "density"]
    cells = runs.rows.groupby(key)
    more = {"keep_dense": "left dense", "overrides": "other settings"}
    more = {name: title for name, title in more.items() if (cells[name].nunique() > 1).any()}
    theirs: dict[Any, str] = {}
    for table in _PUBLISHED.get(runs.experiment, ()):
        for row in published_rows(table, method=list(METHOD_NAMES)).to_dict("records"):
            value, error = row["test_error_pct"], row["standard_error"]
            if value == value:
                text = f"{value:.2f}" + (f" ± {error:.2f}" if error == error else "")
                theirs.setdefault((row["model"], row["method"], row["density"]), text)
    lines = [
        {
            "network": MODEL_NAMES.get(cell["model"], cell["model"].upper()),
            "method": METHOD_NAMES[cell["method"]],
            "weights (%)": f"{100 * cell['density']:g}",
            **{title: cell[name] or "–" for name, title in more.items()},
            "test error (%)": interval_text(cell["mean"], cell["low"], cell["high"]),
            "n": str(cell["n"]),
            "published (%)": theirs.get(tuple(cell[name] for name in key), "–"),
        }
        for cell in summarise(runs.rows, [*key, *more]).to_dict("records")
    ]
    note = "Mean with 95 % interval over the seeds; published: mean ± standard error."
    return Table(pd.DataFrame(lines), "Test error by network, method and share of weights", note)


def _sentence_on(row: Any) -> str:
    text = f"{row['verdict'].capitalize()}: {row['claim']}. Paper: {row['paper']}; "
    text += f"ours: {row['ours']}, n = {row['n']}. Source of the claim: {row['source']}."
    if row["detail"]:
        text += f" {row['detail'][0].upper()}{row['detail'][1:]}."
    return text


def _picture(plot: Plot, caption: str, file: Path) -> Picture:
    """Save a figure as vectors that both outputs take; equal figures give equal bytes."""
    with mpl.rc_context({"svg.hashsalt": file.stem}, fname=STYLE):
        plot.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    width, height = plot.get_size_inches()
    return Picture(file, (float(width), float(height)), caption)


def _open(judged: dict[str, pd.DataFrame], paper: Source) -> list[Block]:
    """What no row answers yet."""
    lines = []
    for name, this in experiments.EXPERIMENTS.items():
        runs = load(name, paper)
        if runs.missing:
            state = "not yet computed" if runs.missing == len(runs.planned) else "partly computed"
            lines.append(
                {
                    "experiment": name,
                    "question": this.title,
                    "state": state,
                    "runs missing": f"{runs.missing:,} of {len(runs.planned):,}",
                }
            )
    blocks: list[Block] = []
    if lines:
        note = (
            "`python -m lib status --profile paper` says how many hours they take on a machine, "
            "`python -m lib run NAME --profile paper` trains them."
        ).replace("`", "")
        caption = "Experiments that are not complete at the paper's scale"
        blocks.append(Numbers(Table(pd.DataFrame(lines), caption, note)))
    for scale, table in judged.items():
        names = table.loc[table["verdict"] == Verdict.INCONCLUSIVE, "claim"]
        if len(names):
            blocks.append(Text(f"Inconclusive at {_scale_name(scale)}, at this n:"))
            blocks.append(Items(tuple(f"{claim}." for claim in names)))
    every = [table.set_index("id") for table in judged.values()]
    at_paper = judged["paper"] if "paper" in judged else claims.verdict_table(paper)
    without = [
        row
        for row in at_paper.to_dict("records")
        if all(table.loc[row["id"], "verdict"] == claims.NO_RUNS for table in every)
    ]
    if without:
        frame = pd.DataFrame(without)[["claim", "paper", "source"]]
        blocks.append(Numbers(Table(frame, "Claims that no run speaks to yet")))
    blocks += map(Text, _UNPUBLISHED)
    return blocks


# --------------------------------------------------------------------------------------------------
# PDF
# --------------------------------------------------------------------------------------------------

_PAGE = 17.0, 23.0  # cm of text
_PREAMBLE = """
#set document(title: {title}, date: none)
#set page(paper: "a4", margin: (x: 2cm, y: 2.2cm), numbering: "1")
#set text(font: "Libertinus Serif", size: 10pt, lang: "en", region: "GB")
#set par(justify: true)
#set heading(numbering: "1.1")
#show heading.where(level: 1): it => block(above: 1.6em, below: 0.9em, it)
#show raw: set text(font: "DejaVu Sans Mono", size: 0.82em)
#let caption(name, body) = block(width: 100%, above: 1.4em, below: 0.7em, sticky: true,
  par(justify: false, text(size: 9pt)[*#name* #body]))
#let note(body) = block(width: 100%, above: 0.6em, below: 1.4em,
  text(size: 8pt, fill: luma(60), body))
#let picture(name, body, file, width) = block(width: 100%, breakable: false, above: 1.3em,
  below: 1.6em, {{
    align(center, image(file, width: width, alt: body))
    par(justify: false, text(size: 9pt)[*#name* #body])
  }})
#align(center)[
  #text(size: 19pt, weight: "bold", {title})
  #v(-0.4em)
  #text(size: 11pt, {subtitle})
]
"""


def to_pdf(blocks: Iterable[Block], folder: Path) -> bytes:
    """The report as PDF; `folder` holds the figures' files."""
    import typst

    source = folder / "report.typ"
    source.write_text(to_typst(blocks), encoding="utf-8")
    pdf = typst.compile(
        str(source), root=str(folder), format="pdf", ignore_system_fonts=True, timestamp=0
    )
    assert isinstance(pdf, bytes)
    return pdf


def to_typst(blocks: Iterable[Block]) -> str:
    """The report in typst's language; every text is a string there, so that none is markup."""
    parts = [_PREAMBLE.format(title=_quoted(TITLE), subtitle=_quoted(SUBTITLE))]
    pictures = tables = 0
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"#heading(level: {level}, {_quoted(text)})")
            case Text(text):
                parts.append(f"#par({{{_pieces(text)}}})")
            case Items(texts):
                items = ", ".join(f"{{{_pieces(text)}}}" for text in texts)
                parts.append(f"#list({items}, spacing: 0.8em)")
            case Picture(file, (width, height), caption):
                pictures += 1
                shown = min(0.95 * 2.54 * width, _PAGE[0], _PAGE[1] * width / height)
                parts.append(
                    f"#picture({_quoted(f'Figure {pictures}.')}, {_quoted(caption)}, "
                    f"{_quoted(file.name)}, {shown:.2f}cm)"
                )
            case Numbers(table):
                tables += 1
                parts.append(_typst_table(table, f"Table {tables}."))
    return "\n".join(parts) + "\n"


def _typst_table(table: Table, name: str) -> str:
    frame = table.frame
    size = 8.5 if len(frame.columns) < 6 else 7.5 if len(frame.columns) < 8 else 6.8
    align = ", ".join("right" if _is_number(frame[c]) else "left" for c in frame.columns)
    widths = ", ".join("auto" for _ in frame.columns)
    head = ", ".join(f"strong({_quoted(c)})" for c in frame.columns)
    cells = ", ".join(_quoted(value) for row in frame.itertuples(index=False) for value in row)
    parts = [
        f"#caption({_quoted(name)}, {_quoted(table.caption)})",
        f"#{{set text(size: {size}pt); set par(justify: false); table(columns: ({widths},), "
        f"align: ({align},), inset: (x: 3.5pt, y: 3pt), stroke: none, "
        f"table.hline(stroke: 0.7pt), table.header({head}, table.hline(stroke: 0.4pt)), "
        f"{cells}, table.hline(stroke: 0.7pt))}}",
    ]
    if table.note:
        parts.append(f"#note({_quoted(table.note)})")
    return "\n".join(parts)


def _is_number(column: pd.Series) -> bool:
    texts = [str(v) for v in column if str(v) not in ("", "–")]
    return bool(texts) and all(re.match(r"[+−<-]?\s?[0-9]", t) and len(t) < 24 for t in texts)


def _pieces(text: str) -> str:
    """A text with code in backquotes as typst expressions."""
    found = []
    for i, piece in enumerate(text.split("`")):
        if piece:
            found.append(f"raw({_quoted(piece)})" if i % 2 else _quoted(piece))
    return "; ".join(found)


def _quoted(value: Any) -> str:
    text = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
    return f'"{text}"'


# --------------------------------------------------------------------------------------------------
# HTML
# --------------------------------------------------------------------------------------------------

_CSS = """
body { font: 16px/1.5 Georgia, "Times New Roman", serif; color: #1a1a1a; background: #fff;
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
h3 { margin-top: 2rem; } nav { font-size: 0.9rem; columns: 2; } nav ol { margin: 0; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
figcaption, caption { font-size: 0.9rem; text-align: left; padding: 0.3rem 0; }
.table { overflow-x: auto; margin: 1.5rem 0; }
table { border-collapse: collapse; font: 0.82rem/1.35 system-ui, sans-serif; }
th, td { padding: 0.25rem 0.6rem; text-align: left; vertical-align: top; }
th { border-top: 2px solid #222; border-bottom: 1px solid #222; }
tbody tr:last-child td { border-bottom: 2px solid #222; }
tbody tr:nth-child(even) { background: #f6f6f6; }
.number { text-align: right; white-space: nowrap; }
.note { font-size: 0.82rem; color: #444; margin-top: 0.4rem; }
code { font-size: 0.85em; background: #f0f0f0; padding: 0 0.2em; }
"""


def to_html(blocks: Iterable[Block]) -> str:
    """The report as one HTML file that needs no other."""
    blocks = list(blocks)
    body: list[str] = []
    contents: list[str] = []
    pictures = tables = chapter = section = 0
    for block in blocks:
        match block:
            case Heading(level, text):
                if level == 1:
                    chapter, section = chapter + 1, 0
                else:
                    section += 1
                number = f"{chapter}.{section}" if section else f"{chapter}"
                title = f"{number} {html.escape(text)}"
                body.append(f'<h{level + 1} id="s{number}">{title}</h{level + 1}>')
                contents.append(f'<a href="#s{number}">{title}</a>')
            case Text(text):
                body.append(f"<p>{_inline(text)}</p>")
            case Items(texts):
                body.append("<ul>" + "".join(f"<li>{_inline(t)}</li>" for t in texts) + "</ul>")
            case Picture(file, (width, _), caption):
                pictures += 1
                data = base64.b64encode(file.read_bytes()).decode()
                said = html.escape(caption, quote=True)
                body.append(
                    f'<figure><img alt="{said}" style="width:{width * 115:.0f}px" '
                    f'src="data:image/svg+xml;base64,{data}">'
                    f"<figcaption><b>Figure {pictures}.</b> {said}</figcaption></figure>"
                )
            case Numbers(table):
                tables += 1
                body.append(_html_table(table, f"Table {tables}."))
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en-GB">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(TITLE)}</title>\n<style>{_CSS}</style>\n</head>\n<body>",
            f"<h1>{html.escape(TITLE)}</h1>\n<p>{html.escape(SUBTITLE)}</p>",
            "<nav>" + "<br>\n".join(contents) + "</nav>",
            *body,
            "</body>\n</html>\n",
        ]
    )


def _html_table(table: Table, name: str) -> str:
    numeric = [_is_number(table.frame[c]) for c in table.frame.columns]
    kinds = [' class="number"' if n else "" for n in numeric]

    def line(tag: str, values: Iterable[Any]) -> str:
        cells = zip(values, kinds, strict=True)
        return (
            "<tr>"
            + "".join(f"<{tag}{kind}>{html.escape(str(v))}</{tag}>" for v, kind in cells)
            + "</tr>"
        )

    rows = "\n".join(line("td", row) for row in table.frame.itertuples(index=False))
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f'<div class="table"><table>\n<caption><b>{name}</b> {html.escape(table.caption)}</caption>'
        f"\n<thead>{line('th', table.frame.columns)}</thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
        f"{note}</div>"
    )


def _inline(text: str) -> str:
    pieces = text.split("`")
    return "".join(
        f"<code>{html.escape(piece)}</code>" if i % 2 else html.escape(piece)
        for i, piece in enumerate(pieces)
    )
