"""Bad checkpoints: each is set aside, and the run has the bits of an undisturbed one."""

from __future__ import annotations

import functools
import io
import os
import pickle
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lib.config import Run
from lib.results.store import PROVENANCE
from lib.runs import single
from tests.soak.parts import fork, problem_of
from tests.support.kill_and_resume import run_of

RUN = run_of("sparse_momentum")


def _train(run: Run, csv: Path, stop_after: int = 0) -> None:
    """Train and store; with `stop_after`, die when so many checkpoints have been written."""
    left, replace = [stop_after], os.replace

    def counted(source: object, target: object, **named: object) -> None:
        replace(source, target, **named)
        left[0] -= str(target).endswith(".pt")
        if stop_after and left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted
    try:
        single.train_and_store(single.Task(run, "main_results", "smoke", csv), checkpoint_seconds=0)
    finally:
        os.replace = replace


@functools.cache
def _good() -> tuple[bytes, bytes, str]:
    """A checkpoint of RUN in the middle, one of another run, and the folder of RUN's whole CSV."""
    folder = Path(tempfile.mkdtemp())
    found = []
    before = os.environ.get("CHECKPOINT_ROOT")
    os.environ["CHECKPOINT_ROOT"] = str(folder)
    for run in (RUN, RUN.overridden(seed=5)):
        os.waitpid(fork(lambda run=run: _train(run, folder / "part" / "x.csv", 9)), 0)
        checkpoint = single.Task(run, "main_results", "smoke", Path()).checkpoint
        found.append(checkpoint.read_bytes())
        checkpoint.unlink()
    os.waitpid(fork(lambda: _train(RUN, folder / "whole" / "x.csv")), 0)
    if before is None:
        del os.environ["CHECKPOINT_ROOT"]
    else:
        os.environ["CHECKPOINT_ROOT"] = before
    return found[0], found[1], str(folder / "whole" / "x.csv")


class _Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (self.marker,)


def _saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def inputs() -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Name and work of each; the work puts the bad file in place and trains."""

    def flipped(content: bytes, part: float) -> bytes:
        at = int(part * len(content))
        return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]

    def inverted(content: bytes) -> bytes:
        at = len(content) // 2
        return content[:at] + bytes(b ^ 255 for b in content[at : at + 64]) + content[at + 64 :]

    for name, make in (
        ("empty", lambda good, other, marker: b""),
        ("one byte", lambda good, other, marker: good[:1]),
        ("half", lambda good, other, marker: good[: len(good) // 2]),
        ("all but the last byte", lambda good, other, marker: good[:-1]),
        ("longer", lambda good, other, marker: good + b"\0"),
        ("a bit flipped at 20 %", lambda good, other, marker: flipped(good, 0.2)),
        ("a bit flipped at 50 %", lambda good, other, marker: flipped(good, 0.5)),
        ("a bit flipped at 80 %", lambda good, other, marker: flipped(good, 0.8)),
        ("64 bytes inverted", lambda good, other, marker: inverted(good)),
        ("zeros", lambda good, other, marker: bytes(len(good))),
        ("text", lambda good, other, marker: b"no checkpoint at all\n"),
        ("of another run", lambda good, other, marker: other),
        ("torch.save of {}", lambda good, other, marker: _saved({})),
        ("torch.save of a tensor", lambda good, other, marker: _saved(torch.zeros(3))),
        ("malicious", lambda good, other, marker: pickle.dumps(_Malicious(marker))),
        ("malicious zip", lambda good, other, marker: _saved({"model": _Malicious(marker)})),
    ):
        yield name, lambda folder, make=make: _tried(folder, make)


def prepare() -> None:
    """Make the good checkpoints before a child needs them: it would not share them."""
    _good()


def _tried(folder: Path, make: Callable[[bytes, bytes, Path], bytes]) -> int:
    good, other, whole = _good()
    marker = folder / "code was run"
    path = single.Task(RUN, "main_results", "smoke", Path()).checkpoint
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(make(good, other, marker))
    csv = folder / "smoke" / "main_results.csv"
    _train(RUN, csv)
    if marker.exists():
        print("the checkpoint ran code")
        return 1
    if problem := problem_of(csv, PROVENANCE | {"experiment"}, like=Path(whole)):
        print(problem)
        return 1
    return 0
