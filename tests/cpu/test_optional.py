"""The fast engines are optional: without their folder everything trains through torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from lib.cpu import library

# An editable installation would find lib.cpu in the checkout that it stands for.
HERE = """
import runpy, sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
"""
TRAIN = """
import torch
from lib.config import Run
from lib.data import Dataset
from lib.train import train

x, y = torch.randn(60, 1, 28, 28), torch.arange(60) % 10
data = Dataset(x, y, x, y, x, y, sha256="0" * 64)
for model in ("lenet300-100", "lenet5"):
    run = Run(model=model, epochs=1, batch_size=20, train_samples=60, kernels="sparse")
    assert train(run, data).kernels == "torch", model
"""


def test_without_the_folder_torch_trains(tmp_path: Path) -> None:
    here = Path(library.__file__).parents[1]
    shutil.copytree(here, tmp_path / "lib", ignore=shutil.ignore_patterns("cpu", "__pycache__"))
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    helped = "sys.argv = ['lib', '--help']; runpy.run_module('lib', run_name='__main__')"
    for command in (["-c", HERE + TRAIN], ["-c", HERE + helped]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
