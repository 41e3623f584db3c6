"""Kills a training process again and again until the run is done; a program, used by test_train.

python kill_and_resume.py FOLDER METHOD...   writes FOLDER/<METHOD>/whole/x.csv, trained in one go,
and FOLDER/<METHOD>/killed/x.csv, and prints the number of kills of each method as JSON. Every
attempt is a process of its own; forking them saves importing and loading anew.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from lib import paths
from lib.config import Run
from lib.runs import single


def run_of(method: str) -> Run:
    return Run(
        method=method,
        epochs=2,
        train_samples=1200,
        density=0.05,
        prune_rate=0.3,
        lr_decay_every_steps=20,
        weight_decay=0.0 if method == "deepr" else 5e-4,
        update_every_steps=0 if method == "set" else 7,
    )


def start(run: Run, csv: Path) -> int:
    """Train in a new process; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        task = single.Task(run, "main_results", "smoke", csv)
        single.train_and_store(task, checkpoint_seconds=0)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def train_with_kills(run: Run, csv: Path, chance: random.Random) -> int:
    """Kill after 1 to 12 new checkpoints, at any point of a step; the number of kills."""
    checkpoint = paths.checkpoints_dir() / "smoke" / f"{run.run_id}.pt"
    kills = 0
    while True:
        pid = start(run, csv)
        left, last = chance.randint(1, 12), inode(checkpoint)
        while left:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                assert status == 0, status
                return kills
            now = inode(checkpoint)
            left, last = left - (now != last), now
            time.sleep(0.0005)
        time.sleep(chance.random() * 0.01)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        kills += os.WIFSIGNALED(status)


def main() -> None:
    folder, methods = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)  # and no backward pass in this process: it can be forked
    kills = {}
    for method in methods:
        run = run_of(method)
        single.dataset(run.dataset, "cpu", run.val_fraction, run.train_samples)
        _, status = os.waitpid(start(run, folder / method / "whole" / "x.csv"), 0)
        assert status == 0, status
        kills[method] = train_with_kills(
            run, folder / method / "killed" / "x.csv", random.Random(method)
        )
    print(json.dumps(kills))


if __name__ == "__main__":
    main()
