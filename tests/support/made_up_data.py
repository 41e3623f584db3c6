"""A made-up CIFAR-10 that is ready at once and can be learnt: the class is the brightest stripe."""

from __future__ import annotations

import torch

from lib.data import Dataset, crop_and_flip


def cifar(train: int, other: int = 20) -> Dataset:
    """`train` training images, `other` for validation and as many for the test."""
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
        num_classes=10,
        sha256="0" * 64,
        augment=crop_and_flip,
    )
