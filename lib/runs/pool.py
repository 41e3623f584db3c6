"""Trains runs side by side in worker processes, each with a pipe of its own to this one.

No lock is shared with a worker, so one that is killed takes nothing along but its run, which keeps
its checkpoint; a new worker takes its place.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context
from typing import Any

from tqdm import tqdm

from lib.runs.single import Task, train_and_store

STOP_SECONDS = 15.0  # for a worker's mini-batch and checkpoint when it is told to stop
ELSEWHERE_SECONDS = 2.0  # until a run that another process is training is asked for again


@dataclass
class _Worker:
    process: Any
    pipe: connection.Connection
    task: Task | None = None


class _Pool:
    """The workers, and what became of their runs."""

    def __init__(
        self, title: str, tasks: Sequence[Task], seconds: Mapping[str, float], jobs: int
    ) -> None:
        self.waiting, self.jobs = deque(tasks), jobs
        self.workers: list[_Worker] = []
        self.failed: list[str] = []  # runs whose worker was killed
        self.errors: list[RuntimeError] = []  # in one sentence; no run is begun after the first
        self.told_of_others = False
        self.left = {task.run.run_id: task.run for task in tasks}
        self.seconds = dict(seconds)  # by network; of this call as soon as there is one
        self.bar = tqdm(
            total=len(tasks),
            desc=title,
            unit="run",
            file=sys.stdout,
            mininterval=0.5 if sys.stdout.isatty() else 60.0,
            bar_format="{desc}: {percentage:3.0f} %|{bar:20}| {n_fmt} of {total_fmt} runs{postfix}",
        )

    def say(self, text: str) -> None:
        self.bar.write(text, sys.stdout)

    def busy(self) -> bool:
        return any(worker.task is not None for worker in self.workers)

    def assign(self, threads: int, device: str) -> None:
        """Give each idle worker a run, and start workers up to the number wanted."""
        idle = [worker for worker in self.workers if worker.task is None]
        while self.waiting and not self.errors and (idle or len(self.workers) < self.jobs):
            worker = idle.pop() if idle else self._start(threads, device)
            worker.task = self.waiting.popleft()
            with contextlib.suppress(OSError):  # it was killed meanwhile: `hear` says so
                worker.pipe.send(worker.task)

    def hear(self, timeout: float) -> None:
        """Take one message of each worker that has sent one, and notice those that died."""
        pipes: dict[Any, _Worker] = {worker.pipe: worker for worker in self.workers}
        for pipe in connection.wait(list(pipes), timeout):
            try:
                message = pipes[pipe].pipe.recv()
            except (EOFError, OSError):
                self._died(pipes[pipe])
            else:
                self._take(pipes[pipe], *message)

    def _start(self, threads: int, device: str) -> _Worker:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        arguments = (theirs, threads, device, os.getpid())
        process = context.Process(target=_serve, args=arguments, daemon=True)
        # Ctrl-C goes to the whole group; a child inherits that it is ignored, even while it imports
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
        try:
            process.start()
        finally:
            if main:
                signal.signal(signal.SIGINT, before)
        theirs.close()
        self.workers.append(_Worker(process, ours))
        return self.workers[-1]

    def _take(self, worker: _Worker, kind: str, *rest: Any) -> None:
        if worker.task is None:
            return
        run_id = worker.task.run.run_id
        if kind == "progress":
            self._show(*rest)
            return
        if kind == "error":
            error = RuntimeError(rest[0])
            error.__cause__ = RuntimeError(f"in a worker:\n{rest[1]}")
            self.errors.append(error)
        elif kind == "elsewhere":
            self.waiting.append(worker.task)  # it is stored one day, or ours when that process ends
            if not self.told_of_others:
                self.say(f"{run_id}: another process is training it; waiting")
            self.told_of_others = True
        elif kind == "interrupted":
            self.failed.append(f"{run_id}: its worker was told to stop")
        else:
            run = self.left.pop(run_id)
            if kind != "done":  # by another process
                self.seconds[run.model] = rest[0]
            self.bar.update()
            self._show(None)
        worker.task = None

    def _show(self, error_pct: float | None) -> None:
        """The time left, as the last run of each network took, and a run's last error."""
        each = [self.seconds.get(run.model) for run in self.left.values()]
        known = [seconds for seconds in each if seconds is not None]
        left = tqdm.format_interval(sum(known) / self.jobs) if len(known) == len(each) else "?"
        last = "" if error_pct is None else f", validation error {error_pct:.2f} %"
        self.bar.set_postfix_str(f"{left} left{last}", refresh=False)
        self.bar.update(0)

    def _died(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        worker.process.join()
        worker.pipe.close()
        code = worker.process.exitcode
        if code >= 0:
            said = f"a worker process ended ({code}), see its message above"
            self.errors.append(RuntimeError(said))
        elif worker.task is not None:
            name = signal.Signals(-code).name
            self.failed.append(f"{worker.task.run.run_id}: its worker was killed ({name})")
            reason = ", for want of memory perhaps: fewer --jobs need less" if code == -9 else ""
            self.say(f"{self.failed[-1]}{reason}; {_kept(worker.task)}")

    def stop(self) -> None:
        """Have the runs in training write their checkpoints, and say which did."""
        stopped = [worker.task for worker in self.workers if worker.task is not None]
        self.waiting.clear()
        self.errors.clear()
        self.say("stopping: waiting for the checkpoints of the runs in training")
        for worker in self.workers:
            worker.process.terminate()  # it finishes its mini-batch and saves (`_serve`)
        end = time.monotonic() + STOP_SECONDS
        while self.busy() and time.monotonic() < end:
            self.hear(0.1)
        for line in map(str, self.errors):
            self.say(line)
        for task in stopped:
            self.say(f"{task.run.run_id}: {_kept(task)}")
        self.say("stopped; the same command goes on")

    def close(self) -> None:
        """End the workers: an idle one ends by itself, others are not waited for."""
        self.bar.close()
        for worker in self.workers:
            worker.pipe.close()
            if worker.task is not None:
                worker.process.kill()
        for worker in self.workers:
            worker.process.join(timeout=2.0)
            worker.process.kill()
            worker.process.join()


def train_all(
    title: str,
    tasks: Sequence[Task],
    seconds: Mapping[str, float],
    jobs: int,
    threads: int,
    device: str,
) -> None:
    """Train and store all tasks, `jobs` at a time, in order; a run that another process is training
    is waited for, and taken over when that process ends.

    `seconds` says what a run of each network takes, for the time left.  On KeyboardInterrupt or
    SystemExit the runs in training write their checkpoints, within STOP_SECONDS, and the exception
    goes on.  Raises RuntimeError for the first run that failed, after those in training have ended,
    and at the end for runs whose worker was killed.
    """
    pool = _Pool(title, tasks, seconds, jobs)
    try:
        pool.assign(threads, device)
        while pool.busy():
            pool.hear(0.5)
            pool.assign(threads, device)
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, or a scheduler's time limit
        with contextlib.suppress(KeyboardInterrupt):  # a second one: without waiting any longer
            pool.stop()
        raise
    finally:
        pool.close()
    if pool.errors:
        raise pool.errors[0]
    if pool.failed:
        raise RuntimeError(
            f"{len(pool.failed)} of {len(tasks)} runs of {title} aren't done, and the same "
            f"command goes on with them: {'; '.join(pool.failed)}"
        )


def _kept(task: Task) -> str:
    """What is left of an unfinished run, as the disk says."""
    try:
        seconds = time.time() - task.checkpoint.stat().st_mtime
    except OSError:
        return "no checkpoint yet, it starts anew"
    return f"its checkpoint of {max(seconds, 0):.0f} s ago stays"


# ------------------------------------------------------------------------------- in a worker


def _serve(pipe: connection.Connection, threads: int, device: str, parent: int) -> None:
    """Train what comes through the pipe, until it is closed or the parent is gone."""
    told_to_stop: list[int] = []  # no lock, which a signal's handler could wait for
    signal.signal(signal.SIGTERM, lambda number, _: told_to_stop.append(number))
    import torch

    from lib.engine import keep_freed_memory

    tqdm.set_lock(threading.RLock())  # torch.fx makes bars; its lock of processes would be left
    torch.set_num_threads(threads)
    keep_freed_memory()  # a fifth of a LeNet-5 step would be spent on getting zeroed pages back

    def tell(error_pct: float | None) -> None:
        with contextlib.suppress(OSError):  # the parent has ended: `should_stop` says so
            pipe.send(("progress", error_pct))

    def should_stop() -> bool:
        return bool(told_to_stop) or os.getppid() != parent

    with contextlib.suppress(EOFError, OSError):  # the parent has ended
        while True:
            task = pipe.recv()
            started = time.monotonic()
            message = _train_one(task, device=device, progress=tell, should_stop=should_stop)
            pipe.send((*message, time.monotonic() - started))
            told_to_stop.clear()
    os._exit(0)  # taking torch down would take seconds on a busy machine


def _train_one(task: Task, **how: Any) -> tuple[str, ...]:
    """Train one run and store its row: what became of it; with "error" what happened, traceback."""
    from lib.train import Interrupted

    try:
        if how["should_stop"]():  # before the seconds that loading takes
            raise Interrupted
        status = train_and_store(task, **how)
        if status == "elsewhere":
            time.sleep(ELSEWHERE_SECONDS)
        return (status,)
    except Interrupted:
        return ("interrupted",)
    except Exception as error:
        expected = isinstance(error, (ValueError, RuntimeError, OSError))
        said = str(error) if expected else f"{type(error).__name__}: {error}"
        sentence = said if task.run.run_id in said else f"{task.run.run_id}: {said}"
        return "error", sentence, traceback.format_exc()
