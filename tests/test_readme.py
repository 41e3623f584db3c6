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
    commands = re.findall(r"^python -m lib (.+?)(?:\s+#.*)?$", README, flags=re.MULTILINE)
    commands += re.findall(r"`python -m lib ([^`.]+)`", README)
    assert len(commands) >= 4
    for command in commands:
        _parser().parse_args(shlex.split(command))
    made = set(re.findall(r"^([a-z]+):", (paths.REPO / "Makefile").read_text(), re.MULTILINE))
    lines = re.findall(r"(?:`|^)make ((?:[a-z]+ ?)+)", README, re.MULTILINE)
    targets = {target for line in lines for target in line.split()}
    assert {"reproduce", "figures", "report", "test"} <= targets <= made
    assert "make reproduce PROFILE=smoke" in README


def test_the_code_for_a_network_of_ones_own_runs() -> None:
    [code] = re.findall(r"```python\n(.*?)```", section("Use it on your network"), re.DOTALL)
    model = build_model("lenet300-100")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def train_on(images: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        torch.nn.functional.nll_loss(model(images), labels).backward()
        optimizer.step()

    batches = [(torch.rand(8, 1, 28, 28), torch.randint(10, (8,))) for _ in range(3)]
    names: dict[str, Any] = {"model": model, "optimizer": optimizer, "epochs": 2}
    names |= {"batches": batches, "train_on": train_on}
    exec(code, names)
    masking = names["masking"]
    weights = dict(model.named_parameters())
    assert sum(int(mask.sum()) for mask in masking.masks.values()) == round(0.05 * 266_200)
    assert not any(weights[name][~mask].any() for name, mask in masking.masks.items())
