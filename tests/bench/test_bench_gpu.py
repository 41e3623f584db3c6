"""What `make bench` measures on a GPU, here on the CPU with few steps: that the rows come."""

from __future__ import annotations

import pytest
import torch

from lib.bench import gpu as bench_gpu
from lib.bench import speed as bench
from lib.bench.conventional import Conventional


def test_rows_of_one_run() -> None:
    rows = list(
        bench_gpu.one_run(
            2, ["lenet300-100"], torch.device("cpu"), matrix=64, steps=3, conventional_steps=2
        )
    )
    values = {row["what"]: row for row in rows}
    assert list(values) == [
        "bf16 matrix peak",
        "ours, an epoch",
        "share of the bf16 matrix peak",
        "ours over conventional fp32 script",
        "mask update, share of an epoch",
    ]
    assert all(row["n"] == 2 and 0 < row["low"] <= row["high"] for row in rows)


def test_rows_of_runs_side_by_side() -> None:
    rows = bench_gpu.side_by_side(2, ["lenet300-100"], torch.device("cpu"), numbers=(1, 2), steps=3)
    (row,) = rows
    assert row["what"] == "2 runs side by side over 1" and row["n"] == 2 and row["low"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_rows_without_a_gpu(tmp_path) -> None:
    assert list(bench_gpu.gpu(1)) == []
    assert bench.bench(1, tmp_path, ["gpu"]) == []


def test_the_conventional_script_augments_cifar10() -> None:
    script = Conventional("alexnet-s", 0.05, batch_size=8)
    assert script.steps(1) > 0
    images, labels = next(iter(script.loader))
    assert images.shape == (8, 3, 32, 32) and labels.shape == (8,)
    assert all(not p[mask == 0].any() and p.any() for p, mask in script.masks.items())
