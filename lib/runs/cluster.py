"""Many machines: shards of an experiment as jobs of a Slurm cluster, or as local processes.

Runs are independent, so a shard is every n-th run, and all append to the same CSVs on a shared file
system.  A job that meets its time limit is put back into the queue and continues from the
checkpoints of its runs.  Any other scheduler can call `python -m lib run ... --shard i/n --results
DIR`, and `python -m lib merge` brings the rows together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lib import paths
from lib.runs.runner import run_experiments, tasks_of


@dataclass
class Shard:
    """One job, called on the node; `checkpoint` is submitit's hook for a time limit or preemption:
    the same shard again, which skips what is done.
    """

    experiment: str
    profile: str
    options: dict[str, Any]  # of `run_experiments`

    def __call__(self) -> str:
        """Train what is missing of the shard; says how many of its runs are done."""
        rows = run_experiments(self.experiment, self.profile, **self.options)[self.experiment]
        index, count = self.options["shard"]
        return f"{self.experiment} ({self.profile}), shard {index}/{count}: {len(rows)} runs"

    def checkpoint(self) -> Any:
        """What submitit queues when the time is up."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(
    experiment: str,
    profile: str,
    executor: Literal["local", "slurm"],
    shards: int,
    parameters: dict[str, Any],
    **options: Any,
) -> list[Any]:
    """Submit `shards` jobs, as one job array on Slurm; returns submitit's jobs.

    `parameters` are submitit's (timeout_min, cpus_per_task, slurm_partition, slurm_gres, ...), the
    `options` those of `run_experiments`; logs go to .cache/jobs.  Raises ValueError for words that
    are wrong, and RuntimeError where submitit or sbatch is missing or refuses.
    """
    tasks_of(experiment, profile, **{k: v for k, v in options.items() if k != "device"})
    jobs = [Shard(experiment, profile, options | {"shard": (i + 1, shards)}) for i in range(shards)]
    name = f"{experiment}-{profile}"
    try:
        import submitit

        # The number of time limits a job may meet is not ours to bound: each leaves checkpoints.
        folder = paths.cache_dir() / "jobs" / name / "%j"
        queue = submitit.AutoExecutor(folder, cluster=executor, slurm_max_num_timeout=1_000_000)
        queue.update_parameters(**{"name": name, **parameters})
        with queue.batch():
            return [queue.submit(job) for job in jobs]
    except (ImportError, RuntimeError, NameError, TypeError, AssertionError) as error:
        raise RuntimeError(
            f"no job was submitted ({' '.join(str(error).split())}): correct --job (--executor "
            "needs submitit), or train here without --executor, or with --executor local"
        ) from error
