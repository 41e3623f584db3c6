"""Trains runs side by side in worker processes, each with a pipe of its own to this one.

No lock is shared with a worker, so one that is killed takes nothing along but its run, which keeps
its checkpoint; a new worker takes its place.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, resource_tracker
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lib.config import Run
from lib.runs.plan import Plan
from lib.runs.progress import Board
from lib.runs.single import checkpoint_of, train_and_store

Task = tuple[Run, Plan]

# Told to stop, a worker has so long for its mini-batch and its checkpoint; then it is killed.
STOP_SECONDS = 15.0
SAY_SECONDS = 0.5


class WorkerError(RuntimeError):
    """What went wrong in a worker, in one sentence; `__cause__` has the worker's traceback."""


@dataclass
class _Worker:
    process: Any
    pipe: connection.Connection
    task: Task | None = None
    ready: bool = False  # it has sent something: it could start


@dataclass
class _Pool:
    """The workers, and what became of their runs."""

    jobs: int
    threads: int
    device: str
    board: Board
    say: Callable[[str], None]
    waiting: deque[Task]
    workers: list[_Worker] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # of runs whose worker was killed
    error: WorkerError | None = None  # the first one; no run is begun after it
    elsewhere: int = 0

    def busy(self) -> bool:
        return any(worker.task is not None for worker in self.workers)

    def assign(self) -> None:
        """Give each idle worker a run, and start workers up to the number wanted."""
        idle = [worker for worker in self.workers if worker.task is None]
        while self.waiting and self.error is None and (idle or len(self.workers) < self.jobs):
            worker = idle.pop() if idle else self._start()
            worker.task = self.waiting.popleft()
            run, todo = worker.task
            with contextlib.suppress(OSError):  # it was killed meanwhile: `hear` says so
                worker.pipe.send((run, todo.experiment, todo.profile, todo.csv, self.device))

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
        process = context.Process(
            target=_serve, args=(theirs, self.threads, os.getpid()), daemon=True
        )
        resource_tracker.ensure_running()  # starting it within would unblock the signal again
        with _workers_ignore_interrupts():
            process.start()
        theirs.close()
        self.workers.append(_Worker(process, ours))
        return self.workers[-1]

    def _take(self, worker: _Worker, kind: str, *rest: Any) -> None:
        worker.ready = True
        if kind == "ready" or worker.task is None:
            return
        run_id = worker.task[0].run_id
        if kind == "progress":
            self.board.note(run_id, *rest)
            return
        worker.task = None
        self.board.end(run_id)
        if kind == "error":
            sentence, text = rest
            error = WorkerError(sentence)
            error.__cause__ = RuntimeError(f"in a worker:\n{text}")
            self.error = self.error or error
        elif rest[0] == "elsewhere":
            self.elsewhere += 1
        elif rest[0] == "interrupted":
            self.failed.append(f"{run_id}: its worker was told to stop")

    def _died(self, worker: _Worker) -> None:
        self.workers.remove(worker)
        worker.process.join()
        worker.pipe.close()
        code = worker.process.exitcode
        how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended ({code})"
        if not worker.ready and code >= 0:
            self.error = self.error or WorkerError(
                f"a worker process {how} before its first run: call the runner from a script's "
                '`if __name__ == "__main__":`, and see the message above, if any'
            )
        elif worker.task is not None:
            run, todo = worker.task
            self.board.end(run.run_id)
            self.failed.append(f"{run.run_id}: its worker {how}")
            reason = ", for want of memory perhaps: fewer --jobs need less" * (code == -9)
            left = kept(run, todo.profile)
            self.say(f"{self.failed[-1]}{reason}; {left}; the other runs go on\n")

    def stop(self) -> None:
        """Have the runs in training write their checkpoints, and say which did."""
        stopped = [worker.task for worker in self.workers if worker.task is not None]
        self.waiting.clear()
        self.say("stopping: waiting for the checkpoints of the runs in training\n")
        self.error = None
        for worker in self.workers:
            worker.process.terminate()  # it finishes its mini-batch and saves (`_serve`)
        end = time.monotonic() + STOP_SECONDS
        while self.busy() and time.monotonic() < end:
            self.hear(0.1)
        late = [worker for worker in self.workers if worker.task is not None]
        for worker in late:
            worker.process.kill()
        problems = [str(self.error)] if self.error else []
        problems += [
            f"{w.task[0].run_id}: not ready in {STOP_SECONDS:.0f} s" for w in late if w.task
        ]
        for problem in problems:
            self.say(f"{problem}\n")
        for run, todo in stopped:
            self.say(f"{run.run_id}: {kept(run, todo.profile)}\n")
        self.say("stopped; the same command goes on\n")

    def close(self) -> None:
        """End the workers, which have no run any more or are not waited for."""
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
    board: Board,
    threads: int,
    device: str,
    say: Callable[[str], None],
) -> None:
    """Train and store all tasks, `board.jobs` at a time, in order.

    On KeyboardInterrupt or SystemExit the runs in training write their checkpoints, within
    STOP_SECONDS, and the exception goes on. Raises WorkerError for the first run that failed, after
    those in training have ended, and at the end for runs whose worker was killed.
    """
    pool = _Pool(board.jobs, threads, device, board, say, deque(tasks))
    said = 0.0
    try:
        say(board.line())
        pool.assign()
        while pool.busy():
            pool.hear(SAY_SECONDS)
            pool.assign()
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                say(board.line())
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, or a scheduler's time limit
        with contextlib.suppress(KeyboardInterrupt):  # a second one: without waiting any longer
            pool.stop()
        raise
    finally:
        pool.close()
    if pool.error is None:
        say(board.line() + "\n")
    if pool.elsewhere:
        say(f"{pool.elsewhere} of these runs are being trained by another process\n")
    if pool.error is not None:
        raise pool.error
    if pool.failed:
        raise WorkerError(
            f"{len(pool.failed)} of {len(tasks)} runs of {title} aren't done, and the same "
            f"command goes on with them: {'; '.join(pool.failed)}"
        )


def kept(run: Run, profile: str) -> str:
    """What is left of an unfinished run, as the disk says."""
    try:
        seconds = time.time() - checkpoint_of(run, profile).stat().st_mtime
    except OSError:
        return "no checkpoint yet, it starts anew"
    return f"its checkpoint of {max(seconds, 0):.0f} s ago stays"


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


# --------------------------------------------------------------------------------------------------
# In a worker
# --------------------------------------------------------------------------------------------------

_asked = SimpleNamespace(to_stop=False)  # no lock, which a signal's handler could wait for


def _stop(number: int, frame: Any) -> None:
    _asked.to_stop = True


def _serve(pipe: connection.Connection, threads: int, parent: int) -> None:
    """Train what comes through the pipe, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops us
    signal.signal(signal.SIGTERM, _stop)
    import torch

    from lib.kernels import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()  # a fifth of a LeNet-5 step would be spent on getting zeroed pages back
    with contextlib.suppress(EOFError, OSError):  # the parent has ended
        pipe.send(("ready",))
        while True:
            task = pipe.recv()
            pipe.send(_train_one(pipe, parent, *task))
            _asked.to_stop = False


def _train_one(
    pipe: connection.Connection,
    parent: int,
    run: Run,
    experiment: str,
    profile: str,
    csv: Path,
    device: str,
) -> tuple[str, ...]:
    """Train one run and store its row; ("ended", what became of it) or ("error", what happened)."""

    def told(progress: Any) -> None:
        with contextlib.suppress(OSError):  # the parent has ended: `should_stop` says so
            pipe.send(("progress", progress.epoch / progress.epochs, progress.val_error_pct))

    def should_stop() -> bool:
        return _asked.to_stop or os.getppid() != parent

    if should_stop():  # before the seconds that loading takes
        return "ended", "interrupted"
    from lib.train import Interrupted

    try:
        return "ended", train_and_store(
            run, experiment, profile, csv, device=device, progress=told, should_stop=should_stop
        )
    except Interrupted:
        return "ended", "interrupted"
    except Exception as error:
        expected = isinstance(error, (ValueError, RuntimeError, OSError))
        said = str(error) if expected else f"{type(error).__name__}: {error}"
        sentence = said if run.run_id in said else f"{run.run_id}: {said}"
        return "error", sentence, traceback.format_exc()
