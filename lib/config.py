"""A run: every hyper-parameter and the seed, and the id that names it. Imports no torch."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import numbers
from collections.abc import Iterable
from dataclasses import Field, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Method:
    """A named combination of rules. `version` is raised when a fix changes the results of a method,
    so that rows computed before and after it never share an id.
    """

    prune: str
    redistribution: str
    growth: str
    version: int = 1


# The rules are functions in `lib/masking.py` and `lib/methods/`. Version 2: what rounding leaves
# over is carried to the next update and no longer lost (DeepR: signs are never redrawn).
METHODS: dict[str, Method] = {
    "dense": Method("none", "none", "none"),
    "sparse_momentum": Method("magnitude", "momentum", "momentum", version=2),
    "dsr": Method("adaptive_threshold", "nonzeros", "random", version=2),
    "set": Method("magnitude", "none", "random", version=2),
    "deepr": Method("sign_flip", "inactive", "random", version=2),
    "rigl": Method("magnitude", "none", "gradient", version=2),
    "snip": Method("none", "none", "none"),
    "static": Method("none", "none", "none"),
    "small_dense": Method("none", "none", "none"),
}
UNMASKED = ("dense", "small_dense")  # every weight of the model is active: no masks at all


def method_of(name: str) -> Method:
    """The registered method; ValueError with the close matches otherwise."""
    if name not in METHODS:
        raise ValueError(unknown("method", name, METHODS))
    return METHODS[name]


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The sentence for a name that isn't registered, with the close matches first."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"unknown {kind} {name!r}: {hint}known are {', '.join(names)}"


@dataclass(frozen=True)
class Run:
    """One training run. The defaults are the paper's MNIST protocol (sections 4 and 7 of the text
    and the official code, commit e19ff16). `prune`, `redistribution` and `growth` left empty become
    the method's own rules.

    Units: `density` and `prune_rate` are shares (0 to 1), `lr_decay_every_steps`,
    `update_every_steps` and `dense_window_steps` mini-batches (0: once per epoch; as many as
    float32 resolves, lib/kernels), `warmup_epochs` and `epochs` passes over the training set,
    `train_samples` and `test_samples` images, the first ones (0: all).

    `init_scale`: "dense", weights start as for a network without masks (the paper); "density",
    those of each masked layer are divided by the square root of its density, which keeps the
    variance of its outputs.

    `kernels`: "auto", whichever is faster here; "torch", masked dense layers; "sparse", lib/kernels
    wherever they know the network, faster or not (not on a GPU or without a compiler). The row
    says what it was.
    """

    dataset: str = "mnist"
    model: str = "lenet300-100"
    method: str = "sparse_momentum"
    method_version: int = 0
    prune: str = ""
    redistribution: str = ""
    growth: str = ""
    init: str = "uniform"
    init_scale: str = "dense"
    density: float = 0.05
    keep_dense: tuple[str, ...] = ()
    prune_rate: float = 0.2
    schedule: str = "cosine"
    update_every_steps: int = 0
    options: tuple[tuple[str, float], ...] = ()
    momentum: float = 0.9
    nesterov: bool = True
    lr: float = 0.1
    lr_decay_every_steps: int = 25_000
    lr_decay: float = 0.1
    warmup_epochs: int = 0
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    dropout: float = -1.0
    batch_size: int = 100
    epochs: int = 100
    train_samples: int = 0
    val_fraction: float = 0.1
    test_samples: int = 0
    augment: bool = True
    precision: str = "fp32"
    kernels: str = "auto"
    dense_window_steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        own = method_of(self.method)
        for name, value in (
            ("prune", own.prune),
            ("redistribution", own.redistribution),
            ("growth", own.growth),
            ("method_version", own.version),
        ):
            object.__setattr__(self, name, getattr(self, name) or value)
        if self.method == "dense":
            object.__setattr__(self, "density", 1.0)
        object.__setattr__(self, "keep_dense", tuple(self.keep_dense))
        object.__setattr__(self, "options", tuple((k, float(v)) for k, v in self.options))
        for item in fields(self):  # 1 and 1.0 are equal, so they must not give two ids
            object.__setattr__(self, item.name, _typed(item, getattr(self, item.name)))
        self._check()

    def _check(self) -> None:
        positive = ("batch_size", "epochs", "lr_decay_every_steps", "lr")
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in (
            "update_every_steps",
            "dense_window_steps",
            "train_samples",
            "test_samples",
            "warmup_epochs",
            "weight_decay",
            "seed",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        if not 0 <= self.prune_rate <= 1:
            raise ValueError(f"prune_rate must be in [0, 1], got {self.prune_rate}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be in (0, 1), got {self.val_fraction}")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}")
        if self.init_scale not in ("dense", "density"):
            raise ValueError(f"init_scale must be 'dense' or 'density', got {self.init_scale!r}")
        if self.kernels not in ("auto", "sparse", "torch"):
            raise ValueError(f"kernels must be 'auto', 'sparse' or 'torch', got {self.kernels!r}")

    def non_default(self) -> dict[str, Any]:
        """The fields that differ from their default; a method's own rules count as defaults."""
        method = METHODS[self.method]
        own: dict[str, Any] = {
            "prune": method.prune,
            "redistribution": method.redistribution,
            "growth": method.growth,
            "method_version": 1,
        }
        if self.method == "dense":
            own["density"] = 1.0
        found = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if value != own.get(item.name, item.default):
                found[item.name] = value
        return found

    @property
    def run_id(self) -> str:
        """Readable slug and a hash of the non-default fields: equal runs share it everywhere."""
        text = json.dumps(self.non_default(), sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        return f"{self.model}_{self.method}_d{self.density:g}_s{self.seed}-{digest}"

    def overridden(self, **changes: Any) -> Run:
        """A copy with fields set anew; ValueError for a field that doesn't exist.

        A new `method` brings its own rules and version, and a run that was dense the default
        density, where they aren't set too.
        """
        known = {item.name for item in fields(self)}
        for name in changes:
            if name not in known:
                raise ValueError(unknown("field of a run", name, known))
        if changes.get("method", self.method) != self.method:
            own = METHODS[self.method]
            for name in ("prune", "redistribution", "growth"):
                if getattr(self, name) == getattr(own, name):
                    changes.setdefault(name, "")
            changes.setdefault("method_version", 0)
            if self.method == "dense":
                changes.setdefault("density", Run.density)
        return replace(self, **changes)


def parse_field(name: str, text: str) -> Any:
    """The value of one field written as text (command line): "epochs", "15" -> 15."""
    defaults: dict[str, Any] = {item.name: item.default for item in fields(Run)}
    if name not in defaults:
        raise ValueError(unknown("field of a run", name, defaults))
    default = defaults[name]
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if isinstance(default, tuple):
            parts = [part for part in text.split(",") if part]
            if name == "options":
                return tuple((k, float(v)) for k, v in (part.split("=") for part in parts))
            return tuple(parts)
        return type(default)(text)
    except (KeyError, ValueError):
        raise ValueError(
            f"{name}={text!r} can't be read as {type(default).__name__} (default {default!r})"
        ) from None


def stream_seed(seed: int, purpose: str, *index: int) -> int:
    """63-bit seed of one random stream, alike in every process: hash of (seed, purpose, index)."""
    text = ":".join([str(seed), purpose, *map(str, index)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _typed(item: Field[Any], value: Any) -> Any:
    """The value in the field's type (1 as 1.0, NumPy's numbers as Python's), else ValueError."""
    kind = type(item.default)
    if not isinstance(value, bool):
        if kind is float and isinstance(value, numbers.Real):
            return float(value)
        if kind is int and isinstance(value, numbers.Integral):
            return int(value)
    if type(value) is not kind:
        raise ValueError(
            f"{item.name} must be of type {kind.__name__}, got {value!r} ({type(value).__name__})"
        )
    return value
