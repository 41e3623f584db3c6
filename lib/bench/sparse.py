"""What sparse training gains on the clock, in whole steps: topics of `python -m lib bench`
(lib/bench/speed.py). Rows have the setting "<model>, <weights> %, batch <n>".
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lib.bench.timing import Row, all_threads, forward_backward, in_turn, ratios, row, setting_of
from lib.config import Run
from lib.engines.network import SparseNetwork, sparse_network
from lib.engines.optimizer import SparseSGD
from lib.kernels import keep_freed_memory
from lib.train import TrainingLoop, flushed_denormals
from lib.training.schedule import dense_window

NETWORKS = {"alexnet-s": 128, "vgg16-d": 128, "wrn-16-8": 128}  # with the batch size
STEPS_PER_EPOCH = 352  # CIFAR-10, batches of 128
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
# Times faster than dense, of whole steps; column of the wide table -> what the row is called.
RATIOS = {
    "training": "training step, dense window counted",
    "outside": "training step outside the window",
    "inside": "training step inside the window",
    "inference": "inference",
    "bf16_over_sparse": "dense bf16 step over sparse fp32",
    "bf16_inference_over_sparse": "dense bf16 inference over sparse fp32",
    "bf16": "dense fp32 step over dense bf16",
    "bf16_inference": "dense fp32 inference over dense bf16",
}
FLOPS = "forward FLOPs of the masks, of dense"
SPARSE_LAYERS = "layers computed sparse"
SECONDS = {
    "dense_s": "seconds: dense fp32 step",
    "bf16_s": "seconds: dense bf16 step",
    "sparse_s": "seconds: sparse step, window counted",
    "outside_s": "seconds: sparse step outside the window",
    "inside_s": "seconds: sparse step inside the window",
    "dense_inference_s": "seconds: dense fp32 inference",
    "bf16_inference_s": "seconds: dense bf16 inference",
    "sparse_inference_s": "seconds: sparse inference",
}
# The masks that are timed: updates, mini-batches between them, images of each.
UPDATES, MINI_BATCHES, MASK_BATCH = 3, 8, 32


def sparse_steps(
    repeats: int,
    networks: Sequence[str] = tuple(NETWORKS),
    densities: Sequence[float] = DENSITIES,
) -> Iterator[Row]:
    """Whole training steps and inference, masks moved by sparse momentum itself on CIFAR-10, all
    threads: dense over sparse, where layers with few weights are sparse.

    In the last K steps before an update the weight gradients are dense (`dense_window`); an epoch
    has 352 steps, so K of 352 cost that and the others the fast step.
    """
    all_threads()
    keep_freed_memory()
    for model in networks:
        for density in densities:
            yield from _steps_of(model, density, NETWORKS[model], repeats, time.perf_counter)


def one_thread(
    repeats: int,
    networks: Sequence[str] = tuple(NETWORKS),
    densities: Sequence[float] = DENSITIES,
) -> Iterator[Row]:
    """The same as `sparse_steps` in seconds of the processor with one thread, as the runner trains
    (one run per core): other processes hardly change it, and on an idle core it is the clock's.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    for model in networks:
        for density in densities:
            yield from _steps_of(model, density, NETWORKS[model], repeats, time.process_time)


def _steps_of(
    model: str, density: float, batch: int, repeats: int, clock: Callable[[], float]
) -> Iterator[Row]:
    loop = after_updates(model, density)
    images, labels = loop.batch(torch.arange(batch))
    share = min(1.0, dense_window(loop.run.momentum) / STEPS_PER_EPOCH)
    variants: dict[str, Callable[[], None]] = {}
    for name, layout, low in (
        ("contiguous", torch.contiguous_format, False),
        ("channels last", torch.channels_last, False),
        ("bf16", torch.channels_last, True),
    ):
        network = copy.deepcopy(loop.model).to(memory_format=layout)
        batch_of = images.contiguous(memory_format=layout)
        variants[name] = training_step(network, batch_of, labels, low)
        variants[f"{name}, inference"] = inference(network, batch_of, low)
    sparse = sparse_network(loop.model, loop.masking.masks)
    sgd = SparseSGD(sparse, loop.optimizer, loop.masking)
    for name, window in (("outside", False), ("inside", True)):
        step = training_step(sparse, images, labels, False, sgd)
        variants[name] = functools.partial(with_window, sparse, window, step)
    variants["sparse, inference"] = inference(sparse, images)
    with flushed_denormals():
        times = in_turn(variants, repeats, clock)
    dense = list(map(min, times["contiguous"], times["channels last"]))
    passes = list(map(min, times["contiguous, inference"], times["channels last, inference"]))
    bf16 = times["bf16"]
    whole = [
        share * a + (1 - share) * b for a, b in zip(times["inside"], times["outside"], strict=True)
    ]
    setting = setting_of(model, density, batch)
    flops = loop.flops.inference(loop.masking.active())
    densities = [float(mask.float().mean()) for mask in loop.masking.masks.values()]
    chosen = [density <= sparse.sparse_up_to for density in densities]
    yield row(FLOPS, setting, [100 * flops], "%")
    yield row(SPARSE_LAYERS, setting, [float(sum(chosen))], f"of {len(chosen)}")
    for what, slow, fast in (
        (RATIOS["training"], dense, whole),
        (RATIOS["outside"], dense, times["outside"]),
        (RATIOS["inside"], dense, times["inside"]),
        (RATIOS["inference"], passes, times["sparse, inference"]),
        (RATIOS["bf16_over_sparse"], bf16, whole),
        (
            RATIOS["bf16_inference_over_sparse"],
            times["bf16, inference"],
            times["sparse, inference"],
        ),
        (RATIOS["bf16"], dense, bf16),
        (RATIOS["bf16_inference"], passes, times["bf16, inference"]),
    ):
        yield row(what, setting, ratios(slow, fast), "x")
    for what, seconds in (
        (SECONDS["dense_s"], dense),
        (SECONDS["bf16_s"], bf16),
        (SECONDS["sparse_s"], whole),
        (SECONDS["outside_s"], times["outside"]),
        (SECONDS["inside_s"], times["inside"]),
        (SECONDS["dense_inference_s"], passes),
        (SECONDS["bf16_inference_s"], times["bf16, inference"]),
        (SECONDS["sparse_inference_s"], times["sparse, inference"]),
    ):
        yield row(what, setting, seconds, "s")


def after_updates(
    model: str,
    density: float,
    updates: int = UPDATES,
    mini_batches: int = MINI_BATCHES,
    batch: int = MASK_BATCH,
) -> TrainingLoop:
    """A network whose masks sparse momentum has moved `updates` times on CIFAR-10, ready for the
    sparse kernels.

    It was trained by torch, so that every step has the gradients of all inactive weights, as the
    steps before an update have in a long run.
    """
    run = Run(
        dataset="cifar10",
        model=model,
        density=density,
        batch_size=batch,
        update_every_steps=mini_batches,
        kernels="torch",
    )
    loop = TrainingLoop(run)
    order = loop.order().split(batch)
    with flushed_denormals():
        for index in order[: updates * mini_batches]:
            loop.step(index)
    # The kernels' memory format, in which a training loop that uses them has everything.
    loop.format = torch.contiguous_format
    loop.model.to(memory_format=loop.format)
    for state in loop.optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].contiguous()
    loop.masking.masks = {name: mask.contiguous() for name, mask in loop.masking.masks.items()}
    return loop


def training_step(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    low: bool,
    sparse_sgd: SparseSGD | None = None,
) -> Callable[[], None]:
    """Forward, backward, and the step of the optimizer: that of sparse layers, masks included, or
    torch's.
    """
    step_weights = (
        sparse_sgd.step
        if sparse_sgd is not None
        else torch.optim.SGD(
            list(network.parameters()),
            lr=1e-3,
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
            fused=True,
        ).step
    )
    once = forward_backward(network, images, labels, low)

    def step() -> None:
        network.train()
        once()
        step_weights()

    return step


def with_window(network: SparseNetwork, window: bool, step: Callable[[], None]) -> None:
    """A training step with the gradients of inactive weights, or without."""
    network.dense_gradients = window
    step()


def inference(network: nn.Module, images: Tensor, low: bool = False) -> Callable[[], None]:
    """A forward pass in evaluation mode."""

    def infer() -> None:
        network.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            network(images)

    return infer
