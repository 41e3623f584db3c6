"""Published values, each held against ours: one `File` per table of results/published.

They are counted for themselves, apart from what the authors state in words.  Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from lib.claims.claim import (
    AFTER,
    BEFORE,
    BETWEEN_CIFAR10_FILES,
    BETWEEN_MNIST_FILES,
    Claim,
    PaperValue,
    Published,
    Rule,
    corrected,
)
from lib.claims.compare import Level
from lib.claims.measured import Estimate
from lib.results.reading import METHOD_NAMES, Where, model_name

RAW = "dsr_authors_raw_runs_wrn28-2_and_mnist"
NORMED = "lenet300-100-bn"
_THEIRS = "code of DSR's authors, network with batch norm likely"


# Margins in points, and the tables whose margins were set before there were rows.
_MARGINS = {
    "mnist_lenet5": 0.1,  # ten images: the errors themselves are below 1.5 %
    "wrn28-2_cifar10_summary": BETWEEN_CIFAR10_FILES,
    "cifar10_table": BETWEEN_CIFAR10_FILES,
    "imagenet_resnet50_paper_and_logs": BETWEEN_CIFAR10_FILES,
}
_SET_BEFORE = ("mnist_sparse_summary", "cifar10_table", "imagenet_resnet50_paper_and_logs")


@dataclass(frozen=True)
class File:
    """A published table, which of its rows are meant, and the runs they are held against.

    `ours`: fields of the runs beyond method, network and density; `model`: our network where it is
    not the published one; `way`: what is said of the training where it is not the paper's; `code`:
    what is known of the code behind rows that do not say it themselves.
    """

    table: str
    experiment: str
    rows: Where
    code: str = "not recorded"
    model: str = ""
    ours: Where = field(default_factory=dict)
    way: str = ""

    def rule(self, method: str, cifar10: bool) -> Rule:
        """A value of this table: its margin, and when it was set."""
        default = BETWEEN_CIFAR10_FILES if cifar10 else BETWEEN_MNIST_FILES
        known = self.table in _SET_BEFORE and method in ("dense", "sparse_momentum")
        when = BEFORE if known else AFTER
        return Rule("value", _MARGINS.get(self.table, default), "%", when)


@dataclass(frozen=True)
class Row:
    """A published value as it was read."""

    value: PaperValue
    says: str = ""

    def read(self, only: Any = None) -> PaperValue:
        """The value."""
        return self.value


_OWN = ["dense", "sparse_momentum"]
_BASELINES: Where = {"dataset": "mnist", "method": ["dsr", "set", "deepr"]}
_STATIC: Where = {"dataset": "mnist", "method": "static"}
_FIGURE, _IMAGENET = "mnist_sparse_summary", "imagenet_resnet50_paper_and_logs"
_USUAL: Where = {"label_smoothing": 0.0}
_TUNED: Where = {"label_smoothing": 0.1}
PLAIN: Where = {"schedule": "cosine", "init": "uniform"}  # as the paper, not as their code
_THEIR_WAY: Where = {"schedule": "constant"}
_HALF: Where = {**PLAIN, "init": "half_output"}
_QUOTED, _ISSUE = "quoted by the paper", "official code, issue 7"
_PARTIAL = "partially dense (first conv + downsample convs dense)"
_LOGS = "tuned fully sparse, final epoch of log"


def _resnet50(setting: str, ours: Where, way: str, code: str = _ISSUE) -> File:
    rows = {"setting": setting, "quantity": "top1_accuracy_pct"}
    return File(_IMAGENET, "imagenet", rows, code, ours=ours, way=way)


FILES: tuple[File, ...] = (
    File(_FIGURE, "main_results", {"method": _OWN}),
    File("mnist_lenet300-100", "mnist_compression", {"method": _OWN, "setting": ""}),
    File("mnist_lenet300-100", "mnist_compression", {"method": "snip"}, _QUOTED),
    File(_FIGURE, "main_results", _BASELINES),
    File(RAW, "main_results", _STATIC, _THEIRS),
    File(_FIGURE, "baseline_network", _BASELINES, _THEIRS, NORMED, PLAIN),
    File(RAW, "baseline_network", _STATIC, _THEIRS, NORMED, PLAIN),
    *(
        File(_FIGURE, "baseline_network", rows, _THEIRS, NORMED, ours, way)
        for rows, ours, way in (
            ({"method": ["dsr", "set"]}, _THEIR_WAY, "trained as their code does"),
            (
                {"method": ["dsr", "set"], "density": [0.01, 0.02, 0.05]},
                _HALF,
                "output layer half dense",
            ),
        )
    ),
    File("mnist_lenet5", "mnist_compression", {"method": _OWN}),
    File("mnist_lenet5", "mnist_compression", {"method": "snip"}, _QUOTED),
    File("wrn28-2_cifar10_summary", "wrn28_2_curve", {"method": _OWN}, "official code"),
    File(
        "wrn28-2_cifar10_summary",
        "wrn28_2_curve",
        {"method": ["dsr", "set", "deepr"]},
        "code of DSR's authors",
    ),
    File(RAW, "wrn28_2_curve", {**_STATIC, "dataset": "cifar10"}, "code of DSR's authors"),
    File("cifar10_table", "cifar10_table", {"method": _OWN}),
    File("cifar10_table", "cifar10_table", {"method": "snip"}, _QUOTED),
    _resnet50("DSR-codebase baseline", _USUAL, "usual training"),
    _resnet50(_PARTIAL, _USUAL, "partially dense"),
    _resnet50("tuned: warmup + label smoothing", _TUNED, "tuned training"),
    _resnet50(_LOGS, _TUNED, "tuned, fully sparse", "official code, logs of the tuned runs"),
)


def value_claims(file: File) -> Iterator[tuple[Claim, dict[str, Any]]]:
    """One claim per row of the table, and file, code, network, method and density of it."""
    raw = RAW if file.table == "mnist_sparse_summary" else ""
    rows, _ = corrected(file.table, file.rows, raw)
    for row in rows.to_dict("records"):
        method, density = str(row["method"]), float(row["density"])
        model = file.model or str(row["model"])
        where: Where = {**file.ours, "model": model, "method": method, "density": density}
        n = None if pd.isna(row["n"]) else int(row["n"])
        slip = "a slip of the source, from its raw runs" if row["suspect"] else ""
        paper = PaperValue(float(row["test_error_pct"]), float(row["standard_error"]), n, slip)
        weights = "" if method == "dense" else f" at {100 * density:g} %"
        way = f", {file.way}" if file.way else ""
        claim = Claim(
            id="_".join(filter(None, (file.table, method, model, f"{density:g}", file.way))),
            statement=f"{model_name(model)}: error of {METHOD_NAMES[method]}{weights}{way}",
            source=str(row["source"]),
            rule=file.rule(method, row["dataset"] != "mnist"),
            ours=Level(file.experiment, {"": where}),
            paper=Row(paper),
        )
        about = {
            "file": file.table,
            "code": row.get("code") or file.code,
            "network": model_name(model),
        }
        yield claim, {**about, "method": METHOD_NAMES[method], "density": density}


def speedup_claims() -> Iterator[tuple[Claim, dict[str, Any]]]:
    """The speed-ups of single networks that the author's blog gives."""
    for name, model, value in (("VGG16-D", "vgg16-d", 3.5), ("WRN-16-10", "wrn-16-10", 12.0)):
        says = "The source says VGG or WRN; which network is not said."
        table = "headline_and_speedup_claims"
        claim = Claim(
            id=f"speedup_blog_{model}",
            statement=f"{name}: estimated speed-up (sparse convolution)",
            source="author's blog of July 2019",
            rule=Rule("value", 0.5, "×", AFTER),
            ours=Estimate("max", models=(model,)),
            paper=Published(
                table,
                {"value": value, "quantity": "speedup_max_x"},
                column="value",
                says="{value:g} ×",
            ),
        )
        about = {"file": table, "code": says, "network": name}
        yield claim, {**about, "method": METHOD_NAMES["sparse_momentum"], "density": float("nan")}
