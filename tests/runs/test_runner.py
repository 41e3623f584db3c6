"""The command line and the runner: real processes on real MNIST, at the smallest scale."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lib import experiments, paths
from lib.__main__ import main
from lib.config import Run
from lib.results import rows as reading
from lib.results import store
from lib.runs import machine, pool, runner, single
from lib.train import TrainingLoop
from tests.soak import members

TINY = {"epochs": 1, "train_samples": 1000}
# Importing torch and torchvision costs seconds in every process, so most calls have one worker.
SET = ["--only", "method=set", "--only", "density=0.05"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHECKPOINT_ROOT", str(tmp_path / "checkpoints"))
    return tmp_path


def words(changes: dict[str, Any]) -> list[str]:
    return [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]


def command(folder: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "lib", "run", "main_results", "--profile", "smoke"),
        *("--device", "cpu", "--jobs", "1", "--results", str(folder), *more),
    ]


def start(folder: Path, *more: str, **named: Any) -> subprocess.Popen[str]:
    """In a process group of its own, as from a terminal: Ctrl-C counts, also where these tests run
    in the background of a script, which has it ignored.
    """
    return subprocess.Popen(
        command(folder, *more),
        cwd=paths.REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        **named,
    )


def end(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == code and "Traceback" not in err, (out, err)
    return out, err


def done(folder: Path) -> list[str]:
    """Ids of the runs that --set changed: they are not in the grid."""
    return sorted(store.read_runs(folder / "own" / "smoke")["run_id"])


def planned(folder: Path, *only: str, **changes: Any) -> list[str]:
    tasks = runner.tasks_of("main_results", "smoke", None, only, changes, (1, 1), folder)
    return sorted(task.run.run_id for task in tasks)


def wait_for(what: Callable[[], Any], seconds: float = 240.0) -> None:
    stop = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < stop, "nothing happened"
        time.sleep(0.02)


def locks(folder: Path) -> list[Path]:
    return list((folder / "checkpoints").rglob("*.lock"))


def test_two_calls_wait_for_each_other_and_nothing_is_left(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ["--only", "method=dense", "--only", "method=set", "--only", "density=0.05"]
    only += ["--only", "density=1.0", *words(TINY)]
    both = [start(folder, *only, "--shard", "1/2"), start(folder, *only)]
    for process in both:
        end(process)
    wanted = planned(folder, *only[1:8:2], **TINY)
    assert done(folder) == wanted and len(wanted) == 4  # the second has all, also the first's
    runs = store.read_runs(folder / "own" / "smoke")
    assert set(runs["status"]) == {"ok"} and set(runs["steps"]) == {10}
    assert runs.loc[runs["method"] == "set", "weights_active"].tolist() == [13_310] * 2
    assert runs.loc[runs["method"] == "dense", "prune_rate"].isna().all()
    assert sorted(store.read_curves(folder / "own" / "smoke")["run_id"]) == wanted
    assert not list((folder / "checkpoints" / "smoke").iterdir())
    before = [path.read_bytes() for path in sorted(folder.rglob("*.csv"))]
    assert main(command(folder, *only)[3:]) == 0
    out = capsys.readouterr().out
    assert "4 runs" in out and str(folder / "own" / "smoke") in out
    assert before == [path.read_bytes() for path in sorted(folder.rglob("*.csv"))]


def test_a_run_that_another_process_holds_is_taken_over_when_that_one_dies(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, it leaves a worker, which sees that it is alone."""
    run = [*SET, "--only", "seed=1", *words(TINY)]
    first = start(folder, *run)
    wait_for(lambda: locks(folder))
    os.killpg(first.pid, signal.SIGSTOP)
    told = []

    def say(_: object, text: str) -> None:
        told.append(text)
        first.kill()
        os.killpg(first.pid, signal.SIGCONT)

    monkeypatch.setattr(pool._Pool, "say", say)
    assert main(command(folder, *run)[3:]) == 0
    first.communicate()
    assert "another process is training it" in told[0] and not members(first.pid)
    assert done(folder) == planned(folder, *SET[1::2], "seed=1", **TINY)


@pytest.mark.parametrize(
    ("how", "to", "code"),  # Ctrl-C goes to every process of the terminal
    [(signal.SIGINT, os.killpg, 130), (signal.SIGTERM, os.kill, 143)],
)
def test_who_stops_the_command_finds_a_checkpoint_and_no_worker(
    folder: Path, how: signal.Signals, to: Callable[[int, int], None], code: int
) -> None:
    run = [*SET, "--only", "seed=1", *words({"epochs": 15, "train_samples": 1000})]
    process = start(folder, *run)
    wait_for(lambda: locks(folder))
    to(process.pid, how)
    end(process, code)
    wait_for(lambda: not members(process.pid), 30)
    assert len(list((folder / "checkpoints").rglob("*.pt"))) == 1 and done(folder) == []
    changes = {"epochs": 15, "train_samples": 1000}
    only = [*SET[1::2], "seed=1"]
    (task,) = runner.tasks_of("main_results", "smoke", None, only, changes, (1, 1), folder)
    assert single.train_and_store(task) == "ok"  # from there: it was not set aside
    assert not list((folder / "checkpoints").rglob("*.bad*"))
    assert store.read_runs(folder / "own" / "smoke")["steps"].tolist() == [150]


def test_ctrl_c_tells_the_truth_where_no_checkpoint_can_be_written(folder: Path) -> None:
    process = start(folder, *SET, "--only", "seed=1", "--set", "epochs=9999")
    wait_for(lambda: locks(folder))
    time.sleep(1.5)
    shutil.rmtree(folder / "checkpoints" / "smoke")
    (folder / "checkpoints" / "smoke").write_text("no folder any more")
    os.killpg(process.pid, signal.SIGINT)
    out, _ = end(process, 130)
    assert "no checkpoint yet" in out


def test_a_reader_that_leaves_ends_the_command(folder: Path) -> None:
    """As `head` does; the worker has not died."""
    process = start(folder, *SET, "--only", "seed=1", *words(TINY))
    wait_for(lambda: locks(folder))
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(240) == 1 and len(done(folder)) == 1


def test_a_killed_worker_costs_its_run_alone(folder: Path) -> None:
    process = start(folder, *SET, *words({**TINY, "epochs": 150, "val_fraction": 0.01}))
    wait_for(lambda: locks(folder))
    (lock,) = locks(folder)
    time.sleep(0.5)
    lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in members(process.pid)}
    (worker,) = [pid for pid, line in lines.items() if b"spawn_main(" in line]
    os.kill(worker, signal.SIGKILL)
    out, err = end(process, 1)
    assert lock.stem in out and lock.stem in err and err.startswith("error: 1 of 2 runs")
    assert len(done(folder)) == 1 and lock.stem not in done(folder)


@pytest.fixture
def task(folder: Path) -> single.Task:
    run = experiments.runs("main_results", "smoke")[0].overridden(**TINY)
    return single.Task(run, "main_results", "smoke", folder / "smoke" / "main_results.csv")


def test_a_run_is_stored_once_and_what_a_killed_process_left_goes(task: single.Task) -> None:
    with paths.locked(task.checkpoint.with_suffix(".lock")):
        assert single.train_and_store(task) == "elsewhere"
    assert single.train_and_store(task) == "ok"
    task.checkpoint.write_bytes(b"left by a process killed between row and clean-up")
    other = single.Task(task.run, "ablations", "smoke", task.csv.with_name("ablations.csv"))
    assert single.train_and_store(other) == "done"  # by another experiment of the profile
    assert not list(task.checkpoint.parent.iterdir()) and not other.csv.exists()


def test_a_row_that_cannot_be_appended_is_said_and_the_next_call_goes_on(
    task: single.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "append_run", full)
        with pytest.raises(RuntimeError, match=r"No space left.*goes on from its last checkpoint"):
            single.train_and_store(task, checkpoint_seconds=0.0)
    monkeypatch.setattr(TrainingLoop, "step", lambda *_: pytest.fail("trained again"))
    assert single.train_and_store(task) == "ok"
    assert not list(task.checkpoint.parent.iterdir())


def test_soak() -> None:
    """Killed runs, workers, parents and writers, another user: a few of each."""
    words = [sys.executable, "-m", "tests.soak", "--kills", "3"]
    done = subprocess.run(words, cwd=paths.REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "BAD" not in done.stdout, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 3


# --------------------------------------------------------------------------------- wrong words


WRONG = {  # what the command line is, and what its sentence must name
    "run main_result": "main_results",
    "run main_results --only method=sett": "sett",
    "run main_results --only metod=set": "metod",
    "run main_results --only set": "'set'",
    "run main_results --set epoch=3": "epochs",
    "run main_results --set epochs=x": "'x'",
    "run main_results --set epochs=0": "epochs",
    "run main_results --set epochs": "'epochs'",
    "run main_results --set method_version=7": "method_version",
    "run main_results --jobs 1 --set model=resnet50": "imagenet",
    "run main_results --jobs 1 --set growth=randm": "randm",
    "run main_results --set val_fraction=0.00000001": "1e-08",
    "run main_results --shard 3/2": "3/2",
    "run main_results --shard two": "two",
    "run main_results --jobs 0": "10000",
    "run main_results --threads -2": "-2",
    "run main_results --device tpu": "tpu",
    "run main_results --device meta": "meta",
    "run main_results --device cuda:99": "cuda:99",
    "run main_results --profile quik": "quick",
    "run main_results --device cpu --results FOLDER/file": "FOLDER/file",
    "run imagenet --profile paper": "torchrun",
    "run imagenet --profile quick": "paper",
    "status --results FOLDER/file": "file",
    "status --results FOLDER/nothing": "nothing",
    "status --results=": "''",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_cannot_work_is_one_sentence_before_the_first_step(
    line: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IMAGENET_ROOT", raising=False)
    (folder / "file").write_text("")
    args = line.replace("FOLDER", str(folder)).split()
    args += [] if "--profile" in args else ["--profile", "smoke"]
    args += [] if "--results" in line else ["--results", str(folder)]
    try:
        code = main(args)
    except SystemExit as exit:
        code = int(exit.code or 0)
    err = capsys.readouterr().err
    assert code in (1, 2) and err.startswith("error: ") and err.count("\n") == 1, err
    assert WRONG[line].replace("FOLDER", str(folder)) in err and not list(folder.rglob("*.csv"))


# ---------------------------------------------------------------------------- grids and status


def test_a_changed_grid_goes_to_a_folder_of_its_own_and_is_read_from_there(folder: Path) -> None:
    grid = reading.planned("main_results", "smoke", density=[0.05, 0.07])
    tasks = runner.tasks_of("main_results", "smoke", grid, ["method=set"], None, (1, 1), folder)
    where = {(task.run.density, task.csv.relative_to(folder).parts[0]) for task in tasks}
    assert where == {(0.05, "smoke"), (0.07, "own")}
    assert [t.run.run_id for t in tasks] == grid[grid.method == "set"].run_id.tolist()
    for i, task in enumerate(tasks):
        run = {"status": "ok", "test_error_pct": 2.0, "steps": i, "weights_total": 1}
        measured = {"train_loss": 0.1, "train_seconds": 1.0, "data_sha256": "0", "kernels": "torch"}
        outcome = SimpleNamespace(**run, **measured)
        row = single.row_of(task.run, outcome, "main_results", "smoke", "cpu")
        store.append_run(task.csv, dict.fromkeys(store.COLUMNS) | row)
    assert runner.missing("main_results", tasks) == []
    assert len(reading.load("main_results", "smoke", folder, grid)) == len(tasks)
    assert runner.tasks_of("main_results", "smoke", [Run(epochs=3)])[0].csv.parts[-3] == "own"


def test_an_experiment_without_runs_at_a_scale_has_no_rows() -> None:
    """As imagenet at smoke, which `run all` comes by."""
    assert runner._rows([]).empty and not runner.tasks_of("training_length", "smoke")


def test_status_counts(task: single.Task, folder: Path, capsys: Any) -> None:
    run = experiments.runs("main_results", "smoke")[0]
    assert single.train_and_store(single.Task(run, "main_results", "smoke", task.csv)) == "ok"
    args = ["status", "main_results", "--profile", "smoke", "--results", str(folder)]
    assert main(args) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    total = len(experiments.runs("main_results", "smoke"))
    assert lines[1][:4] == ["main_results", "1", "0", str(total - 1)]
    assert lines[2][-4:-1] == lines[1][1:4]


# --------------------------------------------------------------------------------- provenance


def test_provenance_is_unknown_where_nobody_can_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(paths.REPO / "lib" / "runs", tmp_path / "outer" / "copy")
    versions = machine.versions.__wrapped__
    there = versions()
    assert there["torch"].startswith("2.") and there["dirty"] in (True, False, None)
    with monkeypatch.context() as patch:
        patch.setenv("GIT_DIR", str(tmp_path))  # of a hook, or of another repository
        assert versions() == there
    with monkeypatch.context() as patch:
        subprocess.run(["git", "init", "-q", str(tmp_path / "outer")], check=True)
        patch.setattr(paths, "REPO", tmp_path / "outer" / "copy")  # a zip inside a repository
        assert (versions()["commit"], versions()["dirty"]) == ("unknown", None)
    monkeypatch.setenv("PATH", str(tmp_path))  # no git program
    assert (versions()["commit"], versions()["dirty"]) == ("unknown", None)
