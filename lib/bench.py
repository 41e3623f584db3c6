"""How fast training is: `make bench`, python -m lib bench; rows in results/bench.

Everything is timed in turn in one process, A B C A B C, because machines are shared and noisy, and
what counts are ratios, repeat by repeat.  A row is the median with the range of the repeats.
"""

from __future__ import annotations

import datetime
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

from lib import paths
from lib.config import Run, known
from lib.data import Dataset
from lib.models import build_model
from lib.runs.machine import cores, device_name, versions
from lib.train import TrainingLoop, flushed_denormals

Row = dict[str, Any]
LENETS = ("lenet300-100", "lenet5")
NETWORKS = ("alexnet-s", "vgg16-d", "wrn-16-8")
TOPICS = {"lenets": LENETS, "sparse_steps": NETWORKS, "one_thread": NETWORKS}
BATCH = 128  # of NETWORKS
STEPS_PER_EPOCH = 352  # CIFAR-10, batches of 128: from one update of the masks to the next
WINDOW = 153  # of these with dense gradients: the default (lib/schedule.py)
# The masks that are timed: updates, mini-batches between them, images of each.
UPDATES, MINI_BATCHES, MASK_BATCH = 3, 8, 32


def bench(
    repeats: int = 5,
    results_root: str | Path | None = None,
    only: Sequence[str] = (),
    networks: Sequence[str] = (),
    densities: Sequence[float] = (0.05,),
) -> None:
    """Measure every topic of TOPICS (or of `only`) for its networks (or those of `networks`).

    Rows go to results/bench/speed.csv (lenets) and kernels.csv in place of those of the same topic
    and setting.  Raises ValueError for an unknown topic or network, and for a density outside
    (0, 1].
    """
    for kind, given, names in (("topic", only, TOPICS), ("network", networks, LENETS + NETWORKS)):
        for name in given:
            known(kind, name, names)
    for density in densities:
        Run(density=density)  # refuses what is none, before anything is measured
    machine = describe_machine()
    print(machine)
    for topic in only or TOPICS:
        torch.set_num_threads(1 if topic == "one_thread" else cores())
        file = paths.results_dir("bench", results_root)
        file /= "speed.csv" if topic == "lenets" else "kernels.csv"
        for model in [name for name in TOPICS[topic] if not networks or name in networks]:
            if topic == "lenets":
                found = list(epochs(model, repeats))
            else:
                found = [row for share in densities for row in steps(model, share, repeats)]
            table = pd.DataFrame([{"topic": topic, **row, "machine": machine} for row in found])
            print(table.drop(columns="machine").to_string(index=False, float_format="%.4g"))
            store(file, table)


def in_turn(variants: dict[str, Callable[[], Any]], repeats: int) -> pd.DataFrame:
    """Seconds of every variant by the clock, A B C A B C ..., after one warm-up of each: a column
    for each, a row for each repeat.
    """
    times: list[dict[str, float]] = []
    with tqdm(total=(repeats + 1) * len(variants), leave=False) as bar, flushed_denormals():
        for _ in range(repeats + 1):
            times.append({})
            for name, function in variants.items():
                bar.set_description(name)
                start = time.perf_counter()
                function()
                times[-1][name] = time.perf_counter() - start
                bar.update()
    return pd.DataFrame(times[1:])


def row(what: str, setting: str, values: pd.Series, unit: str) -> Row:
    """Median, lowest and highest of the repeats.

    Ratios are taken repeat by repeat: what slows one repeat down slows both sides.
    """
    spread = {"low": values.min(), "high": values.max(), "n": len(values)}
    return {"what": what, "setting": setting, "value": values.median(), "unit": unit, **spread}


def conventional(model: str) -> Callable[[int], float]:
    """How MNIST training at 5 % is usually written: a DataLoader with workers that transforms image
    by image, torch.optim.SGD as it comes, and each weight multiplied by its mask after each step.

    Returns what measures the seconds of so many mini-batches, the start of the workers left out.
    """
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    )
    full = datasets.MNIST(str(paths.data_root()), train=True, transform=transform)
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        torch.utils.data.Subset(full, range(54_000)),
        batch_size=100,
        shuffle=True,
        num_workers=os.cpu_count() or 1,
    )
    network = build_model(model)
    weights = list(network.parameters())
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    masks = {p: (torch.rand_like(p) < 0.05).float() for p in weights if p.dim() > 1}

    def seconds(count: int) -> float:
        batches = iter(loader)
        next(batches)
        start = time.perf_counter()
        for _ in range(count):
            images, labels = next(batches)
            optimizer.zero_grad()
            F.nll_loss(F.log_softmax(network(images), dim=1), labels).backward()
            optimizer.step()
            for parameter, mask in masks.items():
                parameter.data = parameter.data * mask
        return time.perf_counter() - start

    return seconds


def epochs(model: str, repeats: int, count: int = 180) -> Iterator[Row]:
    """An epoch of a LeNet at 5 % of the weights: ours as one run with all threads, whole epochs
    with the dense window; the conventional script by `count` mini-batches of its 540.
    """
    usual, loop = conventional(model), TrainingLoop(Run(model=model))
    order = loop.order().split(loop.run.batch_size)
    script: list[float] = []
    variants = {
        "script": lambda: script.append(usual(count)),
        "ours": lambda: [loop.step(index) for index in order],
    }
    ours = in_turn(variants, repeats)["ours"]
    theirs = pd.Series(script[1:]) / count * len(order)
    yield row("conventional script, an epoch", model, theirs, "s")
    yield row("ours, one run with all threads, an epoch", model, ours, "s")
    yield row("ours over conventional, one run", model, theirs / ours, "x")


class Side:
    """A network that trains on one mini-batch, in training steps and inference.

    A step is all that a run does: gather and augment the images, forward, backward, SGD, masks.
    """

    def __init__(self, loop: TrainingLoop, layout: torch.memory_format | None = None) -> None:
        self.loop = loop
        self.index = torch.arange(min(loop.run.batch_size, len(loop.data.train_y)))
        if layout:
            loop.format = layout
            loop.model.to(memory_format=layout)
        loop.model.train()
        for group in loop.optimizer.param_groups:
            group["lr"] = 1e-4  # the same images again and again

    def step(self, left: float = math.inf) -> None:
        """`left`: mini-batches up to the update; within the window the gradients are dense."""
        self.loop.engine.step(self.index, left)

    def infer(self) -> None:
        """A forward pass in evaluation mode."""
        data, count = self.loop.data, len(self.index)
        self.loop.engine.wrong(data.train_x[:count], data.train_y[:count])


def sparse_side(run: Run, data: Dataset | None) -> Side | None:
    """The network with masks that sparse momentum has moved UPDATES times, through the kernels;
    None where this machine or network has none.
    """
    loop = TrainingLoop(replace(run, kernels="sparse", update_every_steps=MINI_BATCHES), data)
    if loop.engine.name == "torch":
        return None
    with flushed_denormals():
        for index in loop.order().split(MASK_BATCH)[: UPDATES * MINI_BATCHES]:
            loop.step(index)
    return Side(loop)


def steps(
    model: str, density: float, repeats: int, data: Dataset | None = None, batch: int = BATCH
) -> Iterator[Row]:
    """Whole training steps and inference of a CIFAR-10 network, dense and over its non-zeros, in
    float32 and bfloat16; torch's dense float32 in the memory format that is faster.

    Of the 352 steps of an epoch the WINDOW before the update are counted with dense gradients.
    """
    shape: dict[str, Any] = {"model": model, "batch_size": batch, "epochs": 250}
    run = Run(dataset="cifar10", density=density, **shape)
    full = Run(dataset="cifar10", method="dense", kernels="torch", **shape)
    setting = f"{model}, {100 * density:g} %, batch {batch}"
    first = TrainingLoop(full, data)
    data, low = first.data, replace(full, precision="bf16")
    sides = {
        "dense": Side(first, torch.contiguous_format),
        "dense, channels last": Side(TrainingLoop(full, data), torch.channels_last),
        "dense bf16": Side(TrainingLoop(low, data), torch.channels_last),
        "sparse": sparse_side(run, data),
        "sparse bf16": sparse_side(replace(run, precision="bf16"), data),
    }
    variants: dict[str, Callable[[], None]] = {}
    for name, side in sides.items():
        if side is not None:
            variants |= {name: side.step, f"{name}, inference": side.infer}
            if name.startswith("sparse"):
                variants[f"{name}, inside"] = partial(side.step, 1)
    times = in_turn(variants, repeats)
    for kind in ("", ", inference"):
        times[f"dense{kind}"] = times[[f"dense{kind}", f"dense, channels last{kind}"]].min(axis=1)
    for name, precision in (("sparse", "fp32"), ("sparse bf16", "bf16")):
        side, start = sides[name], "" if name == "sparse" else f"{name}: "
        if side is None:
            continue
        if name == "sparse":
            share = side.loop.inference_flops_rel(side.loop.masking.active())
            yield row("forward FLOPs of the masks, of dense", setting, pd.Series(100 * share), "%")
        whole = times[name] + WINDOW / STEPS_PER_EPOCH * (times[f"{name}, inside"] - times[name])
        for what, dense, sparse in (
            (f"{start}training step, dense window counted", "dense", whole),
            (f"{start}inference", "dense, inference", times[f"{name}, inference"]),
            (f"dense bf16 step over sparse {precision}", "dense bf16", whole),
        ):
            yield row(what, setting, times[dense] / sparse, "x")
        yield row(f"seconds: {name} step, dense window counted", setting, whole, "s")
        yield row(f"seconds: {name} inference", setting, times[f"{name}, inference"], "s")
    for kind, end in (("step", ""), ("inference", ", inference")):
        fp32, bf16 = times[f"dense{end}"], times[f"dense bf16{end}"]
        yield row(f"dense fp32 {kind} over dense bf16", setting, fp32 / bf16, "x")
        yield row(f"seconds: dense fp32 {kind}", setting, fp32, "s")
        yield row(f"seconds: dense bf16 {kind}", setting, bf16, "s")


def describe_machine() -> str:
    """Processor, cores, instruction sets that matter, versions, load and day."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.exists() else set()
    flags = " ".join(f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in words)
    known, load = versions(), os.getloadavg()[0]
    day = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return (
        f"{cores()} x {device_name()} ({flags}); torch {known['torch']}, Python {known['python']}, "
        f"commit {known['commit']}, load {load:.1f}, {day}"
    )


def store(path: Path, rows: pd.DataFrame) -> None:
    """Put rows into the file, in place of those of the same topic and setting, at once."""
    if path.exists():
        old = pd.read_csv(path, dtype=str, keep_default_na=False)
        keys = ["topic", "setting"]
        kept = ~old.set_index(keys).index.isin(rows.set_index(keys).index)
        rows = pd.concat([old[kept], rows])
    paths.write(path, rows.to_csv(index=False, lineterminator="\n").encode())
