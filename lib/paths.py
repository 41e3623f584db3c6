"""Every path of the repository, in one place; files that survive a kill, locks.

The environment is read when a function is called, never at import, so that a test or a notebook
can point somewhere else.  A relative path in an environment variable counts from the repository
root, not from the working directory: notebooks run in another directory than `make`.
No function that names a path creates it; whoever writes does.

What is created here may be shared by all who may write into its folder, whatever the umask.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def results_dir(profile: str, root: str | Path | None = None) -> Path:
    """Directory of one profile's CSVs: `root`/`profile`, by default results/`profile`."""
    return Path(root or REPO / "results") / profile


def data_root() -> Path:
    """Root directory of the data sets: DATA_ROOT, by default data/."""
    return _from_environment("DATA_ROOT", REPO / "data")


def checkpoints_dir() -> Path:
    """Directory of the checkpoints of unfinished runs: CHECKPOINT_ROOT, else .cache/checkpoints."""
    return _from_environment("CHECKPOINT_ROOT", REPO / ".cache" / "checkpoints")


def kernels_dir() -> Path:
    """Directory of compiled kernels: SPARSE_CACHE, else .cache/kernels."""
    return _from_environment("SPARSE_CACHE", REPO / ".cache" / "kernels")


def _from_environment(variable: str, default: Path) -> Path:
    value = os.environ.get(variable, "").strip()
    return (REPO / Path(value).expanduser()).resolve() if value else default


@contextlib.contextmanager
def locked(file: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of this name; false where, without `wait`, another process has it.

    The kernel lets go of it when the process dies.  (filelock opens for writing what a second user
    may only read.)  Raises OSError with the way out on a file system without locks.
    """
    folder(file.parent)
    new = not file.exists()
    try:
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except PermissionError:  # another user's
        fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        if new:
            _share(file)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            reason = f"{error.strerror}: name folders on a local disk, with --results and "
            raise OSError(error.errno, f"{reason}CHECKPOINT_ROOT", str(file)) from error
        yield True
    finally:
        os.close(fd)


def folder(path: Path) -> None:
    """Make the folder and those above that aren't there, for the users of what holds them."""
    if not path.is_dir():
        folder(path.parent)
        path.mkdir(exist_ok=True)
        with contextlib.suppress(OSError):
            path.chmod(path.parent.stat().st_mode & 0o2777)


def append(file: Path, data: bytes) -> None:
    """Add bytes to a file, on the disk when this returns; a kill leaves a part of them."""
    new = not file.exists()
    with open(file, "ab") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())
    if new:
        _share(file)
        _sync(file.parent)


def write(file: Path, data: bytes) -> None:
    """Put a file with these bytes in place in one step, on the disk when this returns."""
    folder(file.parent)
    # a name that nobody can foresee, and no link that waits there
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as new:
        try:
            new.write(data)
            new.flush()
            os.fsync(new.fileno())
            _share(Path(new.name))
            os.replace(new.name, file)
        except BaseException:
            os.unlink(new.name)
            raise
    _sync(file.parent)


def _share(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.chmod(file.parent.stat().st_mode & 0o666)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot do this for folders
            raise
    finally:
        os.close(fd)
