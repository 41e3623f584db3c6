"""Runs a grid: skips what is done, trains the rest in worker processes, stores every row at once.

The command line, the notebooks and cluster shards all call `run_experiment`. A run that is in the
CSV is not trained again; a run that was killed continues from its checkpoint; two processes never
train the same run at the same time.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypedDict, Unpack

import pandas as pd

from lib import experiments, paths
from lib.config import Run
from lib.results import store as results
from lib.runs import cost

# On a GPU, runs of networks that do not fill it are trained so many side by side.
GPU_JOBS = 4
FILLS_A_GPU = 2e10

# Fields of a run without a column of their own go into the column `overrides`.
_COLUMN_OF_FIELD = {item.name for item in fields(Run)} & set(results.COLUMNS)


@dataclass(frozen=True)
class Plan:
    """What one call is about to do: runs that are done, and runs to train, in order."""

    experiment: str
    profile: str
    csv: Path
    done: tuple[Run, ...]
    todo: tuple[Run, ...]


def plan(
    experiment: str,
    profile: str,
    *,
    only: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    shard: tuple[int, int] = (1, 1),
    results_root: str | Path | None = None,
) -> Plan:
    """The runs of an experiment at a profile, split into done and to do.

    `only` keeps runs with all the given `field=value` (several values of one field: any of them);
    `overrides` sets fields of every run, which gives new ids; `shard` (i, n) keeps every n-th run
    from the i-th, 1-based. Raises ValueError for unknown names and for a selection without runs.
    """
    runs = experiments.runs(experiment, profile)
    if overrides:
        runs = experiments.unique(run.overridden(**overrides) for run in runs)
    runs = experiments.select(runs, only)
    index, count = shard
    if not 1 <= index <= count:
        raise ValueError(f"shard {index}/{count}: the first number goes from 1 to {count}")
    runs = runs[index - 1 :: count]
    csv = paths.results_csv(profile, experiment, results_root)
    known = set(results.read_runs(csv)["run_id"])
    return Plan(
        experiment,
        profile,
        csv,
        done=tuple(run for run in runs if run.run_id in known),
        todo=tuple(run for run in runs if run.run_id not in known),
    )


class Options(TypedDict, total=False):
    """What `run_experiments` takes beside names and profile."""

    only: Sequence[str]
    overrides: dict[str, Any] | None
    shard: tuple[int, int]
    results_root: str | Path | None
    jobs: int | None
    threads: int | None
    device: str | None
    say: Callable[[str], None] | None


def run_experiment(
    experiment: str, profile: str = "quick", **options: Unpack[Options]
) -> pd.DataFrame:
    """Train what is missing of one experiment and return the rows of its selected runs; the options
    are those of `run_experiments`.
    """
    return run_experiments([experiment], profile, **options)[experiment]


def run_experiments(
    names: Sequence[str],
    profile: str = "quick",
    *,
    only: Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    shard: tuple[int, int] = (1, 1),
    results_root: str | Path | None = None,
    jobs: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, pd.DataFrame]:
    """Train what is missing of some experiments, the first seed of all of them, then the second;
    returns the rows of all selected runs of each (lib/results/store.py). A run that several need is
    trained once.

    `only`, `overrides` and `shard` select and change runs (`plan`); of several experiments, those
    in which no run has all that `only` asks are left out, and ValueError says when none is left.
    `jobs` runs are trained side by side with `threads` threads each; by default whichever
    `default_jobs` says. `say` receives one line of progress, about once a second. On Ctrl-C the
    workers write their checkpoints and KeyboardInterrupt goes on. Raises the first error of a
    worker after the other runs have ended; diverged runs are rows, not errors.
    """
    say = say or print_line()

    def plans() -> list[Plan]:
        found, refused = [], None
        for name in names:
            try:
                found.append(
                    plan(
                        name,
                        profile,
                        only=only,
                        overrides=overrides,
                        shard=shard,
                        results_root=results_root,
                    )
                )
            except experiments.NoSuchRunError as error:
                refused = error
        if refused is not None and not found:
            raise refused
        return found

    for one in plans():
        _copy_rows_of_other_experiments(one)
    planned = plans()
    tasks: dict[str, tuple[Run, Plan]] = {}
    for one in planned:
        for run in one.todo:
            if run.dataset != "imagenet":
                tasks.setdefault(run.run_id, (run, one))
    if any(run.dataset == "imagenet" for one in planned for run in one.todo):
        from lib.runs.imagenet import missing

        say(
            (missing() or "ImageNet runs are left out: torchrun -m lib.runs.imagenet trains them")
            + "\n"
        )
    title = f"{' '.join(names) if len(names) < 4 else f'{len(names)} experiments'} ({profile})"
    if tasks:
        device = device or default_device()
        own_jobs, own_threads = default_jobs([run for run, _ in tasks.values()], device)
        in_order = sorted(tasks.values(), key=lambda task: task[0].seed)
        _train_all(title, in_order, jobs or own_jobs, threads or own_threads, device, say)
        for one in planned:
            _copy_rows_of_other_experiments(one)
    else:
        say(f"{title}: all {sum(len(one.done) for one in planned)} runs are done\n")
    tables = {}
    for one in planned:
        wanted = {run.run_id for run in (*one.done, *one.todo)}
        rows = results.read_runs(one.csv)
        tables[one.experiment] = rows[rows["run_id"].isin(wanted)].reset_index(drop=True)
    return tables


def default_device() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def default_jobs(runs: Sequence[Run], device: str) -> tuple[int, int]:
    """(runs side by side, threads of each): on a CPU one single-threaded run per core.

    Runs are independent, so this wastes nothing on synchronising threads: `make bench` measures
    it against one run with all threads. On a GPU one at a time, or GPU_JOBS where none of them
    fills it: the forward pass of a mini-batch is under FILLS_A_GPU floating-point operations.
    `make bench` measures that too, where there is a GPU; none has been at hand so far.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = max(1, min(cores or 1, len(runs)))
    if device != "cpu":
        from lib.models import forward_flops

        work = {(run.model, run.batch_size) for run in runs}
        small = all(sum(forward_flops(m).values()) * b < FILLS_A_GPU for m, b in work)
        jobs = min(jobs, GPU_JOBS) if small else 1
    return jobs, 1


# --------------------------------------------------------------------------------------------------
# Training in worker processes
# --------------------------------------------------------------------------------------------------


def _train_all(
    title: str,
    tasks: Sequence[tuple[Run, Plan]],
    jobs: int,
    threads: int,
    device: str,
    say: Callable[[str], None],
) -> None:
    context = get_context("spawn")
    messages, stop = context.Queue(), context.Event()
    board = _Board(title, tasks, device, jobs)
    pool = ProcessPoolExecutor(
        max_workers=jobs,
        mp_context=context,
        initializer=_start_worker,
        initargs=(threads, messages, stop, os.getpid()),
    )
    pending: set[Future[str]] = set()
    errors: list[BaseException] = []
    elsewhere = 0
    try:
        with _workers_ignore_interrupts():
            for run, todo in tasks:
                args = (run, todo.experiment, todo.profile, todo.csv, device)
                pending.add(pool.submit(_work, *args))
        while pending:
            finished, pending = wait(pending, timeout=0.5)
            for future in finished:
                if future.cancelled():
                    continue
                if (error := future.exception()) is None:
                    elsewhere += future.result() == "elsewhere"
                else:
                    errors.append(error)
                    for other in pending:
                        other.cancel()
                    pending = {other for other in pending if not other.cancelled()}
            with contextlib.suppress(queue.Empty):
                while True:
                    board.note(*messages.get_nowait())
            say(board.line())
        say(board.line() + "\n")
        if elsewhere:
            say(f"{elsewhere} of these runs are being trained by another process\n")
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, or a scheduler's time limit
        stop.set()
        for future in pending:
            future.cancel()
        say("\nstopping: every unfinished run keeps its checkpoint; the same command goes on\n")
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if errors:
        raise errors[0]


@contextlib.contextmanager
def _workers_ignore_interrupts() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, which goes to the whole group of processes: not
    even while they import. For this process it is only put off.
    """
    caught: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    # Blocking is inherited by the children, but holds for this thread only: a library's thread may
    # take the signal, and Python would then run the handler here.
    defer = threading.current_thread() is threading.main_thread() and callable(handler)
    if defer:
        signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if defer:
            signal.signal(signal.SIGINT, handler)
    if caught:
        raise KeyboardInterrupt


class _Board:
    """Who is how far, in units of estimated cost: the line of progress and its ETA."""

    def __init__(
        self, title: str, tasks: Sequence[tuple[Run, Plan]], device: str, jobs: int
    ) -> None:
        self.title = title
        estimate = cost.Estimator(tasks[0][1].csv.parent, device)
        self.cost = {run.run_id: estimate.seconds(run) for run, _ in tasks}
        self.part = dict.fromkeys(self.cost, 0.0)
        self.resumed: dict[str, float] = {}
        self.jobs = jobs
        self.running: dict[str, float | None] = {}
        self.ended = 0
        self.started = time.monotonic()

    def note(self, kind: str, run_id: str, part: float, error_pct: float | None) -> None:
        if kind == "end":
            self.ended += 1
            self.running.pop(run_id, None)
            self.part[run_id] = 1.0
            return
        self.resumed.setdefault(run_id, part)
        self.part[run_id] = part
        self.running[run_id] = error_pct

    def line(self) -> str:
        total = sum(self.cost.values())
        done = sum(self.cost[i] * part for i, part in self.part.items())
        fresh = done - sum(self.cost[i] * part for i, part in self.resumed.items())
        spent = time.monotonic() - self.started
        # Trust the estimate until a tenth of a minute's work has been seen.
        rate = fresh / spent if fresh > 0 and spent > 6 else self.jobs
        left = datetime.timedelta(seconds=round((total - done) / rate))
        error = [e for e in self.running.values() if e is not None]
        last = f", validation error {error[-1]:.2f} %" if error else ""
        return (
            f"{self.title}: {self.ended} of {len(self.cost)} runs, "
            f"{100 * done / total:.0f} %, {left} left{last}"
        )


_messages: Any = None
_stop: Any = None
_parent = 0
_training = threading.Lock()  # held by a worker while it trains


def _start_worker(threads: int, messages: Any, stop: Any, parent: int) -> None:
    import torch

    from lib.kernels import keep_freed_memory

    global _messages, _stop, _parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops us
    torch.set_num_threads(threads)
    keep_freed_memory()  # a fifth of a LeNet-5 step would be spent on getting zeroed pages back
    _messages, _stop, _parent = messages, stop, parent
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()


def _leave_with_the_parent() -> None:
    """In a worker: end when the parent was killed. Waiting for work, it would never be told: each
    worker holds the others' pipe open. A run in training stops by itself, after its checkpoint.
    """
    while os.getppid() == _parent:
        time.sleep(1)
    with _training:
        os._exit(1)


def _work(run: Run, experiment: str, profile: str, csv: Path, device: str) -> str:
    """In a worker: train one run and store its row. Returns what became of it."""
    with _training:
        return _train_one(run, experiment, profile, csv, device)


def _train_one(run: Run, experiment: str, profile: str, csv: Path, device: str) -> str:

    def told(progress: Any) -> None:
        part = progress.epoch / progress.epochs
        _messages.put(("progress", run.run_id, part, progress.val_error_pct))

    def should_stop() -> bool:
        return _stop.is_set() or os.getppid() != _parent

    if should_stop():  # before the seconds that importing and loading take
        return "interrupted"
    from lib.train import Interrupted

    try:
        state = train_and_store(
            run, experiment, profile, csv, device=device, progress=told, should_stop=should_stop
        )
    except Interrupted:
        return "interrupted"
    _messages.put(("end", run.run_id, 1.0, None))
    return state


def train_and_store(
    run: Run,
    experiment: str,
    profile: str,
    csv: Path,
    *,
    device: str = "cpu",
    checkpoint_seconds: float = 30.0,
    progress: Callable[[Any], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> str:
    """Train one run in this process and append its row; "ok", "diverged", "done" or "elsewhere".

    "done": another process stored it meanwhile; "elsewhere": another process is training it.
    """
    from lib.measures import MEASURES
    from lib.train import train

    checkpoint = paths.checkpoints_dir() / profile / f"{run.run_id}.pt"
    with _claim(checkpoint) as mine:
        if not mine:
            return "elsewhere"
        if run.run_id in set(results.read_runs(csv)["run_id"]):
            return "done"
        outcome = train(
            run,
            _dataset(run.dataset, device, run.val_fraction, run.train_samples),
            measures=[MEASURES[name] for name in experiments.measures(run, experiment, profile)],
            device=device,
            checkpoint=checkpoint,
            checkpoint_seconds=checkpoint_seconds,
            progress=progress,
            should_stop=should_stop,
        )
        row = row_of(run, outcome, experiment, profile, device)
        results.append_run(csv, row, outcome.curves, outcome.layers, outcome.measures)
        checkpoint.unlink(missing_ok=True)
    return outcome.status


@functools.lru_cache(maxsize=2)
def _dataset(name: str, device: str, val_fraction: float, train_samples: int) -> Any:
    from lib import data

    return data.load(name, device=device, val_fraction=val_fraction, train_subset=train_samples)


@contextlib.contextmanager
def _claim(checkpoint: Path) -> Iterator[bool]:
    """Whether this process holds the run; the kernel lets go of it when the process dies."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    lock = checkpoint.with_suffix(".lock")
    while True:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            yield False
            return
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(lock)):
                break
        os.close(fd)  # its last holder removed the file between our two calls
    try:
        yield True
    finally:
        with contextlib.suppress(FileNotFoundError):
            lock.unlink()
        os.close(fd)


def _copy_rows_of_other_experiments(todo: Plan) -> None:
    """The same run can be a cell of several experiments: its row is copied, not trained again,
    unless the other experiment did not take the measures that this one needs.
    """
    known = set(results.read_runs(todo.csv)["run_id"])
    missing = {run.run_id for run in todo.todo} - known
    if not missing:
        return
    needed = set(experiments.experiment(todo.experiment).measures)
    for other in experiments.EXPERIMENTS:
        source = todo.csv.with_name(f"{other}.csv")
        if other == todo.experiment or not source.exists():
            continue
        rows = results.read_runs(source)
        rows = rows[rows["run_id"].isin(missing)]
        if rows.empty:
            continue
        curves = results.read_curves(source, runs=rows)
        layers = results.read_layers(source, runs=rows)
        measures = results.read_measures(source, runs=rows)
        for row in rows.to_dict("records"):
            mine = row["run_id"]
            taken = measures[measures["run_id"] == mine]
            if row["status"] == "ok" and not needed <= set(taken["measure"]):
                continue
            results.append_run(
                todo.csv,
                {**{str(k): v for k, v in row.items()}, "experiment": todo.experiment},
                curves[curves["run_id"] == mine].to_dict("records"),
                layers[layers["run_id"] == mine].to_dict("records"),
                taken.to_dict("records"),
            )
            missing.discard(mine)


# --------------------------------------------------------------------------------------------------
# Rows and provenance
# --------------------------------------------------------------------------------------------------


def row_of(run: Run, outcome: Any, experiment: str, profile: str, device: str) -> dict[str, Any]:
    """One row of the results: the run, what it measured, and where it was measured."""
    import torch

    others = {k: v for k, v in run.non_default().items() if k not in _COLUMN_OF_FIELD}
    measured = vars(outcome)
    row: dict[str, Any] = {name: getattr(run, name) for name in _COLUMN_OF_FIELD}
    row |= {name: measured[name] for name in measured if name in results.COLUMNS}
    if run.prune == "none":  # the masks never move
        row |= {"prune_rate": None, "schedule": "", "update_every_steps": None}
    row |= {
        "run_id": run.run_id,
        "experiment": experiment,
        "profile": profile,
        "keep_dense": " ".join(run.keep_dense),
        "overrides": json.dumps(others, sort_keys=True) if others else "",
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        **versions(),
        "finished_utc": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return row


def device_name(device: str = "cpu") -> str:
    """The processor's or the GPU's name."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.lru_cache(maxsize=1)
def versions() -> dict[str, Any]:
    """Commit of the code, whether the tree was dirty, and versions of what the numbers rest on."""
    from importlib.metadata import version

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(paths.REPO), *words], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD")
    code = ("lib", "environment.yml")
    return {
        "commit": commit or "unknown",
        "dirty": bool(git("status", "--porcelain", "--", *code)) if commit else None,
        "python": platform.python_version(),
        "torch": version("torch"),
        "torchvision": version("torchvision"),
    }


def print_line() -> Callable[[str], None]:
    """Progress for people: one line rewritten on a terminal or notebook, one a minute in a log."""
    # An imported ipykernel is not yet a notebook: only a running kernel has a display to update.
    kernel = sys.modules.get("ipykernel.kernelapp")
    if kernel is not None and kernel.IPKernelApp.initialized():
        from IPython.display import display

        handle = display({"text/plain": ""}, raw=True, display_id=True)
        if handle is not None:
            return lambda text: handle.update({"text/plain": text.strip()}, raw=True)
    last = [-60.0]

    def say(text: str) -> None:
        if sys.stdout.isatty():
            print(f"\r\x1b[K{text}", end="", flush=True)
        elif text.endswith("\n") or time.monotonic() - last[0] >= 60:
            last[0] = time.monotonic()
            print(text.rstrip("\n"), flush=True)

    return say


def status_table(profile: str, results_root: str | Path | None = None, device: str = "cpu") -> str:
    """One line per experiment: runs done, diverged and missing, and the hours left here.

    The last line counts a run that several experiments need once.
    """
    cores = default_jobs([Run()] * 1000, device)[0] if device == "cpu" else 1
    width = 20

    def line(name: str, finished: int, diverged: int, left: dict[str, float]) -> str:
        hours = sum(left.values()) / cores / 3600
        return f"{name:<{width}}{finished:>6}{diverged:>10}{len(left):>9}{hours:>10.1f} h"

    each: dict[str, float] = {}
    done: set[str] = set()
    bad: set[str] = set()
    lines = [f"{'experiment':<{width}}{'done':>6}{'diverged':>10}{'missing':>9}{'left':>12}"]
    for name in experiments.EXPERIMENTS:
        todo = plan(name, profile, results_root=results_root)
        rows = results.read_runs(todo.csv)
        here = {run.run_id for run in todo.done}
        diverged = set(rows["run_id"][rows["status"] == "diverged"]) & here
        estimate = cost.Estimator(todo.csv.parent, device)
        seconds = {run.run_id: estimate.seconds(run) for run in todo.todo}
        lines.append(line(name, len(here), len(diverged), seconds))
        each |= seconds
        done |= here
        bad |= diverged
    missing = {run_id: seconds for run_id, seconds in each.items() if run_id not in done}
    lines.append(line("all, each run once", len(done), len(bad), missing))
    how = "one run per core" if device == "cpu" else "one run at a time"
    lines.append(f"profile {profile}, on {cores} x {device_name(device)}, {how}")
    return "\n".join(lines)
