"""What every part of the soak needs: its share of the time, a row of the table, forked children."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lib.results.store import read_curves, read_layers, read_runs


class Row(NamedTuple):
    """One line of the table; `n` is how often it was tried."""

    what: str
    wanted: str
    found: str
    n: int
    passed: bool


@dataclass(frozen=True)
class Share:
    """How much of the whole soak to do, and until when; counts never fall below one."""

    part: float
    deadline: float

    def of(self, whole: int) -> int:
        return max(1, round(self.part * whole))

    @property
    def over(self) -> bool:
        return time.monotonic() > self.deadline


class Ended(NamedTuple):
    """How a child ended; code None: it had to be stopped. `told` is all that it printed."""

    code: int | None
    told: str


def fork(work: Callable[[], object]) -> int:
    """Do `work` in a new process and process group that has loaded what this one has; its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        found = work()
        code = found if isinstance(found, int) else 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def in_child(work: Callable[[], object], seconds: float = 60.0) -> Ended:
    """Do `work` in a child with everything that it prints caught, at most so long."""
    with tempfile.TemporaryFile() as caught:

        def caught_work() -> object:
            for stream in (1, 2):
                os.dup2(caught.fileno(), stream)
            # pytest and notebooks have put other streams in place.
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            return work()

        pid, until = fork(caught_work), time.monotonic() + seconds
        code = None
        while time.monotonic() < until:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                break
            time.sleep(0.01)
        kill_group(pid)
        if code is None:
            os.waitpid(pid, 0)
        caught.seek(0)
        return Ended(code, caught.read().decode(errors="replace"))


def kill_group(pid: int) -> None:
    """SIGKILL to a forked child and everything that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def die_at(folder: Path, number: int, after: bool) -> None:
    """SIGKILL this process before or after its `number`th system call on files below `folder`.

    Of those that matter: open, fsync, rename, unlink. A timer rarely hits them.
    """
    left = [number]

    def below(target: object) -> bool:
        try:
            name = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target
            return Path(os.path.abspath(str(name))).is_relative_to(folder)
        except OSError:
            return False

    def dying(call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(target: object, *args: object, **named: object) -> object:
            counts = below(target)
            left[0] -= counts
            if counts and left[0] == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(target, *args, **named)
            if counts and left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    for name in ("open", "fsync", "replace", "unlink"):
        setattr(os, name, dying(getattr(os, name)))


def problem_of(
    csv: Path, provenance: frozenset[str] = frozenset(), like: Path | None = None
) -> str:
    """What is wrong with an experiment's files, or differs from those of `like`; "" if nothing."""
    try:
        runs = read_runs(csv)
        beside = [read_curves(csv), read_layers(csv)]
    except ValueError as error:
        return str(error)
    curves, layers = (
        table[table["run_id"].isin(runs["run_id"])].reset_index(drop=True) for table in beside
    )
    if set(runs["run_id"]) != set(curves["run_id"]):
        return f"{csv}: a run without its curve"
    if like is not None:
        kept = [name for name in runs if name not in provenance]
        others = read_runs(like)
        for mine, other in (
            (runs[kept], others[kept]),
            (curves, read_curves(like)),
            (layers, read_layers(like)),
        ):
            if not mine.equals(other):
                return f"{csv}: other values than {like}"
    return ""


def chance(name: str) -> random.Random:
    """The same kills and choices in every soak."""
    return random.Random(name)
