"""MNIST and CIFAR-10 as normalised tensors that stay on the device, and the augmentation.

Protocol of the official code (commit e19ff16): the last tenth of the training set is held out for
validation, so 54,000 + 6,000 images of MNIST and 45,000 + 5,000 of CIFAR-10, the same ones for
every seed; CIFAR-10 images for training are flipped and cropped at random.  One difference: the
official code applies the random crop and flip to the validation images too; here validation and
test images are never augmented.

torchvision downloads and parses the files; it is imported only when a data set is loaded.  What it
returns is compared with the known checksum of the whole data set, since torchvision itself does not
check MNIST files that are already unpacked.
"""

from __future__ import annotations

import hashlib
import http.client
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib import paths
from lib.config import known

# A machine without internet may drop packets in silence; then a download ends after this time.
_DOWNLOAD_TIMEOUT_S = 30.0
_PAD = 4  # pixels, of the augmentation


class DataError(RuntimeError):
    """A data set is missing or damaged; the message says which files go where."""


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """CIFAR-10's augmentation in the official code: pad 4 by reflection, crop back to the full size
    at random, flip half of the images; each image [n, c, h, w], of any type, by itself.

    The draws are made on the generator's device, so a CPU generator gives the same crops wherever
    the images are.
    """
    n, c, h, w = images.shape
    like: dict[str, Any] = {"generator": generator, "device": generator.device}
    corners = torch.randint(0, 2 * _PAD + 1, (2, n), **like).to(images.device)
    flip = torch.randint(0, 2, (n, 1), **like).to(images.device).bool()
    x = torch.arange(w, device=images.device)
    x = torch.where(flip, w - 1 - x, x)
    rows = _reflect(corners[0, :, None] + torch.arange(h, device=images.device) - _PAD, h)
    columns = _reflect(corners[1, :, None] + x - _PAD, w)
    # One gather straight out of the unpadded images: no padded copy, no loop over images.
    source = (rows[:, :, None] * w + columns[:, None, :]).view(n, 1, h * w).expand(-1, c, -1)
    return images.flatten(2).gather(2, source).view(n, c, h, w)


def _reflect(position: Tensor, size: int) -> Tensor:
    """Fold positions in -(size-1)..2*(size-1) back into 0..size-1; the edge is not repeated."""
    return (size - 1) - ((size - 1) - position.abs()).abs()


@dataclass(frozen=True, eq=False)
class Dataset:
    """One data set, split and normalised, all on one device.

    The images are float32 of shape (n, c, h, w), the labels int64 of shape (n,).  Loads with equal
    arguments share these tensors: do not write into them.
    """

    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor
    sha256: str
    """Of the raw bytes: training pixels, training labels, test pixels, test labels."""
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    """What the protocol does to each training batch; None for MNIST."""


@dataclass(frozen=True)
class _Source:
    """Where a data set lies below the root, and what identifies it."""

    torchvision_class: str
    folder: str
    files: tuple[str, ...]
    sha256: str  # of all pixels and labels
    mean: tuple[float, ...]  # per channel, of pixels in 0..1
    std: tuple[float, ...]
    augment: Callable[[Tensor, torch.Generator], Tensor] | None

    def missing(self, root: Path) -> list[str]:
        """Names of the files that are not below the root."""
        return [name for name in self.files if not (root / self.folder / name).is_file()]


_KINDS = ("images-idx3", "labels-idx1")
_SOURCES = {
    "mnist": _Source(
        torchvision_class="MNIST",
        folder="MNIST/raw",
        files=tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in _KINDS),
        sha256="06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16",
        mean=(0.1307,),
        std=(0.3081,),
        augment=None,
    ),
    "cifar10": _Source(
        torchvision_class="CIFAR10",
        folder="cifar-10-batches-py",
        files=(*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"),
        sha256="32e5966899bde482c0ef7d076bf69809b4b1488c806f657a814cfca4646ec493",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        augment=crop_and_flip,
    ),
}


def load(
    dataset: str,
    device: str | torch.device = "cpu",
    *,
    val_fraction: float = 0.1,
    train_subset: int = 0,
) -> Dataset:
    """Load `dataset` ("mnist" or "cifar10") from DATA_ROOT (by default data/).

    The last `val_fraction` of the training set is the validation set.  `train_subset` keeps only
    the first so many images of the rest (0: all); they are not stratified, both data sets come in
    random order.  CIFAR-10 takes 0.74 GB on the device, MNIST 0.22 GB.  The last two data sets
    loaded are kept, so that a process that trains many runs reads and checks the files once.

    Raises ValueError for an unknown name, DataError for missing files (after trying to download
    them) and for damaged ones.
    """
    known("data set", dataset, _SOURCES)
    return _load(dataset, paths.data_root(), torch.device(device), val_fraction, train_subset)


@lru_cache(maxsize=2)
def _load(
    name: str, root: Path, device: torch.device, val_fraction: float, train_subset: int
) -> Dataset:
    source = _SOURCES[name]
    train_x, train_y, test_x, test_y = _raw(source, root)
    n = len(train_x) - round(val_fraction * len(train_x))
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (source.mean, source.std))

    def images(pixels: np.ndarray) -> Tensor:
        """Of uint8 (n, c, h, w), float32 of about zero mean and unit variance."""
        resident = torch.from_numpy(pixels).to(device)
        return resident.to(torch.float32).div_(255).sub_(mean).div_(std)

    def labels(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device, torch.int64)

    return Dataset(
        train_x=images(train_x[:n][: train_subset or None]),
        train_y=labels(train_y[:n][: train_subset or None]),
        val_x=images(train_x[n:]),
        val_y=labels(train_y[n:]),
        test_x=images(test_x),
        test_y=labels(test_y),
        sha256=source.sha256,
        augment=source.augment,
    )


def _raw(source: _Source, root: Path) -> tuple[np.ndarray, ...]:
    """Return training pixels and labels, test pixels and labels: uint8, pixels (n, c, h, w)."""
    _require_files(source, root)
    import torchvision

    arrays: list[np.ndarray] = []
    damaged = (
        f"{source.torchvision_class} in {root / source.folder} is damaged: delete "
        f"{root / Path(source.folder).parts[0]} and run again to download it"
    )
    try:
        for train in (True, False):
            parsed = getattr(torchvision.datasets, source.torchvision_class)(root, train=train)
            pixels = np.asarray(parsed.data)
            # torchvision: MNIST is (n, h, w), CIFAR-10 (n, h, w, c).
            pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
            arrays += [np.ascontiguousarray(pixels), np.asarray(parsed.targets, dtype=np.uint8)]
    except Exception as error:  # whatever a parser says of a file cut short
        raise DataError(f"{damaged} ({' '.join(str(error).split())[:200]})") from error
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.data)
    if (found := digest.hexdigest()) != source.sha256:
        raise DataError(f"{damaged} (sha256 {found} instead of {source.sha256})")
    return tuple(arrays)


def _require_files(source: _Source, root: Path) -> None:
    """Download what is missing; raise DataError if it still is."""
    reason, lock, before = "", root / "download.lock", socket.getdefaulttimeout()
    # Where all are there, another process may be unpacking the last one at this moment.
    if source.missing(root) or lock.exists():
        import torchvision

        socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_S)
        try:
            # Worker processes may all get here at once: one downloads, the others wait for it.
            with paths.locked(lock):
                if source.missing(root):
                    getattr(torchvision.datasets, source.torchvision_class)(root, download=True)
        except (OSError, RuntimeError, EOFError, http.client.HTTPException) as error:
            reason = f"the download failed: {' '.join(str(error).split())}"
        finally:
            socket.setdefaulttimeout(before)
    if missing := source.missing(root):
        what = "no file" if len(missing) == len(source.files) else f"no {', '.join(missing)}"
        raise DataError(
            f"{source.torchvision_class} not found: {what} in {root / source.folder} ({reason}); "
            f"put {', '.join(source.files)} (unpacked) there, or set DATA_ROOT to the folder that "
            f"contains {source.folder}, or connect to the internet (behind a proxy set HTTPS_PROXY "
            "and HTTP_PROXY)."
        )
