"""Training on the CPU through our own kernels."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lib.cpu.bf16_engine import accelerate

__all__ = ["accelerate"]


def __getattr__(name: str) -> Any:
    if name == "accelerate":
        from lib.cpu.bf16_engine import accelerate

        return accelerate
    raise AttributeError(f"module 'lib.cpu' has no attribute {name!r}")
