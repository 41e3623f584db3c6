"""Kills everything again and again: python -m tests.soak, or make soak.

Prints one line for each part, and ends with code 1 where a run has other bits than an undisturbed
one, a row is lost, or a file or a process is left over. Nothing outside of temporary folders is
written but results/bench/soak.csv, with --write. The data sets must be there (DATA_ROOT).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lib import paths
from lib.config import Run
from lib.results import store
from lib.runs import pool
from lib.runs.machine import versions
from lib.runs.runner import run_experiments, tasks_of
from lib.train import TrainingLoop
from tests.support.made_up_runs import assert_whole, make_curves, make_layers, make_row

METHODS = ("sparse_momentum", "set", "dsr", "deepr", "rigl", "snip", "static", "dense")
KINDS = ("run", "worker", "parent")
WRITERS = 8
Figures = dict[str, Any]


def fork(work: Callable[[], object]) -> int:
    """Do `work` in a new process group that has loaded what this process has; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        work()
        code = 0
    except RuntimeError:  # runs whose worker was killed: the next attempt goes on with them
        code = 3
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def end_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def members(group: int) -> list[int]:
    """Processes of a group that still run (zombies don't)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, pgid = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            found += [int(folder.name)] if int(pgid) == group and state != "Z" else []
    return found


def left_after(group: int, seconds: float) -> int:
    """How many members of a group are left after so long; ends as soon as none is."""
    end = time.monotonic() + seconds
    while members(group) and time.monotonic() < end:
        time.sleep(0.02)
    return len(members(group))


def torn(folder: Path) -> list[Path]:
    """What a killed process left and nobody cleaned up: in the results, of checkpoints."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [p for p in files if p.suffix != ".csv" and not p.name.endswith(".csv.lock")]


def run_of(method: str, seed: int) -> Run:
    return Run(
        method=method,
        epochs=2,
        train_samples=1200,
        prune_rate=0.3,
        lr_decay_every_steps=20,
        weight_decay=0.0 if method == "deepr" else 5e-4,
        update_every_steps=0 if method == "set" else 7,
        seed=seed,
    )


def train(runs: list[Run], folder: Path) -> None:
    """As `python -m lib run`, with a checkpoint after every step, and workers that are forked: they
    needn't import torch and load the data again.
    """
    serve = pool._serve

    def alone(pipe: Any, *rest: Any) -> None:
        for fd in map(int, os.listdir("/proc/self/fd")):  # the parent's end of the pipe for one
            if fd > 2 and fd != pipe.fileno():
                with contextlib.suppress(OSError):
                    os.close(fd)
        serve(pipe, *rest)

    pool._serve = alone
    pool.get_context = lambda _: multiprocessing.get_context("fork")
    pool.train_and_store = functools.partial(pool.train_and_store, checkpoint_seconds=0.0)
    os.environ["CHECKPOINT_ROOT"] = str(folder / "checkpoints")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        run_experiments(
            "main_results", "smoke", grid=runs, results_root=folder, jobs=2, device="cpu"
        )
    # What a kill between a run's row and its clean-up left goes when the run is asked for again.
    for task in tasks_of("main_results", "smoke", runs, results_root=folder):
        assert pool.train_and_store(task) == "done"


def tables(folder: Path) -> list[pd.DataFrame]:
    """Rows, curves and layers in the order of the runs, without where and when."""
    files = folder / "own" / "smoke"
    runs = store.read_runs(files)
    kept = [name for name in runs if name not in store.PROVENANCE]
    every = (runs[kept], store.read_curves(files), store.read_layers(files))
    return [t.sort_values([*t][:3], ignore_index=True) for t in every]


def trainings(kills: int, folder: Path, chance: random.Random) -> Figures:
    """Kill `run`, one of its workers or the parent alone at random moments, and start it again."""
    done, runs_done, seed = dict.fromkeys((*KINDS, "same_bits", "rows_lost", "left_over"), 0), 0, 0
    names: list[str] = []
    while sum(done[kind] for kind in KINDS) < kills:
        runs = [run_of(METHODS[(3 * seed + k) % len(METHODS)], seed) for k in range(3)]
        whole, killed = folder / f"{seed} whole", folder / f"{seed} getötet"
        started, code = time.monotonic(), -1
        assert end_of(fork(functools.partial(train, runs, whole))) == 0
        seconds = time.monotonic() - started
        while code != 0:
            pid = fork(functools.partial(train, runs, killed))
            kind = KINDS[sum(done[kind] for kind in KINDS) % len(KINDS)]
            if sum(done[kind] for kind in KINDS) < kills:
                time.sleep(chance.random() * seconds)
                workers = [one for one in members(pid) if one != pid]
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    for victim in [pid] if kind != "worker" else workers[:1]:
                        (os.killpg if kind == "run" else os.kill)(victim, signal.SIGKILL)
            code = end_of(pid)
            assert code in (-signal.SIGKILL, 0, 3), code
            done[kind] += code != 0
            done["left_over"] += left_after(pid, 10.0)
        same = all(a.equals(b) for a, b in zip(tables(whole), tables(killed), strict=True))
        done["same_bits"] += len(runs) if same else 0
        done["rows_lost"] += len(runs) - len(tables(killed)[0])
        done["left_over"] += len(files := torn(killed))
        names += [file.name for file in files]
        runs_done, seed = runs_done + len(runs), seed + 1
    said = ", ".join([*(f"{kind} {done[kind]}" for kind in KINDS), *names])
    good = done["same_bits"] == runs_done and not done["rows_lost"] + done["left_over"]
    found = f"{'ok' if good else 'BAD'}: of {runs_done} runs; killed: {said}"
    return {**done, "kills": sum(done[kind] for kind in KINDS), "found": found}


def writers(kills: int, folder: Path, chance: random.Random) -> Figures:
    """Eight processes append to the files of one folder at once and are killed again and again."""
    files, rows = [folder / "smoke" / f"x{k}.csv" for k in range(3)], 2 * kills
    total = WRITERS * rows

    def start(k: int) -> int:
        def work() -> None:  # its own rows and some of its neighbour's
            for i in range(k * rows, min(k * rows + rows + rows // 10, total)):
                store.append_run(files[i % 3], make_row(i), make_curves(i), make_layers(i))

        return fork(work)

    running, done = {k: start(k) for k in range(WRITERS)}, 0
    while running:
        time.sleep(chance.random() * 0.1)
        for file in files:
            assert_whole(file, exact=False)  # a reader looks on
        if done < kills:
            os.kill(chance.choice([*running.values()]), signal.SIGKILL)
            done += 1
        for k, pid in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended and os.waitstatus_to_exitcode(status) == -signal.SIGKILL:
                running[k] = start(k)
            elif ended:
                assert status == 0, status
                del running[k]
    found = [seed for file in files for seed in assert_whole(file)]
    lost, left, double = total - len(set(found)), len(torn(folder)), len(found) - len(set(found))
    good = "BAD" if lost + left + double else "ok"
    said = f"{good}: {total:,} rows by {WRITERS} writers, {double} double"
    return {"kills": done, "rows_lost": lost, "left_over": left, "found": said}


def second_user(kills: int, folder: Path, chance: random.Random) -> Figures:
    """Two users of one group: the second goes on from the first one's checkpoint, and appends."""
    if os.getuid() != 0:
        return {"found": "skipped: only root can be another user"}
    runs, shared = [run_of("set", 1), run_of("static", 1)], folder / "shared"
    folder.chmod(0o755)
    shared.mkdir()
    os.chown(shared, -1, 65534)
    shared.chmod(0o2775)

    def second() -> None:
        train([run_of("dense", 1)], folder / "before")  # imports what this user may not read
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        train(runs, shared)

    first = fork(lambda: train(runs[:1], shared))
    while not list(folder.rglob("*.pt")):
        time.sleep(0.001)
    os.killpg(first, signal.SIGKILL)
    end_of(first)
    code = end_of(fork(second))
    lost, left = len(runs) - len(store.read_runs(shared / "own" / "smoke")), len(torn(shared))
    said = "BAD" if code or lost or left else "ok"
    return {"kills": 1, "rows_lost": lost, "left_over": left, "found": f"{said}: code {code}"}


PARTS = (trainings, writers, second_user)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="of trainings, and of writers")
    parser.add_argument("--write", action="store_true", help="the table to results/bench/soak.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)  # and no backward pass in this process: it can be forked
    TrainingLoop(run_of("set", 0))  # what each forked child would compile, import and load anew
    rows = []
    for part in PARTS:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as name:
            figures = part(options.kills, Path(name), random.Random(part.__name__))
        about = {"date": f"{datetime.date.today()}", "commit": versions()["commit"]}
        seconds = round(time.monotonic() - started)
        rows.append({"part": part.__name__, **figures, "seconds": seconds, **about})
        print(rows[-1], flush=True)
    if options.write:
        table = pd.DataFrame(rows, dtype=object).drop(columns=list(KINDS))
        table.to_csv(paths.REPO / "results/bench/soak.csv", index=False)
    return 1 if any("BAD" in row["found"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
