"""ResNet-50 on ImageNet: the training loop of lib/train.py with image files, one process per GPU.

    IMAGENET_ROOT=/data/imagenet torchrun --nproc-per-node 4 -m lib.runs.imagenet --only seed=0

`batch_size` is that of all processes together. Each takes its part of every mini-batch; gradients
are averaged before the optimizer sees them, so weights, momentum and with them all decisions about
the masks are the same everywhere, which is checked at every update. The validation folder is the
test set, as in the literature; no part of the training images is held out.

Augmentation is torchvision's standard one: random resized crop to 224 and flip for training; for
the test resized to 256 and cropped in the middle.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lib.config import Run, parse_field, stream_seed
from lib.data import DataError, Dataset
from lib.engine import TorchEngine
from lib.models import IMAGENET_SHAPE
from lib.start import stream
from lib.train import Interrupted, TrainingLoop, train

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def missing() -> str:
    """Why ImageNet can't be read, as a sentence; empty when it is there."""
    root = os.environ.get("IMAGENET_ROOT", "").strip()
    if not root:
        return "set IMAGENET_ROOT to a folder with train/<class>/ and val/<class>/ (ILSVRC 2012)"
    for part in ("train", "val"):
        folder = Path(root) / part
        if not folder.is_dir() or not any(entry.is_dir() for entry in folder.iterdir()):
            return f"no folder of a class in {folder} (IMAGENET_ROOT)"
    return ""


def how_to_train(runs: int) -> str:
    """What to do about ImageNet runs that are missing: the plain runner leaves them out."""
    first = f"{missing()}, and then " if missing() else ""
    return (
        f"{runs} ImageNet runs are left out: {first}torchrun --nproc-per-node <GPUs> "
        "-m lib.runs.imagenet trains them, several processes on one run"
    )


def rank_and_world() -> tuple[int, int]:
    """(number of this process, number of processes)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class ImageNetLoop(TrainingLoop):
    """A run in progress on image files, alone or as one of several processes.

    Raises DataError when the files aren't there, ValueError for a batch that can't be shared out.
    """

    def __init__(
        self, run: Run, *, device: str | torch.device = "cpu", workers: int | None = None
    ) -> None:
        if reason := missing():
            raise DataError(reason)
        self.rank, self.world = rank_and_world()
        if run.batch_size % self.world:
            raise ValueError(
                f"batch_size {run.batch_size} can't be shared out to {self.world} processes"
            )
        train, test = _folders(Path(os.environ["IMAGENET_ROOT"]))
        if run.train_samples > len(train):
            raise ValueError(f"train_samples={run.train_samples}: there are {len(train)} images")
        self.train_files = _alike_subset(train, run.train_samples or len(train))
        self.test_files = _alike_subset(test, len(test))
        count = self.images_total = len(self.train_files)
        if count < run.batch_size:
            raise ValueError(f"{count} training images are less than a batch of {run.batch_size}")
        self.batches: Iterator[Any] = iter(())
        self.workers = min(8, os.cpu_count() or 1) if workers is None else workers
        train_y, test_y = (
            torch.tensor(files.dataset.targets)[files.indices]
            for files in (self.train_files, self.test_files)
        )
        super().__init__(run, _shapes_only(train_y, test_y, run.batch_size), device=device)
        if self.world > 1:
            engine = TorchEngine(self.task)
            engine.network = DistributedDataParallel(self.model, broadcast_buffers=False)
            self.engine = engine

    def step(self, index: Tensor) -> Tensor:
        """One mini-batch; returns the mean loss over all processes."""
        return self._mean(super().step(index))

    def order(self) -> Tensor:
        """Which files in which order, the same in all processes; starts to read this one's. The
        last, incomplete batch is left out.
        """
        generator = stream(self.run, "order", self.state.epoch)
        size, steps = self.run.batch_size, self.schedule.steps_per_epoch
        order = torch.randperm(self.images_total, generator=generator)[: steps * size]
        parts = order.view(-1, size)[self.state.step_in_epoch :, self.rank :: self.world]
        self.batches = self._read(self.train_files, parts.tolist(), self.state.epoch)
        return order

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """This process's part of the next mini-batch."""
        images, labels = next(self.batches)
        images = images.to(self.device, non_blocking=True, memory_format=self.format)
        return images, labels.to(self.device, non_blocking=True)

    @torch.no_grad()
    def error_pct(self, images: Tensor, labels: Tensor) -> float:
        """Top-1 error in per cent over the first len(labels) files of the validation folder, with
        the mean of the processes' running statistics.
        """
        for buffer in self.model.buffers():
            if buffer.is_floating_point():
                self._mean(buffer)
        mine = torch.arange(self.rank, len(labels), self.world)
        parts = mine.split(max(1, self.run.batch_size // self.world))
        wrong = torch.zeros((), dtype=torch.long, device=self.device)
        for batch, target in self._read(self.test_files, [part.tolist() for part in parts], 0):
            batch = batch.to(self.device, memory_format=self.format)
            wrong += self.engine.wrong(batch, target.to(self.device))
        if self.world > 1:
            dist.all_reduce(wrong)
        return 100.0 * int(wrong) / len(labels)

    def save(self, path: Path) -> None:
        """The first process writes the checkpoint; all read it."""
        if self.rank == 0:
            super().save(path)

    def update_masks(self) -> None:
        """Prune, redistribute, grow; the same in all processes."""
        super().update_masks()
        if self.world > 1:
            check_alike(self.masking.masks)

    def _read(self, files: Any, batches: list[list[int]], epoch: int) -> Iterator[Any]:
        seed = stream_seed(self.run.seed, "augment", epoch, self.rank)
        loader = torch.utils.data.DataLoader(
            files,
            batch_sampler=batches,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(seed),
        )
        return iter(loader)

    def _mean(self, value: Tensor) -> Tensor:
        """The mean over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(value)
            value /= self.world
        return value


def check_alike(masks: Mapping[str, Tensor]) -> None:
    """RuntimeError unless all processes have the same masks."""
    digest = hashlib.sha256(b"".join(mask.cpu().numpy().tobytes() for mask in masks.values()))
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, digest.hexdigest())
    if len(set(found)) > 1:
        raise RuntimeError(
            f"process {dist.get_rank()}: the masks of the processes differ after an update; their "
            "weights or random streams have drifted apart"
        )


def _shapes_only(train: Tensor, test: Tensor, batch: int) -> Dataset:
    """A data set whose images have a shape but no content: the files are read batch by batch."""
    train_x, test_x = (torch.empty(len(y), *IMAGENET_SHAPE, device="meta") for y in (train, test))
    whole = len(train) - len(train) % batch
    return Dataset(
        train_x=train_x[:whole],
        train_y=train[:whole],
        val_x=test_x,
        val_y=test,
        test_x=test_x,
        test_y=test,
        sha256=hashlib.sha256(repr((train.tolist(), test.tolist())).encode()).hexdigest(),
    )


def _folders(root: Path) -> tuple[Any, Any]:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    last = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    crop = v2.RandomResizedCrop(IMAGENET_SHAPE[1:], antialias=True)
    train_transform = v2.Compose([crop, v2.RandomHorizontalFlip(), *last])
    test_transform = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224), *last])
    train = ImageFolder(str(root / "train"), train_transform, loader=open_image)
    test = ImageFolder(str(root / "val"), test_transform, loader=open_image)
    if odd := sorted(set(train.classes) ^ set(test.classes)):
        raise DataError(f"{root}: {', '.join(odd[:5])}: a class of train/ or val/ only, or empty")
    return train, test


def _alike_subset(files: Any, count: int) -> Any:
    """At most `count` files, as many of each class as there are, always the same random ones."""
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).numpy()
    classes = pd.Series(np.asarray(files.targets)[order])
    by_rank = classes.groupby(classes).cumcount().argsort(kind="stable")
    return torch.utils.data.Subset(files, order[by_rank][:count].tolist())


def open_image(path: str) -> Image.Image:
    """An image as RGB, of 16 bits too; DataError names a file that can't be read."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a whole image ({error}): replace the file") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the missing runs of experiment "imagenet", with all processes on one run at a time."""
    from lib.runs import runner, single
    from lib.runs.machine import versions

    parser = argparse.ArgumentParser(prog="torchrun -m lib.runs.imagenet", description=main.__doc__)
    parser.add_argument("--profile", default="paper")
    parser.add_argument("--only", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--results", metavar="DIR")
    parser.add_argument("--workers", type=int, help="reading processes per GPU")
    options = parser.parse_args(arguments)

    cuda = torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = rank_and_world()
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))

    def should_stop() -> bool:
        told = torch.tensor(len(asked), device=device)
        if world > 1:  # all at the same step, or one would wait for the others for ever
            dist.all_reduce(told)
        return bool(told)

    versions()  # nothing about git may fail after the last step
    try:
        tasks = runner.tasks_of(
            "imagenet",
            options.profile,
            only=options.only,
            overrides=dict(map(parse_field, options.set)),
            results_root=options.results,
        )
        for task in runner.missing("imagenet", tasks):
            outcome = train(
                task.run,
                make_loop=functools.partial(
                    ImageNetLoop, task.run, device=device, workers=options.workers
                ),
                checkpoint=task.checkpoint,
                checkpoint_seconds=600.0,
                should_stop=should_stop,
            )
            if rank == 0:
                single.append(task, outcome, device)
                task.checkpoint.unlink(missing_ok=True)
                print(f"{task.run.run_id}: {outcome.status}, error {outcome.test_error_pct} %")
    except (DataError, ValueError, OSError) as error:  # a reading process wraps it in its traceback
        raise SystemExit(f"error: {str(error).splitlines()[-1]}") from None
    except Interrupted:
        raise SystemExit(128 + signal.SIGTERM) from None  # its checkpoint is written
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
