"""This machine: devices, cores, what it is called, and what there is room for."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lib import paths
from lib.config import Run

# On a GPU, runs of networks that do not fill it are trained so many side by side.
GPU_JOBS = 4
FILLS_A_GPU = 2e10


def default_device() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raise ValueError unless `device` is "cpu", or a GPU that is here ("cuda", "cuda:1")."""
    found = re.fullmatch(r"cpu|cuda(?::([0-9]+))?", device)
    if found is None:
        raise ValueError(f"unknown device {device!r}: known are cpu, cuda and cuda:<number>")
    if device == "cpu":
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(found[1] or 0) >= count:
        raise ValueError(f"device {device!r}: torch finds {count} GPUs here; use --device cpu")


def default_jobs(runs: Sequence[Run], device: str) -> tuple[int, int]:
    """(runs side by side, threads of each): on a CPU one single-threaded run per core.

    Runs are independent, so this wastes nothing on synchronising threads: `make bench` measures
    it against one run with all threads. On a GPU one at a time, or GPU_JOBS where none of them
    fills it: the forward pass of a mini-batch is under FILLS_A_GPU floating-point operations.
    `make bench` measures that too, where there is a GPU; none has been at hand so far.
    """
    jobs = max(1, min(cores(), len(runs)))
    if device != "cpu":
        from lib.models import forward_flops

        work = {(run.model, run.batch_size) for run in runs}
        small = all(sum(forward_flops(m).values()) * b < FILLS_A_GPU for m, b in work)
        jobs = min(jobs, GPU_JOBS) if small else 1
    return jobs, 1


def cores() -> int:
    """Processor cores that this process may use."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return count or 1


def device_name(device: str = "cpu") -> str:
    """The processor's or the GPU's name."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.lru_cache(maxsize=1)
def versions() -> dict[str, Any]:
    """Commit of the code, whether the tree was dirty, and versions of what the numbers rest on."""
    from importlib.metadata import version

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(paths.REPO), *words], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD")
    code = ("lib", "environment.yml")
    return {
        "commit": commit or "unknown",
        "dirty": bool(git("status", "--porcelain", "--", *code)) if commit else None,
        "python": platform.python_version(),
        "torch": version("torch"),
        "torchvision": version("torchvision"),
    }


def check_writable(folders: Iterable[Path]) -> None:
    """Create the folders and a file in each; ValueError with what to do where that fails."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(
                f"{folder} can't be written to ({error.strerror}): nothing was trained; name "
                "another folder with --results, or for checkpoints with CHECKPOINT_ROOT"
            ) from None


def check_space(folder: Path, needed: int) -> None:
    """Raise ValueError where the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} has {free / 1e6:,.0f} MB free, but checkpoints and results take up to "
            f"{needed / 1e6:,.0f} MB: nothing was trained; make room on that disk, or set "
            "CHECKPOINT_ROOT to a folder on another"
        )
