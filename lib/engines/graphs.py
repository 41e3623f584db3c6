"""A training step recorded once as a CUDA graph and replayed: the host no longer launches each of
its hundreds of kernels, which takes longer than small networks compute.

The graph fixes the size of the mini-batch, all addresses, and numbers that aren't tensors (learning
rate, momentum). Mini-batches of another size, the first ones after such a number has changed, and
everything where recording fails, go through the step as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

Step = Callable[[Tensor], Tensor]
# Steps before a recording: libraries choose their algorithms and the optimizer makes its buffers.
WARM_UP = 3


class Recording(Protocol):
    """What a recorder returns: `loss` is what the step returned, rewritten by each replay."""

    loss: Tensor

    def replay(self) -> None:
        """Compute the step again, on what the recorded addresses hold now."""


class Recorder(Protocol):
    """Records steps; `CudaRecorder`, and in tests one for the CPU."""

    def warm_up(self, step: Step, index: Tensor) -> Tensor:
        """Do the step, as it will be recorded."""

    def record(self, step: Step, index: Tensor) -> Recording:
        """Record the step without doing it; RuntimeError where that isn't possible."""


class CudaRecorder:
    """Records on a stream of its own.

    Args:
        device: a CUDA device.
        generators: of that device, from which the step draws, besides torch's own.
    """

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self._stream = torch.cuda.Stream(device)
        self._generators = generators

    def warm_up(self, step: Step, index: Tensor) -> Tensor:
        """The step on the stream of the recording: a gradient belongs to the stream it began on."""
        outside = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            loss = step(index)
        outside.wait_stream(self._stream)
        return loss

    def record(self, step: Step, index: Tensor) -> Recording:
        """See `Recorder`."""
        return _CudaRecording(step, index, self._stream, self._generators)


class _CudaRecording:
    def __init__(
        self,
        step: Step,
        index: Tensor,
        stream: torch.cuda.Stream,
        generators: Sequence[torch.Generator],
    ) -> None:
        self._graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self._graph.register_generator_state(generator)
        with torch.cuda.graph(self._graph, stream=stream):
            self.loss = step(index)

    def replay(self) -> None:
        self._graph.replay()


class GraphedStep:
    """A step that replays a recording of itself.

    Args:
        step: computes the mini-batch of images `index` [B], int64, and moves the weights; returns
            its loss, 0-d, detached. All it does happens on the device: it reads no tensor on the
            host and changes nothing there but `grad`, which it sets anew.
        parameters: of which the step sets `grad`.
        batch_size: B of the mini-batches to be replayed.
        recorder: see `Recorder`.

    Attributes:
        replayed: how many steps were replayed.
        works: False after a recording has failed; from then on no other is tried.
    """

    def __init__(
        self,
        step: Step,
        parameters: Sequence[nn.Parameter],
        batch_size: int,
        recorder: Recorder,
    ) -> None:
        self._step, self._parameters, self._recorder = step, list(parameters), recorder
        self._batch_size = batch_size
        self.replayed, self.works = 0, True
        self.forget()

    def forget(self) -> None:
        """Record anew: the step's tensors have other addresses now."""
        self._recording: Recording | None = None
        self._fixed: Hashable = None
        self._index: Tensor | None = None
        self._seen = 0

    def __call__(self, index: Tensor, fixed: Hashable) -> Tensor:
        """The step on `index`; its loss, valid until the next call.

        `fixed`: the numbers that a recording keeps as they were.
        """
        if not self.works or len(index) != self._batch_size:
            return self._step(index)
        if fixed != self._fixed:
            self.forget()
            self._fixed = fixed
        if self._recording is None:
            if self._seen < WARM_UP:
                self._seen += 1
                return self._recorder.warm_up(self._step, index)
            self._index = index.clone()
            try:
                self._recording = self._recorder.record(self._step, self._index)
            except RuntimeError as error:
                self.works = False
                self.forget()
                reason = str(error).strip().splitlines() or [type(error).__name__]
                warnings.warn(
                    f"training steps go on one kernel at a time: no CUDA graph could be recorded "
                    f"({reason[0]})",
                    stacklevel=2,
                )
                return self._step(index)
            self._gradients = [parameter.grad for parameter in self._parameters]
        assert self._index is not None
        self._index.copy_(index)
        self._recording.replay()
        self.replayed += 1
        # A mini-batch of another size came between and left gradients of its own.
        if self._parameters and self._parameters[0].grad is not self._gradients[0]:
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = gradient
        return self._recording.loss
