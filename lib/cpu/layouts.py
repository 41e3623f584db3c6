"""Structures of the C++ sources, mirrored by hand for ctypes.

Whoever changes one changes the other: on loading, the library's sizes are compared with these
(lib/cpu/library.py). Arrays are addresses.
"""

from __future__ import annotations

import ctypes

_INT, _FLOAT, _ARRAY = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class Nonzeros(ctypes.Structure):
    """Addresses of the arrays that describe the non-zeros of a matrix [rows, columns].

    By row: `index` int64, their places in the flat matrix, and int32 `column`, those of row r from
    row_start[r] to row_start[r + 1]. By column likewise `row`, and `place`, where each stands in
    the order by row. In that order what is held there: float32 `value` and `value_momentum`.
    """

    _fields_ = [
        ("rows", _INT),
        ("columns", _INT),
        ("index", _ARRAY),
        ("row_start", _ARRAY),
        ("column", _ARRAY),
        ("column_start", _ARRAY),
        ("row", _ARRAY),
        ("place", _ARRAY),
        ("value", _ARRAY),
        ("value_momentum", _ARRAY),
    ]


class Layer(ctypes.Structure):
    """PerceptronLayer of perceptron.hpp."""

    _fields_ = [
        ("inputs", _INT),
        ("outputs", _INT),
        ("weight", _ARRAY),
        ("momentum", _ARRAY),
        ("multiplier", _ARRAY),
        ("gradient", _ARRAY),
        ("bias", _ARRAY),
        ("bias_momentum", _ARRAY),
        ("nonzeros", _INT),
        ("row_start", _ARRAY),
        ("column", _ARRAY),
        ("value", _ARRAY),
        ("value_momentum", _ARRAY),
        ("column_start", _ARRAY),
        ("row", _ARRAY),
        ("place", _ARRAY),
        ("scale", _ARRAY),
        ("scale_momentum", _ARRAY),
        ("shift", _ARRAY),
        ("shift_momentum", _ARRAY),
        ("mean", _ARRAY),
        ("variance", _ARRAY),
        ("norm_momentum", _FLOAT),
        ("eps", _FLOAT),
    ]


# In the order of `sparse_sizes` in sparse.cpp.
MIRRORED: tuple[type[ctypes.Structure], ...] = (Nonzeros, Layer)
