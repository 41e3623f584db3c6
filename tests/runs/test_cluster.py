"""Shards as jobs: submitit runs them, here and on Slurm, and their CSVs merge into one."""

import re
import shutil
import subprocess
import sys
import time

import pytest

from lib import experiments, paths
from lib.__main__ import main
from lib.results import store as results
from lib.runs import cluster
from lib.runs.cluster import Shard, submit

TINY = {"epochs": 1, "train_samples": 500}
ONLY = ("density=0.05", "seed=0")


def expected():
    runs = experiments.select(experiments.runs("main_results", "smoke"), ONLY)
    return {run.overridden(**TINY).run_id for run in runs}


def test_local_jobs_train_each_run_once_and_merge(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "cache_dir", lambda: tmp_path / "cache")
    target = paths.results_csv("smoke", "main_results", tmp_path)
    jobs = submit(
        "main_results",
        "smoke",
        "local",
        2,
        only=ONLY,
        overrides=TINY,
        results_root=tmp_path,
        timeout_min=5,
    )
    said = [job.result() for job in jobs]
    rows = results.read_runs(target)
    assert set(rows["run_id"]) == expected()
    assert sum(int(text.split()[-2]) for text in said) == len(rows)
    assert set(results.read_curves(target)["run_id"]) == expected()
    # Once more: everything is done, and nothing changes.
    before = target.read_bytes()
    again = Shard("main_results", "smoke", 1, 2, ONLY, TINY, str(tmp_path))
    assert again() == "main_results (smoke), shard 1/2: 0 runs"
    assert target.read_bytes() == before


def test_a_shard_put_back_into_the_queue_is_the_same_shard():
    shard = Shard("main_results", "smoke", 1, 2, ONLY, TINY, None, "cpu")
    again = shard.checkpoint()
    assert again.function == shard
    assert not again.args


def test_no_shards():
    with pytest.raises(ValueError, match="shards must be at least 1, got 0"):
        submit("main_results", "smoke", "local", 0)


def test_what_slurm_says_becomes_one_sentence(tmp_path, monkeypatch):
    import submitit

    monkeypatch.setattr(paths, "cache_dir", lambda: tmp_path)

    def refused(**named):
        raise RuntimeError("sbatch: error: invalid partition\nsbatch: error: failed")

    monkeypatch.setattr(submitit, "AutoExecutor", refused)
    with pytest.raises(RuntimeError, match=r"no job was submitted \(sbatch: .* failed\): correct"):
        submit("main_results", "smoke", "slurm", 1)


def slurm_answers():
    """Whether a controller answers: Slurm's programs may be installed where none runs."""
    if shutil.which("sinfo") is None:
        return False
    try:
        said = subprocess.run(["sinfo", "--noheader"], check=False, capture_output=True, timeout=30)
    except subprocess.TimeoutExpired:
        return False
    return said.returncode == 0 and bool(said.stdout.strip())


def test_slurm(tmp_path):
    if not slurm_answers():
        pytest.skip("no Slurm controller answers on this machine")
    command = [sys.executable, "-m", "lib", "run", "main_results", "--profile", "smoke"]
    command += [word for field in ONLY for word in ("--only", field)]
    command += [word for k, v in TINY.items() for word in ("--set", f"{k}={v}")]
    command += ["--results", str(tmp_path), "--executor", "slurm", "--shards", "2"]
    done = subprocess.run(
        [*command, "--job", "timeout_min=5"],
        cwd=paths.REPO,
        check=True,
        capture_output=True,
        text=True,
    )
    said = re.fullmatch(r"main_results \(smoke\): submitted (\d+)_0, (\d+)_1\n", done.stdout)
    assert said and said[1] == said[2], done.stdout  # one job array
    target = paths.results_csv("smoke", "main_results", tmp_path)
    deadline = time.monotonic() + 120
    while set(results.read_runs(target)["run_id"]) != expected():
        assert time.monotonic() < deadline, results.read_runs(target)
        time.sleep(1)


def test_the_command_line_submits(monkeypatch, capsys):
    calls = []

    class Job:
        job_id = "7"

        def result(self):
            return "done"

    def fake(*words, **named):
        calls.append((words, named))
        return [Job(), Job()]

    monkeypatch.setattr(cluster, "submit", fake)
    words = ["run", "main_results", "sensitivity", "--profile", "smoke", "--executor", "local"]
    assert main([*words, "--shards", "3", "--job", "timeout_min=5"]) == 0
    assert [words for words, _ in calls] == [
        ("main_results", "smoke", "local", 3),
        ("sensitivity", "smoke", "local", 3),
    ]
    assert all(named["timeout_min"] == 5 for _, named in calls)
    assert capsys.readouterr().out.splitlines()[:2] == [
        "main_results (smoke): submitted 7, 7",
        "done",
    ]
