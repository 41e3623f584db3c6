"""What an update did, and what a masking is, as small tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from lib.methods.layer import Layer


class LayerReport(NamedTuple):
    """One layer's line of an update. Counts of weights; momentum_share is NaN without momentum."""

    name: str
    active_before: int
    pruned: int
    grown: int
    active_after: int
    momentum_share: float


def report(layers: Sequence[Layer], active: Mapping[str, int]) -> Report:
    """What happened to the layers, whose numbers of active weights are now these."""
    lines = []
    for layer in layers:
        now = active[layer.name]
        grown = now - layer.active + layer.pruned
        share = layer.momentum_share
        lines.append(LayerReport(layer.name, layer.active, layer.pruned, grown, now, share))
    return Report(lines)


def layers_table(parameters: Mapping[str, Tensor], active: Mapping[str, int]) -> str:
    """Layer, weights, active ones, density; and all layers together."""
    rows = [(name, p.numel(), active[name]) for name, p in parameters.items()]
    rows.append(("all", sum(row[1] for row in rows), sum(active.values())))
    cells = [(n, f"{size:,}", f"{on:,}", f"{on / max(1, size):.2%}") for n, size, on in rows]
    return table(("layer", "weights", "active", "density"), cells)


class Report(list[LayerReport]):
    """One `LayerReport` per layer; prints as a table."""

    def __repr__(self) -> str:
        rows = []
        for name, *counts, share in self:
            known = "-" if math.isnan(share) else f"{share:.1%}"
            rows.append((name, *(f"{n:,}" for n in counts), known))
        return table(("layer", "before", "pruned", "grown", "after", "momentum share"), rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their cells, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for first, *others in (head, *rows):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)
