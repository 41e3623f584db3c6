"""Trains a perceptron by the kernels of perceptron.hpp: a mini-batch is one call.

The model's parameters and the optimizer's momentum buffers stay where torch keeps them. What a
sparse layer holds instead, the values of its non-zeros and their momentum, is written back by
`sync()`, after which Masking, checkpoints and measurements see what they always see.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lib.cpu.chain import perceptron_layers
from lib.cpu.compact import CompactLayer
from lib.cpu.layouts import Layer
from lib.cpu.library import check, require
from lib.cpu.select import as_floats, count, counts
from lib.masking import LayerReport, Masking
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


def _describe(tensor: Tensor) -> str:
    dtype, contiguous = str(tensor.dtype).removeprefix("torch."), tensor.is_contiguous()
    layout = "contiguous" if contiguous else "not contiguous"
    return f"{layout} {dtype} {list(tensor.shape)} on {tensor.device}"


class PerceptronTrainer:
    """One model in training.

    Args:
        model: for which `perceptron_layers` finds layers.
        optimizer: SGD with momentum above 0 over all parameters, one group, no dampening.
        masking: of the two; layers it does not mask are dense.
        sparse_below: density under which a masked layer is computed over its non-zeros only
            (SPARSE_BELOW); 0 for masks that the caller applies after each step.
        rewires: `deepr_step` is called after each step: all masked layers are computed over their
            non-zeros, which it moves.

    Raises:
        ValueError: another kind of model or optimizer.
        KernelsUnavailable: the kernels cannot be built here.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        masking: Masking,
        *,
        sparse_below: float | None = None,
        rewires: bool = False,
    ) -> None:
        self._library = require()
        layers = perceptron_layers(model)
        if layers is None:
            raise ValueError(
                f"{type(model).__name__} is no chain of linear layers with ReLU in float32 on CPU, "
                "with or without batch norm"
            )
        if len(optimizer.param_groups) != 1:
            raise ValueError(
                f"the optimizer must have one group, got {len(optimizer.param_groups)}"
            )
        (group,) = optimizer.param_groups
        if not isinstance(optimizer, torch.optim.SGD) or group["dampening"] or group["maximize"]:
            raise ValueError("the perceptron's kernels know SGD without dampening, minimising")
        if {id(p) for p in group["params"]} != {id(p) for p in model.parameters()}:
            raise ValueError("the optimizer must hold all parameters of the model, and no others")
        if group["momentum"] <= 0:
            raise ValueError(f"momentum must be above 0, got {group['momentum']}")
        self._named, self._optimizer, self._masking = layers, optimizer, masking
        self._sparse_below = SPARSE_BELOW if sparse_below is None else sparse_below
        self.rewires = rewires
        self._layers = (Layer * len(layers))()
        self._sparse: dict[str, CompactLayer] = {}
        self._multipliers: dict[str, Tensor] = {}
        self._masks: list[tuple[str, Tensor, int]] = []  # with the versions that were taken
        self._data: tuple[Tensor, Tensor] | None = None  # checked last
        self._gradients = self._ahead = False
        self._steps = 0  # not yet counted by batch norm
        self.reload()

    def follow(self, report: Sequence[LayerReport]) -> None:
        """Take masks, weights and momentum after `sync()` and the update of the Masking that gave
        this report: `reload()`, in less time.
        """
        active = {line.name: line.active_after for line in report}
        for k, (path, _, _) in enumerate(self._masks):
            mask, sparse = self._masking.masks[path], self._sparse.get(path)
            if self._ahead or not counts(mask):
                return self.reload()
            nonzeros = active[path]
            if (sparse is None) != self._dense(nonzeros, mask):
                return self.reload()
            if sparse is None:
                as_floats(mask, self._multipliers[path])
            elif nonzeros > sparse.room:
                return self.reload()
            else:
                sparse.take(mask, nonzeros, sparse.weight, sparse.momentum)
                sparse.layer.nonzeros = nonzeros
            self._masks[k] = path, mask, mask._version

    def reload(self) -> None:
        """Take masks, weights and momentum as they are in the model, the Masking, the optimizer.

        Weights outside the masks become zero.
        """
        known, self._sparse = self._sparse, {}
        self._multipliers, self._masks = {}, []
        self._gradients = self._ahead = False
        self._masking.apply()
        active = sum(self._masking.active().values()) if self.rewires else 0
        for layer, (name, module, norm) in zip(self._layers, self._named, strict=True):
            path = f"{name}.weight"
            mask = self._masking.masks.get(path)
            layer.outputs, layer.inputs = module.weight.shape
            layer.weight, layer.momentum = self._pointers(module.weight)
            if module.bias is not None:
                layer.bias, layer.bias_momentum = self._pointers(module.bias)
            if norm is not None:
                assert norm.running_mean is not None and norm.running_var is not None
                layer.scale, layer.scale_momentum = self._pointers(norm.weight)
                layer.shift, layer.shift_momentum = self._pointers(norm.bias)
                layer.mean, layer.variance = (
                    estimate.data_ptr() for estimate in (norm.running_mean, norm.running_var)
                )
                layer.norm_momentum, layer.eps = norm.momentum, norm.eps
            layer.multiplier = layer.gradient = None
            layer.nonzeros = -1
            if mask is None or not (self._sparse_below or self.rewires):
                continue
            self._masks.append((path, mask, mask._version))
            mask = mask.contiguous()
            nonzeros = count(mask)
            if self._dense(nonzeros, mask):
                multiplier = self._multipliers[path] = torch.empty(mask.shape)
                as_floats(mask, multiplier)
                layer.multiplier = multiplier.data_ptr()
                continue
            layer.nonzeros, needed = nonzeros, max(nonzeros, min(active, mask.numel()))
            sparse = known.get(path)
            if sparse is None or sparse.room < needed:  # and some room to grow in
                rows, inputs = mask.shape
                sparse = CompactLayer(rows, inputs, min(needed + needed // 2, mask.numel()))
            self._sparse[path] = sparse
            sparse.take(mask, nonzeros, module.weight, self._momentum(module.weight))
            sparse.attach(layer)

    def sync(self) -> None:
        """Write weights and momentum of the sparse layers to the model and the optimizer, and the
        masks that `deepr_step` moved to the Masking, unless others were assigned meanwhile.
        """
        if not self._ahead:
            return
        self._ahead = False
        for _, _, norm in self._named:
            if norm is not None:
                assert norm.num_batches_tracked is not None
                norm.num_batches_tracked += self._steps
        self._steps = 0
        masks = self._masking.masks
        for k, (path, taken, version) in enumerate(self._masks):
            if path not in self._sparse:
                continue
            sparse, moved = self._sparse[path], None
            if self.rewires:
                moved = sparse.moved().view(taken.shape)
                sparse.weight.detach().zero_()
                sparse.momentum.zero_()  # of dormant connections it is never read
            sparse.put()
            if moved is not None and masks[path] is taken and taken._version == version:
                masks[path] = moved
                self._masks[k] = path, moved, moved._version

    def step(
        self,
        images: Tensor,
        labels: Tensor,
        index: Tensor,
        *,
        track: Track = Track.NOTHING,
        gradients: bool = False,
    ) -> float:
        """One mini-batch: forward, loss, backward, SGD at the optimizer's settings.

        Args:
            images: float32 [images, ...], contiguous; labels: int64 [images].
            index: int64 [B], contiguous, 1 to 128 of the images.
            track: what becomes of the momentum of inactive weights in sparse layers.
            gradients: leave the dense gradient of the loss in `weight.grad` of masked layers.

        Masks that were assigned since the last step are taken.

        Returns:
            The mini-batch's mean loss, before the step.

        Raises:
            ValueError: tensors of another type, shape or memory layout.
            RuntimeError: a mini-batch of another size, or of one image with batch norm, an index
                or a label that is none; nothing has changed then.
        """
        self._check_data(images, labels)
        plain = index.dtype == torch.int64 and index.device.type == "cpu" and index.dim() == 1
        if not plain or not index.is_contiguous():
            raise ValueError(f"index must be contiguous int64 [B], got {_describe(index)}")
        self._take_new_masks()
        if gradients or self._gradients:
            self._provide_gradients(gradients)
        (group,), loss = self._optimizer.param_groups, ctypes.c_double()
        check(
            self._library.perceptron_step(
                self._layers,
                len(self._layers),
                images.data_ptr(),
                labels.data_ptr(),
                len(labels),
                index.data_ptr(),
                len(index),
                group["lr"],
                group["momentum"],
                group["weight_decay"],
                group["nesterov"],
                track,
                torch.get_num_threads(),
                ctypes.byref(loss),
            )
        )
        self._ahead = True
        self._steps += 1
        return loss.value

    def deepr_step(self) -> None:
        """DeepR's step after the gradient step, on the non-zeros alone.

        The same draws as `lib.methods.rules.deepr_step`, and from the same numbers the same
        weights and masks; these are the Masking's after `sync()`.
        """
        masking = self._masking
        self._take_new_masks()
        if any(f"sign/{path}" not in masking.rule_state for path in self._sparse):
            self.sync()  # signs are those of the weights at the first look
        shrinkage, noise = deepr_rates(masking)
        count, dormant, died = 0, 0, ctypes.c_int64()
        for layer, (name, module, _) in zip(self._layers, self._named, strict=True):
            if layer.nonzeros < 0:
                continue
            weight = module.weight.detach()
            sign = signs_of(masking.rule_state, f"{name}.weight", weight, masking.generator)
            moved = None
            if noise > 0:
                moved = drawn(
                    torch.randn, layer.nonzeros, by=masking.generator, device=weight.device
                ).mul_(noise)
            address = None if moved is None else moved.data_ptr()
            check(
                self._library.deepr_move(
                    ctypes.byref(layer), sign.data_ptr(), address, shrinkage, ctypes.byref(died)
                )
            )
            count += died.value
            dormant += sign.numel() - layer.nonzeros + died.value
        if count:
            chosen = some_of(dormant, count, masking.generator, torch.device("cpu"))
            check(
                self._library.deepr_wake(
                    self._layers, len(self._layers), chosen.data_ptr(), len(chosen)
                )
            )
        self._ahead = True

    def wrong(self, images: Tensor, labels: Tensor) -> int:
        """How many of the images [N, ...] get another class than their label [N].

        As torch.argmax: of equal logits the first counts. Raises ValueError as `step` does.
        """
        self._check_data(images, labels)
        self._take_new_masks()
        wrong = ctypes.c_int64()
        check(
            self._library.perceptron_wrong(
                self._layers,
                len(self._layers),
                images.data_ptr(),
                labels.data_ptr(),
                len(labels),
                torch.get_num_threads(),
                ctypes.byref(wrong),
            )
        )
        return wrong.value

    # ---- inside ----

    def _check_data(self, images: Tensor, labels: Tensor) -> None:
        if self._data is not None and self._data[0] is images and self._data[1] is labels:
            return
        inputs = self._layers[0].inputs
        if (
            images.dtype != torch.float32
            or not images.is_contiguous()
            or images.device.type != "cpu"
            or images.dim() < 2
            or images.shape[1:].numel() != inputs
        ):
            raise ValueError(
                f"images must be contiguous float32 [images, {inputs} in all] on the CPU, "
                f"got {_describe(images)}"
            )
        if (
            labels.dtype != torch.int64
            or not labels.is_contiguous()
            or labels.device.type != "cpu"
            or labels.shape != images.shape[:1]
        ):
            raise ValueError(
                f"labels must be contiguous int64 [{len(images)}] on the CPU, "
                f"got {_describe(labels)}"
            )
        self._data = images, labels

    def _take_new_masks(self) -> None:
        masks = self._masking.masks
        if any(masks[path] is not mask or mask._version != v for path, mask, v in self._masks):
            self.sync()
            self.reload()

    def _provide_gradients(self, wanted: bool) -> None:
        for layer, (name, module, _) in zip(self._layers, self._named, strict=True):
            layer.gradient = None
            if wanted and f"{name}.weight" in self._masking.masks:
                if module.weight.grad is None or not module.weight.grad.is_contiguous():
                    module.weight.grad = torch.empty_like(module.weight)
                layer.gradient = module.weight.grad.data_ptr()
        self._gradients = wanted

    def _pointers(self, parameter: Tensor) -> tuple[int, int]:
        if not parameter.is_contiguous():
            raise ValueError("the perceptron's kernels take contiguous parameters")
        return parameter.data_ptr(), self._momentum(parameter).data_ptr()

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self._optimizer.state[parameter]
        if state.get("momentum_buffer") is None:  # zeros: torch's first buffer is 0.9 * 0 + g too
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]

    def _dense(self, nonzeros: int, mask: Tensor) -> bool:
        """Whether a layer is computed over all its weights, in spite of its mask."""
        return not self.rewires and nonzeros >= self._sparse_below * mask.numel()
