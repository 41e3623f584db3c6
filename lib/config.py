"""A run: every hyper-parameter and the seed, and the id that names it. Imports no torch."""

from __future__ import annotations

import ast
import contextlib
import difflib
import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any

# Images for training and validation together, and for the test.
IMAGES = {"mnist": (60_000, 10_000), "cifar10": (50_000, 10_000), "imagenet": (1_281_167, 50_000)}


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
_RULES = ("prune", "redistribution", "growth")


def method_of(name: str) -> Method:
    """The registered method; ValueError with the close matches otherwise."""
    known("method", name, METHODS)
    return METHODS[name]


def unknown(kind: str, name: object, names: Iterable[str]) -> str:
    """The sentence for a name that isn't registered, with the close matches first."""
    names = sorted(names)
    close = difflib.get_close_matches(str(name), names)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"unknown {kind} {name!r}: {hint}known are {', '.join(names)}"


def known(kind: str, name: object, names: Collection[str]) -> None:
    """ValueError with that sentence unless it is one of the names."""
    if name not in names:
        raise ValueError(unknown(kind, name, names))


# What values a number may have: never infinite, never NaN; 2**63 is where a column of 64 bits ends.
_CONDITIONS: dict[str, Callable[[float], bool]] = {
    "in [0, 1]": lambda v: 0 <= v <= 1,
    "in [0, 1)": lambda v: 0 <= v < 1,
    "in (0, 1]": lambda v: 0 < v <= 1,
    "in (0, 1)": lambda v: 0 < v < 1,
    "in [0, inf)": lambda v: 0 <= v < math.inf,
    "in (0, inf)": lambda v: 0 < v < math.inf,
    "-1 or in [0, 1)": lambda v: v == -1 or 0 <= v < 1,
    "in [0, 2**63)": lambda v: 0 <= v < 2**63,
    "in [1, 2**63)": lambda v: 1 <= v < 2**63,
}


def _be(condition: str, default: Any) -> Any:
    """A field whose values must be so."""
    return field(default=default, metadata={"must be": condition, "is": _CONDITIONS[condition]})


def _one_of(*choices: str) -> Any:
    text = "one of " + ", ".join(choices)
    return field(default=choices[0], metadata={"must be": text, "is": choices.__contains__})


@dataclass(frozen=True)
class Run:
    """One training run. The defaults are the paper's MNIST protocol (sections 4 and 7 of the text
    and the official code, commit e19ff16). `prune`, `redistribution` and `growth` left empty become
    the method's own rules.

    Units: `density` and `prune_rate` are shares (0 to 1), `lr_decay_every_steps`,
    `update_every_steps` and `dense_window_steps` mini-batches (0: once per epoch; as many as
    float32 resolves, lib/cpu), `warmup_epochs` and `epochs` passes over the training set,
    `train_samples` and `test_samples` images, the first ones (0: all).

    `init_scale`: "dense", weights start as for a network without masks (the paper); "density",
    those of each masked layer are divided by the square root of its density, which keeps the
    variance of its outputs.

    `kernels`: "auto", whichever is faster here; "torch", masked dense layers; "sparse", lib/cpu
    (with bf16: lib/cpu) wherever they know the network, faster or not (not on a GPU or without a
    compiler). The row says what it was.
    """

    dataset: str = "mnist"
    model: str = "lenet300-100"
    method: str = "sparse_momentum"
    method_version: int = _be("in [0, 2**63)", 0)
    prune: str = ""
    redistribution: str = ""
    growth: str = ""
    init: str = "uniform"
    init_scale: str = _one_of("dense", "density")
    density: float = _be("in (0, 1]", 0.05)
    keep_dense: tuple[str, ...] = ()
    prune_rate: float = _be("in [0, 1]", 0.2)
    schedule: str = "cosine"
    update_every_steps: int = _be("in [0, 2**63)", 0)
    options: tuple[tuple[str, float], ...] = ()
    momentum: float = _be("in [0, 1)", 0.9)
    nesterov: bool = True
    lr: float = _be("in (0, inf)", 0.1)
    lr_decay_every_steps: int = _be("in [1, 2**63)", 25_000)
    lr_decay: float = _be("in (0, 1]", 0.1)
    warmup_epochs: int = _be("in [0, 2**63)", 0)
    weight_decay: float = _be("in [0, inf)", 5e-4)
    label_smoothing: float = _be("in [0, 1)", 0.0)
    dropout: float = _be("-1 or in [0, 1)", -1.0)
    batch_size: int = _be("in [1, 2**63)", 100)
    epochs: int = _be("in [1, 2**63)", 100)
    train_samples: int = _be("in [0, 2**63)", 0)
    val_fraction: float = _be("in (0, 1)", 0.1)
    test_samples: int = _be("in [0, 2**63)", 0)
    augment: bool = True
    precision: str = _one_of("fp32", "bf16")
    kernels: str = _one_of("auto", "sparse", "torch")
    dense_window_steps: int = _be("in [0, 2**63)", 0)
    seed: int = _be("in [0, 2**63)", 0)

    def __post_init__(self) -> None:
        own = method_of(self.method)
        fixed: dict[str, Any] = {n: getattr(self, n) or getattr(own, n) for n in _RULES}
        fixed["method_version"] = self.method_version or own.version
        if self.method == "dense":
            fixed["density"] = 1.0
        for name, item in _FIELDS.items():  # 1 and 1.0 are equal, so they must not give two ids
            value = fixed.get(name, getattr(self, name))
            if value is not item.default:
                object.__setattr__(self, name, valid(name, value))
        self._check_together()

    def _check_together(self) -> None:
        """What no field can tell alone; the data set's size is of the files as published.

        The last images of the training set are held out to validate; ImageNet has others for that.
        """
        known("data set", self.dataset, IMAGES)
        total, test = IMAGES[self.dataset]
        held_out = round(self.val_fraction * total)
        train = total if self.dataset == "imagenet" else total - held_out
        if held_out < 1 or train < 1:
            raise ValueError(
                f"val_fraction={self.val_fraction:g} leaves {train} images of {self.dataset} for "
                f"training and {held_out} for validation: each needs at least one"
            )
        for name, most, what in (
            ("method_version", METHODS[self.method].version, f"of {self.method!r} in this code"),
            ("train_samples", train, "images left for training"),
            ("test_samples", test, f"images of {self.dataset}'s test set"),
            ("batch_size", self.train_samples or train, "images trained on"),
        ):
            if (value := getattr(self, name)) > most:
                raise ValueError(f"{name} must be at most the {most} {what}, got {value}")

    def non_default(self) -> dict[str, Any]:
        """The fields that differ from their default; a method's own rules count as defaults."""
        own = {**vars(METHODS[self.method]), "method_version": 1}
        if self.method == "dense":
            own["density"] = 1.0
        return {n: v for n, v in vars(self).items() if v != own.get(n, _FIELDS[n].default)}

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
        if "method_version" in changes:
            raise ValueError("method_version can't be set: it is the version of the method's code")
        for name in changes:
            known("field of a run", name, _FIELDS)
        if changes.get("method", self.method) != self.method:
            for name in _RULES:
                if getattr(self, name) == getattr(METHODS[self.method], name):
                    changes.setdefault(name, "")
            changes["method_version"] = 0
            if self.method == "dense":
                changes.setdefault("density", Run.density)
        return replace(self, **changes)


_FIELDS = {item.name: item for item in fields(Run)}


def parse_pair(text: str) -> tuple[str, str]:
    """Name and value of "name=value"; ValueError without the sign."""
    name, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"{text!r}: write name=value, for instance epochs=15")
    return name, value


def parse_field(text: str) -> tuple[str, Any]:
    """A field and its value, from the command line: "epochs=15" -> ("epochs", 15)."""
    name, words = parse_pair(text)
    known("field of a run", name, _FIELDS)
    kind: type = type(_FIELDS[name].default)
    value: Any = words
    if kind is tuple:
        parts = [part for part in words.split(",") if part]
        value = list(map(parse_pair, parts)) if name == "options" else parts
    elif kind is not str:
        with contextlib.suppress(SyntaxError, ValueError):
            value = ast.literal_eval(words.capitalize())  # a number, or true as True
    return name, valid(name, value)


def valid(name: str, value: Any) -> Any:
    """The value in the field's type (1 as 1.0, NumPy's numbers as Python's), if it is one that the
    field may have; ValueError otherwise.
    """
    kind: type = type(_FIELDS[name].default)
    if kind is tuple:
        return _tuple(name, value)
    abstract: type | None = {int: Integral, float: Real}.get(kind)
    if abstract is not None and isinstance(value, abstract) and type(value) is not bool:
        value = kind(value)
    if type(value) is not kind:
        raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
    rule = _FIELDS[name].metadata
    if rule and not rule["is"](value):
        raise ValueError(f"{name} must be {rule['must be']}, got {value!r}")
    return value


def stream_seed(seed: int, purpose: str, *index: int) -> int:
    """63-bit seed of one random stream, alike in every process: hash of (seed, purpose, index)."""
    text = ":".join([str(seed), purpose, *map(str, index)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _tuple(name: str, value: Any) -> tuple[Any, ...]:
    """Different names without spaces, or in "options" pairs of such a name and a finite number."""
    pairs = [(one, 0.0) for one in value] if name == "keep_dense" else [(k, v) for k, v in value]
    names = {k for k, _ in pairs if isinstance(k, str) and len(k.split()) == 1}
    finite = all(math.isfinite(float(v)) for _, v in pairs)
    if isinstance(value, str) or len(names) < len(pairs) or not finite:
        raise ValueError(f"{name} can't be {value!r}: a name twice, no name, or no finite number")
    return tuple(value) if name == "keep_dense" else tuple((k, float(v)) for k, v in pairs)
