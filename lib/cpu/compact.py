"""A perceptron's sparse layers by their non-zeros, as perceptron.hpp takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from lib.cpu.layouts import Layer, Nonzeros
from lib.cpu.select import put_nonzeros, take_nonzeros

MAX_NONZEROS = 2**31 - 17  # of a layer; int32 in the kernels, which go in steps of 16

_ARRAYS = ("row_start", "column", "value", "value_momentum", "column_start", "row", "place")


class CompactLayer:
    """The non-zeros of one layer [rows, inputs] by row and by column, at most `room` of them."""

    layer: Layer
    weight: Tensor
    momentum: Tensor

    def __init__(self, rows: int, inputs: int, room: int) -> None:
        if room > MAX_NONZEROS:
            raise ValueError(f"a layer has at most {MAX_NONZEROS} non-zeros, got {room}")
        self.inputs, self.room, self.count = inputs, room, 0
        self.index = torch.empty(room, dtype=torch.int64)  # places in the flat weight
        self.row_start = torch.empty(rows + 1, dtype=torch.int32)
        self.column = torch.empty(room + 16, dtype=torch.int32)  # written sixteen at a time
        self.column_start = torch.empty(inputs + 1, dtype=torch.int32)
        self.row = torch.empty(room, dtype=torch.int32)
        self.place = torch.empty(room, dtype=torch.int32)
        self.value = torch.empty(room)
        self.value_momentum = torch.empty(room)
        names = [field[0] for field in Nonzeros._fields_[2:]]
        self.arrays = Nonzeros(rows, inputs, *(getattr(self, name).data_ptr() for name in names))

    def attach(self, layer: Layer) -> None:
        """Have the kernels find the arrays."""
        self.layer = layer
        for name in _ARRAYS:
            setattr(layer, name, getattr(self, name).data_ptr())

    def take(self, mask: Tensor, count: int, weight: Tensor, momentum: Tensor) -> None:
        """Hold what is true in the mask, bool [rows, inputs] with `count` of them."""
        self.count, self.weight, self.momentum = count, weight, momentum
        take_nonzeros(mask, count, weight, momentum, self.arrays)

    def put(self) -> None:
        """Write weights and momentum back to where they were taken from."""
        put_nonzeros(self.arrays, self.count, self.weight, self.momentum)

    def moved(self) -> Tensor:
        """Bool [rows * inputs]: where the non-zeros have moved; they will be written there."""
        row = torch.repeat_interleave(self.row_start.diff())  # [nnz], that of each
        self.count = len(row)
        moved = self.index[: self.count]
        torch.add(row * self.inputs, self.column[: self.count], out=moved)
        return torch.zeros((len(self.row_start) - 1) * self.inputs, dtype=torch.bool).index_fill_(
            0, moved, True
        )
