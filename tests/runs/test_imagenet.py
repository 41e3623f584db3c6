"""ResNet-50 on a generated folder of images, in two processes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.multiprocessing import ProcessRaisedException, start_processes
from torchvision.models.resnet import Bottleneck, ResNet

from lib import paths
from lib.config import Run
from lib.data import DataError
from lib.results import store as results
from lib.runs import imagenet

# Small crops, a block a stage. torchrun's processes train, and so do two forked ones otherwise, as
# importing torch takes longer than their steps: told to end, as by a scheduler, or killed in a step
# of one rank, and then left in peace.
SMALL = """
import dataclasses, os, signal, socket, sys
from pathlib import Path
from torch.multiprocessing import ProcessExitedException, start_processes
from torchvision.models.resnet import Bottleneck, ResNet
from lib import paths
from lib.models import MODELS
from lib.runs import imagenet, runner, single
imagenet.IMAGENET_SHAPE = 3, 64, 64
build = lambda scale, classes: ResNet(Bottleneck, [1, 1, 1, 1], classes)
MODELS["resnet50"] = dataclasses.replace(MODELS["resnet50"], build=build)
real = imagenet.ImageNetLoop.step
def step(self, index):
    if self.state.step == at and self.rank == 1:
        os.kill(os.getpid(), by)
    return real(self, index)
imagenet.ImageNetLoop.step = step

def train(rank=None):
    os.environ |= {} if rank is None else {"RANK": str(rank)}
    imagenet.main(sys.argv[1:])

at, by = -1, 0
if "RANK" in os.environ:
    train()
    sys.exit()
for at, by in ((1, signal.SIGTERM), (2, signal.SIGKILL), (-1, 0)):
    with socket.create_server(("127.0.0.1", 0)) as free:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    os.environ["WORLD_SIZE"] = "2"
    stopped = False
    try:
        start_processes(train, nprocs=2, start_method="fork")
    except ProcessExitedException:
        stopped = True
    kept = len(list(paths.checkpoints_dir().rglob("*.pt")))
    assert (stopped, kept) == (at > 0, at > 0), (at, stopped, kept)
"""


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """12 training and 5 validation images of 3 classes."""
    random = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for number, name in enumerate(("ant", "bee", "cat")):
            folder = tmp_path / "imagenet" / part / name
            folder.mkdir(parents=True)
            for i in range(count - (part == "val" and number == 2)):
                pixels = random.integers(0, 255, (48, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    monkeypatch.setenv("IMAGENET_ROOT", str(tmp_path / "imagenet"))
    return tmp_path


def run(folder: Path, *words: str) -> None:
    environment = {"CHECKPOINT_ROOT": str(folder / "checkpoints"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=paths.REPO,
        env=os.environ | environment | {"PYTHONPATH": str(paths.REPO)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_two_processes_train_and_store_one_row(images: Path) -> None:
    """With masks that stay alike, which needs alike momentum; also when told to end, or killed."""
    only = ["--only", "seed=0", "--only", "density=0.2", "--only", "prune_rate=0.2"]
    changes = ["epochs=2", "batch_size=4", "train_samples=9", "lr=0.01"]
    words = [word for change in changes for word in ("--set", change)]
    out = images / "results"
    script = images / "small.py"
    script.write_text(SMALL)
    arguments = [str(script), *only, *words, "--workers", "0", "--results"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run(images, *torchrun, *arguments, str(out))
    csv = out / "own" / "paper" / "imagenet.csv"  # --set: not in the grid
    runs = results.read_runs(csv)
    assert len(runs) == 1 and runs["status"][0] == "ok"
    row = runs.iloc[0]
    assert row["steps"] == 2 * (9 // 4)
    weights = {
        n: p.numel() for n, p in ResNet(Bottleneck, [1] * 4).named_parameters() if p.dim() > 1
    }
    dense = sum(size for name, size in weights.items() if name[:5] == "conv1" or "downs" in name)
    assert row["weights_active"] == round(0.2 * (sum(weights.values()) - dense)) + dense
    assert row["test_error_pct"] in [100 * wrong / 5 for wrong in range(6)]
    assert len(results.read_curves(csv)) == 2
    assert not list((images / "checkpoints").rglob("*.pt"))
    run(images, *arguments, str(images / "other"))
    other = results.read_runs(images / "other" / "own" / "paper")
    same = [name for name in results.COLUMNS if name not in results.PROVENANCE]
    assert other[same].equals(runs[same])


def _drift(rank: int, folder: Path) -> None:
    """One of two ranks, which changes a mask behind the other's back."""
    url = f"file://{folder}/group"
    torch.distributed.init_process_group("gloo", init_method=url, rank=rank, world_size=2)
    masks = {"a": torch.ones(3, dtype=torch.bool), "b": torch.zeros(2, 2, dtype=torch.bool)}
    imagenet.check_alike(masks)
    (folder / f"alike{rank}").touch()
    masks["b"][1, 0] = rank == 1
    try:
        imagenet.check_alike(masks)
    finally:
        torch.distributed.destroy_process_group()


def test_masks_that_drift_apart_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(ProcessRaisedException, match="the masks of the processes differ"):
        start_processes(_drift, (tmp_path,), nprocs=2, start_method="fork")
    assert len(list(tmp_path.glob("alike*"))) == 2


def test_a_part_of_the_files_has_all_classes_and_a_bad_file_is_named(images: Path) -> None:
    run = Run(dataset="imagenet", model="resnet50", batch_size=3, train_samples=9)
    loop = imagenet.ImageNetLoop(run, workers=0)
    assert sorted(loop.data.train_y.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]  # as many of each
    assert [loop.train_files[i][1] for i in range(9)] == loop.data.train_y.tolist()
    bad = images / "imagenet" / "train" / "ant" / "0.png"
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(bad)
    assert np.asarray(imagenet.open_image(str(bad))).tolist()[0][0] == [156] * 3
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(DataError, match=re.escape(str(bad))):
        imagenet.open_image(str(bad))
    shutil.rmtree(images / "imagenet" / "val" / "ant")
    with pytest.raises(DataError, match="ant"):
        imagenet.ImageNetLoop(run, workers=0)


def test_what_is_wrong_is_said(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(dataset="imagenet", model="resnet50", batch_size=13)
    with pytest.raises(ValueError, match="12 training images are less than a batch of 13"):
        imagenet.ImageNetLoop(run)
    (images / "imagenet" / "val").rename(images / "imagenet" / "test")
    with pytest.raises(DataError, match=r"no folder of a class in .*val"):
        imagenet.ImageNetLoop(run)
    monkeypatch.delenv("IMAGENET_ROOT")
    with pytest.raises(DataError, match="set IMAGENET_ROOT"):
        imagenet.ImageNetLoop(run)


def test_the_epoch_is_shared_out_without_overlap(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(dataset="imagenet", model="resnet50", batch_size=4, epochs=1)
    read: dict[int, list[list[int]]] = {}

    def reading(self, files, batches, epoch):
        read[self.rank] = batches
        return iter(())

    monkeypatch.setattr(imagenet.ImageNetLoop, "_read", reading)
    loop = imagenet.ImageNetLoop(run, workers=0)
    orders = []
    for rank in (0, 1):
        loop.rank, loop.world = rank, 2
        orders.append(loop.order())
    assert torch.equal(*orders)
    assert all(len(part) == 2 for parts in read.values() for part in parts)
    assert sorted(i for parts in read.values() for part in parts for i in part) == list(range(12))
    for step, (first, second) in enumerate(zip(read[0], read[1], strict=True)):
        assert set(first + second) == set(orders[0][4 * step : 4 * step + 4].tolist())
