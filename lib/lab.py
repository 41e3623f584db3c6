"""How notebooks are kept in the repository: without outputs, in nbformat's own form.

JupyterLab of `make lab` saves them so, and `make format` (python -m lib.lab) rewrites them.
"""

from __future__ import annotations

from typing import Any


def without_outputs(model: dict[str, Any], path: str = "notebooks/", **_: object) -> None:
    """Strip a notebook of the repository of what running it leaves, so that it changes no file.

    A pre-save hook of jupyter_server; `path` counts from the root of the repository.
    """
    if model["type"] != "notebook" or not path.strip("/").startswith("notebooks"):
        return
    content = model["content"]
    content["metadata"] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in content["cells"]:
        cell["metadata"] = {k: v for k, v in cell["metadata"].items() if k == "tags"}
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None


def rewrite() -> None:
    """Rewrite the committed notebooks in that form."""
    import nbformat

    from lib.paths import REPO

    for path in sorted((REPO / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, 4)
        without_outputs({"type": "notebook", "content": notebook})
        nbformat.write(notebook, path)


if __name__ == "__main__":
    rewrite()
