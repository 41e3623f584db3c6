"""README promises commands, files, code and numbers: each against what it is about."""

from __future__ import annotations

import re
import shlex
from typing import Any

import torch

from lib import paths
from lib.__main__ import _parser
from lib.models import build_model

README = (paths.REPO / "README.md").read_text()


def section(name: str) -> str:
    """The text between this heading and the next one."""
    return re.split(r"^## ", README.split(f"\n## {name}\n")[1], flags=re.MULTILINE)[0]


def test_it_is_short() -> None:
    assert 100 <= len(README.splitlines()) <= 140


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [t for t in targets if "://" not in t]
    assert len(local) > 4
    assert [t for t in local if not (paths.REPO / t).exists()] == []


def test_rooms_named_exist_and_all_are_named() -> None:
    names = re.findall(r"`([\w/.]+)`", section("Where things are").split("The same without")[0])
    assert [n for n in names if not (paths.REPO / n).exists()] == []
    rooms = {p.name for p in (paths.REPO / "lib").iterdir() if (p / "__init__.py").exists()}
    assert rooms <= {n.split("/")[1] for n in names if n.startswith("lib/")}


def test_commands_are_understood() -> None:
    commands = re.findall(r"python -m lib ([^`'#\n]+)", README)
    assert len(commands) >= 3
    for command in commands:
        _parser().parse_args(shlex.split(command))
    made = set(re.findall(r"^([a-z]+):", (paths.REPO / "Makefile").read_text(), re.MULTILINE))
    lines = re.findall(r"(?:`|^)make ((?:[a-z]+ ?)+)", README, re.MULTILINE)
    targets = {target for line in lines for target in line.split()}
    assert {"reproduce", "report", "test"} <= targets <= made
    assert "make reproduce PROFILE=smoke" in README


def test_the_code_runs_in_its_order() -> None:
    """Every block in one namespace that has only what README calls the reader's own."""
    model = build_model("lenet300-100")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def train_on(images: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        torch.nn.functional.nll_loss(model(images), labels).backward()
        optimizer.step()

    batches = [(torch.rand(8, 1, 28, 28), torch.randint(10, (8,))) for _ in range(3)]
    names: dict[str, Any] = {"model": model, "optimizer": optimizer, "epochs": 2}
    names |= {"batches": batches, "train_on": train_on}
    first, *others = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(first, names)
    masking = names["masking"]
    masks = {name: mask.clone() for name, mask in masking.masks.items()}
    assert masking.steps == 6 and sum(map(torch.sum, masks.values())) == round(0.05 * 266_200)
    for code in others:
        exec(code, names)
    averaged = dict(names["averaged"].module.named_parameters())
    for weights in (dict(model.named_parameters()), averaged):
        assert not any(weights[name][~mask].any() for name, mask in masks.items())
    for name, matrix in names["stored"].items():
        assert torch.equal(matrix.to_dense(), model.get_parameter(name))
    train_on(*batches[0])
    names["masking"].step()
    assert any(line.grown for line in names["masking"].update())  # by the reader's own rule
