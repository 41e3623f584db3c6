"""The ways of computing compared: by hand, and verdicts on constructed errors."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib import claims, paths
from lib.claims.computing import MARGINS, computed, differences, spread
from lib.config import Run
from lib.results.reading import Source, load
from tests.support.made_up_grid import write_grid

IDS = {f"computing_{way}_{dataset}" for way in ("sparse", "bf16") for dataset in MARGINS}


def way_of(run: Run) -> str:
    if run.precision == "bf16":
        return "bf16"
    return "sparse" if run.kernels == "sparse" else "masked"


def errors(noise: float = 0.0, **shift: float) -> Callable[[Run], float]:
    """3 % on MNIST, 60 % on CIFAR-10 and a point more per seed; `shift` is added to a way.

    The noise, within -+ `noise`, differs between the ways and adds up to nothing over five seeds.
    """

    def error(run: Run) -> float:
        wobble = ({"masked": 1, "sparse": 2, "bf16": 3}[way_of(run)] * run.seed % 5 - 2) / 2
        start = 3.0 if run.dataset == "mnist" else 60.0
        return start + run.seed + shift.get(way_of(run), 0.0) + noise * wobble

    return error


def write(
    root: Path,
    error: Callable[[Run], float | None],
    profile: str = "hours",
    keep: Callable[[Run], bool] = lambda run: True,
) -> None:
    write_grid(root, "computing", profile, error, keep)


def judged(root: Path, profile: str = "hours") -> dict[str, dict[str, Any]]:
    table = claims.verdict_table(Source(profile, root), "05_speedups")
    rows = {str(row["id"]): dict(row) for row in table.to_dict("records")}
    return {name: rows[name] for name in IDS}


# --------------------------------------------------------------------------------------- by hand


def test_differences_are_paired_and_the_spread_is_masked_denses(tmp_path: Path) -> None:
    write(tmp_path, errors(sparse=0.25, bf16=-0.5))
    runs = load("computing", Source("hours", tmp_path))
    for way, shift in (("sparse", 0.25), ("bf16", -0.5)):
        found = differences(runs, way)
        assert list(found) == ["lenet300-100", "lenet5", "wrn-10-1"]
        for pair in found.values():  # the seeds differ by a point each and yet have no spread here
            assert (pair.mean, pair.sd, pair.n) == (pytest.approx(shift), pytest.approx(0), 10)
    assert spread(runs, "wrn-10-1") == pytest.approx(np.std(range(10), ddof=1))


def test_a_seed_that_lacks_a_way_is_left_out(tmp_path: Path) -> None:
    def gap(run: Run) -> bool:
        return not (run.seed == 2 and way_of(run) == "masked")

    def error(run: Run) -> float | None:
        lost = run.seed == 4 and way_of(run) == "bf16" and run.dataset == "cifar10"
        return None if lost else errors(sparse=0.25)(run)

    write(tmp_path, error, keep=gap)
    runs = load("computing", Source("hours", tmp_path))
    assert differences(runs, "sparse")["wrn-10-1"].seeds == (0, 1, *range(3, 10))
    assert differences(runs, "bf16")["wrn-10-1"].seeds == (0, 1, 3, *range(5, 10))
    row = judged(tmp_path)["computing_bf16_cifar10"]
    assert row["n"] == 8 and "runs that learned" in row["detail"]


def by_torch(path: Path, model: str) -> int:
    """Change the rows of a network's kernels as if torch had computed them; how many."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    changed = [row for row in rows if row["model"] == model and row["kernels"] == "sparse"]
    for row in changed:
        row["kernels"] = "torch"
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return len(changed)


def test_torch_against_torch_is_no_evidence_for_the_kernels(tmp_path: Path) -> None:
    """Rows that asked for the kernels and did not get them (a GPU) show no equality."""
    write(tmp_path, errors())
    assert judged(tmp_path)["computing_sparse_cifar10"]["verdict"] == "reproduced"
    count = by_torch(paths.results_csv("hours", "computing", tmp_path), "wrn-10-1")
    runs = load("computing", Source("hours", tmp_path))
    assert list(differences(runs, "sparse")) == ["lenet300-100", "lenet5"]
    assert count == 10 and len(computed(runs, "sparse").rows) == 20  # of the other networks
    rows = judged(tmp_path)
    assert rows["computing_sparse_cifar10"]["verdict"] == claims.NO_RUNS
    assert "python -m lib run computing" in rows["computing_sparse_cifar10"]["detail"]
    assert rows["computing_sparse_mnist"]["verdict"] == "reproduced"


# -------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize("sign", [1, -1])
def test_a_difference_counts_on_either_side(tmp_path: Path, sign: int) -> None:
    """An error that is lower by more than the margin is not the same error."""
    write(tmp_path, errors(noise=0.01, sparse=sign * 0.15, bf16=sign * 0.05))
    rows = judged(tmp_path)
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    assert verdicts == {
        "computing_sparse_mnist": "not reproduced",  # 0.15 beyond 0.1, within 0.2
        "computing_sparse_cifar10": "reproduced",
        "computing_bf16_mnist": "reproduced",
        "computing_bf16_cifar10": "reproduced",
    }
    assert {row["n"] for row in rows.values()} == {10}
    shown = "+" if sign == 1 else "−"
    assert f"LeNet-300-100: {shown}0.15" in rows["computing_sparse_mnist"]["detail"]
    assert abs(rows["computing_sparse_mnist"]["ours_mean"]) == pytest.approx(0.15, abs=0.02)


def test_noise_is_inconclusive_and_the_margins_are_those_of_dense_level(tmp_path: Path) -> None:
    write(tmp_path, errors(noise=2.0))
    assert {row["verdict"] for row in judged(tmp_path).values()} == {"inconclusive"}
    by_id = {claim.id: claim for claim in claims.CLAIMS}
    assert {
        "mnist": by_id["mnist_matches_dense_at_0.2"].rule.margin,
        "cifar10": by_id["cifar10_matches_dense"].rule.margin,
    } == MARGINS


def test_the_network_that_differs_decides(tmp_path: Path) -> None:
    def error(run: Run) -> float:
        return errors(noise=0.01)(run) + 5 * (run.model == "alexnet-s" and way_of(run) == "sparse")

    write(tmp_path, error, "paper")
    row = judged(tmp_path, "paper")["computing_sparse_cifar10"]
    assert row["verdict"] == "not reproduced" and row["n"] == 10
    assert row["detail"].startswith("AlexNet-s: +5.00") and row["ours"].startswith("AlexNet-s")
