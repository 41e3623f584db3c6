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
    corrected,
)
from lib.claims.compare import Level
from lib.claims.measured import Estimate
from lib.results.reading import METHOD_NAMES, Where, model_name

RAW = "dsr_authors_raw_runs_wrn28-2_and_mnist"
NORMED = "lenet300-100-bn"
JULY_9 = "9 July 2019 (19dcdff): resets the momentum of inactive weights"
JULY_29 = "29 July 2019 (fb2eb00): the reset is commented out"
_THEIRS = "code of DSR's authors, network with batch norm likely"


@dataclass(frozen=True)
class File:
    """A published table, which of its rows are meant, and the runs they are held against.

    `ours`: fields of the runs beyond data set, method and density; `model`: our network where it is
    not the published one; `code`: the version of the code behind the table.
    """

    table: str
    experiment: str
    margin: float
    rows: Where
    ours: Where = field(default_factory=dict)
    model: str = ""
    way: str = ""  # what is said of the training, where it is not the paper's
    code: str = ""
    when: str = BEFORE


@dataclass(frozen=True)
class Row:
    """A published value as it was read."""

    value: PaperValue
    says: str = ""

    def read(self, only: Any = None) -> PaperValue:
        """The value."""
        return self.value


_MNIST: Where = {"dataset": "mnist", "method": ["dense", "sparse_momentum"]}
_BASELINES: Where = {"dataset": "mnist", "method": ["dsr", "set", "deepr"]}
_STATIC: Where = {"dataset": "mnist", "method": "static"}
_USUAL: Where = {"label_smoothing": 0.0}
_TUNED: Where = {"label_smoothing": 0.1}
PLAIN: Where = {"schedule": "cosine", "init": "uniform"}  # as the paper, not as their code

FILES: tuple[File, ...] = (
    File("mnist_sparse_summary", "main_results", BETWEEN_MNIST_FILES, _MNIST, code=JULY_9),
    File(
        "mnist_lenet300-100",
        "mnist_compression",
        BETWEEN_MNIST_FILES,
        {**_MNIST, "setting": ""},
        code=JULY_29,
    ),
    File(
        "mnist_lenet300-100",
        "mnist_compression",
        BETWEEN_MNIST_FILES,
        {"method": "snip"},
        code="quoted by the paper",
        when=AFTER,
    ),
    *(
        File(table, "main_results", BETWEEN_MNIST_FILES, rows, code=_THEIRS, when=AFTER)
        for table, rows in (("mnist_sparse_summary", _BASELINES), (RAW, _STATIC))
    ),
    *(
        File(
            table,
            "baseline_network",
            BETWEEN_MNIST_FILES,
            rows,
            PLAIN,
            NORMED,
            code=_THEIRS,
            when=AFTER,
        )
        for table, rows in (("mnist_sparse_summary", _BASELINES), (RAW, _STATIC))
    ),
    *(
        File(
            "mnist_sparse_summary",
            "baseline_network",
            BETWEEN_MNIST_FILES,
            {"method": ["dsr", "set"], **shares},
            ours,
            NORMED,
            way,
            _THEIRS,
            AFTER,
        )
        for way, ours, shares in (
            ("trained as their code does", {"schedule": "constant"}, {}),
            (
                "output layer half dense",
                {**PLAIN, "init": "half_output"},
                {"density": [0.01, 0.02, 0.05]},
            ),
        )
    ),
    File(
        "mnist_lenet5",
        "mnist_compression",
        0.1,  # ten images: the errors themselves are below 1.5 %
        {"method": ["dense", "sparse_momentum"]},
        code=JULY_29,
        when=AFTER,
    ),
    File(
        "mnist_lenet5",
        "mnist_compression",
        0.1,
        {"method": "snip"},
        code="quoted by the paper",
        when=AFTER,
    ),
    File(
        "wrn28-2_cifar10_summary",
        "wrn28_2_curve",
        BETWEEN_CIFAR10_FILES,
        {"method": ["dense", "sparse_momentum", "dsr", "set", "deepr"]},
        code="sparse momentum and dense: official code; others: code of DSR's authors",
        when=AFTER,
    ),
    File(
        RAW,
        "wrn28_2_curve",
        BETWEEN_CIFAR10_FILES,
        {"dataset": "cifar10", "method": "static"},
        code="code of DSR's authors",
        when=AFTER,
    ),
    File(
        "cifar10_table",
        "cifar10_table",
        BETWEEN_CIFAR10_FILES,
        {"method": ["dense", "sparse_momentum", "snip"]},
        code="paper, table 1 (SNIP quoted there)",
    ),
    *(
        File(
            "imagenet_resnet50_paper_and_logs",
            "imagenet",
            BETWEEN_CIFAR10_FILES,
            {"setting": setting, "quantity": "top1_accuracy_pct"},
            ours,
            way=way,
            code=code,
        )
        for setting, ours, way, code in (
            ("DSR-codebase baseline", _USUAL, "usual training", "official code, issue 7"),
            (
                "partially dense (first conv + downsample convs dense)",
                _USUAL,
                "partially dense",
                "official code, issue 7",
            ),
            (
                "tuned: warmup + label smoothing",
                _TUNED,
                "tuned training",
                "official code, issue 7",
            ),
            (
                "tuned fully sparse, final epoch of log",
                _TUNED,
                "tuned, fully sparse",
                "official code, logs of the tuned runs",
            ),
        )
    ),
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
            kind="value",
            margin=file.margin,
            ours=Level(file.experiment, {"": where}),
            paper=Row(paper),
            unit="%",
            when=file.when,
        )
        about = {"file": file.table, "code": file.code, "network": model_name(model)}
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
            kind="value",
            margin=0.5,
            ours=Estimate("max", models=(model,)),
            paper=Published(
                table,
                {"value": value, "quantity": "speedup_max_x"},
                column="value",
                says="{value:g} ×",
            ),
            unit="×",
            when=AFTER,
        )
        about = {"file": table, "code": says, "network": name}
        yield claim, {**about, "method": METHOD_NAMES["sparse_momentum"], "density": float("nan")}
