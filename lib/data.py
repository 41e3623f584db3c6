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

import contextlib
import fcntl
import hashlib
import http.client
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib import paths
from lib.config import unknown

# A machine without internet may drop packets in silence; then a download ends after this time.
_DOWNLOAD_TIMEOUT_S = 30.0
_LOCK = "download.lock"


class DataError(RuntimeError):
    """A data set is missing or damaged; the message says which files go where."""


@dataclass(frozen=True)
class Augment:
    """CIFAR-10's augmentation in the official code: pad 4 by reflection, crop back to the full size
    at random, flip half of the images.
    """

    pad: int = 4

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """A new batch of the shape (n, c, h, w) and type of `images`, each cropped by itself.

        The draws are made on the generator's device, so a CPU generator gives the same crops
        wherever the images are.  Raises ValueError where `crop_and_flip` does.
        """
        n = len(images)
        top, left = torch.randint(
            0, 2 * self.pad + 1, (2, n), generator=generator, device=generator.device
        )
        flip = torch.randint(0, 2, (n,), generator=generator, device=generator.device)
        return crop_and_flip(images, top, left, flip.bool(), pad=self.pad)


@dataclass(frozen=True, eq=False)
class Dataset:
    """One data set, split and normalised, all on one device.

    The images are float32 of shape (n, c, h, w), the labels int64 of shape (n,).  Loads with equal
    arguments share these tensors: do not write into them.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int
    sha256: str
    """Of the raw bytes: training pixels, training labels, test pixels, test labels."""
    augment: Augment | None = None
    """What the protocol does to each training batch; None for MNIST."""


@dataclass(frozen=True)
class _Source:
    """Where a data set lies below the root, and what identifies it."""

    torchvision_class: str
    folder: str
    md5: dict[str, str]  # file name -> checksum
    sha256: str
    shape: tuple[int, int, int]  # of an image
    mean: tuple[float, ...]  # per channel, of pixels in 0..1
    std: tuple[float, ...]
    num_classes: int
    augment: Augment | None


_SOURCES = {
    "mnist": _Source(
        torchvision_class="MNIST",
        folder="MNIST/raw",
        md5={
            "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        },
        sha256="06b0d1f124c4e5fa796686ade41a9b778edacc8622f2195a352ef479ad44fc16",
        shape=(1, 28, 28),
        mean=(0.1307,),
        std=(0.3081,),
        num_classes=10,
        augment=None,
    ),
    "cifar10": _Source(
        torchvision_class="CIFAR10",
        folder="cifar-10-batches-py",
        md5={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
        sha256="32e5966899bde482c0ef7d076bf69809b4b1488c806f657a814cfca4646ec493",
        shape=(3, 32, 32),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        num_classes=10,
        augment=Augment(pad=4),
    ),
}

DATASETS = tuple(_SOURCES)


def load(
    dataset: str,
    root: str | Path | None = None,
    device: str | torch.device = "cpu",
    *,
    val_fraction: float = 0.1,
    train_subset: int = 0,
    download: bool = True,
) -> Dataset:
    """Load `dataset` ("mnist" or "cifar10") from `root` (default: DATA_ROOT, else data/).

    The last `val_fraction` of the training set is the validation set.  `train_subset` keeps only
    the first so many images of the rest (0: all); they are not stratified, both data sets come in
    random order.  CIFAR-10 takes 0.74 GB on the device, MNIST 0.22 GB.  The last two data sets
    loaded are kept, so that a process that trains many runs reads and checks the files once.

    Raises ValueError for an unknown name or impossible sizes, DataError for missing files (after
    trying to download them, unless `download` is False) and for damaged ones.
    """
    if dataset not in _SOURCES:
        raise ValueError(unknown("data set", dataset, DATASETS))
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}, but must be at least 0 and below 1.")
    where = Path(root).expanduser().resolve() if root is not None else paths.data_root()
    return _load(dataset, where, torch.device(device), val_fraction, train_subset, download)


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, *, pad: int) -> Tensor:
    """Pad by reflection, crop back to the same size, mirror left to right where `flip`.

    `images` is (n, c, h, w) of any type; `top` and `left` are (n,) integers in 0..2*pad, the upper
    left corner of the crop in the padded image; `flip` is (n,) bool.  Returns (n, c, h, w).
    Raises ValueError if the image is too small to be reflected by `pad`.
    """
    n, c, h, w = images.shape
    if not 0 <= pad < min(h, w):
        raise ValueError(f"Cannot pad images of {h}x{w} pixels by reflecting {pad} pixels.")
    device = images.device
    top, left, flip = top.to(device), left.to(device), flip.to(device)
    x = torch.arange(w, device=device)
    x = torch.where(flip[:, None], w - 1 - x, x)
    rows = _reflect(top[:, None] + torch.arange(h, device=device) - pad, h)
    columns = _reflect(left[:, None] + x - pad, w)
    # One gather straight out of the unpadded images: no padded copy, no loop over images.
    source = (rows[:, :, None] * w + columns[:, None, :]).view(n, 1, h * w).expand(-1, c, -1)
    return images.flatten(2).gather(2, source).view(n, c, h, w)


def _reflect(position: Tensor, size: int) -> Tensor:
    """Fold positions in -(size-1)..2*(size-1) back into 0..size-1; the edge is not repeated."""
    return (size - 1) - ((size - 1) - position.abs()).abs()


@lru_cache(maxsize=2)
def _load(
    name: str,
    root: Path,
    device: torch.device,
    val_fraction: float,
    train_subset: int,
    download: bool,
) -> Dataset:
    source = _SOURCES[name]
    train_x, train_y, test_x, test_y = _raw(source, root, download)
    n = len(train_x) - round(val_fraction * len(train_x))
    if not 0 <= train_subset <= n:
        raise ValueError(
            f"train_subset is {train_subset}, but must be between 0 (all) and {n}, "
            f"the training images of {name} at val_fraction {val_fraction}."
        )
    kept = train_subset or n

    def images(pixels: np.ndarray) -> Tensor:
        return _normalise(torch.from_numpy(pixels).to(device), source)

    def labels(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device, torch.int64)

    return Dataset(
        name=name,
        train_x=images(train_x[:kept]),
        train_y=labels(train_y[:kept]),
        val_x=images(train_x[n:]),
        val_y=labels(train_y[n:]),
        test_x=images(test_x),
        test_y=labels(test_y),
        num_classes=source.num_classes,
        sha256=source.sha256,
        augment=source.augment,
    )


def _normalise(pixels: Tensor, source: _Source) -> Tensor:
    """Map uint8 pixels (n, c, h, w) to float32 of about zero mean and unit variance."""
    mean = torch.tensor(source.mean, device=pixels.device).view(-1, 1, 1)
    std = torch.tensor(source.std, device=pixels.device).view(-1, 1, 1)
    return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)


def _raw(source: _Source, root: Path, download: bool) -> tuple[np.ndarray, ...]:
    """Return training pixels and labels, test pixels and labels: uint8, pixels (n, c, h, w)."""
    _require_files(source, root, download)
    try:
        arrays = (*_parse(source, root, train=True), *_parse(source, root, train=False))
    except Exception as error:  # whatever a parser says of a file cut short
        raise DataError(_damage(source, root, " ".join(str(error).split())[:200])) from error
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.data)
    shapes = {arrays[0].shape[1:], arrays[2].shape[1:]}  # a header tells them, not the bytes
    if shapes != {source.shape}:
        raise DataError(_damage(source, root, f"images of shape {shapes}"))
    if digest.hexdigest() != source.sha256:
        reason = f"the sha256 of all images and labels is {digest.hexdigest()}"
        raise DataError(_damage(source, root, reason))
    return arrays


def _parse(source: _Source, root: Path, *, train: bool) -> tuple[np.ndarray, np.ndarray]:
    import torchvision

    parsed: Any = getattr(torchvision.datasets, source.torchvision_class)(root, train=train)
    pixels, labels = np.asarray(parsed.data), np.asarray(parsed.targets, dtype=np.uint8)
    # torchvision: MNIST is (n, h, w), CIFAR-10 (n, h, w, c).
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pixels), labels


def _require_files(source: _Source, root: Path, download: bool) -> None:
    """Download what is missing; raise DataError if it still is."""
    if (root / _LOCK).exists():
        # Another process may be unpacking at this moment: its last file is there, but not whole.
        with (root / _LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)
    if not _missing(source, root):
        return
    reason = "downloading was not asked for"
    if download:
        import torchvision

        try:
            # Worker processes may all get here at once: one downloads, the others wait for it.
            with paths.locked(root / _LOCK), _socket_timeout(_DOWNLOAD_TIMEOUT_S):
                if _missing(source, root):
                    getattr(torchvision.datasets, source.torchvision_class)(root, download=True)
        except (OSError, RuntimeError, EOFError, http.client.HTTPException) as error:
            reason = f"the download failed: {' '.join(str(error).split())}"
    missing = _missing(source, root)
    if missing:
        what = "no file" if len(missing) == len(source.md5) else f"no {', '.join(missing)}"
        raise DataError(
            f"{source.torchvision_class} not found: {what} in {root / source.folder} ({reason}); "
            f"put {', '.join(source.md5)} (unpacked) there, or set DATA_ROOT to the folder that "
            f"contains {source.folder}, or connect to the internet (behind a proxy set HTTPS_PROXY "
            "and HTTP_PROXY)."
        )


def _missing(source: _Source, root: Path) -> list[str]:
    return [name for name in source.md5 if not (root / source.folder / name).is_file()]


def _damage(source: _Source, root: Path, reason: str) -> str:
    """Say which files differ from the published ones; `reason` is how it was noticed."""
    folder = root / source.folder
    wrong = []
    for name, expected in source.md5.items():
        content = (folder / name).read_bytes()
        if (md5 := hashlib.md5(content, usedforsecurity=False).hexdigest()) != expected:
            wrong.append(f"{name} ({len(content):,} bytes, md5 {md5} instead of {expected})")
    if wrong:
        return (
            f"{source.torchvision_class} is damaged in {folder}: {', '.join(wrong)}; delete "
            f"{'it' if len(wrong) == 1 else 'them'} and run again to download."
        )
    return (
        f"{source.torchvision_class} could not be read from {folder} although its files are "
        f"intact ({reason}); a folder 'processed' of an older torchvision beside it must go."
    )


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
