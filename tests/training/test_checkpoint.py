"""A checkpoint is whole and this run's, or it is set aside and the run starts anew; one that can't
be written leaves the last one and says so.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lib import data as datasets
from lib.config import Run
from lib.train import Interrupted, TrainingLoop, train
from lib.training import checkpoint
from lib.training.checkpoint import CheckpointAccessError, CheckpointError

RUN = Run(epochs=1, train_samples=600)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def mnist() -> datasets.Dataset:
    whole = datasets.load("mnist", train_subset=RUN.train_samples)
    return replace(
        whole,
        val_x=whole.val_x[:100],
        val_y=whole.val_y[:100],
        test_x=whole.test_x[:100],
        test_y=whole.test_y[:100],
    )


@pytest.fixture
def file(mnist: datasets.Dataset, tmp_path: Path) -> Path:
    """The checkpoint of RUN after three of its six mini-batches."""
    path = tmp_path / "run.pt"
    stop = iter([False, False, True])
    with pytest.raises(Interrupted):
        train(RUN, mnist, checkpoint=path, should_stop=lambda: next(stop))
    return path


def packed(content: object) -> bytes:
    """A whole file of any content, checksum included."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getvalue()
    return b"sparse-momentum checkpoint\n" + hashlib.sha256(payload).digest() + payload


def read(path: Path) -> dict[str, Any]:
    return checkpoint.read(path, RUN.run_id, CPU)


# ------------------------------------------------------------------------------ of no use


class Malicious:
    """Pickled, it would create a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


def flipped(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte % len(content)] ^= 1 << 3
    path.write_bytes(content)


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A whole file that says something else."""

    def write(path: Path) -> None:
        saved = read(path)
        change(saved)
        path.write_bytes(packed(saved))

    return write


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit of the last byte": (lambda p: flipped(p, -1), "it is damaged"),
    "bit of a weight": (lambda p: flipped(p, 400_000), "it is damaged"),
    "bit of the checksum": (lambda p: flipped(p, 30), "it is damaged"),
    "bit of the head": (lambda p: flipped(p, 3), "no checkpoint of this version"),
    "zero bytes": (lambda p: p.write_bytes(b""), "it is empty"),
    "one byte less": (lambda p: cut(p, -1), "it is damaged"),
    "half of it": (lambda p: cut(p, 200_000), "it is damaged"),
    "head only": (lambda p: cut(p, 40), "it is damaged"),
    "foreign": (lambda p: p.write_text("run_id,seed\n"), "no checkpoint of this version"),
    "of torch": (lambda p: torch.save({"run_id": RUN.run_id}, p), "no checkpoint of this version"),
    "no pickle": (
        lambda p: p.write_bytes(
            b"sparse-momentum checkpoint\n" + hashlib.sha256(b"x").digest() + b"x"
        ),
        "something else than tensors",
    ),
    "code": (
        lambda p: p.write_bytes(packed({"run_id": Malicious(p.with_name("executed"))})),
        "something else than tensors",
    ),
    "a list": (lambda p: p.write_bytes(packed([1, 2])), "of another version"),
    "version": (changed(lambda s: s.update(version=99)), "of another version"),
    "run id": (changed(lambda s: s.update(run_id="another")), "it is of the run another"),
    "missing key": (changed(lambda s: s.pop("optimizer")), "it lacks optimizer"),
    "shape": (
        changed(lambda s: s["model"].update({"fc1.weight": torch.zeros(3, 3)})),
        r"weight fc1.weight is \[3, 3\] in it, not \[300, 784\]",
    ),
    "type": (
        changed(lambda s: s["model"].update({"fc1.bias": torch.zeros(300).double()})),
        "weight fc1.bias is torch.float64 in it",
    ),
    "no tensor": (changed(lambda s: s["model"].update({"fc1.bias": 3})), "fc1.bias is int in it"),
    "masks": (changed(lambda s: s["masking"]["masks"].clear()), "its mask has other names"),
    "momentum": (
        changed(lambda s: s["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(2))),
        r"momentum 0 is \[2\] in it",
    ),
    "position": (changed(lambda s: s["state"].update(step="3")), "its step is '3'"),
    "fields": (changed(lambda s: s["state"].pop("curves")), "has other fields"),
    "engine": (changed(lambda s: s.update(engine={"name": "torch"})), "'torch' computed it"),
    "stream": (
        changed(lambda s: s.update(augment_stream=torch.zeros(3, dtype=torch.uint8))),
        r"stream augment is \[3\] in it",
    ),
    "rules": (changed(lambda s: s["masking"].update(rules=("a",))), "its content is not a run's"),
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
    spoilt = file.read_bytes()
    outcome = train(RUN, mnist, checkpoint=file, checkpoint_seconds=1e9)
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"the checkpoint {file} can't be used, ") and "\n" not in said
    assert said.endswith("it is now run.pt.bad1, the run starts anew")
    assert [p.name for p in file.parent.iterdir()] == ["run.pt.bad1"]  # no code was executed
    assert (file.parent / "run.pt.bad1").read_bytes() == spoilt
    fresh = train(RUN, mnist)
    for one in (outcome, fresh):
        one.train_seconds = 0.0
    assert outcome == fresh


def test_files_that_were_set_aside_stay(file: Path, mnist: datasets.Dataset) -> None:
    file.with_name("run.pt.bad1").write_text("the first one")
    flipped(file, -1)
    train(RUN, mnist, checkpoint=file, checkpoint_seconds=1e9)
    assert file.with_name("run.pt.bad1").read_text() == "the first one"
    assert file.with_name("run.pt.bad2").exists()


def test_a_file_that_cannot_be_read_stays(tmp_path: Path, mnist: datasets.Dataset) -> None:
    (tmp_path / "run.pt").mkdir()
    with pytest.raises(CheckpointAccessError, match=r"run\.pt can't be read \(.*stays as it is"):
        train(RUN, mnist, checkpoint=tmp_path / "run.pt")


# ------------------------------------------------------------------------------ writing


def test_what_is_written_is_read(tmp_path: Path) -> None:
    content = {"run_id": RUN.run_id, "a": torch.randn(3), "b": {"c": [1, 2.5, None, (True,)]}}
    checkpoint.write(tmp_path / "new" / "a.pt", content)
    found = read(tmp_path / "new" / "a.pt")
    assert torch.equal(found.pop("a"), content.pop("a"))  # type: ignore[arg-type]
    assert found == {**content, "version": checkpoint.VERSION}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.pt"]


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
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_write_errors_name_the_file_and_what_is_safe(
    call: str, number: int, file: Path, mnist: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, loop = file.read_bytes(), TrainingLoop(RUN, mnist)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(CheckpointAccessError) as caught:
        loop.save(file)
    said = str(caught.value)
    assert str(file) in said and os.strerror(number) in said and "the last one is safe" in said
    assert file.read_bytes() == before
    with pytest.raises(CheckpointAccessError, match="and this run has none yet"):
        loop.save(file.with_name("other.pt"))
    assert [p.name for p in file.parent.iterdir()] == [file.name]


@pytest.fixture
def small_disk():
    """No file of this process can grow above 64 KB: writing fails in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_interrupted_without_room(small_disk, tmp_path: Path, mnist: datasets.Dataset) -> None:
    """The truth, at once, and no torn file."""
    with pytest.raises(CheckpointAccessError, match=r"File too large\), and this run has none yet"):
        train(RUN, mnist, checkpoint=tmp_path / "run.pt", should_stop=lambda: True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_interrupt_while_writing_leaves_the_last_one(
    call: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = file.read_bytes()
    monkeypatch.setattr(os, call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(file, {})
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_while_writing(
    call: str, file: Path, mnist: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one is whole; what was torn goes when the run goes on."""
    content = {"run_id": RUN.run_id, "weights": torch.zeros(10_000)}
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(os, call, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        checkpoint.write(file, content)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert sorted(p.name for p in file.parent.iterdir()) == [".run.pt.tmp", "run.pt"]
    assert read(file)["state"]["step"] == 3
    outcome = train(RUN, mnist, checkpoint=file, checkpoint_seconds=1e9)
    assert outcome.steps == 6 and [p.name for p in file.parent.iterdir()] == ["run.pt"]
