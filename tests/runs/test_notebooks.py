"""The notebooks: committed without outputs, literals as parameters, executed through papermill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.provisioning import LocalProvisioner

from lib import experiments, paths
from lib.results import store as results
from lib.runs import notebooks

COMMITTED = sorted(notebooks.notebooks_dir().glob("*.ipynb"))
MAIN = "01_main_results"


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


# ------------------------------------------------------------------------------------ as committed


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_notebook_is_valid_and_has_no_outputs(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id
        assert not {"papermill", "execution"} & set(cell.metadata), cell.id
    assert "papermill" not in notebook.metadata
    assert notebook.metadata.kernelspec.name == "python3"
    assert str(paths.REPO) not in path.read_text()


def test_the_grid_has_a_row_per_cell_and_shows_what_it_varies() -> None:
    found = notebooks.grid("effective_step", "quick")
    runs = experiments.runs("effective_step", "quick")
    assert len(found) == len(runs) / len({run.seed for run in runs})
    assert not {"seed", "method_version"} & set(found.columns)
    row = found.iloc[1]  # momentum 0.99 at a tenth of the learning rate; the method is the default
    assert (row["momentum"], row["lr"], row["method"]) == (0.99, 0.01, "")


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_parameters_are_literals_with_the_usual_defaults(path: Path) -> None:
    found = notebooks.parameters_of(path)
    assert (found["profile"], found["results"]) == ("quick", "")


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_each_checks_its_injected_parameters_and_needs_no_search_path(path: Path) -> None:
    source = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "code")
    assert f'check_injected_parameters("{path.stem}")' in source
    assert "sys.path" not in source


def test_every_experiment_names_a_notebook_that_is_there() -> None:
    named = {e.notebook for e in experiments.EXPERIMENTS.values()}
    assert MAIN in named and named <= {path.stem for path in COMMITTED}


# -------------------------------------------------------------------------------------- executed


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The main notebook at smoke scale, one seed, on real MNIST; its results and what was said."""
    root, said = tmp_path_factory.mktemp("results"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHECKPOINT_ROOT", str(tmp_path_factory.mktemp("checkpoints")))
        (path,) = notebooks.execute_all(
            "smoke",
            only=[MAIN],
            parameters={"only": "['seed=0', 'model=lenet300-100', 'density=0.05', 'density=1.0']"},
            results_root=root,
            say=said.append,
        )
    assert path == root / "smoke" / "notebooks" / f"{MAIN}.ipynb"
    return root, said


def test_executed_notebook_is_complete(executed: tuple[Path, list[str]]) -> None:
    folder = executed[0] / "smoke" / "notebooks"
    assert [path.name for path in folder.iterdir()] == [f"{MAIN}.ipynb"]
    notebook = read(folder / f"{MAIN}.ipynb")
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source]
    assert all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"image/png", "text/markdown"} <= kinds
    text = json.dumps(outputs)
    assert "reduced scale, not the paper's" in text and "100 %" in text
    assert "papermill" not in notebook.metadata


def test_its_runs_are_in_the_results(executed: tuple[Path, list[str]]) -> None:
    rows = results.read_runs(paths.results_csv("smoke", "main_results", executed[0]))
    assert set(rows["seed"]) == {0} and set(rows["density"]) == {0.05, 1.0}
    assert {"dense", "sparse_momentum", "set", "dsr", "deepr", "static"} == set(rows["method"])
    assert rows["test_error_pct"].max() < 60  # chance is 88.65 %: all of them learn


def test_progress_is_a_few_clean_lines(executed: tuple[Path, list[str]]) -> None:
    first, last = executed[1]
    assert first == f"{MAIN} (smoke): executing"
    assert last.startswith(f"{MAIN} (smoke): done in ") and last.endswith(f"{MAIN}.ipynb")


# ------------------------------------------------------------------------- parameters and failures


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"onyl": "[]"}, "unknown parameter of 01_main_results 'onyl': did you mean 'only'"),
        ({"only": "3"}, r"only=3 is int, but the parameter is list \(default \[\]\)"),
        ({"only": "seed=0"}, "only='seed=0' is str, but the parameter is list"),
        ({"device": 1}, "device=1 is int, but the parameter is str"),
        ({"profile": "paper"}, "--profile"),
        ({"results": "x"}, "--results"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_runs(
    tmp_path: Path, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        notebooks.execute_all("smoke", [MAIN], parameters, tmp_path, say=pytest.fail)
    assert not any(tmp_path.iterdir())


def test_unknown_notebook_and_profile_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean '01_main_results'"):
        notebooks.execute_all("smoke", ["01_main_result"], results_root=tmp_path)


def test_texts_become_the_type_of_the_parameter(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.ipynb",
        'profile = "quick"\nresults = ""\n# rate\nrate = 0.2\nfast = False\nn = 3',
    )
    given = {"rate": "1", "fast": "True", "n": 4}
    values = notebooks.checked_parameters(path, given)
    assert values == {"rate": 1.0, "fast": True, "n": 4} and type(values["rate"]) is float


@pytest.mark.parametrize(
    "source",
    ['profile = "a" + "b"', "from os import path", "a = b = 1", "a: int = 1", "profile =", "f()"],
)
def test_anything_but_literals_in_the_parameters_cell_is_refused(
    tmp_path: Path, source: str
) -> None:
    with pytest.raises(ValueError, match=r"a\.ipynb: the parameters cell"):
        notebooks.parameters_of(write(tmp_path / "a.ipynb", source))


def test_parameters_cell_must_be_tagged_and_name_profile_and_results(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ipynb", 'profile = "quick"')
    with pytest.raises(ValueError, match="lacks 'results'"):
        notebooks.checked_parameters(path, {})
    notebook = read(path)
    notebook.cells[0].metadata["tags"] = []
    nbformat.write(notebook, path)
    with pytest.raises(ValueError, match="0 cells tagged 'parameters'"):
        notebooks.parameters_of(path)


def write(path: Path, parameters: str, *more: str) -> Path:
    """A notebook with this parameters cell and more cells."""
    cells = [nbformat.v4.new_code_cell(source) for source in (parameters, *more)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-p", "numbr", "3"], "unknown parameter of a 'numbr': did you mean 'number'"),
        (["-p", "number", "x"], "a: number='x' is str, but the parameter is int"),
        (["-p", "number", "3"], ""),
    ],
)
def test_papermills_own_command_stops_at_an_unknown_parameter(
    tmp_path: Path, words: list[str], message: str
) -> None:
    parameters = 'profile = "quick"\nresults = ""\nnumber = 1'
    setup = f"import sys\nsys.path.insert(0, {str(paths.REPO)!r})"
    check = f"{setup}\nfrom lib.runs.notebooks import check_injected_parameters\n"
    check += f"check_injected_parameters({str(tmp_path / 'a')!r})"
    path = write(tmp_path / "a.ipynb", parameters, check, "print('went on')")
    command = [sys.executable, "-m", "papermill", "--language", "python", "-k", "python3"]
    done = subprocess.run(
        [*command, str(path), str(tmp_path / "out.ipynb"), *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode != 0) == bool(message), done.stderr
    assert message in done.stderr
    (last,) = read(tmp_path / "out.ipynb").cells[-1:]
    assert bool(last.outputs) != bool(message)


def test_an_idle_kernel_is_not_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that meets the end of the last request makes the kernel print an error."""
    signals: list[int] = []
    send = LocalProvisioner.send_signal

    async def recorded(self: LocalProvisioner, signum: int) -> None:
        signals.append(signum)
        await send(self, signum)

    monkeypatch.setattr(LocalProvisioner, "send_signal", recorded)
    monkeypatch.setattr(notebooks, "notebooks_dir", lambda: tmp_path)
    write(tmp_path / "a.ipynb", 'profile = "quick"\nresults = ""', "1 + 1")
    notebooks.execute_all("smoke", "a", {}, tmp_path / "results", say=lambda _: None)
    assert signal.SIGINT not in signals


def test_a_failing_notebook_leaves_its_copy_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the kernel is this interpreter, even where the user has another one called python3."""
    committed, misled = tmp_path / "notebooks", tmp_path / "jupyter" / "kernels" / "python3"
    committed.mkdir()
    misled.mkdir(parents=True)
    spec = {"argv": ["/no/such/python"], "display_name": "no", "language": "python"}
    (misled / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setattr(notebooks, "notebooks_dir", lambda: committed)
    parameters = 'profile = "quick"\nresults = ""\nn = 1'
    write(committed / "a.ipynb", parameters, "print(profile, n)", "1 / 0")
    write(
        committed / "b.ipynb", parameters, "import os, sys\nprint(sys.executable, os.getcwd(), n)"
    )
    said: list[str] = []
    with pytest.raises(RuntimeError, match=r"a\.ipynb, cell .*ZeroDivisionError") as caught:
        notebooks.execute_all("smoke", (), {"n": "7"}, tmp_path / "results", say=said.append)
    folder = tmp_path / "results" / "smoke" / "notebooks"
    unfinished = folder / "a.unfinished.ipynb"
    assert str(unfinished) in str(caught.value)
    assert "smoke 7" in unfinished.read_text()
    assert {path.name for path in folder.iterdir()} == {"a.unfinished.ipynb", "b.ipynb"}
    (output,) = [o for cell in read(folder / "b.ipynb").cells for o in cell.get("outputs", [])]
    assert output.text.split() == [sys.executable, str(committed), "7"]
    assert said[:2] == ["a (smoke): executing", "a (smoke): failed"]
