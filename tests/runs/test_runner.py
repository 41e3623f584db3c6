"""The command line and the runner: real processes on real MNIST, at the smallest scale."""

from __future__ import annotations

import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lib import experiments, paths
from lib.__main__ import main
from lib.config import Run
from lib.results import store as results
from lib.runs import machine, progress, runner, single
from lib.training import checkpoint

REPO = Path(__file__).parents[2]
TINY = ["--set", "epochs=1", "--set", "train_samples=1000"]
# Importing torch and torchvision costs seconds in every process, so most calls have one worker.
SET = ["--only", "method=set", "--only", "density=0.05"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CHECKPOINT_ROOT", str(tmp_path / "checkpoints"))
    return tmp_path


def command(folder: Path, *words: str) -> list[str]:
    return [
        *(sys.executable, "-m", "lib", "run", "main_results", "--profile", "smoke"),
        *("--device", "cpu", "--jobs", "1", "--results", str(folder), *words),
    ]


def call(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(folder, *words), cwd=REPO, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    told = done.stderr.splitlines()  # the first run on a machine compiles the kernels
    assert [line for line in told if "compiling the CPU kernels" not in line] == []
    return done


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """In a process group of its own, as from a terminal: Ctrl-C counts, also where these tests run
    in the background of a script, which has it ignored.
    """
    return subprocess.Popen(
        command(folder, *words),
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


def rows(folder: Path) -> list[str]:
    return results.read_runs(csv(folder))["run_id"].tolist()


def csv(folder: Path) -> Path:
    return paths.results_csv("smoke", "main_results", folder)


def planned(folder: Path, *only: str) -> list[str]:
    made = runner.plan(
        "main_results",
        "smoke",
        only=only,
        overrides={"epochs": 1, "train_samples": 1000},
        results_root=folder,
    )
    return [run.run_id for run in (*made.done, *made.todo)]


def test_shards_then_nothing_left(folder):
    """Two shards make the whole, their rows are whole, and a third call trains nothing."""
    only = ("method=dense", "method=set", "density=0.05", "density=1.0")
    words = [w for text in only for w in ("--only", text)]
    wanted = planned(folder, *only)
    assert len(wanted) == 4
    call(folder, *words, *TINY, "--shard", "1/2")
    assert sorted(rows(folder)) == sorted(wanted[0::2])
    call(folder, *words, *TINY, "--shard", "2/2")
    assert sorted(rows(folder)) == sorted(wanted)

    table = results.read_runs(csv(folder))
    assert set(table["status"]) == {"ok"} and set(table["epochs"]) == {1}
    assert set(table["steps"]) == {10} and table["test_error_pct"].between(0, 100).all()
    assert (table["profile"] == "smoke").all() and (table["experiment"] == "main_results").all()
    assert table.loc[table["method"] == "set", "weights_active"].tolist() == [13_310] * 2
    assert table.loc[table["method"] == "dense", "prune_rate"].isna().all()
    curves = results.read_curves(csv(folder), runs=table)
    assert sorted(curves["run_id"]) == sorted(wanted)

    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in csv(folder).parent.glob("*.csv")}
    done = call(folder, *words, *TINY)
    assert "all 4 runs are done" in done.stdout
    assert before == {
        p: (p.stat().st_mtime_ns, p.read_bytes()) for p in csv(folder).parent.glob("*.csv")
    }


def test_two_calls_at_once_neither_lose_nor_repeat(folder):
    only = ("method=static", "method=deepr", "density=0.05")
    words = [w for text in only for w in ("--only", text)]
    both = [start(folder, *words, *TINY) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and err == "", (out, err)
    assert sorted(rows(folder)) == sorted(planned(folder, *only))
    assert not list((folder / "checkpoints").rglob("*.pt"))


def wait_for(what, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def interrupt(process: subprocess.Popen[str]) -> str:
    """Ctrl-C, as a terminal sends it: to every process of the group. What was printed."""
    os.killpg(process.pid, signal.SIGINT)
    begin = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err)
    assert time.monotonic() - begin < 20
    assert "Traceback" not in err and "Traceback" not in out, err
    return out


def test_ctrl_c_keeps_checkpoints_and_the_same_command_goes_on(folder):
    words = [*SET, "--only", "seed=1", "--set", "train_samples=1000", "--set", "epochs=15"]
    process = start(folder, *words)
    locks = folder / "checkpoints" / "smoke"
    wait_for(lambda: list(locks.glob("*.lock")))
    time.sleep(1.0)
    out = interrupt(process)
    assert "the same command goes on" in out
    assert rows(folder) == []
    (saved,) = locks.glob("*.pt")
    assert rows(folder) == []
    state = checkpoint.read(saved, saved.stem, torch.device("cpu"))
    assert state is not None and 0 < state["state"]["step"] < 150
    call(folder, *words)
    assert results.read_runs(csv(folder))["steps"].tolist() == [150]
    assert not list(locks.iterdir())


def test_ctrl_c_tells_the_truth_where_no_checkpoint_can_be_written(folder):
    process = start(folder, *SET, "--only", "seed=1", "--set", "epochs=9999")
    checkpoints = folder / "checkpoints" / "smoke"
    wait_for(lambda: list(checkpoints.glob("*.lock")))
    time.sleep(1.0)
    shutil.rmtree(checkpoints)
    checkpoints.write_text("no folder any more")
    out = interrupt(process)
    assert "no checkpoint yet, it starts anew" in out and "stopped" in out
    assert not list((folder / "checkpoints").rglob("*.tmp"))


def test_a_killed_worker_costs_its_run_alone(folder):
    """The run is named, the other one goes on in a new worker, and the exit code says so."""
    words = [*SET, *TINY, "--set", "epochs=150", "--set", "val_fraction=0.01"]
    process = start(folder, *words)
    checkpoints = folder / "checkpoints" / "smoke"
    wait_for(lambda: list(checkpoints.glob("*.lock")))
    (lock,) = checkpoints.glob("*.lock")
    time.sleep(0.5)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    spawned = [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    (worker,) = [
        c for c in spawned if b"resource_tracker" not in Path(f"/proc/{c}/cmdline").read_bytes()
    ]
    os.kill(int(worker), signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err and err.count("\n") == 1, err
    assert f"{lock.stem}: its worker was killed (SIGKILL)" in out and "other runs go on" in out
    assert (
        err.startswith("error: 1 of 2 runs of main_results (smoke) aren't done")
        and lock.stem in err
    )
    assert len(rows(folder)) == 1 and lock.stem not in rows(folder)


def test_a_checkpoint_whose_row_is_stored_goes(folder):
    """Killed between the two, a process leaves both."""
    run = experiments.runs("main_results", "smoke")[0].overridden(epochs=1, train_samples=1000)
    assert single.train_and_store(run, "main_results", "smoke", csv(folder)) == "ok"
    checkpoint = single.checkpoint_of(run, "smoke")
    checkpoint.write_bytes(b"left")
    assert single.train_and_store(run, "main_results", "smoke", csv(folder)) == "done"
    assert not checkpoint.exists()


def test_a_result_that_cannot_be_appended_waits_for_the_next_call(folder, monkeypatch):
    run = experiments.runs("main_results", "smoke")[0].overridden(epochs=1, train_samples=1000)
    whole = folder / "whole" / "smoke" / "main_results.csv"
    assert single.train_and_store(run, "main_results", "smoke", whole) == "ok"

    def full(*args, **named):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(single.results, "append_run", full)
        with pytest.raises(RuntimeError, match=r"is trained, .*No space left.* adds it from"):
            single.train_and_store(run, "main_results", "smoke", csv(folder))
    assert rows(folder) == []
    monkeypatch.setattr("lib.train.train", lambda *args, **named: pytest.fail("trained again"))
    assert single.train_and_store(run, "main_results", "smoke", csv(folder)) == "ok"
    other, same = (results.read_runs(path) for path in (whole, csv(folder)))
    assert same["test_error_pct"].equals(other["test_error_pct"])
    assert results.read_curves(csv(folder)).equals(results.read_curves(whole))
    assert not list((folder / "checkpoints" / "smoke").iterdir())


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent(folder, how):
    """Whoever stops the command, its workers leave their checkpoint and end."""
    process = start(folder, *SET, "--set", "epochs=1000", "--set", "train_samples=1000")
    group = process.pid
    deadline = time.monotonic() + 60
    while not list((folder / "checkpoints").rglob("*.lock")):  # a run is being trained
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    os.kill(process.pid, how)
    process.communicate(timeout=60)
    assert process.returncode in (143, -how)
    deadline = time.monotonic() + 30
    while members(group):
        assert time.monotonic() < deadline, members(group)
        time.sleep(0.2)
    assert list((folder / "checkpoints").rglob("*.pt"))


def members(group: int) -> list[str]:
    """What still runs in a process group (zombies don't)."""
    listed = subprocess.run(
        ["ps", "-eo", "pgid,stat,args"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[1:]
    found = [line.split(None, 2) for line in listed]
    return [args for pgid, stat, args in found if int(pgid) == group and stat[0] != "Z"]


def test_ctrl_c_while_the_workers_start(folder):
    process = start(folder, *SET, *TINY, "--jobs", "2")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("needs Linux's list of child processes")
    wait_for(lambda: len(children.read_text().split()) >= 2)  # the tracker and the first worker
    interrupt(process)
    assert rows(folder) == []


def test_a_worker_that_fails_is_one_sentence(folder):
    done = subprocess.run(
        command(folder, *SET, *TINY, "--set", "schedule=cosin"),
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: unknown schedule 'cosin': did you mean 'cosine'")
    assert rows(folder) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "method=sett"], "no run has method=sett; there are method: deepr, dense"),
        (["--only", "metod=set"], "unknown field of a run 'metod': did you mean 'method'"),
        (["--only", "set"], "--only 'set': write field=value"),
        (["--set", "epoch=3"], "unknown field of a run 'epoch': did you mean 'epochs'"),
        (["--set", "epochs=x"], "epochs='x' can't be read as int (default 100)"),
        (["--set", "epochs=0"], "epochs must be in [1, 2**63), got 0"),
        (["--set", "epochs"], "--set 'epochs': write name=value"),
        (["--shard", "3/2"], "shard 3/2: the first number goes from 1 to 2"),
        (["--shard", "two"], "--shard 'two': write i/n"),
    ],
)
def test_bad_words_are_one_sentence(words, message, folder, capsys):
    args = ["run", "main_results", "--profile", "smoke", "--results", str(folder), *words]
    assert main(args) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    with pytest.raises(ValueError):
        main([*args, "--traceback"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "main_result"], "unknown experiment 'main_result': did you mean 'main_results'"),
        (["run", "main_results", "--profile", "quik"], "unknown profile 'quik': did you mean"),
        (["status", "main_result"], "unknown experiment 'main_result': did you mean"),
        (["rum"], "unknown command 'rum': did you mean 'run'"),
        (["run", "main_results", "--jobs", "0"], "jobs must be from 1 to 10000, got 0"),
        (["run", "main_results", "--threads", "-2"], "threads must be from 1 to 10000, got -2"),
        (["run", "main_results", "--device", "tpu"], "unknown device 'tpu': known are cpu"),
        (["run", "main_results", "--device", ""], "unknown device ''"),
        (["run", "main_results", "--device", "cuda:99"], "device 'cuda:99': torch finds"),
        (["run", "main_results", "--set", "model=resnet50"], "resnet50 is a network for imagenet"),
        (["run", "main_results", "--set", "model=lenet"], "unknown model 'lenet'; did you mean"),
        (["run", "main_results", "--set", "growth=randm"], "unknown growth rule 'randm': did you"),
        (["run", "main_results", "--set", "init=er"], "unknown init 'er'"),
        (["run", "main_results", "--set", "keep_dense=nosuch"], "unknown keep_dense name 'nosuch'"),
        (["run", "main_results", "--set", "val_fraction=0.00000001"], "val_fraction=1e-08 leaves"),
        (["run", "main_results", "--set", "method_version=7"], "method_version can't be set"),
        (["run", "main_results", "--executor", "local", "--job", "tiemout=3"], "--job: Parameter"),
    ],
)
def test_what_cannot_work_is_said_before_the_first_step(words, message, folder, capsys):
    where = [] if words[0] == "rum" or words[0] == "status" else ["--results", str(folder)]
    profile = ["--profile", "smoke"] if words[0] == "run" and "--profile" not in words else []
    assert main([*words, *profile, *where]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
    assert not list(folder.rglob("*.csv"))


@pytest.mark.parametrize("command", ["status", "verdict", "figures", "report"])
def test_a_results_path_without_results_is_one_sentence(command, folder, capsys):
    (folder / "file").write_text("")
    for path, message in (
        (folder / "file", "is a file, not a folder"),
        (folder / "nosuch", "doesn't exist"),
        (folder, "holds no results: python -m lib run all --profile smoke"),
    ):
        assert main([command, "--profile", "smoke", "--results", str(path)]) == 1
        said = capsys.readouterr()
        assert message in said.err and said.err.count("\n") == 1 and said.out == ""


def test_folders_and_disk_space_are_looked_at_first(folder, capsys, monkeypatch):
    (folder / "file").write_text("")
    args = ["run", "main_results", "--profile", "smoke", "--results"]
    assert main([*args, str(folder / "file")]) == 1
    assert "file/smoke can't be written to (Not a directory)" in capsys.readouterr().err
    full = SimpleNamespace(total=0, used=0, free=1000)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: full)
    assert main([*args, str(folder)]) == 1
    assert "has 0 MB free, but checkpoints and results take up to" in capsys.readouterr().err
    assert not list(folder.rglob("*.csv"))


def test_a_locale_without_utf8_stops_nothing():
    code = (
        "import lib.__main__ as m; m._print_in_any_locale(); print('1\\u00a0000 \\u2212 3 \\u2265')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPO,
        env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        check=True,
    )
    assert done.stdout == b"1 000 - 3 >=\n"


def test_one_condition_may_be_a_string(folder):
    made = runner.plan("main_results", "smoke", only="method=set", results_root=folder)
    assert {run.method for run in made.todo} == {"set"}


def test_status_counts(folder, capsys):
    run = experiments.runs("main_results", "smoke")[0]
    assert runner.train_and_store(run, "main_results", "smoke", csv(folder)) == "ok"
    assert main(["status", "--profile", "smoke", "--results", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    line = next(line.split() for line in lines if line.startswith("main_results"))
    total = len(experiments.runs("main_results", "smoke"))
    assert line[1:4] == ["1", "0", str(total - 1)]
    assert lines[0].split() == ["experiment", "done", "diverged", "missing", "left"]


def test_an_imported_kernel_is_no_notebook(capsys):
    """Another part of the process may have imported ipykernel; progress is then printed."""
    import ipykernel.kernelapp  # noqa: F401
    import IPython.display  # noqa: F401

    progress.print_line()("3 of 7 runs\n")
    assert capsys.readouterr().out.strip() == "3 of 7 runs"


def test_a_run_is_claimed_once(folder):
    checkpoint = folder / "checkpoints" / "a.pt"
    with single.claim(checkpoint) as first:
        with single.claim(checkpoint) as second:
            assert first and not second
        with single.claim(checkpoint) as third:
            assert not third
    with single.claim(checkpoint) as fourth:
        assert fourth
    assert not list(checkpoint.parent.iterdir())


TORCH_FREE = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision"):
            raise ImportError(f"{name} was imported")
sys.meta_path.insert(0, NoTorch())
for name in sys.argv[1:]:
    __import__(name)
import lib
from lib import experiments, paths
from lib.results import store as results
assert experiments.runs("main_results", "paper")
assert results.read_runs(paths.results_csv("smoke", "nothing")).empty
"""


def test_results_and_figures_need_no_torch():
    reading = [
        f"{package}.{module.name}"
        for package in ("lib.results", "lib.claims", "lib.figures", "lib.report")
        for module in pkgutil.iter_modules([str(REPO / package.replace(".", "/"))])
    ]
    assert len(reading) > 30
    there = [*reading, "lib.stats", "lib.experiments", "lib.runs.cost", "lib.runs.runner"]
    there.append("lib.__main__")
    done = subprocess.run(
        [sys.executable, "-c", TORCH_FREE, *there],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------ runs side by side


def test_runs_side_by_side(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    small, large = Run(), Run(dataset="cifar10", model="vgg16-d", batch_size=128)
    for runs, device, jobs in (
        ([small] * 40, "cpu", 16),
        ([small] * 3, "cpu", 3),
        ([small] * 40, "cuda", machine.GPU_JOBS),
        ([small] * 3, "cuda", 3),
        ([small, large], "cuda", 1),
    ):
        assert machine.default_jobs(runs, device) == (jobs, 1)
