"""Shards as jobs: submitit runs them, here and on Slurm, and they append to the same CSVs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lib import experiments, paths
from lib.__main__ import main
from lib.results import store
from lib.runs.cluster import Shard, submit

ONLY = ["density=0.05", "seed=0", "method=set", "method=static"]


def test_local_jobs_train_each_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "cache_dir", lambda: tmp_path / "cache")
    tiny: dict[str, Any] = {"epochs": 1, "train_samples": 500}
    options: dict[str, Any] = {"only": ONLY, "overrides": tiny, "results_root": str(tmp_path)}
    jobs = submit("main_results", "smoke", "local", 2, {"timeout_min": 5}, **options)
    assert all("1 runs" in job.result() for job in jobs)
    runs = experiments.select(experiments.runs("main_results", "smoke"), ONLY)
    found = store.read_runs(tmp_path / "own" / "smoke")
    assert set(found["run_id"]) == {run.overridden(**tiny).run_id for run in runs}
    assert len(store.read_curves(tmp_path / "own" / "smoke")) == 2


def test_a_shard_put_back_into_the_queue_is_the_same_shard() -> None:
    shard = Shard("main_results", "smoke", {"only": ["seed=0"], "shard": (1, 2)})
    again = shard.checkpoint()
    assert again.function is shard and not again.args


def test_what_slurm_says_becomes_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import submitit

    def refused(*_: Any, **__: Any) -> None:
        raise RuntimeError("sbatch: error: invalid partition\nsbatch: error: failed")

    monkeypatch.setattr(submitit, "AutoExecutor", refused)
    args = ["run", "main_results", "--profile", "smoke", "--executor", "slurm", "--job", "nodes=1"]
    assert main([*args, "--results", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "invalid partition" in err and err.count("\n") == 1
