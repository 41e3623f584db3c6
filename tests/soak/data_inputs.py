"""Damaged copies of MNIST, each of which must be named."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from lib import data, paths

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def inputs() -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Name and work of each; the work loads the data from below the folder."""

    def changed(content: bytes, at: int) -> bytes:
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    for file in FILES:
        for how, edit in (
            ("cut off", lambda content: content[: len(content) // 2]),
            ("empty", lambda content: b""),
            ("one bit changed", lambda content: changed(content, len(content) // 2)),
            ("another header", lambda content: changed(content, 3)),
            ("longer", lambda content: content + b"\0"),
        ):
            yield f"{file} {how}", lambda folder, file=file, edit=edit: _load(folder, file, edit)
    yield "labels in place of images", lambda folder: _load(folder, FILES[2], lambda _: _read(3))
    yield "a missing file", lambda folder: _load(folder, FILES[1], lambda _: None)


def _read(number: int) -> bytes:
    return (paths.data_root() / "MNIST/raw" / FILES[number]).read_bytes()


def _load(folder: Path, file: str, edit: Callable[[bytes], bytes | None]) -> None:
    # Beside the folder that is watched for what is written.
    raw = Path(f"{folder}-data") / "MNIST/raw"
    raw.mkdir(parents=True)
    try:
        for number, name in enumerate(FILES):
            if name != file:
                os.symlink(paths.data_root() / "MNIST/raw" / name, raw / name)
            elif (content := edit(_read(number))) is not None:
                (raw / name).write_bytes(content)
        try:
            data.load("mnist", raw.parents[1], download=False)
        except data.DataError as error:
            if file not in str(error):
                raise KeyError(f"{file} is not named") from error
            raise
    finally:
        for path in raw.iterdir():
            path.unlink()
        raw.rmdir()
        raw.parent.rmdir()
        raw.parents[1].rmdir()
