"""Executes the notebooks through papermill, into results/<profile>/notebooks.  Imports no torch."""

from __future__ import annotations

import ast
import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import paths
from lib.config import unknown
from lib.experiments import runs

if TYPE_CHECKING:
    import pandas as pd


def notebooks_dir() -> Path:
    """Directory of the notebooks as committed, without outputs."""
    return paths.REPO / "notebooks"


def executed_dir(profile: str, results_root: str | Path | None = None) -> Path:
    """Directory of the executed copies."""
    return paths.results_dir(profile, results_root) / "notebooks"


def execute_all(
    profile: str,
    only: str | Sequence[str] = (),
    parameters: Mapping[str, Any] | None = None,
    results_root: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Execute the notebooks (all, or those named in `only`), in order; the executed copies.

    `parameters` are papermill parameters of every executed notebook, as values or as the text of a
    literal. Each copy is written beside its place under another name and moved when it is complete;
    when a cell fails, the unfinished copy stays, the other notebooks go on, and RuntimeError at the
    end names each failure. Raises ValueError for an unknown notebook or parameter or for a value of
    the wrong type, before anything is executed.
    """
    only = [only] if isinstance(only, str) else only
    found = {path.stem: path for path in sorted(notebooks_dir().glob("*.ipynb"))}
    names = [name.removesuffix(".ipynb") for name in only] or list(found)
    for name in names:
        if name not in found:
            raise ValueError(unknown("notebook", name, found))
    root = None if results_root is None else Path(results_root).resolve()
    own = {"profile": profile, "results": "" if root is None else str(root)}
    given = dict(parameters or {})
    for name in own:
        if name in given:
            raise ValueError(f"{name} is set by --{name}, not as a parameter")
    values = {name: own | checked_parameters(found[name], given) for name in names}
    folder = executed_dir(profile, root)
    folder.mkdir(parents=True, exist_ok=True)
    done, failures = [], []
    with _kernel_of_this_interpreter():
        for name in names:
            started = time.monotonic()
            say(f"{name} ({profile}): executing")
            try:
                done.append(_execute(found[name], folder, values[name]))
            except RuntimeError as error:
                say(f"{name} ({profile}): failed")
                failures.append(str(error))
                continue
            say(f"{name} ({profile}): done in {time.monotonic() - started:.0f} s, {done[-1]}")
    if failures:
        raise RuntimeError("\n".join(failures))
    return done


def parameters_of(notebook: Path) -> dict[str, Any]:
    """Names and defaults of a notebook's parameters: the cell tagged "parameters".

    Raises ValueError without such a cell, or for anything in it but `name = literal` and comments.
    """
    import nbformat

    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{notebook.name}: {len(tagged)} cells tagged 'parameters', expected one")
    found = {}
    try:
        statements = ast.parse(tagged[0].source).body
    except SyntaxError as error:
        raise ValueError(f"{notebook.name}: the parameters cell is no Python: {error}") from None
    for statement in statements:
        try:
            assert isinstance(statement, ast.Assign)
            (name,) = statement.targets
            assert isinstance(name, ast.Name)
            found[name.id] = ast.literal_eval(statement.value)
        except (AssertionError, ValueError):
            raise ValueError(
                f"{notebook.name}: the parameters cell has {ast.unparse(statement)!r}; "
                "write `name = literal`, one per line"
            ) from None
    return found


def checked_parameters(notebook: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The given parameters with the types of the notebook's own; ValueError for an unknown one.

    A text for a parameter that is no text is read as a Python literal: "epochs=15" gives 15.
    """
    known = parameters_of(notebook)
    for name in ("profile", "results"):
        if name not in known:
            raise ValueError(f"{notebook.name}: its parameters cell lacks {name!r}")
    values = {}
    for name, value in given.items():
        if name not in known:
            raise ValueError(unknown(f"parameter of {notebook.stem}", name, known))
        default = known[name]
        if isinstance(value, str) and not isinstance(default, str):
            with contextlib.suppress(ValueError, SyntaxError):
                value = ast.literal_eval(value)
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            raise ValueError(
                f"{notebook.stem}: {name}={value!r} is {type(value).__name__}, "
                f"but the parameter is {type(default).__name__} (default {default!r})"
            )
        values[name] = value
    return values


def check_injected_parameters(notebook: str) -> None:
    """In the notebook's cell after its parameters: raise ValueError for a parameter that papermill
    injected and the notebook doesn't have, or of another type.

    `notebook` is its name without ".ipynb". Papermill's own command only warns of an unknown one,
    and the notebook would go on with its defaults.
    """
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    cells = shell.user_ns["In"] if shell is not None else []
    for cell in cells:
        if cell.startswith("# Parameters\n"):  # papermill's own first line
            given = {
                statement.targets[0].id: ast.literal_eval(statement.value)
                for statement in ast.parse(cell).body
                if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
            }
            checked_parameters(notebooks_dir() / f"{notebook}.ipynb", given)


def grid(experiment: str, profile: str) -> pd.DataFrame:
    """For a notebook: what the runs of an experiment set beside the defaults of `Run`, one row per
    cell of its grid; empty where a run has the default.
    """
    import pandas as pd

    rows = pd.DataFrame([run.non_default() for run in runs(experiment, profile)])
    rows = rows.drop(columns=["seed", "method_version"], errors="ignore").drop_duplicates()
    return rows.astype(object).where(rows.notna(), "")


def _execute(notebook: Path, folder: Path, parameters: dict[str, Any]) -> Path:
    """Execute one notebook in its own directory, as JupyterLab does; the finished copy."""
    import nbformat
    import papermill

    unfinished = folder / f"{notebook.stem}.unfinished.ipynb"
    try:
        papermill.execute_notebook(
            str(notebook),
            str(unfinished),
            parameters=parameters,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            cwd=str(notebook.parent),
            **_ended_by_request(),
        )
    except papermill.PapermillExecutionError as error:
        raise RuntimeError(
            f"{notebook.name}, cell {error.cell_index}: {error.ename}: {error.evalue} "
            f"(executed so far: {unfinished})"
        ) from error
    finished = nbformat.read(unfinished, as_version=4)
    _strip(finished)
    nbformat.write(finished, unfinished)
    target = folder / notebook.name
    os.replace(unfinished, target)
    return target


def _ended_by_request() -> dict[str, Any]:
    """Arguments of papermill with which a kernel that has nothing to do ends without a signal.

    jupyter_client interrupts every kernel before it asks it to shut down. That meets the end of
    papermill's last request, and ipykernel prints an error. A busy one is interrupted as ever.
    """
    from jupyter_client.manager import AsyncKernelManager

    busy: set[int] = set()

    class Kernel(AsyncKernelManager):
        async def _shut_down(self, now: bool = False, restart: bool = False) -> None:
            if now or busy:
                await super()._async_shutdown_kernel(now=now, restart=restart)
                return
            await self.request_shutdown(restart=restart)
            await self.finish_shutdown(restart=restart)
            await self.cleanup_resources(restart=restart)

        shutdown_kernel = _shut_down

    return {
        "kernel_manager_class": Kernel,
        "on_cell_execute": lambda cell, cell_index: busy.add(cell_index),
        "on_cell_executed": lambda cell, cell_index, execute_reply: busy.discard(cell_index),
    }


def _strip(notebook: Any) -> None:
    """Without papermill's times and paths: what isn't a result differs between machines."""
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        for name in ("papermill", "execution"):
            cell.metadata.pop(name, None)


@contextlib.contextmanager
def _kernel_of_this_interpreter() -> Iterator[None]:
    """Inside, the kernel "python3" is this interpreter, whatever kernels the user has installed,
    and `lib` this repository's, also where the package is not installed (make PYTHON=...).
    """
    from ipykernel.kernelspec import make_ipkernel_cmd, write_kernel_spec

    # Errors only: a kernel's remarks on its sockets are no concern of the notebook's reader.
    command = make_ipkernel_cmd(extra_arguments=["--log-level=ERROR"])
    before = os.environ.get("JUPYTER_PATH")
    with tempfile.TemporaryDirectory() as folder:
        spec = Path(folder) / "kernels" / "python3"
        path = os.pathsep.join(filter(None, (str(paths.REPO), os.environ.get("PYTHONPATH"))))
        write_kernel_spec(str(spec), overrides={"argv": command, "env": {"PYTHONPATH": path}})
        os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, (folder, before)))
        try:
            yield
        finally:
            if before is None:
                del os.environ["JUPYTER_PATH"]
            else:
                os.environ["JUPYTER_PATH"] = before
