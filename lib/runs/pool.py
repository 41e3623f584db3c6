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
from types import SimpleNamespace
from typing import Any

from tqdm import tqdm

from lib.runs.single import Task, train_and_store

# Told to stop, a worker has so long for its mini-batch and its checkpoint; then it is killed.
STOP_SECONDS = 15.0
# A run that another process is training is asked for again after so long.
ELSEWHERE_SECONDS = 2.0


class WorkerError(RuntimeError):
    """What went wrong in a worker, in one sentence; `__cause__` has the worker's traceback."""


@dataclass
class _Worker:
    process: Any
    pipe: connection.Connection
    task: Task | None = None
    ready: bool = False  # it has sent something: it could start


class _Pool:
    """The workers, and what became of their runs."""

    def __init__(
        self,
        title: str,
        tasks: Sequence[Task],
        seconds: Mapping[str, float],
        jobs: int,
        threads: int,
        device: str,
    ) -> None:
        self.waiting, self.jobs = deque(tasks), jobs
        self.threads, self.device = threads, device
        self.workers: list[_Worker] = []
        self.failed: list[str] = []  # runs whose worker was killed
        self.errors: list[WorkerError] = []  # no run is begun after the first
        self.told_of_others = False
        self.left = {task.run.run_id: task.run for task in tasks}
        self.seconds = seconds
        self.begun: dict[str, float] = {}  # when a run was first heard of
        self.taken: dict[str, list[float]] = {}  # by network: seconds of the runs of this call
        self.bar = tqdm(
            total=len(tasks),
            desc=title,
            unit="run",
            file=sys.stdout,
            mininterval=0.5 if sys.stdout.isatty() else 60.0,
            bar_format="{desc}: {percentage:3.0f} %|{bar:20}| {n_fmt} of {total_fmt} runs{postfix}",
        )

    def busy(self) -> bool:
        return any(worker.task is not None for worker in self.workers)

    def assign(self) -> None:
        """Give each idle worker a run, and start workers up to the number wanted."""
        idle = [worker for worker in self.workers if worker.task is None]
        while self.waiting and not self.errors and (idle or len(self.workers) < self.jobs):
            worker = idle.pop() if idle else self._start()
            worker.task = self.waiting.popleft()
            with contextlib.suppress(OSError):  # it was killed meanwhile: `hear` says so
                worker.pipe.send((worker.task, self.device))

    def hear(self, timeout: float) -> None:
        """Take one message of each worker that has sent one, and notice those that died."""
        pipes = {worker.pipe: worker for worker in self.workers}
        for pipe in connection.wait(list(pipes), timeout):
            worker = pipes[pipe]  # type: ignore[index]
            try:
                self._take(worker, *worker.pipe.recv())
            except (EOFError, OSError):
                self._died(worker)

    def _start(self) -> _Worker:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        arguments = (theirs, self.threads, os.getpid())
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
        worker.ready = True
        if kind == "ready" or worker.task is None:
            return
        run_id, now = worker.task.run.run_id, time.monotonic()
        if kind == "progress":
            self.begun.setdefault(run_id, now)
            self._show(rest[0])
            return
        if kind == "error":
            sentence, text = rest
            error = WorkerError(sentence)
            error.__cause__ = RuntimeError(f"in a worker:\n{text}")
            self.errors.append(error)
        elif rest[0] == "elsewhere":
            self.waiting.append(worker.task)  # it is stored one day, or ours when that process ends
            if not self.told_of_others:
                self.bar.write(f"{run_id}: another process is training it; waiting", sys.stdout)
            self.told_of_others = True
        elif rest[0] == "interrupted":
            self.failed.append(f"{run_id}: its worker was told to stop")
        else:
            run = self.left.pop(run_id)
            if run_id in self.begun:
                self.taken.setdefault(run.model, []).append(rest[1])
            self.bar.update()
            self._show(None)
        worker.task = None

    def _show(self, error_pct: float | None) -> None:
        """The time left, by the mean of the runs of the same network, of this call if there are."""
        mean = {model: sum(times) / len(times) for model, times in self.taken.items()}
        each = {i: mean.get(r.model, self.seconds.get(r.model, 0.0)) for i, r in self.left.items()}
        now = time.monotonic()
        whole = sum(max(0.0, s - (now - self.begun.get(i, now))) for i, s in each.items())
        left = tqdm.format_interval(whole / self.jobs) if all(each.values()) else "?"
        last = "" if error_pct is None else f"validation error {error_pct:.2f} %"
        self.bar.set_postfix_str(f"{left} left{', ' * bool(last)}{last}", refresh=False)
        self.bar.update(0)

    def _died(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        worker.process.join()
        worker.pipe.close()
        code = worker.process.exitcode
        how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended ({code})"
        if not worker.ready and code >= 0:
            said = f"a worker process {how} before its first run: call the runner from a script's "
            said += '`if __name__ == "__main__":`, and see the message above, if any'
            self.errors.append(WorkerError(said))
        elif worker.task is not None:
            self.failed.append(f"{worker.task.run.run_id}: its worker {how}")
            reason = ", for want of memory perhaps: fewer --jobs need less" if code == -9 else ""
            self.bar.write(f"{self.failed[-1]}{reason}; {kept(worker.task)}", sys.stdout)

    def stop(self) -> None:
        """Have the runs in training write their checkpoints, and say which did."""
        stopped = [worker.task for worker in self.workers if worker.task is not None]
        self.waiting.clear()
        self.bar.write("stopping: waiting for the checkpoints of the runs in training", sys.stdout)
        self.errors.clear()
        for worker in self.workers:
            worker.process.terminate()  # it finishes its mini-batch and saves (`_serve`)
        end = time.monotonic() + STOP_SECONDS
        while self.busy() and time.monotonic() < end:
            self.hear(0.1)
        for worker in self.workers:
            if worker.task is not None:
                worker.process.kill()
        for error in self.errors:
            self.bar.write(str(error), sys.stdout)
        for task in stopped:
            self.bar.write(f"{task.run.run_id}: {kept(task)}", sys.stdout)
        self.bar.write("stopped; the same command goes on", sys.stdout)

    def close(self) -> None:
        """End the workers, which have no run any more or are not waited for."""
        self.bar.close()
        for worker in self.workers:
            worker.pipe.close()  # an idle one ends by itself
        for worker in self.workers:
            worker.process.join(timeout=2.0)
            if worker.process.is_alive():
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
    goes on.  Raises WorkerError for the first run that failed, after those in training have ended,
    and at the end for runs whose worker was killed.
    """
    pool = _Pool(title, tasks, seconds, jobs, threads, device)
    try:
        pool.assign()
        while pool.busy():
            pool.hear(0.5)
            pool.assign()
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, or a scheduler's time limit
        with contextlib.suppress(KeyboardInterrupt):  # a second one: without waiting any longer
            pool.stop()
        raise
    finally:
        pool.close()
    if pool.errors:
        raise pool.errors[0]
    if pool.failed:
        raise WorkerError(
            f"{len(pool.failed)} of {len(tasks)} runs of {title} aren't done, and the same "
            f"command goes on with them: {'; '.join(pool.failed)}"
        )


def kept(task: Task) -> str:
    """What is left of an unfinished run, as the disk says."""
    try:
        seconds = time.time() - task.checkpoint.stat().st_mtime
    except OSError:
        return "no checkpoint yet, it starts anew"
    return f"its checkpoint of {max(seconds, 0):.0f} s ago stays"


# --------------------------------------------------------------------------------------------------
# In a worker
# --------------------------------------------------------------------------------------------------

_asked = SimpleNamespace(to_stop=False)  # no lock, which a signal's handler could wait for


def _stop(number: int, frame: Any) -> None:
    _asked.to_stop = True


def _serve(pipe: connection.Connection, threads: int, parent: int) -> None:
    """Train what comes through the pipe, until it is closed or the parent is gone."""
    signal.signal(signal.SIGTERM, _stop)
    import torch

    from lib.engine import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()  # a fifth of a LeNet-5 step would be spent on getting zeroed pages back
    with contextlib.suppress(EOFError, OSError):  # the parent has ended
        pipe.send(("ready",))
        while True:
            task, device = pipe.recv()
            pipe.send(_train_one(pipe, parent, task, device))
            _asked.to_stop = False


def _train_one(
    pipe: connection.Connection, parent: int, task: Task, device: str
) -> tuple[str, str, Any]:
    """Train one run and store its row; ("ended", what became of it, seconds) or ("error", what
    happened, traceback).
    """

    def told(progress: Any) -> None:
        with contextlib.suppress(OSError):  # the parent has ended: `should_stop` says so
            pipe.send(("progress", progress.val_error_pct))

    def should_stop() -> bool:
        return _asked.to_stop or os.getppid() != parent

    if should_stop():  # before the seconds that loading takes
        return "ended", "interrupted", None
    from lib.train import Interrupted

    started = time.monotonic()
    try:
        status = train_and_store(task, device=device, progress=told, should_stop=should_stop)
        if status == "elsewhere":
            time.sleep(ELSEWHERE_SECONDS)
        return "ended", status, time.monotonic() - started
    except Interrupted:
        return "ended", "interrupted", None
    except Exception as error:
        expected = isinstance(error, (ValueError, RuntimeError, OSError))
        said = str(error) if expected else f"{type(error).__name__}: {error}"
        sentence = said if task.run.run_id in said else f"{task.run.run_id}: {said}"
        return "error", sentence, traceback.format_exc()
