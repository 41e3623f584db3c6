"""Many runs in one process, and the same runs in odd places."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lib import paths
from lib.config import Run
from lib.results.store import PROVENANCE
from lib.runs import single
from tests.soak.parts import Row, Share, in_child, problem_of

RUNS, MOST_MIB = 200, 8.0
TINY = Run(epochs=1, train_samples=1000, test_samples=1000)


def memory(share: Share) -> Row:
    """Train and store LeNet-300-100 again and again in one process and look at what it holds."""
    wanted = max(8, share.of(RUNS))
    with tempfile.TemporaryDirectory() as name:
        told = in_child(lambda: _many(Path(name), wanted, share), seconds=1200).told
    try:
        done, grown = told.split()[-2:]
        n, mib = int(done), float(grown)
        found = f"{mib:+.1f} MiB from run {n // 4} to run {n}"
    except ValueError:
        n, mib, found = 0, float("inf"), told.strip()[-200:]
    passed = n == wanted and mib <= MOST_MIB
    what = "LeNet-300-100 trained and stored in one process"
    return Row(what, f"at most {MOST_MIB:g} MiB more after the first quarter", found, n, passed)


def _many(folder: Path, wanted: int, share: Share) -> None:
    os.environ["CHECKPOINT_ROOT"] = str(folder / "checkpoints")
    held = []
    for seed in range(wanted):
        if share.over:
            break
        run = TINY.overridden(seed=seed, method=("sparse_momentum", "set", "dense")[seed % 3])
        # A file each, as reading a growing one takes growing memory.
        csv = folder / str(seed) / "x.csv"
        single.train_and_store(single.Task(run, "main_results", "smoke", csv))
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    early = max(held[: len(held) // 4])
    print(len(held), held[-1] - early)


def places(share: Share) -> Row:
    """The same run from a folder with spaces and umlauts, under another locale and time zone, and
    from another working directory: the rows of the plain one.
    """
    variants: dict[str, dict[str, str]] = {
        "plain": {},
        "spaces and umlauts": {},
        "LC_ALL=C without UTF-8": {
            "LC_ALL": "C",
            "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0",
        },
        "time zone of Chatham": {"TZ": "Pacific/Chatham"},
        "another working directory": {},
    }
    chosen = [*variants][: 1 + share.of(len(variants) - 1)]
    problems, n = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = folder / "plain" / "smoke" / "main_results.csv"
        for what in chosen:
            if share.over:
                break
            odd = what == "spaces and umlauts"
            root = folder / ("Größe und Übermaß" if odd else what)
            code = paths.REPO
            if odd:  # the program itself, too
                code = root / "Quelltext für Läufe"
                shutil.copytree(paths.REPO / "lib", code / "lib")
                shutil.copytree(paths.REPO / "results/published", code / "results/published")
            environment = (
                os.environ | variants[what] | {"CHECKPOINT_ROOT": str(root / "checkpoints")}
            )
            environment |= {"PYTHONPATH": str(code), "DATA_ROOT": str(paths.data_root())}
            words = [
                *("run", "main_results", "--profile", "smoke", "--device", "cpu", "--jobs", "1"),
                *("--only", "method=sparse_momentum", "--only", "density=0.05"),
                *("--set", "epochs=1", "--set", "train_samples=1000"),
            ]
            away = folder if what == "another working directory" else code
            for command in (words, ["status", "--profile", "smoke"]):
                done = subprocess.run(
                    [sys.executable, "-m", "lib", *command, "--results", str(root)],
                    cwd=away,
                    env=environment,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=300,
                    check=False,
                )
                if done.returncode:
                    problems.append(f"{what}, {command[0]}: {done.stderr.strip()[-200:]}")
            csv = root / "smoke" / "main_results.csv"
            if problem := problem_of(csv, PROVENANCE, like=plain):
                problems.append(f"{what}: {problem}")
            n += 1
    what = "a run and its status in another place: " + ", ".join(chosen[1:])
    found = problems[0] if problems else f"the same rows in {n} of {n}"
    wanted = "the rows of the plain one, no error"
    return Row(what, wanted, found, n, not problems and n == len(chosen))
