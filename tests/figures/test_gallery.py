"""All figures and tables: drawn without torch, alike each time, legible, nothing unsaid."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text

from lib import figures, paths
from lib.__main__ import main
from lib.config import METHODS
from lib.figures.plots import WIDTH
from lib.results.reading import METHOD_NAMES, Source
from lib.results.store import ResultsError

SOME = ("main_results_lenet300-100", "ablations")


def scale_of(name: str) -> str:
    """A profile at which the made-up results have rows of a figure or table."""
    if name.startswith(("speedups", "features")):
        return "quick"
    return "hours" if name == "training_length" else "paper"


def readable(plot: figures.Plot) -> list[Text]:
    """The texts of a figure (matplotlib also keeps labels of ticks outside the limits)."""
    found = [*plot.texts, *(text for legend in plot.legends for text in legend.get_texts())]
    for ax in plot.axes:
        found += [*ax.texts, ax.title, ax._left_title]
        for axis in (ax.xaxis, ax.yaxis) if ax.axison else ():
            low, high = sorted(axis.get_view_interval())
            ticks = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
            found += [axis.label, *(tick.label1 for tick in ticks)]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def said(plot: figures.Plot) -> str:
    return " ".join(text.get_text() for text in plot.texts)


def test_drawn_without_torch_with_equal_bytes(root: Path) -> None:
    """In a fresh process without torch (as `make figures`), and again in this one."""
    code = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'torchvision'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "from lib.figures import draw_all\n"
        "from lib.results.reading import Source\n"
        f"for path in draw_all(Source('quick', {str(root)!r}), {SOME!r}): print(path)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=paths.REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    files = {Path(line): Path(line).read_bytes() for line in done.stdout.splitlines()}
    names = {f"{SOME[0]}.{kind}" for kind in ("pdf", "png", "md", "tex")}
    assert names <= {file.name for file in files} and all(files.values())
    again = figures.draw_all(Source("quick", root), SOME, say=lambda line: None)
    assert {path: path.read_bytes() for path in again} == files
    assert not list((root / "quick" / "figures").glob(".*"))


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_is_legible_and_complete(root: Path, name: str) -> None:
    """Within its edges, at the width of a printed page, with no small print."""
    plot = figures.FIGURES[name](Source(scale_of(name), root))
    assert plot.get_size_inches()[0] == WIDTH and plot.get_size_inches()[1] < 9.5
    plot.draw_without_rendering()
    width, height = plot.bbox.size
    texts = readable(plot)
    for text in texts:
        box = text.get_window_extent()
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        assert inside, (text.get_text(), box)
    assert min(text.get_fontsize() for text in texts) >= 7.5
    assert plot.caption.startswith(figures.FIGURES[name].caption) and "nan" not in plot.caption
    assert f"Profile {scale_of(name)}" in said(plot)


@pytest.mark.parametrize("name", figures.TABLES)
def test_every_table_has_rows_and_its_scale(root: Path, name: str) -> None:
    made = figures.TABLES[name](Source(scale_of(name), root))
    assert len(made.frame) and not made.frame.isin(["nan", "None"]).any(axis=None)
    assert "a machine" in made.note or "profile" in made.note.lower()


def test_all_of_them_are_saved_with_their_captions(root: Path, tmp_path: Path) -> None:
    (tmp_path / "hours").symlink_to(root / "hours")
    lines: list[str] = []
    written = figures.draw_all(Source("hours", tmp_path), say=lines.append)
    page = next(path for path in written if path.name == "README.md").read_text()
    assert (
        "![training_length](training_length.png)" in page
        and "reduced scale, not the paper's" in page
    )
    skipped = [line for line in lines if line.startswith("skipped figure main_results")]
    assert len(skipped) == 1 and "no such runs in this profile" in skipped[0]


def test_without_runs_each_is_skipped_with_one_line_that_helps(tmp_path: Path) -> None:
    lines: list[str] = []
    assert figures.draw_all(Source("quick", tmp_path), say=lines.append) == []
    assert len(lines) == len(figures.FIGURES) + len(figures.TABLES)
    (line,) = [s for s in lines if s.startswith(f"skipped figure {SOME[0]}:")]
    assert "python -m lib run main_results --profile quick" in line
    assert not any(tmp_path.iterdir())


def test_unknown_names_and_damaged_rows_are_refused(tmp_path: Path) -> None:
    assert figures.output_dir(Source("quick")) == paths.REPO / "figures" / "quick"
    with pytest.raises(ValueError, match="did you mean 'ablations'"):
        figures.draw_all(Source("quick", tmp_path), only=["ablation"])
    with pytest.raises(ValueError, match="did you mean 'quick'"):
        figures.draw_all(Source("quik", tmp_path))
    csv = paths.results_csv("quick", "main_results", tmp_path)
    csv.parent.mkdir(parents=True)
    csv.write_text("run_id,method\na,b\n")
    with pytest.raises(ResultsError, match=r"main_results\.csv:1"):
        figures.draw_all(Source("quick", tmp_path), [SOME[0]])


def test_a_notebook_shows_by_name_and_goes_on_without_runs(root: Path, tmp_path: Path) -> None:
    source = Source("quick", root)
    assert isinstance(figures.show("ablations", source), figures.Plot)
    assert isinstance(figures.show("ablations", source, "table"), figures.Table)
    assert isinstance(figures.show("cifar10_table", source), figures.Table)
    absent = figures.show("imagenet", Source("quick", tmp_path))
    assert isinstance(absent, figures.Absent) and "IMAGENET_ROOT" in absent._repr_markdown_()
    with pytest.raises(ValueError, match="unknown figure 'cifar10_table'"):
        figures.show("cifar10_table", source, "figure")
    assert isinstance(figures.meaning("cifar10_table", Source("quick", tmp_path)), figures.Absent)


def test_a_reduced_scale_is_said_in_the_picture_and_the_papers_is_not(root: Path) -> None:
    quick, paper = (figures.FIGURES[SOME[0]](Source(p, root)) for p in ("quick", "paper"))
    assert "Profile quick (reduced scale, not the paper's): 10 epochs" in said(quick)
    assert "3 seeds, made-up processor." in said(quick)
    assert "reduced" not in said(paper) and "runs missing" in said(paper)


# ---------------------------------------------------------------------------------- the palette


def test_every_method_and_variant_has_its_own_look() -> None:
    assert list(figures.PALETTE) == list(figures.MARKERS) == list(METHOD_NAMES)
    assert set(figures.PALETTE) == set(METHODS)
    for of in (figures.PALETTE, figures.MARKERS, METHOD_NAMES):
        assert len(set(of.values())) == len(of)
    assert len({look.label for look in figures.LOOKS.values()}) == len(figures.LOOKS)


# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
COLOUR_BLIND = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


def lab(linear: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of one linear RGB colour."""
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x, y, z = np.cbrt(to_xyz @ linear.clip(0, 1) / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", COLOUR_BLIND)
def test_colours_differ_for_the_colour_blind(vision: str) -> None:
    colours = []
    for colour in figures.PALETTE.values():
        code = colour.lstrip("#")
        srgb = np.array([int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)])
        linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
        colours.append(lab(np.array(COLOUR_BLIND[vision]) @ linear))
    distances = [math.dist(a, b) for i, a in enumerate(colours) for b in colours[i + 1 :]]
    assert min(distances) > 15  # just noticeable: 2.3


def test_the_command_counts_files_by_folder(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hours").symlink_to(root / "hours")
    assert main(["figures", "--profile", "hours", "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    counts = {}
    for line in said:
        if not line.startswith("skipped"):
            folder, _, found = line.partition(": ")
            counts[folder] = sum(int(one.split()[0]) for one in found.split(", "))
    assert counts
    for folder, count in counts.items():
        assert count == sum(1 for path in Path(folder).iterdir() if path.is_file())
