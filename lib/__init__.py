"""Sparse momentum (Dettmers and Zettlemoyer 2019), reproduced.

`from lib import Masking, build_model`. Names are resolved on first use, so that reading results
and figures imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lib.masking import DivergenceError, LayerReport, Masking
    from lib.models import build_model

__all__ = ["DivergenceError", "LayerReport", "Masking", "build_model"]

_HOME = dict.fromkeys(__all__, "lib.masking") | {"build_model": "lib.models"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'lib' has no attribute {name!r}")
