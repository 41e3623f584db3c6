"""Every figure and table, drawn from the saved CSVs.  Imports no torch.

`plots` is the vocabulary, `gallery` the registry; the other files have the figures of one topic.
"""

from lib.figures import (  # noqa: F401
    ablations,
    cifar10,
    mnist,
    readings,
    trainability,
)
from lib.figures.gallery import FIGURES, TABLES, Absent, Entry, draw_all, output_dir, show
from lib.figures.plots import LOOKS, MARKERS, PALETTE, STYLE, Plot
from lib.figures.tables import Table
from lib.figures.verdicts import meaning

__all__ = [
    "FIGURES",
    "LOOKS",
    "MARKERS",
    "PALETTE",
    "STYLE",
    "TABLES",
    "Absent",
    "Entry",
    "Plot",
    "Table",
    "draw_all",
    "meaning",
    "output_dir",
    "show",
]
