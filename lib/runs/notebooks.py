"""Executes the notebooks through papermill, into results/<profile>/notebooks.  Imports no torch."""

from __future__ import annotations

import ast
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from lib import paths
from lib.config import known

NOTEBOOKS = paths.REPO / "notebooks"


def execute_all(
    profile: str,
    only: Sequence[str] = (),
    parameters: Mapping[str, str] | None = None,
    results_root: str | Path | None = None,
) -> list[Path]:
    """Execute the notebooks (all, or those named in `only`), training what is missing; the copies.

    `parameters`: texts of literals; each goes to the notebooks that have it.  When a cell fails
    the others go on, and RuntimeError at the end names each failure.  ValueError for an unknown
    notebook, and for a parameter that no notebook has or that is of another type.
    """
    found = {path.stem: path for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    names = [name.removesuffix(".ipynb") for name in only] or list(found)
    for name in names:
        known("notebook", name, found)
    folder = paths.results_dir(profile, results_root).resolve() / "notebooks"
    own = {"profile": profile, "results": str(folder.parent.parent) if results_root else ""}
    knobs = {name: knobs_of(found[name]) for name in names}
    defaults = {k: v for mine in knobs.values() for k, v in mine.items() if k not in own}
    given = {"train": True} | {k: _value(k, v, defaults) for k, v in (parameters or {}).items()}
    folder.mkdir(parents=True, exist_ok=True)
    targets = [folder / f"{name}.ipynb" for name in names]
    values = [own | {k: v for k, v in given.items() if k in knobs[name]} for name in names]
    with ProcessPoolExecutor(2) as pool:  # not more, as each may train on all cores
        said = list(pool.map(_execute, map(found.get, names), targets, values))
    if failures := list(filter(None, said)):
        raise RuntimeError("\n".join(failures))
    return targets


def _execute(notebook: Path, target: Path, values: Mapping[str, Any]) -> str:
    """Execute one notebook, in a process of its own; what failed, or ""."""
    import papermill
    from traitlets.config import Config

    start = time.monotonic()
    try:
        with mock.patch.dict(os.environ, _environment()), TemporaryDirectory() as sockets:
            papermill.execute_notebook(
                str(notebook), str(target), values, kernel_name="python3", language="python",
                progress_bar=False, cwd=str(NOTEBOOKS),
                # no port, and no name of a socket, to race for
                config=Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"}),
            )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        return f"{target.stem}, cell {error.cell_index}: {error.ename}: {error.evalue} ({target})"
    print(f"{target.stem}: {time.monotonic() - start:.0f} s, {target}", flush=True)
    return ""


def _environment() -> dict[str, str]:
    """The kernel python3 is this interpreter, whatever the user has installed, and `lib` ours."""
    first = {"JUPYTER_PATH": f"{sys.prefix}/share/jupyter", "PYTHONPATH": str(paths.REPO)}
    return {k: os.pathsep.join(filter(None, (v, os.environ.get(k)))) for k, v in first.items()}


def knobs_of(notebook: Path) -> dict[str, Any]:
    """Names and defaults in the notebook's cell tagged `parameters`, which holds literals alone."""
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    (cell,) = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    lines: list[Any] = ast.parse("".join(cell["source"])).body
    return {line.targets[0].id: ast.literal_eval(line.value) for line in lines}


def _value(name: str, text: str, defaults: Mapping[str, Any]) -> Any:
    """The literal in this text, which must have the type of the notebooks' default."""
    known("parameter", name, defaults)
    kind = type(defaults[name])
    try:
        value = text if kind is str else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{name}={text!r}: write a {kind.__name__} as {defaults[name]!r}")
    return value
