"""Progress for people: a bar on a terminal, a line a minute in a log, and the time that is left."""

from __future__ import annotations

import heapq
import sys
import time
from collections.abc import Callable, Sequence

from lib.config import Run
from lib.runs.cost import Estimator, clock

BAR = 20
# The estimate weighs as much as so many seconds of training seen: little where it comes from FLOPs.
TRUST_SECONDS = {True: 30.0, False: 2.0}
LOG_SECONDS = 60.0
# Importing torch and loading the images in a new worker, before its first run.
START_SECONDS = 6.0


class Board:
    """Who is how far, and what is left of the stage.

    The time left is that of the estimates, corrected by the pace of the runs seen: seconds they
    took over seconds they were to take, of each network, and of all where one wasn't seen.
    """

    def __init__(self, title: str, runs: Sequence[Run], estimate: Estimator, jobs: int) -> None:
        self.title, self.jobs = title, jobs
        self.model = {run.run_id: run.model for run in runs}
        self.cost = {run.run_id: estimate.seconds(run) for run in runs}
        self.known = {run.model: estimate.known(run) for run in runs}
        self.part = dict.fromkeys(self.cost, 0.0)
        self.errors: dict[str, float] = {}
        self.ended = 0
        self.began: dict[str, tuple[float, float]] = {}  # run -> clock and part when first heard
        self.started = time.monotonic()
        self.seen: dict[str, tuple[float, float]] = {}  # run -> seconds taken, seconds expected

    def note(self, run_id: str, part: float, error_pct: float | None) -> None:
        """A run is so far (0 to 1), with this validation error in per cent."""
        now = time.monotonic()
        if self.part[run_id] == 0.0:  # loading may have taken long, and it may be resumed
            self.began[run_id] = (now, part)
        started, first = self.began[run_id]
        self.part[run_id] = part
        self.seen[run_id] = (now - started, (part - first) * self.cost[run_id])
        if error_pct is not None:
            self.errors[run_id] = error_pct

    def end(self, run_id: str) -> None:
        """A run is done, or will not be."""
        self.ended += 1
        if self.part[run_id] > 0:
            started, first = self.began[run_id]
            self.seen[run_id] = (time.monotonic() - started, (1 - first) * self.cost[run_id])
        self.part[run_id] = 1.0
        self.errors.pop(run_id, None)

    def seconds_left(self) -> float | None:
        """Until the last run ends; None while nothing tells it."""
        if not self.seen and not any(self.known.values()):
            return None
        of_all = self._pace(self.known)
        pace = {model: self._pace([model], of_all) for model in self.known}
        left = {
            run_id: (1 - part) * self.cost[run_id] * pace[self.model[run_id]]
            for run_id, part in self.part.items()
            if part < 1
        }
        free = [0.0] * self.jobs
        for run_id in sorted(left, key=lambda one: self.part[one] == 0.0):  # those begun first
            heapq.heapreplace(free, free[0] + left[run_id])
        starting = 0.0 if self.seen else START_SECONDS - (time.monotonic() - self.started)
        return max(free) + max(0.0, starting)

    def _pace(self, models: Sequence[str] | dict[str, bool], before: float = 1.0) -> float:
        seen = [pair for run_id, pair in self.seen.items() if self.model[run_id] in models]
        trust = TRUST_SECONDS[all(self.known[model] for model in models)]
        taken, expected = (sum(pair[i] for pair in seen) for i in (0, 1))
        return (taken + trust * before) / (expected + trust)

    def line(self) -> str:
        """How far all are, on one line."""
        total = sum(self.cost.values())
        done = sum(self.cost[run_id] * part for run_id, part in self.part.items()) / total
        seconds = self.seconds_left()
        left = "time left not known yet" if seconds is None else f"about {clock(seconds)} left"
        if self.ended == len(self.cost):
            left = "done"
        bar = "#" * round(BAR * done)
        error = list(self.errors.values())
        last = f", validation error {error[-1]:.2f} %" if error else ""
        return (
            f"{self.title}: [{bar:-<{BAR}}] {100 * done:.0f} %, {self.ended} of {len(self.cost)} "
            f"runs, {left}{last}"
        )


def print_line() -> Callable[[str], None]:
    """One line rewritten on a terminal or in a notebook; in a log the first, one a minute, and
    those that end with a line break.
    """
    # An imported ipykernel is not yet a notebook: only a running kernel has a display to update.
    kernel = sys.modules.get("ipykernel.kernelapp")
    if kernel is not None and kernel.IPKernelApp.initialized():
        from IPython.display import display

        handle = display({"text/plain": ""}, raw=True, display_id=True)
        if handle is not None:
            return lambda text: handle.update({"text/plain": text.strip()}, raw=True)
    last = [-LOG_SECONDS]

    def say(text: str) -> None:
        if sys.stdout.isatty():
            print(f"\r\x1b[K{text}", end="", flush=True)
        elif text.endswith("\n") or time.monotonic() - last[0] >= LOG_SECONDS:
            last[0] = time.monotonic()
            print(text.strip("\n"), flush=True)

    return say
