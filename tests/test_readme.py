"""README promises commands, files and numbers: each against what it is about."""

from __future__ import annotations

import re
import shlex

import pandas as pd

from lib import experiments, paths
from lib.__main__ import _parser
from lib.results import store as results

README = (paths.REPO / "README.md").read_text()
BENCH = paths.REPO / "results" / "bench"


def rows(section: str) -> list[list[str]]:
    """Cells of the table lines between this heading and the next one, without rulers."""
    text = re.split(r"^## ", README.split(f"\n## {section}\n")[1], flags=re.MULTILINE)[0]
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def measured(file: str) -> pd.Series:
    """Value by (what, setting); the topics that the README quotes name each thing once."""
    frame = pd.read_csv(BENCH / f"{file}.csv").drop_duplicates(["what", "setting"])
    return frame.set_index(["what", "setting"])["value"]


def numbers(cell: str) -> list[float]:
    return [float(n) for n in re.findall(r"\d+(?:\.\d+)?", cell)]


def assert_rounds_to(value: float, shown: float, text: str) -> None:
    """`shown` is the value with as many digits after the point as `text` has."""
    found = re.search(rf"{shown:g}0*", text)
    assert found, (shown, text)
    digits = len(found.group().partition(".")[2])
    assert abs(value - shown) <= 0.5 * 10**-digits + 1e-9, (value, text)


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [t for t in targets if "://" not in t]
    assert len(local) > 5
    assert [t for t in local if not (paths.REPO / t).exists()] == []


def test_modules_named_exist() -> None:
    table = " ".join(row[0] for row in rows("What is where"))
    names = re.findall(r"`([\w/*.]+)`", table)
    assert len(names) > 10
    for name in names:
        here = "" if "/" in name else "lib/"
        assert list(paths.REPO.glob((here + name).rstrip("/"))), name


def test_commands_are_understood() -> None:
    commands = re.findall(r"^python -m lib (.+?)(?:\s+#.*)?$", README, flags=re.MULTILINE)
    commands += re.findall(r"`python -m lib ([^`.]+)`", README)
    assert len(commands) >= 6
    for command in commands:
        _parser().parse_args(shlex.split(command))
    made = set(re.findall(r"^([a-z]+):", (paths.REPO / "Makefile").read_text(), re.MULTILINE))
    targets = set(re.findall(r"(?:`|^)make ([a-z]+)", README, re.MULTILINE))
    assert {"reproduce", "figures", "bench"} <= targets <= made


def quick_costs() -> dict[str, tuple[int, float]]:
    """Experiment -> runs at quick, core-minutes of those that none above it had."""
    known: set[str] = set()
    costs = {}
    for name in experiments.EXPERIMENTS:
        frame = results.read_runs(paths.results_csv("quick", name))
        frame = frame[frame.run_id.isin({run.run_id for run in experiments.runs(name, "quick")})]
        costs[name] = len(frame), frame[~frame.run_id.isin(known)].train_seconds.sum() / 60
        known |= set(frame.run_id)
    return costs


def test_map_of_experiments() -> None:
    table = rows("Figures and tables")[1:]
    costs = quick_costs()
    assert {row[2].strip("`") for row in table} == set(experiments.EXPERIMENTS)
    for _, notebook, name, files, quick, paper in table:
        name = name.strip("`")
        assert list((paths.REPO / "notebooks").glob(f"{notebook}_*.ipynb")), notebook
        for file in re.findall(r"`(\w+)`", files):
            places = [f"{profile}/{file}.*" for profile in ("quick", "paper")]
            drawn = any(list((paths.REPO / "figures").glob(p)) for p in places)
            assert drawn or quick == "-", file  # nothing to draw yet
        assert int(paper) == len(experiments.runs(name, "paper")), name
        if quick == "-":
            assert not experiments.runs(name, "quick")
            continue
        count, minutes = numbers(quick)
        assert (count, minutes) == (costs[name][0], round(costs[name][1])), name


def test_runs_and_minutes_of_make_reproduce() -> None:
    said = re.search(r"its (\d+) runs train (\d+) core-minutes", README)
    assert said
    planned = {run.run_id for n in experiments.EXPERIMENTS for run in experiments.runs(n, "quick")}
    minutes = sum(minutes for _, minutes in quick_costs().values())
    assert [int(n) for n in said.groups()] == [len(planned), round(minutes)]


def test_speed_of_the_lenets() -> None:
    value = measured("speed")
    table = rows("Speed")
    labels = [row[0] for row in table]
    assert table[0] == ["", "LeNet-300-100", "LeNet-5"]
    for what in ("conventional script", "ours, one run per core", "ours, one run with all threads"):
        row = table[next(i for i, label in enumerate(labels) if label.startswith(what))]
        for model, cell in zip(("lenet300-100", "lenet5"), row[1:], strict=True):
            seconds, *ratio = numbers(cell)
            assert_rounds_to(value[f"{what}, an epoch", model], seconds, cell)
            if what.startswith("ours"):
                short = what.removeprefix("ours, ").removesuffix(" with all threads")
                assert_rounds_to(value[f"ours over conventional, {short}", model], *ratio, cell)


def test_speed_of_the_kernels() -> None:
    value = measured("kernels")
    table = rows("Speed")
    shares = table[4][1:]
    assert shares == ["1 %", "2 %", "5 %", "10 %", "20 %", "50 %"]
    for share, cell in zip(shares, table[5][1:], strict=True):
        layers = value["all convolutions, dense over sparse", f"vgg16-d, {share}"]
        assert_rounds_to(layers, *numbers(cell), cell)
    for label, *cells in table[7:]:
        model = label.split(",")[0].lower()
        for share, cell in zip(shares, cells, strict=True):
            setting = f"{model}, {share}, batch 128"
            step, inference = numbers(cell)
            assert_rounds_to(value["training step, dense window counted", setting], step, cell)
            assert_rounds_to(value["inference", setting], inference, cell)


def test_sentences_on_speed() -> None:
    value = measured("speed")
    text = " ".join(README.split())
    shares = re.search(
        r"mask update is ([\d.]+) % .*? LeNet-300-100 .*? ([\d.]+) % .*?AlexNet", text
    )
    peak = re.search(r"\(([\d.]+) GFLOP/s a core\) would take ([\d.]+) %", text)
    linear = re.search(r"([\d.]+) to ([\d.]+) ns a weight", text)
    assert shares
    assert peak
    assert linear
    for model, shown in zip(("lenet300-100", "alexnet-s"), shares.groups(), strict=True):
        assert_rounds_to(value["mask update, share of an epoch", model], float(shown), shown)
    assert_rounds_to(
        value["float32 matrix peak, one thread", "1024 x 1024"], float(peak[1]), peak[1]
    )
    part = 100 * value["products at peak over whole step", "lenet300-100"]
    assert_rounds_to(part, float(peak[2]), peak[2])
    costs = value["mask update, a weight"]
    for end, shown in zip((costs.min(), costs.max()), linear.groups(), strict=True):
        assert_rounds_to(end, float(shown), shown)
