"""The data sets: real MNIST and CIFAR-10 below DATA_ROOT, their failures, and the augmentation."""

import fcntl
import hashlib
import os
import pickle
import threading
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import data, paths

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
CIFAR_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")


@pytest.fixture(scope="module")
def mnist() -> data.Dataset:
    return data.load("mnist")


@pytest.fixture(scope="module")
def cifar10() -> data.Dataset:
    return data.load("cifar10")


def link(folder: str, names: tuple[str, ...], root: Path) -> Path:
    """Link the real files below `root`; return their folder there."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        os.symlink(paths.data_root() / folder / name, root / folder / name)
    return root / folder


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


# The real data


def test_mnist_is_what_the_files_hold(mnist: data.Dataset) -> None:
    folder = paths.data_root() / "MNIST/raw"
    pixels = [
        np.frombuffer((folder / name).read_bytes(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
        for name in MNIST_FILES[::2]
    ]
    labels = [
        np.frombuffer((folder / name).read_bytes(), np.uint8, offset=8)
        for name in MNIST_FILES[1::2]
    ]
    parts = {
        "train": (pixels[0][:54_000], labels[0][:54_000]),
        "val": (pixels[0][54_000:], labels[0][54_000:]),
        "test": (pixels[1], labels[1]),
    }
    for name, (images, values) in parts.items():
        x, y = getattr(mnist, f"{name}_x"), getattr(mnist, f"{name}_y")
        assert len(x) == len(images)
        expected = (images[::10] / np.float32(255) - np.float32(0.1307)) / np.float32(0.3081)
        np.testing.assert_allclose(x[::10], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(y, values)
    every = torch.cat([mnist.train_x, mnist.val_x])
    assert abs(every.mean().item()) < 1e-3
    assert abs(every.std().item() - 1) < 1e-3
    assert (mnist.name, mnist.num_classes, mnist.augment) == ("mnist", 10, None)
    assert len(mnist.sha256) == 64


def test_cifar10_is_what_the_files_hold(cifar10: data.Dataset) -> None:
    folder = paths.data_root() / "cifar-10-batches-py"
    batches = [
        pickle.loads((folder / name).read_bytes(), encoding="bytes") for name in CIFAR_FILES[:6]
    ]
    pixels = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([batch[b"labels"] for batch in batches])
    mean = np.float32([0.4914, 0.4822, 0.4465]).reshape(3, 1, 1)
    std = np.float32([0.2023, 0.1994, 0.2010]).reshape(3, 1, 1)
    parts = {
        "train": slice(0, 45_000),
        "val": slice(45_000, 50_000),
        "test": slice(50_000, 60_000),
    }
    for name, part in parts.items():
        x, y = getattr(cifar10, f"{name}_x"), getattr(cifar10, f"{name}_y")
        assert len(x) == part.stop - part.start
        expected = (pixels[part][::10] / np.float32(255) - mean) / std
        np.testing.assert_allclose(x[::10], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(y, labels[part])
    # The usual divisors are smaller than the standard deviations (.247, .243, .262).
    np.testing.assert_allclose(cifar10.train_x.mean((0, 2, 3)), 0, atol=5e-3)
    np.testing.assert_allclose(cifar10.train_x.std((0, 2, 3)), [1.22, 1.22, 1.30], atol=0.01)
    assert (cifar10.name, cifar10.num_classes) == ("cifar10", 10)
    assert cifar10.augment == data.Augment(pad=4)


@pytest.mark.parametrize("name", data.DATASETS)
def test_shapes_types_and_order(name: str, request: pytest.FixtureRequest) -> None:
    loaded = request.getfixturevalue(name)
    shape, sizes = {
        "mnist": ((1, 28, 28), (54_000, 6_000, 10_000)),
        "cifar10": ((3, 32, 32), (45_000, 5_000, 10_000)),
    }[name]
    for part, size in zip(("train", "val", "test"), sizes, strict=True):
        x, y = getattr(loaded, f"{part}_x"), getattr(loaded, f"{part}_y")
        assert (x.shape, x.dtype, x.is_contiguous()) == ((size, *shape), torch.float32, True)
        assert (y.shape, y.dtype) == ((size,), torch.int64)
        # Nearly equal classes in every part: no part is a sorted stretch.
        assert torch.bincount(y, minlength=10).min() > 0.85 * size / 10
    assert data.load(name) is loaded  # a process reads and checks the files once


def test_subsets_and_validation_shares() -> None:
    few = data.load("mnist", train_subset=1000)
    assert (len(few.train_x), len(few.train_y), len(few.val_x)) == (1000, 1000, 6000)
    half = data.load("mnist", val_fraction=0.5)
    assert (len(half.train_x), len(half.val_x)) == (30_000, 30_000)
    assert torch.equal(half.train_x[:1000], few.train_x)
    assert torch.equal(half.train_y[:1000], few.train_y)
    assert torch.equal(half.val_x[-6000:], few.val_x)
    none = data.load("mnist", val_fraction=0.0)
    assert (len(none.train_x), len(none.val_x), len(none.val_y)) == (60_000, 0, 0)
    raw = hashlib.sha256()
    for name, header in zip(MNIST_FILES, (16, 8, 16, 8), strict=True):
        raw.update((paths.data_root() / "MNIST/raw" / name).read_bytes()[header:])
    assert few.sha256 == half.sha256 == none.sha256 == raw.hexdigest()  # of what was read


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mnits", {}, r"'mnits': did you mean 'mnist'\?"),
        ("mnist", {"val_fraction": 1.0}, "val_fraction is 1.0"),
        ("mnist", {"val_fraction": float("nan")}, "val_fraction is nan"),
        ("mnist", {"train_subset": -1}, "train_subset is -1"),
        ("mnist", {"train_subset": 54_001}, "train_subset is 54001, .* and 54000"),
    ],
)
def test_impossible_arguments_name_their_values(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        data.load(name, **options)


# Missing and damaged files


def test_root_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link("MNIST/raw", MNIST_FILES, tmp_path)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    assert len(data.load("mnist", download=False).train_x) == 54_000
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "empty"))
    with pytest.raises(data.DataError, match="empty/MNIST/raw"):
        data.load("mnist", download=False)


@pytest.mark.parametrize(
    ("name", "folder", "files"),
    [("mnist", "MNIST/raw", MNIST_FILES), ("cifar10", "cifar-10-batches-py", CIFAR_FILES)],
)
def test_missing_data_without_network_says_which_files_go_where(
    name: str,
    folder: str,
    files: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*_: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    for cls in (torchvision.datasets.MNIST, torchvision.datasets.CIFAR10):
        monkeypatch.setattr(cls, "download", offline)
    with pytest.raises(data.DataError) as caught:
        data.load(name, tmp_path)
    message = str(caught.value)
    assert "Name or service not known" in message
    assert str(tmp_path / folder) in message
    assert "DATA_ROOT" in message and "HTTPS_PROXY" in message
    assert all(file in message for file in files)
    assert "\n" not in message
    with pytest.raises(data.DataError, match="downloading was not asked for"):
        data.load(name, tmp_path, download=False)
    # One file of the set is missing: it is the one named as not found.
    link(folder, files[1:], tmp_path)
    with pytest.raises(
        data.DataError, match=rf"not found: no {files[0]} in {tmp_path / folder} \("
    ):
        data.load(name, tmp_path, download=False)


def test_a_root_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(data.DataError, match=r"the download failed: .*file"):
        data.load("mnist", tmp_path / "file" / "below")


def test_missing_data_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(self: torchvision.datasets.MNIST) -> None:
        calls.append(self.root)
        link("MNIST/raw", MNIST_FILES, Path(self.root))

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    assert len(data.load("mnist", tmp_path).test_x) == 10_000
    assert calls == [str(tmp_path)] or calls == [tmp_path]


def test_a_download_of_another_process_is_waited_for(tmp_path: Path) -> None:
    folder = link("MNIST/raw", MNIST_FILES, tmp_path)
    whole = (folder / MNIST_FILES[0]).read_bytes()
    replace(folder / MNIST_FILES[0], whole[:1_000_000])  # is being unpacked
    loaded: list[data.Dataset] = []
    thread = threading.Thread(target=lambda: loaded.append(data.load("mnist", tmp_path)))
    with (tmp_path / "download.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        replace(folder / MNIST_FILES[0], whole)
    thread.join(60)
    assert len(loaded) == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "longer", "header"])
def test_damaged_mnist_names_the_file(damage: str, tmp_path: Path) -> None:
    path = link("MNIST/raw", MNIST_FILES, tmp_path) / MNIST_FILES[2]
    original = path.read_bytes()
    content = bytearray(original)
    content[1_000_000] ^= 1
    content = {
        "cut": content[:3_000_000],
        "empty": bytearray(),
        "changed": content,
        "longer": content + b"\0",
        # the same bytes as images of 56 x 14
        "header": original[:8] + bytes([0, 0, 0, 56, 0, 0, 0, 14]) + original[16:],
    }[damage]
    replace(path, bytes(content))
    with pytest.raises(data.DataError) as caught:
        data.load("mnist", tmp_path)
    message = str(caught.value)
    assert f"MNIST is damaged in {path.parent}: {path.name} ({len(content):,} bytes" in message
    assert "instead of 2646ac647ad5339dbf082846283269ea)" in message  # the published md5
    assert "delete it" in message and "\n" not in message
    assert not any(name in message for name in MNIST_FILES if name != path.name)


def test_damaged_cifar10_names_the_files(tmp_path: Path) -> None:
    folder = link("cifar-10-batches-py", CIFAR_FILES, tmp_path)
    for name in ("data_batch_3", "test_batch"):
        content = (folder / name).read_bytes()
        replace(folder / name, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(data.DataError, match=r"data_batch_3 \(.*, test_batch \(.*delete them"):
        data.load("cifar10", tmp_path)


def test_other_images_in_a_legacy_cache_are_refused(tmp_path: Path) -> None:
    link("MNIST/raw", MNIST_FILES, tmp_path)
    (tmp_path / "MNIST/processed").mkdir()
    for name in ("training.pt", "test.pt"):
        content = (torch.zeros(10, 28, 28, dtype=torch.uint8), torch.zeros(10, dtype=torch.long))
        torch.save(content, tmp_path / "MNIST/processed" / name)
    with pytest.raises(data.DataError, match="folder 'processed'"):
        data.load("mnist", tmp_path)


# Augmentation


def numbered(n: int, c: int, h: int, w: int) -> torch.Tensor:
    """Images in which every value occurs once, so that a crop tells where it comes from."""
    return torch.arange(n * c * h * w).view(n, c, h, w)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_crop_and_flip_equals_numpy(draw: st.DataObject) -> None:
    h, w = draw.draw(st.integers(2, 9)), draw.draw(st.integers(2, 9))
    n, c = draw.draw(st.integers(1, 4)), draw.draw(st.integers(1, 3))
    pad = draw.draw(st.integers(0, min(h, w) - 1))
    offsets = st.lists(st.integers(0, 2 * pad), min_size=n, max_size=n)
    top, left = draw.draw(offsets), draw.draw(offsets)
    flip = draw.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    images = numbered(n, c, h, w)
    result = data.crop_and_flip(
        images, torch.tensor(top), torch.tensor(left), torch.tensor(flip), pad=pad
    )
    for i in range(n):
        padded = np.pad(images[i].numpy(), ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
        crop = padded[:, top[i] : top[i] + h, left[i] : left[i] + w]
        np.testing.assert_array_equal(result[i], crop[:, :, ::-1] if flip[i] else crop)


def test_augment_draws_every_crop_and_flip_equally_often() -> None:
    n = 16_200  # 100 for each of the 9 x 9 x 2 outcomes
    image = numbered(1, 1, 32, 32).float()
    result = data.Augment()(image.expand(n, -1, -1, -1), torch.Generator().manual_seed(0))
    padded = np.pad(image[0, 0].numpy(), 4, mode="reflect")
    outcomes = {}
    for top in range(9):
        for left in range(9):
            crop = padded[top : top + 32, left : left + 32]
            outcomes[crop.tobytes()] = (top, left, False)
            outcomes[np.ascontiguousarray(crop[:, ::-1]).tobytes()] = (top, left, True)
    assert len(outcomes) == 162
    counts = dict.fromkeys(outcomes.values(), 0)
    for one in result.numpy():
        counts[outcomes[one[0].tobytes()]] += 1  # a KeyError: no valid crop
    observed = np.array(list(counts.values()))
    chi_square = ((observed - 100) ** 2 / 100).sum()
    assert chi_square < 233  # the 0.9999 quantile at 161 degrees of freedom
    flipped = sum(count for (_, _, flip), count in counts.items() if flip)
    assert abs(flipped / n - 0.5) < 4 * 0.5 / np.sqrt(n)


def test_same_generator_state_same_bits(cifar10: data.Dataset) -> None:
    batch = cifar10.train_x[:128]
    before = batch.clone()
    generator = torch.Generator().manual_seed(7)
    state = generator.get_state()
    first, second = data.Augment()(batch, generator), data.Augment()(batch, generator)
    generator.set_state(state)
    global_state = torch.get_rng_state()
    again = data.Augment()(batch, generator)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(batch, before)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert (first.shape, first.dtype, first.is_contiguous()) == (batch.shape, batch.dtype, True)


def test_too_large_a_padding_is_refused() -> None:
    with pytest.raises(ValueError, match="4x4 pixels by reflecting 4 pixels"):
        data.Augment(pad=4)(torch.zeros(1, 1, 4, 4), torch.Generator())
