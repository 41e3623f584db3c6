"""How such training is usually written: what `make bench` compares with."""

from __future__ import annotations

import os
import time

import torch
import torch.nn.functional as F

from lib import paths
from lib.bench.timing import synchronize
from lib.models import build_model, model_spec


class Conventional:
    """A DataLoader with workers that transforms image by image, torch.optim.SGD as it comes, in
    float32, and each weight multiplied by its mask after each step.
    """

    def __init__(
        self, model: str, density: float, batch_size: int = 100, device: str | torch.device = "cpu"
    ) -> None:
        from torchvision import datasets as vision
        from torchvision import transforms as t

        self.device = torch.device(device)
        root = str(paths.data_root())
        full: torch.utils.data.Dataset[tuple[torch.Tensor, int]]
        if model_spec(model).input_shape[0] == 1:
            transform = t.Compose([t.ToTensor(), t.Normalize((0.1307,), (0.3081,))])
            full, images = vision.MNIST(root, train=True, transform=transform), 54_000
        else:
            normalise = t.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
            crop = t.RandomCrop(32, padding=4, padding_mode="reflect")
            transform = t.Compose([crop, t.RandomHorizontalFlip(), t.ToTensor(), normalise])
            full, images = vision.CIFAR10(root, train=True, transform=transform), 45_000
        self.loader = torch.utils.data.DataLoader(
            torch.utils.data.Subset(full, range(images)),
            batch_size=batch_size,
            shuffle=True,
            num_workers=os.cpu_count() or 1,
            pin_memory=self.device.type == "cuda",
        )
        self.model = build_model(model).to(self.device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        self.masks = {
            p: (torch.rand_like(p) < density).float()
            for p in self.model.parameters()
            if p.dim() > 1
        }

    def steps(self, count: int) -> float:
        """Seconds of `count` mini-batches, the start of the workers left out."""
        batches = iter(self.loader)
        next(batches)
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(count):
            images, labels = (x.to(self.device, non_blocking=True) for x in next(batches))
            self.optimizer.zero_grad()
            F.nll_loss(F.log_softmax(self.model(images), dim=1), labels).backward()
            self.optimizer.step()
            for parameter, mask in self.masks.items():
                parameter.data = parameter.data * mask
        synchronize(self.device)
        seconds = time.perf_counter() - start
        del batches
        return seconds
