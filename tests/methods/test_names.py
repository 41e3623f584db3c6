"""Masks fit wrapped and plain models alike; what is printed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from lib import Masking
from lib.methods.masks import plain_name
from tests.support.masked import Trained, seeded, sgd, small_model

NAMES = ["0.weight", "4.weight", "6.weight"]


@pytest.fixture
def ddp(tmp_path: Path) -> Iterator[type]:
    """DistributedDataParallel in a group of one process."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield nn.parallel.DistributedDataParallel
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrapper", ["compile", "data parallel", "ddp", "compiled ddp", "a layer"])
def test_masks_load_across_wrapped_and_plain_models(wrapper: str, ddp: type) -> None:
    model = small_model()
    if wrapper == "a layer":
        wrapped = copy.copy(model)
        wrapped[4] = torch.compile(wrapped[4])
    else:
        wrapped = model
        wrapped = nn.DataParallel(wrapped) if wrapper == "data parallel" else wrapped
        wrapped = ddp(wrapped) if "ddp" in wrapper else wrapped
        wrapped = torch.compile(wrapped) if "compile" in wrapper else wrapped
    theirs = [n for n, p in wrapped.named_parameters() if p.dim() > 1]
    assert theirs != NAMES
    masking = Masking(wrapped, sgd(wrapped), 0.2, generator=seeded(1), keep_dense="0")
    assert list(masking.masks) == list(masking.parameters) == NAMES[1:]
    masking.step()
    plain_model = small_model()
    plain = Masking(plain_model, sgd(plain_model), 0.2, keep_dense="0")
    plain.load_state_dict(masking.state_dict())
    assert all(torch.equal(plain.masks[n], masking.masks[n]) for n in NAMES[1:])
    by_their_names = {
        n: masking.masks[n] for n in theirs[1:]
    }  # as for sparse_network(wrapped, ...)
    plain.masks = by_their_names
    masking.load_state_dict(plain.state_dict())


def test_a_module_that_is_called_module_keeps_its_name() -> None:
    model = nn.ModuleDict({"module": nn.Linear(3, 4)})
    assert plain_name(model, "module.weight") == "module.weight"
    assert list(Masking(model, sgd(model)).masks) == ["module.weight"]


def test_a_masking_prints_as_a_table() -> None:
    run = Trained(total_steps=40)
    run.steps(10)
    lines = repr(run.masking).splitlines()
    rules = "sparse_momentum (magnitude, momentum, momentum)"
    assert lines[0] == f"Masking: {rules}, prune rate 0.256 at step 10 of 40"
    assert [line.split() for line in lines[1:]] == [
        ["layer", "weights", "active", "density"],
        ["0.weight", "108", "22", "20.37%"],
        ["4.weight", "1,152", "231", "20.05%"],
        ["6.weight", "48", "9", "18.75%"],
        ["all", "1,308", "262", "20.03%"],
    ]
    assert len(set(map(len, lines[1:]))) == 1


def test_an_update_prints_as_a_table() -> None:
    run = Trained()
    run.steps(3)
    report = run.masking.update()
    assert report == list(report) and report[0].name == "0.weight"
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "before", "pruned", "grown", "after", "momentum", "share"]
    for line, row in zip(lines[1:], report, strict=True):
        counts = [f"{n:,}" for n in row[1:5]]
        assert line.split() == [row.name, *counts, f"{row.momentum_share:.1%}"]
    no_momentum = Trained(method="set", optimizer=lambda m: sgd(m, momentum=0))
    no_momentum.steps(1)
    assert str(no_momentum.masking.update()).splitlines()[1].endswith(" -")
