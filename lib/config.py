"""A run: every hyper-parameter and the seed, and the id that names it. Imports no torch."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import numbers
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

# Images for training and validation together, and for the test.
IMAGES = {"mnist": (60_000, 10_000), "cifar10": (50_000, 10_000), "imagenet": (1_281_167, 50_000)}

# Types with the values they may have, as text: intervals and single numbers. A bound of infinity is
# never included, so that no field is infinite or NaN; 2**63 is where a column of 64 bits ends.
Count = Annotated[int, "[0, 2**63)"]
Positive = Annotated[int, "[1, 2**63)"]
Share = Annotated[float, "[0, 1]"]
BelowOne = Annotated[float, "[0, 1)"]
AboveZero = Annotated[float, "(0, 1]"]


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
# over is carried to the next update and no longer lost (DeepR: signs are never redrawn; SNIP: its
# weights keep their first values, where random masks had cleared all but a few of them).
METHODS: dict[str, Method] = {
    "dense": Method("none", "none", "none"),
    "sparse_momentum": Method("magnitude", "momentum", "momentum", version=2),
    "dsr": Method("adaptive_threshold", "nonzeros", "random", version=2),
    "set": Method("magnitude", "none", "random", version=2),
    "deepr": Method("sign_flip", "inactive", "random", version=2),
    "rigl": Method("magnitude", "none", "gradient", version=2),
    "snip": Method("none", "none", "none", version=2),
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
    (with bf16: lib/cpu) wherever they know the network, faster or not (not on a GPU or without a
    compiler). The row says what it was.
    """

    dataset: str = "mnist"
    model: str = "lenet300-100"
    method: str = "sparse_momentum"
    method_version: Count = 0
    prune: str = ""
    redistribution: str = ""
    growth: str = ""
    init: str = "uniform"
    init_scale: Literal["dense", "density"] = "dense"
    density: AboveZero = 0.05
    keep_dense: tuple[str, ...] = ()
    prune_rate: Share = 0.2
    schedule: str = "cosine"
    update_every_steps: Count = 0
    options: tuple[tuple[str, float], ...] = ()
    momentum: BelowOne = 0.9
    nesterov: bool = True
    lr: Annotated[float, "(0, inf)"] = 0.1
    lr_decay_every_steps: Positive = 25_000
    lr_decay: AboveZero = 0.1
    warmup_epochs: Count = 0
    weight_decay: Annotated[float, "[0, inf)"] = 5e-4
    label_smoothing: BelowOne = 0.0
    dropout: Annotated[float, "-1 or [0, 1)"] = -1.0
    batch_size: Positive = 100
    epochs: Positive = 100
    train_samples: Count = 0
    val_fraction: Annotated[float, "(0, 1)"] = 0.1
    test_samples: Count = 0
    augment: bool = True
    precision: Literal["fp32", "bf16"] = "fp32"
    kernels: Literal["auto", "sparse", "torch"] = "auto"
    dense_window_steps: Count = 0
    seed: Count = 0

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
        for name in ("keep_dense", "options"):
            object.__setattr__(self, name, _pairs_or_names(name, getattr(self, name)))
        for item in fields(self):  # 1 and 1.0 are equal, so they must not give two ids
            object.__setattr__(self, item.name, valid(item.name, getattr(self, item.name)))
        self._check_together()

    def _check_together(self) -> None:
        """What no field can tell alone; the data set's size is of the files as published."""
        if self.dataset not in IMAGES:
            raise ValueError(unknown("data set", self.dataset, IMAGES))
        newest = METHODS[self.method].version
        if self.method_version > newest:
            raise ValueError(
                f"method_version must be at most {newest}, the version of {self.method!r} in this "
                f"code, got {self.method_version}"
            )
        test_images = IMAGES[self.dataset][1]
        limits = {
            "train_samples": (self.images_to_train_on, "left for training"),
            "test_samples": (test_images, f"of {self.dataset}'s test set"),
            "batch_size": (self.train_samples or self.images_to_train_on, "trained on"),
        }
        if self.images_to_train_on < 1 or self.images_to_validate_on < 1:
            raise ValueError(
                f"val_fraction={self.val_fraction:g} leaves {self.images_to_train_on} images of "
                f"{self.dataset} for training and {self.images_to_validate_on} for validation: "
                "each needs at least one"
            )
        for name, (most, what) in limits.items():
            if getattr(self, name) > most:
                raise ValueError(
                    f"{name} must be at most the {most} images {what}, got {getattr(self, name)}"
                )

    @property
    def images_to_validate_on(self) -> int:
        """The last images of the training set; ImageNet has a validation set of its own."""
        total, test = IMAGES[self.dataset]
        return test if self.dataset == "imagenet" else round(self.val_fraction * total)

    @property
    def images_to_train_on(self) -> int:
        """Images of the training set that aren't held out, of which `train_samples` are used."""
        total = IMAGES[self.dataset][0]
        return total if self.dataset == "imagenet" else total - self.images_to_validate_on

    @property
    def images_an_epoch(self) -> int:
        """Images that pass through the network in each epoch of training."""
        return self.train_samples or self.images_to_train_on

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
        """A copy with fields set anew; ValueError for a field that doesn't exist, and for
        `method_version`, which says what code trained a run.

        A new `method` brings its own rules and version, and a run that was dense the default
        density, where they aren't set too.
        """
        known = {item.name for item in fields(self)}
        for name in changes:
            if name not in known:
                raise ValueError(unknown("field of a run", name, known))
        if "method_version" in changes:
            raise ValueError("method_version can't be set: it is the version of the method's code")
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
    kind = type(default)
    value: Any = text
    try:
        if kind is bool:
            value = {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        elif kind is tuple:
            parts = [part for part in text.split(",") if part]
            value = tuple(parts)
            if name == "options":
                value = tuple((k, _number(v, float)) for k, v in (p.split("=") for p in parts))
        elif kind is not str:
            value = _number(text, kind)
    except (KeyError, ValueError):
        raise ValueError(
            f"{name}={text!r} can't be read as {kind.__name__} (default {default!r})"
        ) from None
    return valid(name, value)


def stream_seed(seed: int, purpose: str, *index: int) -> int:
    """63-bit seed of one random stream, alike in every process: hash of (seed, purpose, index)."""
    text = ":".join([str(seed), purpose, *map(str, index)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(inf|nan)", re.I)


def _number(text: str, kind: type) -> Any:
    """The number in ASCII digits; Python itself reads those of every script, and 1_000."""
    if not _NUMBER.fullmatch(text):
        raise ValueError(text)
    return kind(text)


def _pairs_or_names(name: str, value: Any) -> tuple[Any, ...]:
    """`keep_dense` as a tuple of names, `options` as a tuple of (name, number)."""
    if isinstance(value, str):
        raise ValueError(f"{name} must be a tuple, got the text {value!r}")
    try:
        pairs = tuple(value) if name == "keep_dense" else tuple((k, float(v)) for k, v in value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a tuple of (name, number), got {value!r}") from None
    names = [pair if name == "keep_dense" else pair[0] for pair in pairs]
    if any(not isinstance(text, str) or not text or len(text.split()) != 1 for text in names):
        raise ValueError(f"{name} holds a name that is empty or has spaces: {value!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"{name} holds a name twice: {value!r}")
    if name == "options" and not all(math.isfinite(number) for _, number in pairs):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return pairs


def valid(name: str, value: Any) -> Any:
    """The value in the field's type (1 as 1.0, NumPy's numbers as Python's), if it is one that the
    field may have; ValueError otherwise.
    """
    kind, choices, intervals, text = _declared()[name]
    if not isinstance(value, bool):
        if kind is float and isinstance(value, numbers.Real):
            value = float(value)
        if kind is int and isinstance(value, numbers.Integral):
            value = int(value)
    if type(value) is not kind:
        raise ValueError(
            f"{name} must be of type {kind.__name__}, got {value!r} ({type(value).__name__})"
        )
    if choices and value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
    if intervals and not any(one.holds(value) for one in intervals):
        raise ValueError(f"{name} must be in {text}, got {value}")
    return value


class _Interval(NamedTuple):
    low: float
    high: float
    with_low: bool
    with_high: bool

    def holds(self, value: Any) -> bool:
        above = self.low <= value if self.with_low else self.low < value
        return above and (value <= self.high if self.with_high else value < self.high)


class _Declared(NamedTuple):
    kind: type
    choices: tuple[Any, ...] = ()
    intervals: tuple[_Interval, ...] = ()
    text: str = ""


@lru_cache(maxsize=1)
def _declared() -> dict[str, _Declared]:
    """What each field may be, from the annotations of `Run`."""
    found = {}
    for name, hint in get_type_hints(Run, include_extras=True).items():
        if get_origin(hint) is Annotated:
            kind, text = get_args(hint)
            found[name] = _Declared(kind, (), tuple(map(_interval, text.split(" or "))), text)
        elif get_origin(hint) is Literal:
            found[name] = _Declared(str, get_args(hint))
        else:
            found[name] = _Declared(get_origin(hint) or hint)
    return found


def _interval(text: str) -> _Interval:
    """ "(0, 1]", say; a number alone holds itself."""
    if text[0] not in "[(":
        return _Interval(float(text), float(text), True, True)
    low, high = (2**63 if end == "2**63" else float(end) for end in text[1:-1].split(", "))
    return _Interval(low, high, text[0] == "[", text[-1] == "]")
