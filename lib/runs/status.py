"""What is done of each experiment, and how long the rest takes on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lib import experiments, paths
from lib.config import Run
from lib.results import store as results
from lib.runs import cost
from lib.runs.machine import default_jobs
from lib.runs.plan import plan


def status_table(
    profile: str,
    results_root: str | Path | None = None,
    device: str = "cpu",
    names: Sequence[str] = (),
) -> str:
    """One line per experiment (all, or those named): runs done, diverged and missing, and the
    hours left here. The last line counts a run that several experiments need once.
    """
    jobs = default_jobs([Run()] * 1000, device)[0] if device == "cpu" else 1
    root = paths.results_dir(profile, results_root).parent
    estimate = cost.Estimator(cost.rows_under(root), device)

    how = "one run per core" if device == "cpu" else "one run at a time"

    def line(name: str, finished: int, diverged: int, left: dict[str, float]) -> str:
        time = cost.clock(cost.makespan(left.values(), jobs)) if left else ""
        return f"{name:<20}{finished:>6}{diverged:>10}{len(left):>9}{time:>12}"

    each: dict[str, float] = {}
    done: set[str] = set()
    bad: set[str] = set()
    guessed: set[str] = set()
    lines = [f"{'experiment':<20}{'done':>6}{'diverged':>10}{'missing':>9}{'left':>12}"]
    for name in names or experiments.EXPERIMENTS:
        todo = plan(name, profile, results_root=results_root)
        rows = results.read_runs(todo.csv.parent)
        here = {run.run_id for run in todo.done}
        diverged = set(rows["run_id"][rows["status"] == "diverged"]) & here
        seconds = {run.run_id: estimate.seconds(run) for run in todo.todo}
        guessed |= {run.model for run in todo.todo if not estimate.known(run)}
        lines.append(line(name, len(here), len(diverged), seconds))
        each |= seconds
        done |= here
        bad |= diverged
    missing = {run_id: seconds for run_id, seconds in each.items() if run_id not in done}
    lines.append(line("all, each run once", len(done), len(bad), missing))
    lines.append(f"profile {profile}; left: on {jobs} x {estimate.machine}, {how}, nothing else")
    if estimate.rows_of and estimate.rows_of[0] != estimate.machine:
        lines.append(f"by runs on {estimate.rows_of[0]}, since this machine has done none")
    if guessed:
        which = ", ".join(sorted(guessed)) if len(guessed) < 6 else f"{len(guessed)} networks"
        lines.append(f"by FLOPs, since no run of them is stored: {which}")
    return "\n".join(lines)
