"""One training run from its hyper-parameters to a finished row: the only training loop there is.

The protocol is the paper's (section 4; official code e19ff16, mnist_cifar/main.py): SGD with
Nesterov momentum, learning rate x0.1 every so many mini-batches, the last 10 % of the training set
held out, the test set read once after the last epoch, masks moved at the end of every epoch but
the last. Data are tensors resident on the device; nothing is loaded or transformed per image.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import data as datasets
from lib.config import UNMASKED, Run, stream_seed, unknown
from lib.engines.graphs import CudaRecorder, GraphedStep
from lib.engines.network import SparseNetwork, dense_window, sparse_network, step_cost
from lib.engines.optimizer import SparseSGD
from lib.engines.perceptron import (
    MAX_SAMPLES,
    SPARSE_BELOW,
    PerceptronTrainer,
    Track,
    perceptron_layers,
)
from lib.kernels import available
from lib.masking import EVERY_STEP, DivergenceError, LayerReport, Masking
from lib.measures.features import observe_features
from lib.measures.speedups import observe_speedups
from lib.methods.snip import snip_masks
from lib.models import build_model, layer_flops, small_dense_scale

EVALUATION_BATCH = 1000
# Convolutional networks up to this density go through the sparse kernels where those are faster,
# unless training is so short that finding out would cost more than it gains.
SPARSE_NETWORK_UP_TO = 0.5
WORTH_CALIBRATING_STEPS = 1_000
# What a recorded step keeps of the optimizer's settings.
_FIXED = ("lr", "momentum", "weight_decay", "nesterov")


class Interrupted(Exception):
    """Training was asked to stop; the checkpoint holds everything up to the last mini-batch."""


@dataclass
class Outcome:
    """What a run measured. Errors in per cent of images; None where training diverged.

    `curves`, `layers` and `measures` are rows of the other files (lib/results/store.py). FLOPs are
    relative to the dense network's: inference with the final densities; training as the mean over
    all steps of forward, input-gradient and weight-gradient products, the weight gradient counted
    densely in the steps whose growth rule reads it (RigL, appendix H). `kernels` names what
    computed the run: "perceptron", "sparse" (lib/kernels) or "torch".
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
    train_seconds: float = 0.0
    kernels: str = "torch"
    data_sha256: str = ""
    curves: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    measures: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Progress:
    """Handed to the progress callback after every epoch and about once a second."""

    epoch: float
    epochs: int
    val_error_pct: float | None


@dataclass
class _State:
    """Everything about the position in a run that isn't in model, optimizer or masking."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    flops_sum: float = 0.0
    curves: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    report: list[tuple[Any, ...]] = field(default_factory=list)
    observed: dict[str, list[float]] = field(default_factory=dict)  # what a measure collects


# Name -> function that is called before training and returns one that is called on the finished
# network and gives its rows (results.MEASURE_COLUMNS). Experiments name the measures they need.
Measure = Callable[["TrainingLoop"], Callable[[], list[dict[str, Any]]]]
MEASURES: dict[str, Measure] = {"features": observe_features, "speedups": observe_speedups}


def train(
    run: Run,
    dataset: datasets.Dataset | None = None,
    *,
    loop: TrainingLoop | None = None,
    measures: Sequence[str] = (),
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30.0,
    progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Outcome:
    """Train one run to its end, continuing from `checkpoint` where that file exists.

    The file is replaced about every `checkpoint_seconds` and removed by whoever stored the
    outcome. Continuing gives the same bits as never stopping (CPU; same machine, versions and
    number of threads). `loop` is one made already (lib/runs/imagenet.py). `measures` (of MEASURES)
    are taken of the trained network, unless it diverged: a loss, weight or momentum that isn't
    finite ends the run with status "diverged".
    Raises Interrupted when `should_stop()` is true, after writing the checkpoint.
    """
    for name in measures:
        if name not in MEASURES:
            raise ValueError(unknown("measure", name, MEASURES))
    loop = loop or TrainingLoop(run, dataset, device=device)
    rows_of = [MEASURES[name](loop) for name in measures]
    if checkpoint is not None and checkpoint.exists():
        loop.load(checkpoint)
    try:
        loop.run_to_end(checkpoint, checkpoint_seconds, progress, should_stop)
    except DivergenceError:
        return loop.outcome(status="diverged")
    done = loop.outcome()
    for rows in rows_of:
        done.measures += rows()
    return done


class TrainingLoop:
    """A run in progress: model, optimizer, masking, random streams, position."""

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
        self.model = build_model(
            run.model,
            dropout=None if run.dropout < 0 else run.dropout,
            width_scale=(
                small_dense_scale(run.model, run.density) if run.method == "small_dense" else 1.0
            ),
            generator=stream(run, "init"),
        ).to(self.device)
        self.steps_per_epoch = math.ceil(len(self.data.train_y) / run.batch_size)
        self.total_steps = run.epochs * self.steps_per_epoch
        # Convolutions run faster with channels last (`make bench`); DeepR and the sparse kernels
        # index flat weights.
        kernels = self._kernels()
        convolutional = any(isinstance(m, nn.Conv2d) for m in self.model.modules())
        self.format = (
            torch.channels_last
            if convolutional and run.method != "deepr" and kernels == "torch"
            else torch.contiguous_format
        )
        self.model = self.model.to(memory_format=self.format)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(
            self.parameters,
            lr=run.lr,
            momentum=run.momentum,
            nesterov=run.nesterov and run.momentum > 0,
            weight_decay=run.weight_decay,
            fused=True,
        )
        self.masking = Masking(
            self.model,
            self.optimizer,
            density=1.0 if run.method in UNMASKED else run.density,
            prune_rate=run.prune_rate,
            total_steps=self.total_steps,
            schedule=run.schedule,
            method=run.method,
            prune=run.prune,
            redistribution=run.redistribution,
            growth=run.growth,
            init=run.init,
            keep_dense=run.keep_dense,
            generator=stream(run, "masks"),
            options=dict(run.options),
        )
        if run.init_scale == "density":
            with torch.no_grad():
                for name, mask in self.masking.masks.items():
                    self.masking.parameters[name].div_(mask.double().mean().sqrt().float())
        self.augment_stream = stream(run, "augment", device=self.device)
        self.dropout_stream = stream(run, "dropout", device=self.device).get_state()
        self.flops = layer_flops(self.model, self.data.train_x.shape[1:])
        self.state = _State()
        if run.method == "snip":
            self.masking.masks = self._snip()
            self.masking.apply()
        self.graphed: GraphedStep | None = None
        if self.device.type == "cuda":
            # Whole epochs of one shape: worth trying out which algorithm is fastest.
            torch.backends.cudnn.benchmark = True
            if run.method not in EVERY_STEP:  # these look at the masks on the host
                recorder = CudaRecorder(self.device, [self.augment_stream])
                self.graphed = GraphedStep(self._compute, self.parameters, run.batch_size, recorder)
        self.perceptron: PerceptronTrainer | None = None
        self.sparse: SparseNetwork | None = None
        self.sparse_sgd: SparseSGD | None = None
        if kernels == "perceptron":
            rewires = run.method == "deepr" and run.density < SPARSE_BELOW
            below = 0.0 if run.method in EVERY_STEP else None  # its masks are new after each step
            self.perceptron = PerceptronTrainer(
                self.model, self.optimizer, self.masking, sparse_below=below, rewires=rewires
            )
        elif kernels == "sparse":
            mode = "sparse" if run.kernels == "sparse" else "auto"  # of each layer
            self.sparse = sparse_network(self.model, self.masking.masks, mode=mode)
            if run.momentum > 0:
                self.sparse_sgd = SparseSGD(self.sparse, self.optimizer, self.masking)

    # ---- the loop ----

    def run_to_end(
        self,
        checkpoint: Path | None = None,
        checkpoint_seconds: float = 30.0,
        progress: Callable[[Progress], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        """All epochs that are left. See `train`."""
        state, run = self.state, self.run
        started = time.perf_counter() - state.seconds
        saved = told = time.perf_counter()
        with self._dropout_stream(), flushed_denormals():
            while state.epoch < run.epochs:
                order = self._order()
                loss_sum = torch.tensor(state.loss_sum, dtype=torch.float64, device=self.device)
                self.model.train()
                for k in range(state.step_in_epoch, self.steps_per_epoch):
                    index = order[k * run.batch_size : (k + 1) * run.batch_size]
                    loss_sum += self.step(index) * len(index)
                    state.step_in_epoch = k + 1
                    if self.device.type != "cpu":
                        continue  # looking at the clock is free, looking at the loss is not
                    now = time.perf_counter()
                    if progress is not None and now - told > 1.0:
                        told = now
                        progress(self._progress())
                    stop = should_stop is not None and should_stop()
                    if stop or (checkpoint and now - saved >= checkpoint_seconds):
                        saved = now
                        state.loss_sum, state.seconds = float(loss_sum), now - started
                        if checkpoint:
                            self.save(checkpoint)
                    if stop:
                        raise Interrupted(run.run_id)
                state.seconds = time.perf_counter() - started
                self._end_epoch(float(loss_sum))
                if progress is not None:
                    progress(self._progress())
                now = time.perf_counter()
                state.seconds = now - started
                stop = state.epoch < run.epochs and should_stop is not None and should_stop()
                if checkpoint and (stop or now - saved >= checkpoint_seconds):
                    saved = now
                    self.save(checkpoint)
                if stop:
                    raise Interrupted(run.run_id)

    def step(self, index: Tensor) -> Tensor:
        """One mini-batch of training images `index` [B]: returns its mean loss, 0-d, detached."""
        run, state = self.run, self.state
        lr = self.lr()
        if self.optimizer.param_groups[0]["lr"] != lr:
            self.optimizer.param_groups[0]["lr"] = lr
        loss = self._torch_step(index) if self.perceptron is None else self._perceptron_step(index)
        state.step += 1
        every = run.update_every_steps  # 0: at the end of the epoch, after validation
        if every and state.step % every == 0 and state.step < self.total_steps:
            self._update_masks()
        return loss

    def use_torch(self) -> None:
        """From now on compute by torch's operators alone: each layer as its module."""
        self._write_back()
        self.perceptron = self.sparse = self.sparse_sgd = None

    def lr(self) -> float:
        """Learning rate of the next mini-batch: linear warm-up, then x`lr_decay` in steps."""
        run, step = self.run, self.state.step
        warmup = run.warmup_epochs * self.steps_per_epoch
        if step < warmup:
            return run.lr * (step + 1) / warmup
        return run.lr * run.lr_decay ** (step // run.lr_decay_every_steps)

    @torch.no_grad()
    def error_pct(self, images: Tensor, labels: Tensor) -> float:
        """Share of wrong predictions in per cent: wrong images over all images, in eval mode."""
        if self.perceptron is not None:
            images = images.contiguous()
            return 100.0 * self.perceptron.wrong(images, labels) / len(labels)
        network = self.sparse or self.model
        network.eval()
        right = torch.zeros((), dtype=torch.long, device=self.device)
        for start in range(0, len(labels), EVALUATION_BATCH):
            part = slice(start, start + EVALUATION_BATCH)
            with self._autocast():
                logits = network(images[part])
            right += (logits.argmax(1) == labels[part]).sum()
        network.train()
        return 100.0 * (len(labels) - int(right)) / len(labels)

    def training_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All training images once, in order, augmented as in training: images [B, C, H, W] and
        labels [B], with at most `size` images; draws from a stream of its own.
        """
        augment = stream(self.run, "measure", device=self.device)
        for start in range(0, len(self.data.train_y), size):
            index = torch.arange(start, min(start + size, len(self.data.train_y)))
            yield self._batch(index.to(self.device), augment)

    # ---- persistence ----

    def save(self, path: Path) -> None:
        """Write the checkpoint in one step: a kill leaves the old one or the new one."""
        if self.perceptron is not None:
            self.perceptron.sync()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")  # one name: a kill leaves one at most
        torch.save(
            {
                "run_id": self.run.run_id,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "masking": self.masking.state_dict(),
                "augment_stream": self.augment_stream.get_state(),
                "dropout_stream": self._rng_state(),
                "gradients": self._pending_gradients(),
                # Not caught up with here, or momentum would round as it does in no other run.
                "pending": self.sparse_sgd.pending if self.sparse_sgd is not None else {},
                "state": vars(self.state),
            },
            temporary,
        )
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint; ValueError when it is another run's."""
        saved = torch.load(path, map_location=self.device, weights_only=True)
        if saved["run_id"] != self.run.run_id:
            raise ValueError(f"{path} is the checkpoint of {saved['run_id']}: remove it")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.masking.load_state_dict(saved["masking"])
        self.augment_stream.set_state(saved["augment_stream"].cpu())
        self.dropout_stream = saved["dropout_stream"].cpu()
        self.state = _State(**saved["state"])
        for name, gradient in saved.get("gradients", {}).items():
            self.masking.parameters[name].grad = gradient
        if self.perceptron is not None:
            self.perceptron.reload()
        if self.sparse_sgd is not None:
            self.sparse_sgd.pending = dict(saved.get("pending", {}))
        if self.graphed is not None:
            self.graphed.forget()

    def outcome(self, status: str = "ok") -> Outcome:
        """The finished run's numbers; reads the test set, once."""
        state, masking = self.state, self.masking
        done = Outcome(
            status=status,
            weights_total=sum(p.numel() for p in self.model.parameters() if p.dim() > 1),
            steps=state.step,
            train_seconds=state.seconds,
            kernels="perceptron" if self.perceptron else "sparse" if self.sparse else "torch",
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
            done.inference_flops_rel = self._flops_rel(masking.active())
        return done

    # ---- inside ----

    def _kernels(self) -> str:
        """What computes this run: "perceptron", "sparse" or "torch"."""
        run = self.run
        if (
            run.kernels == "torch"
            or self.device.type != "cpu"
            or run.precision != "fp32"
            or not available()
        ):
            return "torch"
        if perceptron_layers(self.model):
            known = run.batch_size <= MAX_SAMPLES and run.momentum > 0 and not run.label_smoothing
            known = known and not (run.augment and self.data.augment is not None)
            return "perceptron" if known else "torch"
        if run.kernels == "sparse" and run.method not in (*UNMASKED, *EVERY_STEP):
            return "sparse"
        return "sparse" if self._sparse_pays() else "torch"

    def _sparse_pays(self) -> bool:
        """Whether a convolutional network trains faster by the sparse kernels, as measured here."""
        run = self.run
        if (
            run.method in (*UNMASKED, *EVERY_STEP)
            or run.density > SPARSE_NETWORK_UP_TO
            or run.dataset == "imagenet"  # its images are read as they come
            or self.total_steps < WORTH_CALIBRATING_STEPS
        ):
            return False
        what = f"step model={run.model} density={run.density:g} batch={run.batch_size}"
        cost = step_cost(what, self.model, run.density, self.data.train_x[: run.batch_size])
        period = run.update_every_steps or self.steps_per_epoch
        share = 0.0 if run.prune == "none" else min(1.0, self._window() / period)
        return cost.sparse_is_faster(share)

    def _torch_step(self, index: Tensor) -> Tensor:
        if self.graphed is not None:
            self.masking.refresh()
            loss = self.graphed(index, tuple(self.optimizer.param_groups[0][n] for n in _FIXED))
            self.masking.advance()
            return loss
        loss = self._compute(index)
        if self.run.method in EVERY_STEP:
            self.masking.step()
        else:
            self.masking.advance()
        return loss

    def _compute(self, index: Tensor) -> Tensor:
        """The arithmetic of a step, up to inactive weights set back to zero: its mean loss."""
        images, labels = self._batch(index)
        network = self.model
        if self.sparse is not None:
            network, left = self.sparse, self._until_update()
            self.sparse.dense_gradients = left <= max(self._window(), 1)
        with self._autocast():
            loss = F.cross_entropy(
                network(images), labels, label_smoothing=self.run.label_smoothing
            )
        for parameter in self.parameters:  # optimizer.zero_grad() costs 3 % of a LeNet step
            parameter.grad = None
        loss.backward()
        if self.sparse_sgd is not None:
            self.sparse_sgd.step()
        else:
            self.optimizer.step()
            self.masking.apply()
        return loss.detach()

    def _perceptron_step(self, index: Tensor) -> Tensor:
        assert self.perceptron is not None
        left, window = self._until_update(), self._window()
        track = Track.NOTHING
        # DeepR's connections wake without momentum: what they had before is never read.
        if left <= window and not self.perceptron.rewires:
            # A window that began before the last update goes on; a new one starts from zero.
            whole = window >= (self.run.update_every_steps or self.steps_per_epoch)
            track = Track.FIRST if left == window and not whole else Track.MORE
        loss = self.perceptron.step(
            self.data.train_x,
            self.data.train_y,
            index,
            track=track,
            gradients=left == 1 and self.masking.growth.needs == "gradient",
        )
        if self.perceptron.rewires:
            self.masking.advance()
            self.perceptron.deepr_step()
        elif self.run.method in EVERY_STEP:
            self.masking.step()
        else:
            self.masking.advance()
        return torch.tensor(loss, dtype=torch.float64)

    def _until_update(self) -> float:
        """Mini-batches up to the next update of the masks, the next one included; inf: none."""
        if self.masking.prune.name == "none" or not self.masking.masks:
            return math.inf
        period = self.run.update_every_steps or self.steps_per_epoch
        left = period - self.state.step % period
        return left if self.state.step + left < self.total_steps else math.inf

    def _window(self) -> int:
        """Mini-batches before an update that gather the momentum of inactive weights."""
        return self.run.dense_window_steps or dense_window(self.run.momentum)

    def _pending_gradients(self) -> dict[str, Tensor]:
        """What an update of masks reads of the last step, where it's still to come."""
        if self.masking.growth.needs != "gradient" or self.run.update_every_steps:
            return {}
        if self.state.step_in_epoch < self.steps_per_epoch:
            return {}
        found = {name: p.grad for name, p in self.masking.parameters.items()}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def _write_back(self) -> None:
        if self.perceptron is not None:
            self.perceptron.sync()
        if self.sparse_sgd is not None:
            self.sparse_sgd.sync()

    def _batch(
        self, index: Tensor, augment: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        images = self.data.train_x.index_select(0, index)
        if self.run.augment and self.data.augment is not None:
            images = self.data.augment(images, augment or self.augment_stream)
        images = images.contiguous(memory_format=self.format)
        return images, self.data.train_y.index_select(0, index)

    def _order(self) -> Tensor:
        """This epoch's order of the training images: its own stream, so a resume can redraw it."""
        generator = stream(self.run, "order", self.state.epoch)
        return torch.randperm(len(self.data.train_y), generator=generator).to(self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.run.precision == "bf16"
        )

    def _end_epoch(self, loss_sum: float) -> None:
        state, run = self.state, self.run
        self._write_back()
        if not math.isfinite(loss_sum):
            raise DivergenceError(f"the loss is {loss_sum} in epoch {state.epoch + 1}")
        norms = torch._foreach_norm([p.detach() for p in self.model.parameters()])
        if not torch.stack(norms).isfinite().all():  # the last step's weights enter no loss
            raise DivergenceError(f"a weight isn't finite after epoch {state.epoch + 1}")
        active = self.masking.active()
        state.flops_sum += self.steps_per_epoch * self._train_flops_rel(active)
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
            self._update_masks()
        if last or str(state.epoch).rstrip("0") in ("1", "2", "5"):
            self._record_layers()
        state.step_in_epoch, state.loss_sum = 0, 0.0

    def _update_masks(self) -> None:
        self._write_back()
        report = self.masking.update()
        self.state.report = [tuple(line) for line in report]
        if self.perceptron is not None:
            self.perceptron.follow(report)

    def _record_layers(self) -> None:
        shares = {LayerReport(*line).name: line[-1] for line in self.state.report}
        for name, count in self.masking.active().items():
            self.state.layers.append(
                {
                    "run_id": self.run.run_id,
                    "epoch": self.state.epoch,
                    "layer": name,
                    "weights": self.masking.masks[name].numel(),
                    "active": count,
                    "momentum_share": shares.get(name, math.nan),
                }
            )

    def _flops_rel(self, active: dict[str, int]) -> float:
        total = sum(self.flops.values())
        sparse = sum(
            flops * (active[name] / self.masking.masks[name].numel() if name in active else 1.0)
            for name, flops in self.flops.items()
        )
        return sparse / total

    def _train_flops_rel(self, active: dict[str, int]) -> float:
        """Forward, input gradient and weight gradient of one step, relative to dense."""
        sparse = self._flops_rel(active)
        period = self.run.update_every_steps or self.steps_per_epoch
        dense_share = 0.0
        if active and self.masking.growth.needs == "momentum":  # of inactive weights too
            windowed = self.perceptron is not None or self.sparse is not None
            dense_share = min(1.0, self._window() / period) if windowed else 1.0
        elif active and self.masking.growth.needs == "gradient":
            dense_share = 1 / period
        return (2 * sparse + dense_share + (1 - dense_share) * sparse) / 3

    def _progress(self) -> Progress:
        state = self.state
        done = state.epoch + state.step_in_epoch / self.steps_per_epoch
        last = state.curves[-1]["val_error_pct"] if state.curves else None
        return Progress(min(done, self.run.epochs), self.run.epochs, last)

    def _snip(self) -> dict[str, Tensor]:
        run = self.run
        index = self._order()[: run.batch_size]
        dropout = None if run.dropout < 0 else run.dropout
        probe = build_model(run.model, dropout=dropout, generator=stream(run, "init"))
        probe = probe.to(self.device)
        parameters = {n: p for n, p in probe.named_parameters() if n in self.masking.parameters}
        images, labels = self._batch(index)
        with self._dropout_stream():
            return snip_masks(
                probe, parameters, run.density, lambda: F.cross_entropy(probe(images), labels)
            )

    @contextlib.contextmanager
    def _dropout_stream(self) -> Iterator[None]:
        """Dropout draws from torch's own generator of the device: inside, it is this run's."""
        if self.device.type == "cpu":
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self.dropout_stream)
                yield
        else:
            with torch.random.fork_rng(devices=[self.device], device_type=self.device.type):
                torch.cuda.set_rng_state(self.dropout_stream, self.device)
                yield

    def _rng_state(self) -> Tensor:
        if self.device.type == "cpu":
            return torch.get_rng_state()
        return torch.cuda.get_rng_state(self.device)


@contextlib.contextmanager
def flushed_denormals() -> Iterator[None]:
    """Denormal numbers, hundreds of times slower on a CPU, are zero inside; elsewhere they stay."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def stream(
    run: Run, purpose: str, *index: int, device: str | torch.device = "cpu"
) -> torch.Generator:
    """The random stream of one purpose of a run; streams never share draws."""
    return torch.Generator(device=device).manual_seed(stream_seed(run.seed, purpose, *index))
