"""The dense window against full tracking: a topic of `python -m lib bench`. Counts, not times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lib.bench.timing import Row, all_threads, row, setting_of
from lib.config import Run
from lib.data import Dataset
from lib.kernels import keep_freed_memory
from lib.train import TrainingLoop, flushed_denormals
from lib.training.streams import torch_draws_from

WINDOWS = (44, 88, 153)  # mini-batches: 0.9^K is 1e-2, 1e-4, 1e-7


class WindowedMomentum:
    """The momentum of inactive weights that saw only the last K mini-batches before an update.

    SGD's buffer with momentum a and gradients g_t is m_T = sum over t of a^(T - t) g_t (weight
    decay adds a * weight to the gradient, which is zero for an inactive weight). Cut off after K
    steps it misses a^K m_(T - K). Active weights keep theirs: the masks differ only in what grows.
    """

    def __init__(self, loop: TrainingLoop, window: int) -> None:
        self.loop, self.window = loop, window
        self.gathered: dict[str, Tensor] = {}

    def after_step(self, left: float) -> None:
        """After the mini-batch `left` - 1 before the update; reads its dense gradients."""
        if left > self.window:
            return
        if left == self.window:
            self.gathered.clear()
        for name, parameter in self.loop.masking.parameters.items():
            assert parameter.grad is not None
            if name in self.gathered:
                self.gathered[name].mul_(self.loop.run.momentum).add_(parameter.grad)
            else:
                self.gathered[name] = parameter.grad.clone()

    def buffers(self) -> dict[str, Tensor]:
        """What the optimizer would hold: all of the momentum of active weights, and the windowed
        one of inactive weights.
        """
        masking = self.loop.masking
        return {
            name: torch.where(masking.masks[name], _buffer(self.loop, name), self.gathered[name])
            for name in masking.parameters
        }


def _buffer(loop: TrainingLoop, name: str) -> Tensor:
    return loop.optimizer.state[loop.masking.parameters[name]]["momentum_buffer"]


@torch.no_grad()
def updated_masks(
    loop: TrainingLoop, buffers: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], int]:
    """The masks that an update now would give, with these momentum buffers in place of the
    optimizer's, and how many positions it would grow; the run itself stays as it is.
    """
    masking = loop.masking
    saved = masking.state_dict()
    weights = {name: p.detach().clone() for name, p in masking.parameters.items()}
    own = {name: _buffer(loop, name) for name in masking.parameters}
    try:
        for name, parameter in masking.parameters.items():
            if buffers is not None:
                loop.optimizer.state[parameter]["momentum_buffer"] = buffers[name]
        grown = sum(line.grown for line in masking.update())
        return {name: mask.clone() for name, mask in masking.masks.items()}, grown
    finally:
        masking.load_state_dict(saved)
        for name, parameter in masking.parameters.items():
            loop.optimizer.state[parameter]["momentum_buffer"] = own[name]
            parameter.copy_(weights[name])


def window_differences(
    run: Run,
    updates: int,
    windows: Sequence[int] = WINDOWS,
    dataset: Dataset | None = None,
) -> Iterator[tuple[int, int, dict[int, int], TrainingLoop]]:
    """Train by full tracking; at each update, by the masks of each window K beside: (update from 1,
    grown positions, K -> grown positions that differ, the loop).

    All masks come from the same weights and the same gradients: two separate runs would drift
    apart by rounding at the kinks of ReLU, whatever the window.

    Raises:
        ValueError: an epoch has no more mini-batches than the longest window.
    """
    loop = TrainingLoop(replace(run, kernels="torch", epochs=updates + 1), dataset)
    if loop.schedule.steps_per_epoch <= max(windows):
        raise ValueError(
            f"an epoch has {loop.schedule.steps_per_epoch} mini-batches, but must have more than "
            f"the window of {max(windows)}: take more images or smaller batches"
        )
    every = [WindowedMomentum(loop, window) for window in windows]
    with torch_draws_from(loop.dropout_state, loop.device), flushed_denormals():
        for update in range(1, updates + 1):
            loop.model.train()
            loss = 0.0
            for index in loop.order().split(run.batch_size):
                left = loop.schedule.until_update(loop.state.step)
                loss += float(loop.step(index)) * len(index)
                for one in every:
                    one.after_step(left)
            masks, grown = updated_masks(loop)
            differing = {}
            for one in every:
                others, _ = updated_masks(loop, one.buffers())
                differing[one.window] = sum(
                    int((mask & ~others[name]).sum()) for name, mask in masks.items()
                )
            loop.end_epoch(loss)
            if not all(torch.equal(loop.masking.masks[name], masks[name]) for name in masks):
                raise RuntimeError("the update did not give the masks that were compared")
            yield update, grown, differing, loop


WINDOW_RUNS = {
    "lenet300-100": Run(),
    "alexnet-s": Run(dataset="cifar10", model="alexnet-s", batch_size=64, train_samples=14_300),
}


def window(repeats: int, networks: Sequence[str] = tuple(WINDOW_RUNS)) -> Iterator[Row]:
    """The dense window against full tracking in the same trajectory, five updates: grown positions
    that differ, forward FLOPs of the masks, and the training FLOPs of both. Counts, not times.

    LeNet-300-100: all of MNIST; AlexNet-s: 14,300 images of CIFAR-10, 224 mini-batches of 64.
    """
    del repeats  # the same bits each time
    all_threads()
    keep_freed_memory()
    for model in networks:
        run = WINDOW_RUNS[model]
        setting = setting_of(model, run.density, run.batch_size)
        active: dict[str, int] = {}
        for update, grown, differing, loop in window_differences(run, 5):
            at = f"update {update}"
            yield row(f"grown positions, {at}", setting, [float(grown)], "")
            for k, count in differing.items():
                yield row(f"differing positions, K = {k}, {at}", setting, [float(count)], "")
            active = loop.masking.active()
            flops = 100 * loop.flops.inference(active)
            yield row(f"forward FLOPs of the masks, {at}", setting, [flops], "%")
        data, steps = loop.data, loop.schedule.steps_per_epoch
        yield row("mini-batches between updates", setting, [float(steps)], "")
        full = 100 * loop.train_flops_rel(active)
        yield row("training FLOPs, full tracking", setting, [full], "% of dense")
        for k in WINDOWS:
            other = TrainingLoop(replace(run, dense_window_steps=k), data)
            flops = 100 * other.train_flops_rel(active)
            yield row(f"training FLOPs, K = {k}", setting, [flops], "% of dense")
