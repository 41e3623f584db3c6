"""Kills at random moments: of trainings, and of several writers of the same files."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import torch

from lib import paths
from lib.config import Run
from lib.results.store import PROVENANCE, append_run, read_runs
from lib.runs import single
from tests.soak.parts import Row, Share, chance, die_at, fork, kill_group, problem_of
from tests.support.kill_and_resume import run_of
from tests.support.made_up_runs import make_curves, make_layers, make_row

METHODS = ("sparse_momentum", "set", "dsr", "deepr", "rigl", "snip", "static", "dense")
KINDS = ("timer", "checkpoint", "append")
WRITERS, ROWS = 8, 1000


def trainings(share: Share) -> Row:
    """Kill trainings with a checkpoint after every step until they are done all the same."""
    wanted, random = share.of(100), chance("trainings")
    kills = dict.fromkeys(KINDS, 0)
    problems: list[str] = []
    done = 0
    torch.set_num_threads(1)  # and no backward pass in this process: it can be forked
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = os.environ.get("CHECKPOINT_ROOT")
        os.environ["CHECKPOINT_ROOT"] = str(folder / "checkpoints")
        while sum(kills.values()) < wanted and not share.over:
            run = run_of(METHODS[done % len(METHODS)]).overridden(seed=done)
            single.dataset(run.dataset, "cpu", run.val_fraction, run.train_samples)
            whole, csv = (folder / f"{done}-{name}" / "x.csv" for name in ("whole", "killed"))
            started = time.monotonic()
            if _end_of(fork(lambda run=run, csv=whole: _train(run, csv))):
                problems.append(f"{run.run_id} can't be trained")
                break
            seconds = time.monotonic() - started
            while True:
                kind = min(KINDS, key=lambda kind: kills[kind])
                enough = sum(kills.values()) >= wanted or share.over
                number = 10**9 if enough or kind == "timer" else random.randint(1, 12)
                target = csv.parent if kind == "append" else paths.checkpoints_dir()
                after = random.random() < 0.5

                def work(
                    run: Run = run,
                    csv: Path = csv,
                    target: Path = target,
                    number: int = number,
                    after: bool = after,
                ) -> None:
                    die_at(target.resolve(), number, after)
                    _train(run, csv)

                pid = fork(work)
                if kind == "timer" and not enough:
                    time.sleep(random.random() * seconds)
                    kill_group(pid)
                code = _end_of(pid)
                if problem := problem_of(csv):
                    problems.append(problem)
                if code == 0:
                    break
                if code > 0:
                    problems.append(f"{run.run_id} ended with code {code}")
                    break
                kills[kind] += 1
            if problem := problem_of(csv, PROVENANCE, like=whole):
                problems.append(problem)
            if left := sorted(str(p) for p in (folder / "checkpoints").rglob("*.pt")):
                problems.append(f"checkpoints stay behind: {', '.join(left)}")
            done += 1
        if before is None:
            del os.environ["CHECKPOINT_ROOT"]
        else:
            os.environ["CHECKPOINT_ROOT"] = before
    n = sum(kills.values())
    what = (
        f"training killed by a timer ({kills['timer']}), in a checkpoint's system calls "
        f"({kills['checkpoint']}) and in an append's ({kills['append']})"
    )
    found = problems[0] if problems else f"same bits in {done} of {done} runs, none lost or torn"
    return Row(what, "same bits, no row lost or torn", found, n, not problems and n >= wanted)


def _train(run: Run, csv: Path) -> None:
    single.train_and_store(single.Task(run, "main_results", "smoke", csv), checkpoint_seconds=0)


def _end_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def writers(share: Share) -> Row:
    """Eight writers append to the same eight experiments and are killed again and again, in the
    middle of a system call too; a reader looks on.
    """
    rows, random = share.of(ROWS), chance("writers")
    wanted_kills = share.of(80)
    kills = reads = 0
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        csvs = [Path(name) / str(k) / "x.csv" for k in range(WRITERS)]

        def start(k: int) -> int:
            number = random.randint(1, 400) if random.random() < 0.5 else 10**9
            after = random.random() < 0.5

            def work() -> None:
                die_at(Path(name).resolve(), number, after)
                known = {i for csv in csvs for i in read_runs(csv)["seed"]}
                # Its own rows and some of its neighbour's: both may have the same in hand.
                for i in range(k * rows, min(k * rows + rows + rows // 20, WRITERS * rows)):
                    if i not in known:
                        curves, layers = make_curves(i, 2), make_layers(i, 1)
                        append_run(csvs[i % WRITERS], make_row(i), curves, layers)

            return fork(work)

        running = {k: start(k) for k in range(WRITERS)}
        while running and not share.over:
            time.sleep(random.random() * 0.3)
            if problem := problem_of(random.choice(csvs)):
                problems.append(problem)
            reads += 1
            if kills < wanted_kills:
                kill_group(random.choice(list(running.values())))
            for k, pid in list(running.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if not ended:
                    continue
                code = os.waitstatus_to_exitcode(status)
                if code < 0:
                    kills += 1
                    running[k] = start(k)
                    continue
                if code:
                    problems.append(f"writer {k} ended with code {code}")
                del running[k]
        for pid in running.values():
            kill_group(pid)
            os.waitpid(pid, 0)
        problems += filter(None, map(problem_of, csvs))
        seeds = [i for csv in csvs for i in read_runs(csv)["seed"]] if not problems else []
    double, total = len(seeds) - len(set(seeds)), WRITERS * rows
    found = (
        problems[0]
        if problems
        else f"{len(set(seeds)):,} rows, {double} double, {reads} reads without a torn one"
    )
    return Row(
        f"{WRITERS} writers of {rows:,} rows each, killed {kills} times",
        f"{total:,} rows, none double or torn",
        found,
        total,
        not problems and len(seeds) == total and not double,
    )
