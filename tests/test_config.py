"""Runs, their ids, and the text and numbers they are made from."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from lib.config import METHODS, Run, parse_field, stream_seed


def test_rules_equal_to_the_methods_own_are_defaults():
    cell = Run(prune="magnitude", redistribution="momentum", growth="momentum", method_version=2)
    assert cell == Run() and cell.run_id == Run().run_id
    other = Run(growth="random")
    assert other.run_id != Run().run_id
    assert other.non_default() == {"growth": "random", "method_version": 2}
    assert Run(method="set", growth="momentum").run_id != Run(method="set").run_id


def test_every_field_changes_the_id():
    other = {
        "dataset": "cifar10",
        "model": "lenet5",
        "method": "set",
        "method_version": 1,
        "prune": "magnitude_up",
        "redistribution": "none",
        "growth": "random",
        "init": "erk",
        "init_scale": "density",
        "keep_dense": ("fc1",),
        "schedule": "linear",
        "options": (("l1", 0.1),),
        "nesterov": False,
        "augment": False,
        "precision": "bf16",
        "kernels": "torch",
        "label_smoothing": 0.25,
        "train_samples": 1000,
        "dropout": 0.2,
    }
    ids = {Run().run_id}
    for name, default in vars(Run()).items():
        value = other.get(name, default / 2 if isinstance(default, float) else None)
        ids.add(replace(Run(), **{name: default + 1 if value is None else value}).run_id)
    assert len(ids) == len(vars(Run())) + 1


def test_a_version_changes_the_ids_of_one_method(monkeypatch):
    before = {name: Run(method=name).run_id for name in METHODS}
    monkeypatch.setitem(METHODS, "set", replace(METHODS["set"], version=9))
    after = {name: Run(method=name).run_id for name in METHODS}
    assert {name for name in METHODS if before[name] != after[name]} == {"set"}
    assert Run(method="set").method_version == 9


def test_equal_numbers_give_one_id():
    assert Run(lr=1, density=1).run_id == Run(lr=1.0, density=1.0).run_id
    assert Run(seed=np.int64(3), lr=np.float64(0.5)).run_id == Run(seed=3, lr=0.5).run_id
    assert Run(keep_dense=["a"], options=[["l1", 1]]) == Run(
        keep_dense=("a",), options=(("l1", 1.0),)
    )
    assert type(Run(density=1).density) is float


def test_dense_ignores_density():
    assert Run(method="dense", density=0.02) == Run(method="dense")
    assert Run(method="dense").density == 1.0
    assert Run(method="small_dense", density=0.02).density == 0.02


def test_overriding():
    assert Run().overridden(epochs=3, seed=2) == Run(epochs=3, seed=2)
    assert Run().overridden(method="rigl") == Run(method="rigl")
    assert Run().overridden(method="deepr") == Run(method="deepr")
    assert Run(growth="random").overridden(method="set") == Run(method="set", growth="random")
    assert Run(method="dense").overridden(method="set") == Run(method="set")
    assert Run(method="dense").overridden(method="set", density=0.5).density == 0.5
    with pytest.raises(ValueError, match="unknown field of a run 'epoch': did you mean 'epochs'"):
        Run().overridden(epoch=3)
    with pytest.raises(ValueError, match="method_version can't be set: it is the version of"):
        Run().overridden(method_version=1)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("density", (0.0, 1.5, math.nan, "0.05")),
        ("prune_rate", (1.01, -0.1)),
        ("momentum", (1.0,)),
        ("val_fraction", (0.0, 1.0, 1e-8, 0.999999)),
        ("epochs", (0, 2.5, True)),
        ("batch_size", (-5, 54_001)),
        ("lr", (0.0, math.nan, math.inf)),
        ("seed", (-1, True, 2**63)),
        ("weight_decay", (math.nan, math.inf, -1)),
        ("precision", ("fp16",)),
        ("lr_decay", (math.nan, -1)),
        ("label_smoothing", (-1.0, 1.0)),
        ("dropout", (1.0, -0.5)),
        ("dataset", ("mnits",)),
        ("method", ("sett",)),
        ("method_version", (7,)),
        ("test_samples", (10_001,)),
        ("train_samples", (54_001,)),
        ("keep_dense", ("fc1", ("a b",), ("",), ("a", "a"))),
        ("options", ((("l1", math.nan),), (("l1", 1), ("l1", 2)))),
    ],
)
def test_bad_values_are_named(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name}|unknown .*{value}"):
            Run(**{name: value})
    for ends in ({"dropout": -1}, {"dropout": 0}, {"density": 1}, {"prune_rate": 0}, {"seed": 0}):
        Run(**ends)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("epochs=15", 15),
        ("density=0.05", 0.05),
        ("lr=1", 1.0),
        ("nesterov=False", False),
        ("nesterov=true", True),
        ("model=lenet5", "lenet5"),
        ("keep_dense=conv1,fc.*", ("conv1", "fc.*")),
        ("keep_dense=", ()),
        ("options=l1=1e-5,temperature=0", (("l1", 1e-5), ("temperature", 0.0))),
    ],
)
def test_fields_are_read(text, value):
    name, parsed = parse_field(text)
    assert parsed == value and type(parsed) is type(value)
    assert getattr(Run(**{name: parsed}), name) == value


REFUSED = ["epochs=1.5", "epochs=１５", "epochs=", "lr_decay=nan", "density=5%", "nesterov=maybe"]
REFUSED += ["options=l1", "options=l1=x", "densty=0.5", "epochs", f"seed={'1' * 26}"]


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_field_is_refused_by_name(text):
    name, last = text.split("=")[0], text.split("=")[-1]
    with pytest.raises(ValueError, match=f"{name}|'{last}'"):
        parse_field(text)


def test_streams_are_pinned_and_apart():
    assert stream_seed(0, "init") == 3598610026517748695
    assert stream_seed(0, "order", 3) == 1555077830293145243
    seeds = [
        stream_seed(seed, purpose, *index)
        for seed in range(5)
        for purpose in ("init", "masks", "order")
        for index in ((), (0,), (1,), (1, 0))
    ]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**63 for s in seeds)
