"""This machine and this code: devices, cores, names, versions."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lib import paths


def checked_device(device: str | None) -> str:
    """ "cuda" where there is a GPU, else "cpu", if None; ValueError unless `device` is "cpu" or a
    GPU that is here ("cuda", "cuda:1").
    """
    if device == "cpu":
        return device
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        return "cuda" if count else "cpu"
    found = re.fullmatch(r"cuda(?::([0-9]+))?", device)
    if found is None:
        raise ValueError(f"unknown device {device!r}: known are cpu, cuda and cuda:<number>")
    if int(found[1] or 0) >= count:
        raise ValueError(f"device {device!r}: torch finds {count} GPUs here; use --device cpu")
    return device


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
    """Commit of the code, whether the tree was dirty, and versions of what the numbers rest on.

    "unknown", and None for dirty, where nobody can say: without the git program, or in a copy that
    is no checkout, also when it lies inside another repository.
    """
    ours = _git("rev-parse", "--show-toplevel")
    commit = _git("rev-parse", "--short=12", "HEAD") if ours and paths.REPO.samefile(ours) else ""
    code = ("lib", "environment.yml")
    return {
        "commit": commit or "unknown",
        "dirty": bool(_git("status", "--porcelain", "--", *code)) if commit else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision")},
    }


def _git(*words: str) -> str:
    # an inherited GIT_DIR, as in a hook, names another repository
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(paths.REPO), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=own)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
