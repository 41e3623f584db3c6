"""A checkpoint is whole and this run's, or it is set aside and the run starts anew; one that can't
be written leaves the last one and says so.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lib import checkpoint
from lib import data as datasets
from lib.checkpoint import CheckpointError
from lib.config import Run
from lib.train import Interrupted, TrainingLoop, train
from tests.support import made_up_data

RUN = Run(epochs=1, train_samples=600, kernels="torch")
HEAD = b"sparse-momentum checkpoint 2\n"


@pytest.fixture(scope="module")
def mnist() -> datasets.Dataset:
    return made_up_data.mnist(RUN.train_samples, 100)


@pytest.fixture
def file(mnist: datasets.Dataset, tmp_path: Path) -> Path:
    """The checkpoint of RUN after three of its six mini-batches."""
    path = tmp_path / "run.pt"
    stop = iter([False, False, True])
    with pytest.raises(Interrupted):
        train(RUN, mnist, checkpoint=path, should_stop=lambda: next(stop))
    return path


# ------------------------------------------------------------------------------ of no use


class Malicious:
    """Pickled, it would create a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


def packed(content: object) -> bytes:
    """A whole file of any content, checksum included."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getvalue()
    return HEAD + hashlib.sha256(payload).digest() + payload


def flipped(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte % len(content)] ^= 1 << 3
    path.write_bytes(content)


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A whole file that says something else."""

    def write(path: Path) -> None:
        saved = checkpoint.read(path, torch.device("cpu"))
        change(saved)
        path.write_bytes(packed(saved))

    return write


def by_two_threads(path: Path) -> None:
    torch.set_num_threads(2)
    path.unlink()
    with pytest.raises(Interrupted):
        train(RUN, datasets.load("mnist"), checkpoint=path, should_stop=lambda: True)
    torch.set_num_threads(1)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit of a weight": (lambda p: flipped(p, 400_000), "it is damaged"),
    "bit of the checksum": (lambda p: flipped(p, 30), "it is damaged"),
    "bit of the head": (lambda p: flipped(p, 3), "of another version"),
    "zero bytes": (lambda p: p.write_bytes(b""), "it is empty"),
    "half of it": (lambda p: p.write_bytes(p.read_bytes()[:200_000]), "it is damaged"),
    "head only": (lambda p: p.write_bytes(p.read_bytes()[:40]), "it is damaged"),
    "code": (
        lambda p: p.write_bytes(packed({"run": Malicious(p.with_name("executed"))})),
        "something else than tensors",
    ),
    "run": (changed(lambda s: s.update(run="another")), f"run is 'another', .* '{RUN.run_id}'"),
    "kernels": (
        changed(lambda s: s.update(engine="perceptron on cpu, 1 threads")),
        "engine is 'perceptron on cpu, 1 threads', here it would be 'torch on cpu, 1 threads'",
    ),
    "threads": (by_two_threads, "'torch on cpu, 2 threads', here it would be .*, 1 threads'"),
    "a key": (changed(lambda s: s.pop("optimizer")), "its content is not a run's: .*optimizer"),
    "shape": (
        changed(lambda s: s["model"].update({"fc1.weight": torch.zeros(3, 3)})),
        "its content is not a run's: .*fc1.weight",
    ),
    "masks": (changed(lambda s: s["masking"]["masks"].clear()), "its content is not a run's"),
    "rules": (changed(lambda s: s["masking"].update(rules=("a",))), "its content is not a run's"),
    "position": (changed(lambda s: s["state"].update(colour="red")), "colour"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_of_no_use_is_set_aside(
    damage: str, file: Path, mnist: datasets.Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence, and the same run as without the file."""
    spoil, reason = DAMAGES[damage]
    spoil(file)
    with pytest.raises(CheckpointError, match=reason):
        TrainingLoop(RUN, mnist).load(file)
    spoilt, earlier = file.read_bytes(), file.with_name("run.pt.bad1")
    earlier.write_text("the first one")
    outcome, fresh = train(RUN, mnist, checkpoint=file, checkpoint_seconds=1e9), train(RUN, mnist)
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"the checkpoint {file} can't be used, ") and "\n" not in said
    assert said.endswith("it is now run.pt.bad2, the run starts anew")
    left = {path.name: path.read_bytes() for path in file.parent.iterdir()}
    assert left == {"run.pt.bad1": b"the first one", "run.pt.bad2": spoilt}  # no code was executed
    outcome.train_seconds = fresh.train_seconds = 0.0
    assert outcome == fresh


# ------------------------------------------------------------------------------ writing


def test_file_and_folder_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file before it gets its name, the folder afterwards."""
    done: list[str] = []
    fsync, rename = os.fsync, os.replace

    def flush(handle: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    def name(*paths: Path) -> None:
        done.append("rename")
        rename(*paths)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", name)
    checkpoint.write(tmp_path / "a.pt", {})
    assert done == ["file", "rename", "folder"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_what_fails_while_writing_leaves_the_last_one(
    call: str, error: BaseException, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says so."""

    def fail(*_: object) -> None:
        raise error

    before = file.read_bytes()
    monkeypatch.setattr(os, call, fail)
    for path, safe in ((file, "the last one is safe"), (file.with_name("b.pt"), "has none yet")):
        with pytest.raises(type(error)) as caught:
            checkpoint.write(path, {})
        for part in (str(path), "No space left", safe) if isinstance(error, OSError) else ():
            assert part in str(caught.value)
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_while_writing(
    call: str, file: Path, mnist: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one is whole; what was torn goes when the run goes on."""
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(os, call, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        checkpoint.write(file, {"weights": torch.zeros(10_000)})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and len(list(file.parent.iterdir())) == 2
    loop = TrainingLoop(RUN, mnist)
    loop.load(file)
    assert loop.state.step == 3
    assert train(RUN, mnist, checkpoint=file, checkpoint_seconds=1e9).steps == 6
    assert [p.name for p in file.parent.iterdir()] == ["run.pt"]
