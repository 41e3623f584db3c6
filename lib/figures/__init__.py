"""Every figure and table, drawn from the saved CSVs.  Imports no torch.

`plots` has what they share; the other files register the figures of one topic each.
"""

from lib.figures import (  # noqa: F401
    ablations,
    computing,
    initial_densities,
    kernels,
    main_results,
    measured,
    readings,
    sensitivity,
)
from lib.figures.main_results import meaning
from lib.figures.plots import (
    FIGURES,
    MARKERS,
    PALETTE,
    STYLE,
    TABLES,
    Plot,
    Table,
    draw_all,
    main_results_lenet,
    main_results_lenet_differences,
    main_results_lenet_table,
    output_dir,
    show,
    verdicts,
)

__all__ = [
    "FIGURES",
    "MARKERS",
    "PALETTE",
    "STYLE",
    "TABLES",
    "Plot",
    "Table",
    "draw_all",
    "main_results_lenet",
    "main_results_lenet_differences",
    "main_results_lenet_table",
    "meaning",
    "output_dir",
    "show",
    "verdicts",
]
