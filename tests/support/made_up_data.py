"""Small data sets: a part of MNIST, and a made-up CIFAR-10 that is ready at once."""

from __future__ import annotations

from dataclasses import replace

import torch

from lib.data import Dataset, crop_and_flip, load


def mnist(train: int, other: int = 500) -> Dataset:
    """The first training images, and so many for validation and for the test."""
    whole = load("mnist", train_subset=train)
    names = ("val_x", "val_y", "test_x", "test_y")
    return replace(whole, **{name: getattr(whole, name)[:other] for name in names})


def cifar(train: int, other: int = 20) -> Dataset:
    """`train` images that can be learnt, `other` for validation and as many for the test: the
    class is the brightest stripe.
    """
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(count) % 10
        images = torch.randn(count, 3, 32, 32, generator=generator)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[:, 3 * label : 3 * label + 3] += 3.0
        return images, labels

    (train_x, train_y), (val_x, val_y), (test_x, test_y) = part(train), part(other), part(other)
    return Dataset(
        train_x=train_x,
        train_y=train_y,
        val_x=val_x,
        val_y=val_y,
        test_x=test_x,
        test_y=test_y,
        sha256="0" * 64,
        augment=crop_and_flip,
    )
