"""The benchmark at tiny settings: rows that follow from the times, and the file they go to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from lib import bench
from lib.config import Run
from lib.data import Dataset
from lib.train import TrainingLoop
from tests.support.made_up_data import cifar


def test_ratios_follow_from_the_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_torch(run: Run, data: Dataset | None) -> bench.Side:  # nothing is compiled
        return bench.Side(TrainingLoop(replace(run, kernels="torch"), data))

    monkeypatch.setattr(bench, "sparse_side", by_torch)
    found = {r["what"]: r for r in bench.steps("wrn-10-1", 0.05, 1, cifar(40), 8)}
    assert {r["setting"] for r in found.values()} == {"wrn-10-1, 5 %, batch 8"}
    seconds = {
        name: found[f"seconds: {name}"]["value"]
        for name in ("dense fp32 step", "dense bf16 step", "sparse step, dense window counted")
    }
    whole = seconds["sparse step, dense window counted"]
    ratio = found["training step, dense window counted"]["value"]
    assert ratio == pytest.approx(seconds["dense fp32 step"] / whole)
    ratio = found["dense bf16 step over sparse fp32"]["value"]
    assert ratio == pytest.approx(seconds["dense bf16 step"] / whole)
    assert 0 < found["forward FLOPs of the masks, of dense"]["value"] < 100


def test_stored_rows_replace_only_their_topic_and_setting(tmp_path: Path) -> None:
    def table(*lines: tuple[str, str, float]) -> pd.DataFrame:
        rows = [
            {"topic": t, **bench.row("w", s, pd.Series([v]), "x"), "machine": "m"}
            for t, s, v in lines
        ]
        return pd.DataFrame(rows)

    path = tmp_path / "bench" / "kernels.csv"
    bench.store(path, table(("sparse_steps", "a", 1 / 3), ("one_thread", "a", 2 / 3)))
    bench.store(path, table(("sparse_steps", "a", 3.0), ("sparse_steps", "b", 4.0)))
    found = pd.read_csv(path)
    assert path.read_text().startswith("topic,what,setting,value,unit,low,high,n,machine\n")
    assert list(zip(found.topic, found.setting, found.value, strict=True)) == [
        ("one_thread", "a", 2 / 3),
        ("sparse_steps", "a", 3.0),
        ("sparse_steps", "b", 4.0),
    ]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"only": ["gpu"]}, "gpu"),
        ({"networks": ["vgg16-x"]}, "vgg16-x"),
        ({"densities": [5]}, "5"),
    ],
)
def test_what_it_does_not_measure_is_refused(
    tmp_path: Path, arguments: dict[str, list[str]], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        bench.bench(1, tmp_path, **arguments)
