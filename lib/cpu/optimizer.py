"""SGD over the non-zeros of sparse layers: a step costs what is active, not what could be."""

from __future__ import annotations

import torch
from torch import Tensor

from lib.cpu.library import require
from lib.masking import Masking, clear_outside

from .network import SparseNetwork


class SparseSGD:
    """The optimizer's and the Masking's part of a mini-batch, together; `step` after `backward()`.

    Weights and momentum buffers stay where torch keeps them. In a sparse layer that got the
    gradients of its non-zeros alone, weight and momentum move there only. The momentum of its
    inactive weights, which would shrink by the same factor in each such step, shrinks when somebody
    is to read it: before the next step with a dense gradient, and in `sync()`.

    Args:
        network: takes `compact_gradients` from this object.
        optimizer: SGD with momentum above 0, one group, no dampening.
        masking: of the two; masks may move between `sync()` and the next forward pass.

    Attributes:
        pending: layer -> steps by which the momentum of its inactive weights lags behind.

    Raises:
        ValueError: another kind of optimizer.
    """

    def __init__(
        self, network: SparseNetwork, optimizer: torch.optim.Optimizer, masking: Masking
    ) -> None:
        if not isinstance(optimizer, torch.optim.SGD) or len(optimizer.param_groups) != 1:
            raise ValueError(
                "sparse steps know torch.optim.SGD with one group of parameters, got "
                f"{type(optimizer).__name__} with {len(optimizer.param_groups)}"
            )
        (group,) = optimizer.param_groups
        if group["momentum"] <= 0 or group["dampening"] or group["maximize"]:
            raise ValueError("sparse steps know SGD with momentum, without dampening, minimising")
        self._network, self._optimizer, self._masking = network, optimizer, masking
        for parameter in group["params"]:
            self._momentum(parameter)
        self.pending: dict[str, int] = {}
        network.compact_gradients = True

    @torch.no_grad()
    def step(self) -> None:
        """What `optimizer.step()` and `masking.apply()` do, from the gradients of the last pass."""
        masks, parameters = self._masking.masks, self._masking.parameters
        dense = [name for name in masks if parameters[name].grad is not None]
        for name in dense:
            self._settle(name)
        self._optimizer.step()
        if len(dense) == len(masks):
            self._masking.apply()
        elif dense:
            for name in dense:
                clear_outside(parameters[name], masks[name])
        (group,), threads = self._optimizer.param_groups, torch.get_num_threads()
        for name, (pattern, values) in self._network.values.items():
            if values.grad is None:
                continue
            weight, momentum = parameters[name], self._momentum(parameters[name])
            if not weight.is_contiguous() or not momentum.is_contiguous():
                raise ValueError(f"sparse steps take contiguous weights, {name} is not")
            require().sparse_sgd(
                weight.data_ptr(),
                momentum.data_ptr(),
                pattern.index.data_ptr(),
                values.grad.data_ptr(),
                pattern.nnz,
                group["lr"],
                group["momentum"],
                group["weight_decay"],
                group["nesterov"],
                threads,
            )
            self.pending[name] = self.pending.get(name, 0) + 1
        self._network.values.clear()

    def sync(self) -> None:
        """Let the momentum of all inactive weights catch up; the masks must still be the same."""
        for name in list(self.pending):
            self._settle(name)

    @torch.no_grad()
    def _settle(self, name: str) -> None:
        steps = self.pending.pop(name, 0)
        if not steps:
            return
        momentum, mask = self._momentum(self._masking.parameters[name]), self._masking.masks[name]
        share = self._optimizer.param_groups[0]["momentum"] ** steps
        torch.where(mask, momentum, momentum * share, out=momentum)

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self._optimizer.state[parameter]
        if state.get("momentum_buffer") is None:  # zeros: torch's first buffer is 0.9 * 0 + g too
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]
