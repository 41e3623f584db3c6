"""One training run from its hyper-parameters to a finished row: the only training loop there is.

The protocol is the paper's (section 4; official code e19ff16, mnist_cifar/main.py): SGD with
Nesterov momentum, learning rate x0.1 every so many mini-batches, the last 10 % of the training set
held out, the test set read once after the last epoch, masks moved at the end of every epoch but
the last. Data are tensors resident on the device; nothing is loaded or transformed per image. What
computes a step is an engine (lib/engine.py, lib/cpu).
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lib import checkpoint as checkpoints
from lib import data as datasets
from lib.checkpoint import CheckpointError
from lib.config import Run
from lib.engine import Engine, Task, choose, memory_format
from lib.masking import EVERY_STEP, DivergenceError
from lib.methods.masks import maskable_parameters, snip_masks
from lib.models import layer_flops
from lib.schedule import Schedule
from lib.start import network, optimizer_and_masks, stream, torch_draws_from


class Interrupted(Exception):
    """Training was asked to stop; the checkpoint holds everything up to the last mini-batch."""


@dataclass
class Outcome:
    """What a run measured. Errors in per cent of images; None where training diverged.

    `curves`, `layers` and `measures` are rows of the other files (lib/results/store.py). FLOPs are
    relative to the dense network's: inference with the final densities; training as the mean over
    all steps of forward, input-gradient and weight-gradient products, the weight gradient counted
    densely in the steps whose growth rule reads it (RigL, appendix H). `explored` is the share of
    the maskable weights that was active at any time (Liu et al. 2021), None where masks move in
    every step (DeepR), which a fast engine keeps to itself. `kernels` is the name of the engine
    that computed the run.
    """

    status: str = "ok"
    test_error_pct: float | None = None
    val_error_pct: float | None = None
    train_loss: float | None = None
    density_final: float | None = None
    weights_total: int = 0
    weights_active: int | None = None
    steps: int = 0
    train_flops_rel: float | None = None
    inference_flops_rel: float | None = None
    explored: float | None = None
    train_seconds: float = 0.0
    kernels: str = "torch"
    data_sha256: str = ""
    curves: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    measures: list[dict[str, Any]] = field(default_factory=list)


# See lib/measures.py.
Measure = Callable[["TrainingLoop"], Callable[[], list[dict[str, Any]]]]


def train(
    run: Run,
    dataset: datasets.Dataset | None = None,
    *,
    make_loop: Callable[[], TrainingLoop] | None = None,
    measures: Sequence[Measure] = (),
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30.0,
    progress: Callable[[float | None], None] = lambda error: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train one run to its end, continuing from `checkpoint` where that file exists.

    The file is replaced about every `checkpoint_seconds` and removed by whoever stored the
    outcome; one that can't be used is renamed, which stderr says, and the run starts anew.
    Continuing gives the same bits as never stopping (CPU; same machine and versions; another engine
    or number of threads is refused). `progress` is told the last validation error in % after every
    epoch and about once a second. `make_loop` makes another loop than the plain one
    (lib/runs/imagenet.py). `measures` (lib/measures.py) are taken of the trained network, unless
    it diverged: a loss, weight or momentum that isn't finite ends the run with status "diverged".
    Raises Interrupted when `should_stop()` is true, after writing the checkpoint, and OSError where
    that can't be written.
    """
    if checkpoint is not None:
        checkpoints.remove_torn(checkpoint)
    while True:
        loop = make_loop() if make_loop is not None else TrainingLoop(run, dataset, device=device)
        rows_of = [measure(loop) for measure in measures]
        if checkpoint is None or not checkpoint.exists():
            break
        try:
            loop.load(checkpoint)
            break
        except CheckpointError as error:
            print(f"\n{checkpoints.set_aside(checkpoint, error)}", file=sys.stderr, flush=True)
    try:
        loop.run_to_end(checkpoint, checkpoint_seconds, progress, should_stop)
    except DivergenceError:
        return loop.outcome(status="diverged")
    done = loop.outcome()
    for rows in rows_of:
        done.measures += rows()
    return done


@dataclass
class State:
    """Everything about the position in a run that isn't in model, optimizer or masking."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    flops_sum: float = 0.0
    curves: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    momentum_shares: dict[str, float] = field(default_factory=dict)  # by the last update
    explored: dict[str, Tensor] = field(default_factory=dict)  # weights that were ever active
    observed: dict[str, list[float]] = field(default_factory=dict)  # what a measure collects


class TrainingLoop:
    """A run in progress: model, optimizer, masking, engine, random streams, position."""

    def __init__(
        self,
        run: Run,
        dataset: datasets.Dataset | None = None,
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        self.run, self.device = run, torch.device(device)
        self.data = dataset or datasets.load(
            run.dataset,
            device=self.device,
            val_fraction=run.val_fraction,
            train_subset=run.train_samples,
        )
        self.schedule = Schedule(run, math.ceil(len(self.data.train_y) / run.batch_size))
        model = network(run).to(self.device)
        engine = choose(run, self.data, model, self.device)
        self.format = memory_format(engine, run, model)
        self.model = model.to(memory_format=self.format)
        self.augment_stream = stream(run, "augment", device=self.device)
        self.dropout_state = stream(run, "dropout", device=self.device).get_state()
        self.state = State()
        masks = None
        if run.method == "snip":
            images, labels = self.batch(self.order()[: run.batch_size])
            with torch_draws_from(self.dropout_state, self.device):
                probe = network(run).to(self.device)
                weights = maskable_parameters(probe, run.keep_dense)
                masks = snip_masks(
                    probe, weights, run.density, lambda: F.cross_entropy(probe(images), labels)
                )
        self.optimizer, self.masking = optimizer_and_masks(
            run, self.model, self.schedule.total_steps, masks
        )
        self._explore()
        self.layer_flops = layer_flops(self.model, self.data.train_x.shape[1:])
        moved = (self.model, self.optimizer, self.masking)
        fixed = (run, self.schedule, self.data, self.device)
        self.task = Task(*fixed, *moved, self.batch)
        self.engine: Engine = engine(self.task)

    # ---- the loop ----

    def run_to_end(
        self,
        checkpoint: Path | None = None,
        checkpoint_seconds: float = 30.0,
        progress: Callable[[float | None], None] = lambda error: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """All epochs that are left. See `train`."""
        state, run, per_epoch = self.state, self.run, self.schedule.steps_per_epoch
        started = time.perf_counter() - state.seconds
        saved = told = time.perf_counter()
        with torch_draws_from(self.dropout_state, self.device), flushed_denormals():
            while state.epoch < run.epochs:
                order = self.order()
                loss_sum = torch.tensor(state.loss_sum, dtype=torch.float64, device=self.device)
                self.model.train()
                for k in range(state.step_in_epoch, per_epoch):
                    index = order[k * run.batch_size : (k + 1) * run.batch_size]
                    loss_sum += self.step(index) * len(index)
                    state.step_in_epoch = k + 1
                    ended = state.step_in_epoch == per_epoch
                    if ended:
                        self.end_epoch(float(loss_sum))
                        loss_sum.zero_()
                    elif self.device.type != "cpu" and state.step_in_epoch % 100:
                        continue  # looking at the clock is free, looking at the loss is not
                    now = time.perf_counter()
                    state.seconds = now - started
                    if ended or now - told > 1.0:
                        told = now
                        progress(state.curves[-1]["val_error_pct"] if state.curves else None)
                    stop = state.epoch < run.epochs and should_stop()
                    if checkpoint and (stop or now - saved >= checkpoint_seconds):
                        saved = now
                        state.loss_sum = float(loss_sum)
                        self.save(checkpoint)
                    if stop:
                        raise Interrupted(run.run_id)

    def step(self, index: Tensor) -> Tensor:
        """One mini-batch of training images `index` [B]: returns its mean loss, 0-d, detached."""
        run, state, schedule = self.run, self.state, self.schedule
        self.optimizer.param_groups[0]["lr"] = schedule.lr(state.step)
        loss = self.engine.step(index, schedule.until_update(state.step))
        state.step += 1
        every = run.update_every_steps  # 0: at the end of the epoch, after validation
        if every and state.step % every == 0 and state.step < schedule.total_steps:
            self.update_masks()
        return loss

    def end_epoch(self, loss_sum: float) -> None:
        """After the last mini-batch of an epoch, whose losses sum to this: validate, move masks.

        Raises DivergenceError when the loss or a weight isn't finite.
        """
        state, run = self.state, self.run
        self.engine.write_back()
        if not math.isfinite(loss_sum):
            raise DivergenceError(f"the loss is {loss_sum} in epoch {state.epoch + 1}")
        norms = torch._foreach_norm([p.detach() for p in self.model.parameters()])
        if not torch.stack(norms).isfinite().all():  # the last step's weights enter no loss
            raise DivergenceError(f"a weight isn't finite after epoch {state.epoch + 1}")
        active = self.masking.active()
        state.flops_sum += self.schedule.steps_per_epoch * self.train_flops_rel(active)
        state.epoch += 1
        state.curves.append(
            {
                "run_id": run.run_id,
                "epoch": state.epoch,
                "train_loss": loss_sum / len(self.data.train_y),
                "val_error_pct": self.error_pct(self.data.val_x, self.data.val_y),
                "lr": self.optimizer.param_groups[0]["lr"],
                "prune_rate": self.masking.current_rate,
                "density": self.masking.density,
            }
        )
        last = state.epoch == run.epochs
        if not last and run.update_every_steps == 0:
            self.update_masks()
        if last or str(state.epoch).rstrip("0") in ("1", "2", "5"):
            state.layers += [
                {
                    "run_id": run.run_id,
                    "epoch": state.epoch,
                    "layer": name,
                    "weights": self.masking.masks[name].numel(),
                    "active": count,
                    "momentum_share": state.momentum_shares.get(name, math.nan),
                }
                for name, count in self.masking.active().items()
            ]
        state.step_in_epoch, state.loss_sum = 0, 0.0

    def update_masks(self) -> None:
        """Prune, redistribute, grow (lib/masking.py)."""
        self.engine.write_back()
        report = self.masking.update()
        self._explore()
        self.state.momentum_shares = {line.name: line.momentum_share for line in report}
        self.engine.follow()

    def _explore(self) -> None:
        """Remember which weights were ever active."""
        ever = self.state.explored
        for name, mask in self.masking.masks.items():
            ever[name] = ever[name] | mask if name in ever else mask.clone()

    # ---- data ----

    def order(self) -> Tensor:
        """This epoch's order of the training images: its own stream, so a resume can redraw it."""
        generator = stream(self.run, "order", self.state.epoch)
        return torch.randperm(len(self.data.train_y), generator=generator).to(self.device)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Training images [B, C, H, W], augmented, and labels [B]."""
        images = self.data.train_x.index_select(0, index)
        if self.run.augment and self.data.augment is not None:
            images = self.data.augment(images, self.augment_stream)
        images = images.contiguous(memory_format=self.format)
        return images, self.data.train_y.index_select(0, index)

    def error_pct(self, images: Tensor, labels: Tensor) -> float:
        """Share of wrong predictions in per cent: wrong images over all images, in eval mode."""
        return 100.0 * self.engine.wrong(images, labels) / len(labels)

    # ---- persistence ----

    def _same(self) -> dict[str, str]:
        """What a checkpoint must have been written by, that the rest may give the same bits."""
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        engine = f"{self.engine.name} on {self.device.type}{threads}"
        return {"run": self.run.run_id, "engine": engine}

    def save(self, path: Path) -> None:
        """Write the checkpoint: all that the rest of the run depends on. Raises OSError."""
        cuda = self.device.type != "cpu"
        content = {
            **self._same(),
            "engine_state": self.engine.state_dict(),  # first: it may write back
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "masking": self.masking.state_dict(),
            "augment": self.augment_stream.get_state(),
            "dropout": torch.cuda.get_rng_state(self.device) if cuda else torch.get_rng_state(),
            "state": vars(self.state),
        }
        checkpoints.write(path, content)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint. Raises CheckpointError for one that isn't this run's, whole and
        of the right shapes; this loop is of no use then.
        """
        saved = checkpoints.read(path, self.device, **self._same())
        try:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.masking.load_state_dict(saved["masking"])
            self.augment_stream.set_state(saved["augment"].cpu())
            self.dropout_state = saved["dropout"].cpu()
            self.state = State(**saved["state"])
            self.engine.load_state_dict(saved["engine_state"])
        except Exception as error:  # a whole file of this run, but not what `save` writes
            raise CheckpointError(f"its content is not a run's: {error!r}") from error

    # ---- what a row says ----

    def outcome(self, status: str = "ok") -> Outcome:
        """The finished run's numbers; reads the test set, once."""
        state, masking = self.state, self.masking
        done = Outcome(
            status=status,
            weights_total=sum(p.numel() for p in self.model.parameters() if p.dim() > 1),
            steps=state.step,
            train_seconds=state.seconds,
            kernels=self.engine.name,
            data_sha256=self.data.sha256,
            curves=state.curves,
            layers=state.layers,
        )
        if status == "ok":
            part = slice(self.run.test_samples or None)
            done.test_error_pct = self.error_pct(self.data.test_x[part], self.data.test_y[part])
            done.val_error_pct = state.curves[-1]["val_error_pct"]
            done.train_loss = state.curves[-1]["train_loss"]
            done.density_final = masking.density
            kept_dense = done.weights_total - masking.weights_total
            done.weights_active = sum(masking.active().values()) + kept_dense
            done.train_flops_rel = state.flops_sum / state.step
            done.inference_flops_rel = self.inference_flops_rel(masking.active())
            if (ever := state.explored.values()) and self.run.method not in EVERY_STEP:
                done.explored = sum(int(m.sum()) for m in ever) / masking.weights_total
        return done

    def inference_flops_rel(self, active: Mapping[str, int]) -> float:
        """A forward pass's FLOPs relative to dense, with so many active weights per masked layer
        (RigL, appendix H).
        """
        shares = {name: n / self.masking.masks[name].numel() for name, n in active.items()}
        sparse = sum(flops * shares.get(name, 1.0) for name, flops in self.layer_flops.items())
        return sparse / sum(self.layer_flops.values())

    def train_flops_rel(self, active: Mapping[str, int]) -> float:
        """Of a mean step: forward, input gradient and weight gradient, the latter of all weights in
        the share of the steps whose growth rule reads it.
        """
        needs, share = self.masking.growth.needs, 0.0
        if active and needs == "momentum":  # of inactive weights too
            window = self.schedule.window if self.engine.windowed else math.inf
            share = min(1.0, window / self.schedule.period)
        elif active and needs == "gradient":
            share = 1 / self.schedule.period
        sparse = self.inference_flops_rel(active)
        return (2 * sparse + share + (1 - share) * sparse) / 3


@contextlib.contextmanager
def flushed_denormals() -> Iterator[None]:
    """Denormal numbers, hundreds of times slower on a CPU, are zero inside; elsewhere they stay."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
