"""Compiles the kernels on first use and loads them.

The library has a plain C interface and is called through ctypes, so it needs neither ninja nor
torch's headers, builds in seconds and does not depend on torch's binary interface.  It is linked
without an OpenMP runtime of its own: torch has loaded one, and a second pool of threads would
spin against the first on the same cores.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch  # loads the OpenMP runtime that the library shares
from torch import Tensor

from lib import paths

_HERE = Path(__file__).resolve().parent
SOURCES = [_HERE / f for f in ("sparse.hpp", "dense.hpp", "perceptron.hpp", "sparse.cpp")]
FLAGS = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast"]
FLAGS += ["-fopenmp", "-fPIC", "-Wno-psabi"]


class KernelsUnavailable(RuntimeError):
    """The sparse kernels cannot be built or loaded on this machine."""


def compiler() -> str | None:
    """The C++ compiler: $CXX, g++, c++ or clang++, whichever is found first; None without one."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(name):
            return shutil.which(name)
    return None


@functools.cache
def cpu_id() -> str:
    """Names the processor: code built with -march=native must not move to another one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    first = {line.split(":")[0].strip(): line for line in reversed(lines) if ":" in line}
    known = [first[key] for key in ("model name", "flags", "Features") if key in first]
    return "\n".join([platform.machine(), platform.processor(), *known])


def _run(command: list[str]) -> str:
    """What the command prints; KernelsUnavailable with its first error line if it fails."""
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, errors="replace"
        )
    except OSError as error:
        raise KernelsUnavailable(f"{command[0]} can't be started ({error.strerror})") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [
            f"exit code {done.returncode}, no message"
        ]
        raise KernelsUnavailable(f"the C++ compiler {command[0]} failed: {lines[0].strip()}")
    return done.stdout


def build(link_openmp: bool = False, sources: Sequence[Path] = ()) -> Path:
    """Path of the compiled library (`sources`: headers, last what is compiled; SOURCES without),
    built unless the user's folder in the cache has it for these sources, flags, compiler and
    processor. A build takes some ten seconds and says so on stderr; of several processes one builds
    and the others wait.

    Raises:
        KernelsUnavailable: no C++ compiler, it failed, or the cache can't be written, or others can
            write it, who could exchange what is loaded.
    """
    cxx = compiler()
    if cxx is None:
        raise KernelsUnavailable(
            "no C++ compiler was found (CXX, g++, c++, clang++); install one to use sparse kernels"
        )
    sources, key = sources or SOURCES, hashlib.sha256()
    for part in (cxx, _run([cxx, "--version"]), cpu_id(), str(link_openmp), *FLAGS):
        key.update(part.encode() + b"\0")
    for source in sources:
        key.update(source.read_bytes() + b"\0")
    folder = paths.kernels_dir() / f"user-{os.getuid()}"
    built = folder / f"{sources[-1].stem}-{key.hexdigest()[:16]}.so"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise KernelsUnavailable(f"others can write {folder}: set SPARSE_CACHE to another one")
        with paths.locked(folder / "compile.lock"):
            if not built.is_file():
                print("compiling the CPU kernels, once for this machine", file=sys.stderr)
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    compiled, linked = f"{scratch}/kernels.o", f"{scratch}/kernels.so"
                    _run([cxx, *FLAGS, "-c", str(sources[-1]), "-o", compiled])
                    openmp = ["-fopenmp"] if link_openmp else []
                    _run([cxx, "-shared", compiled, *openmp, "-o", linked])
                    paths.write(built, Path(linked).read_bytes())  # whole, or not there
    except OSError as error:
        raise KernelsUnavailable(
            f"the cache {folder} can't be written ({error.strerror}); set SPARSE_CACHE to a folder "
            "that can"
        ) from error
    return built


@functools.cache
def _load() -> ctypes.CDLL | KernelsUnavailable:
    try:
        try:
            library = ctypes.CDLL(str(build()))
        except OSError:  # torch brought no OpenMP runtime under a name we can share
            library = ctypes.CDLL(str(build(link_openmp=True)))
        library.sparse_error.restype = ctypes.c_char_p
        return library
    except (KernelsUnavailable, OSError) as error:
        return error if isinstance(error, KernelsUnavailable) else KernelsUnavailable(str(error))


@functools.cache
def _warn(message: str) -> None:
    text = f"sparse CPU kernels are not used, training goes on with masked dense layers: {message}"
    # Under a name without source, so that it is one line and not two.
    warnings.warn_explicit(text, RuntimeWarning, "lib.cpu", 1, module=__name__)


def available() -> bool:
    """Whether the kernels work here (compiling them on the first call); warns once if not."""
    library = _load()
    if isinstance(library, KernelsUnavailable):
        _warn(str(library))
        return False
    return True


def require() -> ctypes.CDLL:
    """The loaded library; KernelsUnavailable, which says why, where there is none."""
    library = _load()
    if isinstance(library, KernelsUnavailable):
        raise library
    return library


def call(name: str, *arguments: Any) -> None:
    """One float32 kernel, with torch's number of threads; see `passed`.

    Raises:
        RuntimeError: the kernel failed; the message says why.
    """
    library = require()
    if getattr(library, name)(*map(passed, (*arguments, torch.get_num_threads()))):
        raise RuntimeError(f"sparse kernel failed: {library.sparse_error().decode()}")


def sgd_rule(optimizer: torch.optim.SGD) -> tuple[float, float, float, bool]:
    """The learning rate, momentum, weight decay and whether Nesterov's, as kernels take them."""
    (group,) = optimizer.param_groups
    rates = [float(group[key]) for key in ("lr", "momentum", "weight_decay")]
    return *rates, group["nesterov"]


def passed(value: Any) -> Any:
    """An argument of any kernel: whole numbers become int64_t, others double; tensors and arrays go
    by their address, None as a null pointer, lists and tuples as arrays of int64_t.
    """
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_double(value)
    if isinstance(value, Tensor):
        if value.dtype == torch.float64 or not value.is_cpu or not value.is_contiguous():
            raise TypeError(
                "kernels take contiguous tensors on the CPU, none in double precision, got "
                f"{value.dtype} {list(value.shape)} of strides {value.stride()} on {value.device}"
            )
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, np.ndarray):
        return value.ctypes
    return (ctypes.c_int64 * len(value))(*value) if isinstance(value, Sequence) else value
