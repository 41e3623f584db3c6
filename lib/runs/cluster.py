"""Many machines: shards of an experiment as jobs of a Slurm cluster, or as local processes.

Runs are independent, so a shard is every n-th run. Each writes CSVs of its own and merges them
into the experiment's at its end; a job that meets its time limit is put back into the queue and
continues from the checkpoints of its runs. Needs submitit; any other scheduler can call
`python -m lib run ... --shard i/n --results DIR` and merge with `python -m lib merge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lib import paths
from lib.results.store import merge
from lib.runs.plan import plan
from lib.runs.runner import run_experiment

# Names of submitit's parameters that hold for every kind of cluster.
SHARED = ("timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node")


@dataclass
class Shard:
    """One job. Pickled by submitit, called on the node; `checkpoint` is submitit's hook for a time
    limit or preemption: the same shard again, which skips what is done.
    """

    experiment: str
    profile: str
    index: int
    count: int
    only: tuple[str, ...] = ()
    overrides: dict[str, Any] = field(default_factory=dict)
    results_root: str | None = None
    device: str | None = None

    def __call__(self) -> str:
        """Train what is missing of the shard; says how many runs came to the experiment's CSV."""
        target = paths.results_csv(self.profile, self.experiment, self.results_root)
        own_root = target.parent.parent / "shards" / f"{self.index}-of-{self.count}"
        own = paths.results_csv(self.profile, self.experiment, own_root)
        if target.exists():
            merge([target], own)  # what is done anywhere is done for this shard
        run_experiment(
            self.experiment,
            self.profile,
            only=self.only,
            overrides=self.overrides,
            shard=(self.index, self.count),
            results_root=own_root,
            device=self.device,
        )
        added = merge([own], target)
        return f"{self.experiment} ({self.profile}), shard {self.index}/{self.count}: {added} runs"

    def checkpoint(self) -> Any:
        """What submitit queues when the time is up."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(
    experiment: str,
    profile: str,
    executor: Literal["local", "slurm"],
    shards: int,
    *,
    only: str | Sequence[str] = (),
    overrides: dict[str, Any] | None = None,
    results_root: str | Path | None = None,
    device: str | None = None,
    **parameters: Any,
) -> list[Any]:
    """Submit `shards` jobs, as one job array on Slurm; returns submitit's jobs.

    `parameters` are submitit's (timeout_min, cpus_per_task, slurm_partition, slurm_gres, ...).
    Logs go to .cache/jobs. Raises ValueError for no shards, and RuntimeError where submitit or
    sbatch is missing.
    """
    if shards < 1:
        raise ValueError(f"shards must be at least 1, got {shards}")
    try:
        import submitit
    except ImportError:
        raise RuntimeError(
            "--executor needs submitit: `pip install submitit`, or use --shard i/n"
        ) from None
    only = [only] if isinstance(only, str) else only
    plan(experiment, profile, only=only, overrides=overrides)  # wrong words, before any job
    root = None if results_root is None else str(Path(results_root).resolve())
    jobs = [
        Shard(experiment, profile, i, shards, tuple(only), dict(overrides or {}), root, device)
        for i in range(1, shards + 1)
    ]
    folder = paths.cache_dir() / "jobs" / f"{experiment}-{profile}"
    try:
        # The number of time limits a job may meet is not ours to bound: each leaves checkpoints.
        queue = submitit.AutoExecutor(
            folder=folder / "%j", cluster=executor, slurm_max_num_timeout=1_000_000
        )
        try:
            queue.update_parameters(**{"name": f"{experiment}-{profile}", **parameters})
        except (NameError, TypeError, ValueError, AssertionError) as error:
            raise ValueError(
                f"--job: {str(error).splitlines()[0]} Shared names are {', '.join(SHARED)}; others "
                "are written slurm_<name>, as slurm_partition"
            ) from error
        with queue.batch():
            return [queue.submit(job) for job in jobs]
    except RuntimeError as error:  # of submitit or of sbatch, whose message has several lines
        raise RuntimeError(
            f"no job was submitted ({' '.join(str(error).split())}): correct --job, or train here "
            "without --executor, or with --executor local"
        ) from error
