"""The data sets: real MNIST and CIFAR-10 below DATA_ROOT, their failures, and the augmentation."""

import fcntl
import os
import pickle
import threading
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from lib import data, paths

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
CIFAR_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
FOLDERS = {"mnist": "MNIST/raw", "cifar10": "cifar-10-batches-py"}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root of its own, and no network."""

    def offline(*_: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    for cls in (torchvision.datasets.MNIST, torchvision.datasets.CIFAR10):
        monkeypatch.setattr(cls, "download", offline)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    return tmp_path


def link(source: Path, names: tuple[str, ...], root: Path) -> Path:
    """Link real files below `root`; return their folder there."""
    folder = root / source.relative_to(source.parents[1 if source.name == "raw" else 0])
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        os.symlink(source / name, folder / name)
    return folder


REAL = {name: paths.data_root() / folder for name, folder in FOLDERS.items()}


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


# The real data


def raw(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels of the training set and then the test set, read without torchvision."""
    if name == "mnist":
        files = [(REAL[name] / file).read_bytes() for file in MNIST_FILES]
        pixels = [np.frombuffer(file, np.uint8, offset=16) for file in files[::2]]
        labels = [np.frombuffer(file, np.uint8, offset=8) for file in files[1::2]]
        return np.concatenate(pixels).reshape(-1, 1, 28, 28), np.concatenate(labels)
    batches = [
        pickle.loads((REAL[name] / file).read_bytes(), encoding="bytes") for file in CIFAR_FILES[:6]
    ]
    pixels = [batch[b"data"] for batch in batches]
    labels = [np.array(batch[b"labels"]) for batch in batches]
    return np.concatenate(pixels).reshape(-1, 3, 32, 32), np.concatenate(labels)


@pytest.mark.parametrize(
    ("name", "sizes", "mean", "std"),
    [
        ("mnist", (54_000, 6_000, 10_000), [0.1307], [0.3081]),
        # The usual divisors are smaller than the standard deviations (.247, .243, .262).
        ("cifar10", (45_000, 5_000, 10_000), [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    ],
)
def test_it_is_what_the_files_hold(
    name: str, sizes: tuple[int, ...], mean: list[float], std: list[float]
) -> None:
    """In their order, scaled, as float32 and int64; loaded once."""
    loaded, (pixels, labels) = data.load(name), raw(name)
    center, scale = (np.float32(v).reshape(-1, 1, 1) for v in (mean, std))
    start = 0
    for part, size in zip(("train", "val", "test"), sizes, strict=True):
        x, y = getattr(loaded, f"{part}_x"), getattr(loaded, f"{part}_y")
        here = slice(start, start + size)
        assert (len(x), x.dtype, y.dtype) == (size, torch.float32, torch.int64)
        assert x.is_contiguous()
        expected = (pixels[here][::10] / np.float32(255) - center) / scale
        np.testing.assert_allclose(x[::10], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(y, labels[here])
        assert torch.bincount(y, minlength=10).min() > 0.85 * size / 10  # no sorted stretch
        start += size
    assert start == len(pixels)
    assert (loaded.augment is not None) == (name == "cifar10")
    assert data.load(name) is loaded


def test_subsets_and_validation_shares() -> None:
    few = data.load("mnist", train_subset=1000)
    assert (len(few.train_x), len(few.train_y), len(few.val_x)) == (1000, 1000, 6000)
    half = data.load("mnist", val_fraction=0.5)
    assert (len(half.train_x), len(half.val_x)) == (30_000, 30_000)
    assert torch.equal(half.train_x[:1000], few.train_x)  # the first ones
    assert torch.equal(half.val_x[-6000:], few.val_x)
    none = data.load("mnist", val_fraction=0.0)
    assert (len(none.train_x), len(none.val_x)) == (60_000, 0)


def test_an_unknown_name_is_told() -> None:
    with pytest.raises(ValueError, match=r"'mnits': did you mean 'mnist'\?"):
        data.load("mnits")


# Missing and damaged files


@pytest.mark.parametrize(("name", "files"), [("mnist", MNIST_FILES), ("cifar10", CIFAR_FILES)])
def test_missing_data_without_network_says_which_files_go_where(
    name: str, files: tuple[str, ...], root: Path
) -> None:
    with pytest.raises(data.DataError) as caught:
        data.load(name)
    message = str(caught.value)
    for part in (str(root / FOLDERS[name]), "Name or service", "DATA_ROOT", "HTTPS_PROXY", *files):
        assert part in message
    assert "\n" not in message
    link(REAL[name], files[1:], root)
    with pytest.raises(data.DataError, match=rf"not found: no {files[0]} in {root}"):
        data.load(name)


def test_a_root_that_cannot_be_written_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "file").touch()
    monkeypatch.setenv("DATA_ROOT", str(root / "file" / "below"))
    with pytest.raises(data.DataError, match=r"the download failed: .*file"):
        data.load("mnist")


def test_missing_data_is_downloaded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(self: torchvision.datasets.MNIST) -> None:
        link(REAL["mnist"], MNIST_FILES, Path(self.root))

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    assert len(data.load("mnist").test_x) == 10_000


def test_a_download_of_another_process_is_waited_for(root: Path) -> None:
    folder = link(REAL["mnist"], MNIST_FILES, root)
    whole = (folder / MNIST_FILES[0]).read_bytes()
    replace(folder / MNIST_FILES[0], whole[:1_000_000])  # is being unpacked
    loaded: list[data.Dataset] = []
    thread = threading.Thread(target=lambda: loaded.append(data.load("mnist")))
    with (root / "download.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        replace(folder / MNIST_FILES[0], whole)
    thread.join(60)
    assert len(loaded) == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "longer"])
def test_damaged_mnist_names_the_folder(damage: str, root: Path) -> None:
    path = link(REAL["mnist"], MNIST_FILES, root) / MNIST_FILES[2]
    original = path.read_bytes()
    content = {
        "cut": original[:3_000_000],
        "empty": b"",
        "changed": original[:1_000_000] + b"\1" + original[1_000_001:],
        "longer": original + b"\0",
    }[damage]
    replace(path, content)
    with pytest.raises(data.DataError) as caught:
        data.load("mnist")
    message = str(caught.value)
    assert f"MNIST in {path.parent} is damaged: delete {root / 'MNIST'} and run again" in message
    assert "\n" not in message


def test_damaged_cifar10_names_the_folder(root: Path) -> None:
    folder = link(REAL["cifar10"], CIFAR_FILES, root)
    content = (folder / "test_batch").read_bytes()
    replace(folder / "test_batch", content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(data.DataError, match=f"CIFAR10 in {folder} is damaged: delete {folder}"):
        data.load("cifar10")


def test_other_images_in_a_legacy_cache_are_refused(root: Path) -> None:
    link(REAL["mnist"], MNIST_FILES, root)
    (root / "MNIST/processed").mkdir()
    for name in ("training.pt", "test.pt"):
        content = (torch.zeros(10, 28, 28, dtype=torch.uint8), torch.zeros(10, dtype=torch.long))
        torch.save(content, root / "MNIST/processed" / name)
    with pytest.raises(data.DataError, match=f"delete {root / 'MNIST'} and"):
        data.load("mnist")


# Augmentation


def test_every_crop_and_flip_is_drawn_equally_often() -> None:
    """One of those that NumPy makes, of all channels alike."""
    n = 16_200  # 100 for each of the 9 x 9 x 2 outcomes
    image = torch.arange(3 * 12 * 13).view(3, 12, 13).float()  # tells where a crop comes from
    generator = torch.Generator().manual_seed(0)
    result = data.crop_and_flip(image.expand(n, -1, -1, -1), generator)
    padded = np.pad(image.numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
    counts = {}
    for top in range(9):
        for left in range(9):
            crop = padded[:, top : top + 12, left : left + 13]
            counts[crop.tobytes()] = counts[crop[:, :, ::-1].tobytes()] = 0
    assert len(counts) == 162
    for one in result.numpy():
        counts[one.tobytes()] += 1  # a KeyError: no valid crop
    chi_square = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert chi_square < 233  # the 0.9999 quantile at 161 degrees of freedom


def test_same_generator_state_same_bits() -> None:
    batch = torch.randn(128, 3, 32, 32)
    before, global_state = batch.clone(), torch.get_rng_state()
    generator = torch.Generator().manual_seed(7)
    first, second = (data.crop_and_flip(batch, generator) for _ in range(2))
    again = data.crop_and_flip(batch, torch.Generator().manual_seed(7))
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(batch, before) and torch.equal(torch.get_rng_state(), global_state)
    assert (first.shape, first.dtype, first.is_contiguous()) == (batch.shape, batch.dtype, True)
