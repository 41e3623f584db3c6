"""Files from which an unfinished run goes on: whole, its own, or not used at all.

A file is one line of text, the SHA-256 of the rest, and the rest, which is `torch.save`'s. The
checksum is compared before anything is read, and what is read holds tensors and plain values only.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lib import paths

_HEAD = b"sparse-momentum checkpoint 2\n"  # another number where the content is another one
_DIGEST = hashlib.sha256().digest_size


class CheckpointError(ValueError):
    """The file is no checkpoint from which this run can go on; the message says why."""


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the file in one step: a kill, a full disk or a power cut leaves the old one or the
    new one. OSError says which of the two is there.
    """
    packed = io.BytesIO()
    torch.save(dict(content), packed)
    payload = packed.getbuffer()
    try:
        paths.write(path, b"".join((_HEAD, hashlib.sha256(payload).digest(), payload)))
    except OSError as error:
        left = "the last one is safe" if path.is_file() else "and this run has none yet"
        raise OSError(
            f"the checkpoint {path} can't be written ({error.strerror or error}), {left}: make "
            "room or set CHECKPOINT_ROOT to another folder, then the same command goes on"
        ) from error


def read(path: Path, device: torch.device, **same: str) -> dict[str, Any]:
    """What `write` was given, with tensors on the device; CheckpointError where the file is damaged
    or of another program, or has not all the values of `same`.
    """
    found = path.read_bytes()
    payload = memoryview(found)[len(_HEAD) + _DIGEST :]
    if not found.startswith(_HEAD):
        raise CheckpointError("it is empty or of another version of the program")
    if hashlib.sha256(payload).digest() != found[len(_HEAD) : len(_HEAD) + _DIGEST]:
        raise CheckpointError("it is damaged: its checksum is another one")
    try:
        saved = torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
    except Exception as error:  # whatever a pickle can raise, code that it would run included
        raise CheckpointError(
            f"it holds something else than tensors and numbers ({type(error).__name__})"
        ) from error
    for name, value in same.items():
        if (other := saved[name]) != value:
            raise CheckpointError(f"its {name} is {other!r}, here it would be {value!r}")
    return dict(saved)


def set_aside(path: Path, why: CheckpointError) -> str:
    """Rename a file that can't be used; the sentence that says so."""
    names = (f"{path.name}.bad{number}" for number in itertools.count(1))
    other = next(name for name in names if not path.with_name(name).exists())
    with contextlib.suppress(FileNotFoundError):  # another process of this run was faster
        os.replace(path, path.with_name(other))
    return f"the checkpoint {path} can't be used, {why}: it is now {other}, the run starts anew"


def remove_torn(path: Path) -> None:
    """Remove what processes that were killed while writing left."""
    for torn in path.parent.glob(f".{path.name}.*"):
        with contextlib.suppress(OSError):
            torn.unlink()
