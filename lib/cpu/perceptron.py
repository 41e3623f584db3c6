"""Training a perceptron by one call of perceptron.hpp a mini-batch, on the CPU.

The model's parameters and the optimizer's momentum buffers stay where torch keeps them. What a
sparse layer holds instead, the values of its non-zeros and their momentum, is written back by
`write_back()`, after which Masking, checkpoints and measurements see what they always see.
"""

from __future__ import annotations

import ctypes
import enum
import math
import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.cpu.library import call, require, sgd_rule
from lib.engine import Engine, Task, momentum_buffer
from lib.masking import EVERY_STEP
from lib.methods.parts import drawn
from lib.methods.rules import deepr_rates, signs_of, some_of

# Sparse layers cost their non-zeros, dense ones all weights at several times the speed. A fixed
# density, near where the two met for LeNet-300-100 with AVX-512; not calibrated per machine.
SPARSE_BELOW = 0.3
MAX_SAMPLES = 128


class Track(enum.IntEnum):
    """Whether a step gathers the gradients of inactive weights in their momentum: not at all,
    in addition to what is there, or from zero.
    """

    NOTHING = 0
    MORE = 1
    FIRST = 2


_INT, _FLOAT, _ARRAY = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class _Layer(ctypes.Structure):
    """PerceptronLayer of perceptron.hpp; whoever changes one changes the other."""

    _fields_ = [
        (name, kind)
        for kind, names in (
            (_INT, "inputs outputs"),
            (_ARRAY, "weight momentum multiplier gradient bias bias_momentum"),
            (_INT, "nonzeros"),
            (_ARRAY, "row_start column value value_momentum column_start row place"),
            (_ARRAY, "scale scale_momentum shift shift_momentum mean variance"),
            (_FLOAT, "norm_momentum eps"),
        )
        for name in names.split()
    ]


class _Nonzeros(NamedTuple):
    """Those of a layer [rows, columns]: by row their columns, those of row r from row_start[r] to
    row_start[r + 1], and what is held there; by column likewise their rows, and `place`, where each
    stands in the order by row. Places are int32.
    """

    row_start: Tensor
    column: Tensor
    value: Tensor
    value_momentum: Tensor
    column_start: Tensor
    row: Tensor
    place: Tensor

    @staticmethod
    def under(mask: Tensor, weight: Tensor, momentum: Tensor, room: int) -> _Nonzeros:
        """Of a weight with this mask; the arrays have room for so many."""
        row, column = mask.nonzero().int().unbind(1)
        place = column.argsort(stable=True)
        lists = (column, weight.detach()[mask], momentum[mask], row[place], place.int())
        more = (0, max(0, room - len(row)))
        column, value, value_momentum, row, place = (F.pad(part, more) for part in lists)
        row_start, column_start = (F.pad(mask.sum(d).cumsum(0), (1, 0)).int() for d in (1, 0))
        return _Nonzeros(row_start, column, value, value_momentum, column_start, row, place)

    def put(self, weight: Tensor, momentum: Tensor) -> Tensor:
        """Write weights and momentum back; returns where, bool."""
        count = int(self.row_start[-1])
        row, column = torch.repeat_interleave(self.row_start.diff()), self.column[:count].long()
        weight.detach()[row, column] = self.value[:count]
        momentum[row, column] = self.value_momentum[:count]
        mask = torch.zeros_like(weight, dtype=torch.bool)
        mask[row, column] = True
        return mask


class PerceptronLayer(NamedTuple):
    """A linear layer, by its name in the model, and the batch norm behind it."""

    name: str
    linear: nn.Linear
    norm: nn.BatchNorm1d | None


def perceptron_layers(model: nn.Module) -> list[PerceptronLayer] | None:
    """The layers of a perceptron of lib/models.py, a chain Linear, ReLU, Linear, ... in which batch
    norm may come between a linear layer and its ReLU and after the last; None for other networks.
    """
    letters = {nn.Linear: "L", nn.BatchNorm1d: "N", nn.ReLU: "R"}
    kinds = "".join(letters.get(type(module), "?") for module in model.children())
    if not (isinstance(model, nn.Sequential) and re.fullmatch("(LN?R)*LN?", kinds)):
        return None
    found: list[PerceptronLayer] = []
    for name, module in model.named_children():
        if isinstance(module, nn.Linear):
            found.append(PerceptronLayer(name, module, None))
        elif isinstance(module, nn.BatchNorm1d):
            found[-1] = found[-1]._replace(norm=module)
    return found


class PerceptronEngine(Engine):
    """A model for which `perceptron_layers` finds layers. Below the density `sparse_below` a masked
    layer is computed over its non-zeros; with DeepR all are, which it moves (`rewires`), or none
    where it is dense.

    Raises:
        KernelsUnavailable: the kernels cannot be built here.
    """

    name, windowed = "perceptron", True

    def __init__(self, task: Task, sparse_below: float = SPARSE_BELOW) -> None:
        super().__init__(task)
        require()
        self._named = perceptron_layers(task.model) or []
        self.rewires = task.run.method == "deepr" and task.run.density < SPARSE_BELOW
        every_step = task.run.method in EVERY_STEP  # its masks are new after each step
        self._below = math.inf if self.rewires else 0.0 if every_step else sparse_below
        self._layers = (_Layer * len(self._named))()
        self._net = ctypes.byref(self._layers), len(self._layers)
        self._ahead, self._steps = False, 0  # the latter not yet counted by batch norm
        self.follow()

    def step(self, index: Tensor, left: float) -> Tensor:
        """See `Engine.step`."""
        masking, window = self.task.masking, self.task.schedule.window
        track = Track.NOTHING
        # DeepR's connections wake without momentum: what they had before is never read.
        if left <= window and not self.rewires:
            # A window that began before the last update goes on; a new one starts from zero.
            whole = window >= self.task.schedule.period
            track = Track.FIRST if left == window and not whole else Track.MORE
        gradients = left == 1 and masking.growth.needs == "gradient"
        loss = self.learn(index, track=track, gradients=gradients)
        if self.rewires:
            masking.advance()
            self.deepr_step()
        elif self.task.run.method in EVERY_STEP:
            masking.step()
        else:
            masking.advance()
        return torch.tensor(loss, dtype=torch.float64)

    def wrong(self, images: Tensor, labels: Tensor) -> int:
        """See `Engine.wrong`. As torch.argmax: of equal logits the first counts."""
        wrong, images = ctypes.c_int64(), images.contiguous()
        call("perceptron_wrong", *self._net, images, labels, len(labels), ctypes.byref(wrong))
        return wrong.value

    def write_back(self) -> None:
        """See `Engine.write_back`. Also the masks that `deepr_step` moved, to the Masking."""
        if not self._ahead:
            return
        self._ahead = False
        for _, _, norm in self._named:
            if norm is not None:
                assert norm.num_batches_tracked is not None
                norm.num_batches_tracked += self._steps
        self._steps = 0
        masking = self.task.masking
        for path, held in self._sparse.items():
            weight = masking.parameters[path]
            momentum = momentum_buffer(self.task.optimizer, weight)
            if self.rewires:
                weight.detach().zero_()
                momentum.zero_()  # of dormant connections it is never read
            mask = held.put(weight, momentum)
            if self.rewires:
                masking.masks[path] = mask

    def state_dict(self) -> dict[str, Any]:
        """Nothing, once all is written back."""
        self.write_back()
        return {}

    def follow(self) -> None:
        """See `Engine.follow`. Weights outside the masks become zero."""
        self._sparse: dict[str, _Nonzeros] = {}
        self._multipliers: dict[str, Tensor] = {}
        self._ahead = False
        masking = self.task.masking
        masking.apply()
        active = sum(masking.active().values()) if self.rewires else 0
        for layer, (name, module, norm) in zip(self._layers, self._named, strict=True):
            path = f"{name}.weight"
            mask = masking.masks.get(path)
            layer.outputs, layer.inputs = module.weight.shape
            layer.weight, layer.momentum = self._pointers(module.weight)
            if module.bias is not None:
                layer.bias, layer.bias_momentum = self._pointers(module.bias)
            if norm is not None:
                assert norm.running_mean is not None and norm.running_var is not None
                layer.scale, layer.scale_momentum = self._pointers(norm.weight)
                layer.shift, layer.shift_momentum = self._pointers(norm.bias)
                layer.mean = norm.running_mean.data_ptr()
                layer.variance = norm.running_var.data_ptr()
                layer.norm_momentum, layer.eps = norm.momentum, norm.eps
            layer.multiplier = layer.gradient = None
            layer.nonzeros = -1
            if mask is None or not self._below:
                continue
            nonzeros = int(mask.count_nonzero())
            if nonzeros >= self._below * mask.numel():
                self._multipliers[path] = multiplier = mask.float().contiguous()
                layer.multiplier = multiplier.data_ptr()
                continue
            layer.nonzeros, room = nonzeros, min(active, mask.numel())  # DeepR may fill it up
            momentum = momentum_buffer(self.task.optimizer, module.weight)
            held = self._sparse[path] = _Nonzeros.under(mask, module.weight, momentum, room)
            for array, tensor in held._asdict().items():
                setattr(layer, array, tensor.data_ptr())

    def learn(
        self, index: Tensor, *, track: Track = Track.NOTHING, gradients: bool = False
    ) -> float:
        """One mini-batch: forward, loss, backward, SGD at the optimizer's settings.

        Args:
            index: int64 [B], contiguous, 1 to 128 of the training images.
            track: what becomes of the momentum of inactive weights in sparse layers.
            gradients: leave the dense gradient of the loss in `weight.grad` of masked layers.

        Returns:
            The mini-batch's mean loss, before the step.

        Raises:
            TypeError: tensors in double precision or not contiguous.
            RuntimeError: a mini-batch of another size, or of one image with batch norm, an index
                or a label that is none; nothing has changed then.
        """
        images, labels = self.task.data.train_x, self.task.data.train_y
        batch, rule, loss = (index, len(index)), sgd_rule(self.task.optimizer), ctypes.c_double()
        for layer, (name, module, _) in zip(self._layers, self._named, strict=True):
            layer.gradient = None
            if gradients and f"{name}.weight" in self.task.masking.masks:
                if module.weight.grad is None:
                    module.weight.grad = torch.empty_like(module.weight)
                layer.gradient = module.weight.grad.data_ptr()
        data = images, labels, len(labels)
        call("perceptron_step", *self._net, *data, *batch, *rule, track, ctypes.byref(loss))
        self._ahead = True
        self._steps += 1
        return loss.value

    def deepr_step(self) -> None:
        """DeepR's step after the gradient step, on the non-zeros alone.

        The same draws as `lib.methods.rules.deepr_step`, and from the same numbers the same
        weights and masks; these are the Masking's after `write_back()`.
        """
        masking = self.task.masking
        if any(f"sign/{path}" not in masking.rule_state for path in self._sparse):
            self.write_back()  # signs are those of the weights at the first look
        shrinkage, noise = deepr_rates(masking)
        count, dormant, died = 0, 0, ctypes.c_int64()
        for layer, (name, module, _) in zip(self._layers, self._named, strict=True):
            if layer.nonzeros < 0:
                continue
            weight = module.weight.detach()
            sign = signs_of(masking.rule_state, f"{name}.weight", weight, masking.generator)
            moved = None
            if noise > 0:
                by, device = masking.generator, weight.device
                moved = drawn(torch.randn, layer.nonzeros, by=by, device=device).mul_(noise)
            call("deepr_move", ctypes.byref(layer), sign, moved, shrinkage, ctypes.byref(died))
            count += died.value
            dormant += sign.numel() - layer.nonzeros + died.value
        if count:
            chosen = some_of(dormant, count, masking.generator, torch.device("cpu"))
            call("deepr_wake", *self._net, chosen, len(chosen))
        self._ahead = True

    def _pointers(self, parameter: Tensor) -> tuple[int, int]:
        return parameter.data_ptr(), momentum_buffer(self.task.optimizer, parameter).data_ptr()
