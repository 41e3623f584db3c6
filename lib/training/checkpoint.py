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
from torch import Tensor

VERSION = 1
_HEAD = b"sparse-momentum checkpoint\n"
_DIGEST = hashlib.sha256().digest_size


class CheckpointError(ValueError):
    """The file is no checkpoint from which this run can go on; the message says why."""


class CheckpointAccessError(OSError):
    """A checkpoint can't be read or written at all; the message says what is safe."""


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the file in one step: a kill, a full disk or a power cut leaves the old one or the
    new one. Raises CheckpointAccessError.
    """
    packed = io.BytesIO()
    torch.save({**content, "version": VERSION}, packed)
    payload = packed.getbuffer()
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(_HEAD)
                file.write(hashlib.sha256(payload).digest())
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _flush_folder(path.parent)
    except OSError as error:
        left = "the last one is safe" if path.exists() else "and this run has none yet"
        raise CheckpointAccessError(
            f"the checkpoint {path} can't be written ({error.strerror or error}), {left}: make "
            "room or set CHECKPOINT_ROOT to another folder, then the same command goes on"
        ) from error


def read(path: Path, run_id: str, device: torch.device) -> dict[str, Any]:
    """What `write` was given, with tensors on the device.

    Raises:
        CheckpointError: the file is damaged, of another program, version or run.
        CheckpointAccessError: the file can't be read.
    """
    try:
        found = path.read_bytes()
    except OSError as error:
        raise CheckpointAccessError(
            f"the checkpoint {path} can't be read ({error.strerror or error}) and stays as it is: "
            "make it readable, or remove it and the run starts anew"
        ) from error
    if not found:
        raise CheckpointError("it is empty")
    payload = memoryview(found)[len(_HEAD) + _DIGEST :]
    if not found.startswith(_HEAD):
        raise CheckpointError("it is no checkpoint of this version of the program")
    if hashlib.sha256(payload).digest() != found[len(_HEAD) : len(_HEAD) + _DIGEST]:
        raise CheckpointError("it is damaged: its checksum is another one")
    try:
        saved = torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
    except Exception as error:  # whatever a pickle can raise, code that it would run included
        raise CheckpointError(
            f"it holds something else than tensors and numbers ({type(error).__name__})"
        ) from error
    if not isinstance(saved, dict) or saved.get("version") != VERSION:
        raise CheckpointError("it is of another version of the program")
    if saved.get("run_id") != run_id:
        raise CheckpointError(f"it is of the run {saved.get('run_id')}")
    return saved


def check_tensors(what: str, found: object, expected: Mapping[str, Tensor]) -> None:
    """CheckpointError unless these are tensors of the same names, shapes and types."""
    if not isinstance(found, Mapping) or found.keys() != expected.keys():
        raise CheckpointError(f"its {what} has other names than this run's")
    for name, tensor in expected.items():
        other = found[name]
        if not isinstance(other, Tensor) or other.shape != tensor.shape:
            shape = list(other.shape) if isinstance(other, Tensor) else type(other).__name__
            raise CheckpointError(f"{what} {name} is {shape} in it, not {list(tensor.shape)}")
        if other.dtype != tensor.dtype:
            raise CheckpointError(f"{what} {name} is {other.dtype} in it, not {tensor.dtype}")


def set_aside(path: Path, why: CheckpointError) -> str:
    """Rename a file that can't be used; the sentence that says so. CheckpointAccessError if it
    can't be renamed.
    """
    for number in itertools.count(1):
        other = path.with_name(f"{path.name}.bad{number}")
        if not other.exists():
            break
    unusable = f"the checkpoint {path} can't be used, {why}"
    try:
        with contextlib.suppress(FileNotFoundError):  # another process of this run was faster
            os.replace(path, other)
    except OSError as error:
        raise CheckpointAccessError(
            f"{unusable}, nor renamed ({error.strerror}): remove it, then the run starts anew"
        ) from error
    return f"{unusable}: it is now {other.name}, the run starts anew"


def remove_torn(path: Path) -> None:
    """Remove what a process that was killed while writing left."""
    with contextlib.suppress(OSError):
        _temporary(path).unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")  # one name: a kill leaves one at most


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
