"""How fast training is: `make bench`, python -m lib bench; rows in results/bench.

Everything is timed in turn in one process, A B C A B C, because machines are shared and noisy, and
what counts are ratios, repeat by repeat.  A row is the median with the range of the repeats.
"""

from __future__ import annotations

import csv
import datetime
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from lib import paths
from lib.config import Run, unknown
from lib.data import Dataset
from lib.models import build_model
from lib.runs.machine import cores, device_name, versions
from lib.train import TrainingLoop, flushed_denormals

Row = dict[str, Any]
COLUMNS = ["topic", "what", "setting", "value", "unit", "low", "high", "n", "machine"]
REPEATS = 5
LENETS = ("lenet300-100", "lenet5")
NETWORKS = {"alexnet-s": 128, "vgg16-d": 128, "wrn-16-8": 128}  # with the batch size
TOPICS = {"lenets": LENETS, "sparse_steps": tuple(NETWORKS), "one_thread": tuple(NETWORKS)}
STEPS_PER_EPOCH = 352  # CIFAR-10, batches of 128: from one update of the masks to the next
WINDOWS = (153, 88)  # steps with dense gradients; the first is the default (lib/training/schedule)
# The masks that are timed: updates, mini-batches between them, images of each.
UPDATES, MINI_BATCHES, MASK_BATCH = 3, 8, 32


def bench(
    repeats: int = REPEATS,
    results_root: str | Path | None = None,
    only: Sequence[str] = (),
    networks: Sequence[str] = (),
    densities: Sequence[float] = (0.05,),
) -> list[Row]:
    """Measure every topic of TOPICS (or of `only`) for its networks (or those of `networks`).

    Rows go to results/bench/speed.csv (lenets) and kernels.csv in place of those of the same topic
    and setting.  Raises ValueError for an unknown topic or network, and for a density outside
    (0, 1].
    """
    for kind, given, known in (
        ("topic", only, tuple(TOPICS)),
        ("network", networks, (*LENETS, *NETWORKS)),
    ):
        if strange := [name for name in given if name not in known]:
            raise ValueError(unknown(kind, strange[0], known))
    if wrong := [density for density in densities if not 0 < density <= 1]:
        raise ValueError(f"density {wrong[0]:g} is outside (0, 1]")
    machine = describe_machine()
    print(machine)
    found: list[Row] = []
    for topic in only or TOPICS:
        for model in [name for name in TOPICS[topic] if not networks or name in networks]:
            for line in _measured(topic, model, repeats, densities):
                found.append({"topic": topic, **line, "machine": machine})
                _tell(found[-1])
            file = "speed" if topic == "lenets" else "kernels"
            store(paths.results_dir("bench", results_root) / f"{file}.csv", found)
    return found


def _measured(topic: str, model: str, repeats: int, densities: Sequence[float]) -> Iterator[Row]:
    torch.set_num_threads(1 if topic == "one_thread" else cores())
    if topic == "lenets":
        yield from epochs(model, repeats)
        return
    for density in densities:
        yield from steps(model, density, repeats)


def _tell(line: Row) -> None:
    spread = f" [{line['low']:.3g}, {line['high']:.3g}]" if line["n"] > 1 else ""
    said = f"{line['topic']:<13} {line['what']:<52} {line['setting']:<28}"
    tqdm.write(f"{said} {line['value']:>9.4g} {line['unit']}{spread}")


# ------------------------------------------------------------------------- timing and rows


def in_turn(variants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every variant by the clock, A B C A B C ..., after one warm-up of each."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    with tqdm(total=(repeats + 1) * len(variants), leave=False) as bar, flushed_denormals():
        for turn in range(repeats + 1):
            for name, function in variants.items():
                bar.set_description(name)
                start = time.perf_counter()
                function()
                times[name] += [time.perf_counter() - start] if turn else []
                bar.update()
    return times


def row(what: str, setting: str, values: Sequence[float], unit: str) -> Row:
    """Median, lowest and highest of the repeats."""
    return {
        "what": what,
        "setting": setting,
        "value": statistics.median(values),
        "unit": unit,
        "low": min(values),
        "high": max(values),
        "n": len(values),
    }


def over(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """Slow over fast, repeat by repeat: what slows one repeat down slows both sides."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


# ------------------------------------------------------- epochs against a conventional script


class Conventional:
    """How MNIST training is usually written: a DataLoader with workers that transforms image by
    image, torch.optim.SGD as it comes, and each weight multiplied by its mask after each step.
    """

    def __init__(self, model: str, density: float = 0.05, batch_size: int = 100) -> None:
        from torchvision import datasets as vision
        from torchvision import transforms as t

        transform = t.Compose([t.ToTensor(), t.Normalize((0.1307,), (0.3081,))])
        full = vision.MNIST(str(paths.data_root()), train=True, transform=transform)
        self.loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
            torch.utils.data.Subset(full, range(54_000)),
            batch_size=batch_size,
            shuffle=True,
            num_workers=os.cpu_count() or 1,
        )
        self.model = build_model(model)
        weights = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(
            weights, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
        )
        self.masks = {p: (torch.rand_like(p) < density).float() for p in weights if p.dim() > 1}

    def seconds(self, count: int) -> float:
        """Of `count` mini-batches, the start of the workers left out."""
        batches = iter(self.loader)
        next(batches)
        start = time.perf_counter()
        for _ in range(count):
            images, labels = next(batches)
            self.optimizer.zero_grad()
            F.nll_loss(F.log_softmax(self.model(images), dim=1), labels).backward()
            self.optimizer.step()
            for parameter, mask in self.masks.items():
                parameter.data = parameter.data * mask
        return time.perf_counter() - start


def epochs(model: str, repeats: int, count: int = 180) -> Iterator[Row]:
    """An epoch of a LeNet at 5 % of the weights: ours as one run with all threads, whole epochs
    with the dense window; the conventional script by `count` mini-batches of its 540.
    """
    usual, loop = Conventional(model), TrainingLoop(Run(model=model))
    order = loop.order().split(loop.run.batch_size)
    script: list[float] = []

    def epoch() -> None:
        for index in order:
            loop.step(index)

    variants = {"script": lambda: script.append(usual.seconds(count)), "ours": epoch}
    ours = in_turn(variants, repeats)["ours"]
    theirs = [seconds / count * len(order) for seconds in script[1:]]
    yield row("conventional script, an epoch", model, theirs, "s")
    yield row("ours, one run with all threads, an epoch", model, ours, "s")
    yield row("ours over conventional, one run", model, over(theirs, ours), "x")


# ------------------------------------------------------------ whole steps, sparse against dense


@dataclass
class Side:
    """A network that trains on one mini-batch, in training steps and inference.

    A step is all that a run does: gather and augment the images, forward, backward, SGD, masks.
    """

    loop: TrainingLoop
    batch: int
    index: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.index = torch.arange(min(self.batch, len(self.loop.data.train_y)))
        self.loop.model.train()
        for group in self.loop.optimizer.param_groups:
            group["lr"] = 1e-4  # the same images again and again

    def step(self, left: float = math.inf) -> None:
        """`left`: mini-batches up to the update; within the window the gradients are dense."""
        self.loop.engine.step(self.index, left)

    def infer(self) -> None:
        """A forward pass in evaluation mode."""
        data = self.loop.data
        self.loop.engine.wrong(data.train_x[: self.batch], data.train_y[: self.batch])


def dense_side(run: Run, data: Dataset | None, layout: torch.memory_format) -> Side:
    """The dense network, through torch, in a memory format."""
    loop = TrainingLoop(run, data)
    loop.format = layout
    loop.model.to(memory_format=layout)
    return Side(loop, run.batch_size)


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
    return Side(loop, run.batch_size)


def steps(
    model: str,
    density: float,
    repeats: int,
    data: Dataset | None = None,
    batch: int | None = None,
) -> Iterator[Row]:
    """Whole training steps and inference of a CIFAR-10 network, dense and over its non-zeros, in
    float32 and bfloat16; torch's dense float32 in the memory format that is faster.

    In the last K steps before an update the weight gradients are dense; of the 352 of an epoch K
    are counted so, for each K of WINDOWS.
    """
    batch = batch or NETWORKS[model]
    shape: dict[str, Any] = {"model": model, "batch_size": batch, "epochs": 250}
    run = Run(dataset="cifar10", density=density, **shape)
    full = Run(dataset="cifar10", method="dense", kernels="torch", **shape)
    setting = f"{model}, {100 * density:g} %, batch {batch}"
    first = dense_side(full, data, torch.contiguous_format)
    data = first.loop.data
    sides = {
        "dense": first,
        "dense, channels last": dense_side(full, data, torch.channels_last),
        "dense bf16": dense_side(replace(full, precision="bf16"), data, torch.channels_last),
        "sparse": sparse_side(run, data),
        "sparse bf16": sparse_side(replace(run, precision="bf16"), data),
    }
    times = in_turn(_variants({k: v for k, v in sides.items() if v}), repeats)
    for name in ("dense", "dense, inference"):
        last = name.replace("dense", "dense, channels last", 1)
        times[name] = list(map(min, times[name], times.pop(last)))
    for name in ("sparse", "sparse bf16"):
        if side := sides[name]:
            masks = side.loop.masking.active()
            if name == "sparse":
                share = 100 * side.loop.flops.inference(masks)
                yield row("forward FLOPs of the masks, of dense", setting, [share], "%")
            yield from _sparse_rows(name, setting, times)
    yield from _dense_rows(setting, times)


def _variants(sides: dict[str, Side]) -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}
    for name, side in sides.items():
        found[name], found[f"{name}, inference"] = side.step, side.infer
        if name.startswith("sparse"):
            found[f"{name}, inside"] = lambda side=side: side.step(1)  # type: ignore[misc]
    return found


def _sparse_rows(name: str, setting: str, times: dict[str, list[float]]) -> Iterator[Row]:
    """Dense over sparse; float32 has no prefix, as in older rows."""
    start = "" if name == "sparse" else f"{name}: "
    outside, inside = times[name], times[f"{name}, inside"]
    inference = times[f"{name}, inference"]
    yield row(
        f"{start}training step outside the window", setting, over(times["dense"], outside), "x"
    )
    yield row(f"{start}training step inside the window", setting, over(times["dense"], inside), "x")
    precision = "fp32" if name == "sparse" else "bf16"
    for window in WINDOWS:
        part = window / STEPS_PER_EPOCH
        whole = [part * a + (1 - part) * b for a, b in zip(inside, outside, strict=True)]
        counted = "dense window counted" if window == WINDOWS[0] else f"window of {window} counted"
        after = "" if window == WINDOWS[0] else f", window of {window}"
        yield row(f"{start}training step, {counted}", setting, over(times["dense"], whole), "x")
        ratio = over(times["dense bf16"], whole)
        yield row(f"dense bf16 step over sparse {precision}{after}", setting, ratio, "x")
        yield row(f"seconds: {name} step, {counted}", setting, whole, "s")
    yield row(f"{start}inference", setting, over(times["dense, inference"], inference), "x")
    ratio = over(times["dense bf16, inference"], inference)
    yield row(f"dense bf16 inference over sparse {precision}", setting, ratio, "x")
    yield row(f"seconds: {name} inference", setting, inference, "s")


def _dense_rows(setting: str, times: dict[str, list[float]]) -> Iterator[Row]:
    for kind, end in (("step", ""), ("inference", ", inference")):
        full, low = times[f"dense{end}"], times[f"dense bf16{end}"]
        yield row(f"dense fp32 {kind} over dense bf16", setting, over(full, low), "x")
        yield row(f"seconds: dense fp32 {kind}", setting, full, "s")
        yield row(f"seconds: dense bf16 {kind}", setting, low, "s")


# ------------------------------------------------------------------------ machine and file


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


def store(path: Path, rows: Sequence[Row]) -> None:
    """Put rows into the file, in place of those of the same topic and setting, at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = [line for line in rows if (line["topic"] == "lenets") == (path.stem == "speed")]
    new = {(line["topic"], line["setting"]) for line in mine}
    kept: list[Row] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            kept = [r for r in csv.DictReader(file) if (r["topic"], r["setting"]) not in new]
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *mine])
    os.replace(temporary, path)
