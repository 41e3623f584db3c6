"""Every notebook but the first (test_notebooks.py) trains and argues at smoke scale."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from lib import paths
from lib.runs import notebooks

OTHERS = sorted(path.stem for path in (paths.REPO / "notebooks").glob("0[2-7]_*.ipynb"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results shared by the notebooks, so that a run of several experiments is trained once."""
    return tmp_path_factory.mktemp("results")


def test_there_are_six_others() -> None:
    assert [name[:2] for name in OTHERS] == ["02", "03", "04", "05", "06", "07"]


@pytest.mark.parametrize("name", OTHERS)
def test_notebook_runs_from_question_to_conclusion(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHECKPOINT_ROOT", str(tmp_path))
    (path,) = notebooks.execute_all(
        "smoke", [name], {"only": "['seed=0']"}, root, say=lambda _: None
    )
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source]
    assert all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"image/png", "text/markdown"} <= kinds
