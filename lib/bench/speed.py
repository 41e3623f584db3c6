"""How fast the training is, against a conventional script and against the machine: `make bench`.

Every figure is a ratio of medians over repeats taken in turn in one process run, because machines
are shared and noisy. Rows go to results/bench/ with the machine's description.
"""

from __future__ import annotations

import csv
import datetime
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib import data as datasets
from lib import paths
from lib.bench.conventional import Conventional
from lib.bench.sparse import NETWORKS, one_thread, sparse_steps
from lib.bench.timing import Row, all_threads, forward_backward, in_turn, row, timed_steps
from lib.bench.window import WINDOW_RUNS, window
from lib.config import Run, unknown
from lib.kernels import keep_freed_memory
from lib.masking import Masking
from lib.models import build_model, forward_flops
from lib.runs import machine
from lib.train import TrainingLoop, flushed_denormals

REPEATS = 5
COLUMNS = ["topic", "what", "setting", "value", "unit", "low", "high", "n", "machine"]

Topic = Callable[..., Iterator[Row]]


def bench(
    repeats: int = REPEATS,
    results_root: str | Path | None = None,
    only: Sequence[str] = (),
    networks: Sequence[str] = (),
) -> list[Row]:
    """Measure every topic of TOPICS (or of `only`), print each row and store it.

    Rows go to results/bench/<file>.csv as they come, in place of the topic's rows of the same
    setting in an earlier measurement; those of settings that no longer exist go at the end of the
    topic. `networks` restricts the topics of BY_NETWORK, whose other rows then stay.
    Raises ValueError for an unknown topic, and for a network that a topic doesn't measure.
    """
    if strange := [name for name in only if name not in TOPICS]:
        raise ValueError(unknown("topic", strange[0], TOPICS))
    chosen = [name for name in TOPICS if (name in only if only else name not in ON_REQUEST)]
    for name in networks:
        for topic in chosen:
            if name not in BY_NETWORK.get(topic, ()):
                raise ValueError(unknown(f"network of {topic}", name, BY_NETWORK.get(topic, ())))
    machine = describe_machine()
    print(machine)
    rows: list[Row] = []
    for name in chosen:
        file, topic_of = TOPICS[name]
        path = paths.results_dir("bench", results_root) / f"{file}.csv"
        found: list[Row] = []
        for line in topic_of(repeats, networks) if networks else topic_of(repeats):
            found.append({"topic": name, **line, "machine": machine})
            spread = f" [{line['low']:.3g}, {line['high']:.3g}]" if line["n"] > 1 else ""
            print(
                f"{name:<13} {line['what']:<52} {line['setting']:<28} "
                f"{line['value']:>9.4g} {line['unit']}{spread}",
                flush=True,
            )
            _store(path, name, found, keep_other_settings=True)
        _store(path, name, found, keep_other_settings=bool(networks))
        rows += found
    return rows


# --------------------------------------------------------------------------------------------------
# Against the conventional script
# --------------------------------------------------------------------------------------------------


def lenets(repeats: int) -> Iterator[Row]:
    """Epochs per second of the LeNets: conventional script; ours as one run with all threads, and
    as one single-threaded run per core, counted together. The default is the faster one.

    Ours are whole epochs, because steps in the window before an update cost more than the others.
    """
    cores = len(os.sched_getaffinity(0))
    for model, count in (("lenet300-100", 180), ("lenet5", 60)):
        conventional = Conventional(model, 0.05)
        loop = TrainingLoop(Run(model=model))
        order = loop.order().split(loop.run.batch_size)
        times: dict[str, list[float]] = {"conventional": [], "threads": [], "processes": []}
        context = get_context("spawn")
        with ProcessPoolExecutor(cores, mp_context=context) as pool:
            list(pool.map(_steps_in_worker, [(model, time.time() + 8, 1)] * cores))
            for _ in range(repeats):
                torch.set_num_threads(cores)
                times["conventional"].append(conventional.steps(count) / count)
                times["threads"].append(timed_steps(loop, order, len(order)))
                start = time.time() + 0.2  # together, so that they compete for the machine
                jobs = [(model, start, len(order))] * cores
                side_by_side = list(pool.map(_steps_in_worker, jobs))
                times["processes"].append(statistics.mean(side_by_side) / cores)
        steps = loop.schedule.steps_per_epoch
        for name, label in (
            ("conventional", "conventional script, an epoch"),
            ("threads", "ours, one run with all threads, an epoch"),
            ("processes", "ours, one run per core, an epoch"),
        ):
            yield row(label, model, [t * steps for t in times[name]], "s")
        for name, label in (("threads", "one run"), ("processes", "one run per core")):
            ratios = [c / t for c, t in zip(times["conventional"], times[name], strict=True)]
            yield row(f"ours over conventional, {label}", model, ratios, "x")


@functools.lru_cache(maxsize=1)
def _loop_of_worker(model: str) -> tuple[TrainingLoop, Any]:
    torch.set_num_threads(1)
    keep_freed_memory()  # as every worker of the runner does
    loop = TrainingLoop(Run(model=model))
    order = loop.order().split(loop.run.batch_size)
    timed_steps(loop, order, 20)
    return loop, order


def _steps_in_worker(job: tuple[str, float, int]) -> float:
    model, start, count = job
    loop, order = _loop_of_worker(model)
    time.sleep(max(0.2, start - time.time()))  # long enough that every worker takes one job
    return timed_steps(loop, order, count)


# --------------------------------------------------------------------------------------------------
# Against the machine
# --------------------------------------------------------------------------------------------------


def peak_share(repeats: int) -> Iterator[Row]:
    """LeNet-300-100 trained dense, one thread: time its products would take at the measured matrix
    peak, over the time of the whole step. One means nothing but arithmetic.
    """
    torch.set_num_threads(1)
    loop = TrainingLoop(Run(method="dense"))  # sparse layers would not make these products
    order = loop.order().split(loop.run.batch_size)
    # Forward, weight gradient, and the input gradient of all layers but the first.
    flops = forward_flops("lenet300-100")
    per_step = loop.run.batch_size * (3 * sum(flops.values()) - flops["fc1.weight"])
    a = torch.rand(1024, 1024)
    shares, peaks = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(5):
            a @ a
        peaks.append(5 * 2 * 1024**3 / (time.perf_counter() - start))
        shares.append(per_step / peaks[-1] / timed_steps(loop, order, 100))
    yield row("float32 matrix peak, one thread", "1024 x 1024", [p / 1e9 for p in peaks], "GFLOP/s")
    yield row("products at peak over whole step", "lenet300-100", shares, "")


def layouts(repeats: int) -> Iterator[Row]:
    """Forward and backward of the networks by memory format and precision, all threads."""
    all_threads()
    for model in ("lenet5", "alexnet-s", "wrn-10-2"):
        shape = (1, 28, 28) if model == "lenet5" else (3, 32, 32)
        images, labels = torch.randn(64, *shape), torch.randint(0, 10, (64,))
        variants: dict[str, Callable[[], None]] = {}
        for name, layout, low in (
            ("contiguous fp32", torch.contiguous_format, False),
            ("channels last fp32", torch.channels_last, False),
            ("channels last bf16", torch.channels_last, True),
        ):
            network = build_model(model).to(memory_format=layout)
            variants[name] = forward_backward(
                network, images.contiguous(memory_format=layout), labels, low
            )
        times = in_turn(variants, repeats)
        for name in list(variants)[1:]:
            ratios = [a / b for a, b in zip(times["contiguous fp32"], times[name], strict=True)]
            yield row(f"{name} over contiguous fp32", model, ratios, "x")


def augmentation(repeats: int) -> Iterator[Row]:
    """Share of flip and random crop in a CIFAR-10 step, one thread."""
    torch.set_num_threads(1)
    images, labels = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))
    augment, generator = datasets.Augment(pad=4), torch.Generator().manual_seed(0)
    for model in ("alexnet-s", "wrn-10-2"):
        network = build_model(model).to(memory_format=torch.channels_last)
        step = forward_backward(
            network, images.contiguous(memory_format=torch.channels_last), labels, False
        )
        times = in_turn({"a": lambda: augment(images, generator), "step": step}, repeats)
        shares = [100 * a / (a + s) for a, s in zip(times["a"], times["step"], strict=True)]
        yield row("augmentation, share of a step", model, shares, "%")


def mask_update(repeats: int) -> Iterator[Row]:
    """One mask update of the training loop over one epoch, at 5 % of the weights, one thread.

    The first epochs of LeNet-300-100, which move the most; of AlexNet-s a few steps for an epoch,
    outside of the window: the fast ones.
    """
    torch.set_num_threads(1)
    keep_freed_memory()  # as every worker of the runner does
    for run, count in (
        (Run(), 540),
        (Run(dataset="cifar10", model="alexnet-s", batch_size=128, epochs=250), 8),
    ):
        loop = TrainingLoop(run)
        order = loop.order().split(run.batch_size)
        shares = []
        with flushed_denormals():  # as in training
            for _ in range(4 * repeats + 1):  # short ones: seconds in all
                epoch = loop.schedule.steps_per_epoch * timed_steps(loop, order, count)
                loop.engine.write_back()  # every epoch ends so, whether masks move or not
                start = time.perf_counter()
                loop.update_masks()
                shares.append(100 * (time.perf_counter() - start) / epoch)
        del shares[0]  # the warm-up
        yield row("mask update, share of an epoch", run.model, shares, "%")


def selection(repeats: int) -> Iterator[Row]:
    """Cost of one whole mask update against the number of weights: linear, 10^5 to 10^8."""
    torch.set_num_threads(1)
    for weights in (10**5, 10**6, 10**7, 10**8):
        network = nn.Linear(1000, weights // 1000, bias=False)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        masking = Masking(network, optimizer, density=0.05)
        network.weight.grad = torch.randn_like(network.weight)
        optimizer.step()
        few = 1 if weights >= 10**8 else repeats

        def update(masking: Masking = masking) -> None:
            masking.advance()
            masking.update(0.2)

        times = in_turn({"update": update}, few)["update"]
        yield row(
            "mask update, a weight",
            f"{weights:.0e} weights",
            [t / weights * 1e9 for t in times],
            "ns",
        )


# Topic -> file of its rows, and the function that measures.
TOPICS: dict[str, tuple[str, Topic]] = {
    function.__name__: (file, function)
    for file, functions in {
        "speed": (lenets, peak_share, layouts, augmentation, mask_update, selection),
        "kernels": (sparse_steps, one_thread, window),
    }.items()
    for function in functions
}
BY_NETWORK: dict[str, tuple[str, ...]] = {
    "sparse_steps": tuple(NETWORKS),
    "one_thread": tuple(NETWORKS),
    "window": tuple(WINDOW_RUNS),
}
ON_REQUEST = ("window",)  # counts, the same each time, by a training of its own


# --------------------------------------------------------------------------------------------------
# Helpers
# --------------------------------------------------------------------------------------------------


def describe_machine() -> str:
    """Processor, cores, instruction sets that matter, system, versions, and the day."""
    flags = ""
    if Path("/proc/cpuinfo").exists():
        words = set(Path("/proc/cpuinfo").read_text().split())
        flags = " ".join(f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in words)
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    versions = machine.versions()
    day = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return (
        f"{cores} x {machine.device_name()} ({flags}); torch {versions['torch']}, "
        f"Python {versions['python']}, commit {versions['commit']}, load {load:.1f}, {day}"
    )


def _store(path: Path, topic: str, rows: list[Row], keep_other_settings: bool) -> None:
    """Put the topic's rows into the file, in place of its former ones (or only of those of the same
    settings); one replacement.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {row["setting"] for row in rows}
    kept: list[Row] = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [
                row
                for row in csv.DictReader(file)
                if row["topic"] != topic or (keep_other_settings and row["setting"] not in settings)
            ]
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])
    os.replace(temporary, path)
