"""The environment file, the Makefile that installs it, and the state of the committed notebooks.

The installation itself is tested with small scripts in the place of python3, pip and conda, so that
nothing is downloaded.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from jupyter_server.services.contents.filemanager import FileContentsManager

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def dependencies() -> tuple[list[str], list[str]]:
    """The conda and the pip requirements of environment.yml."""
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    [pip] = [entry["pip"] for entry in entries if isinstance(entry, dict)]
    return [entry for entry in entries if isinstance(entry, str)], pip


def make(folder: Path, *arguments: str, ok: bool = True) -> subprocess.CompletedProcess:
    """Run make in `folder`, programs in its bin/ first, free of the make that runs this test."""
    path = f"{folder}/bin{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=folder,
        env={"PATH": path, "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode == 0) == ok, done.stderr
    return done


def script(path: Path, body: str) -> None:
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)


# environment.yml


def test_every_dependency_is_pinned_exactly() -> None:
    conda, pip = dependencies()
    assert [re.split("[=<>~! ]", name)[0] for name in conda] == ["python", "pip"]
    for requirement in conda:
        assert re.fullmatch(r"[a-z]+=\d+(\.\d+)+", requirement), requirement
    for requirement in pip:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==\d+(\.\d+)+", requirement), requirement


def test_makefile_reads_the_pip_section_as_yaml_does() -> None:
    said = make(ROOT, "requirements", "CONDA=").stdout
    assert said.split("\n")[:-1] == dependencies()[1]


# The Makefile


def test_help_is_the_default_and_explains_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    internal = {"check-python", "build-venv", "build-conda"}
    targets = set(re.findall(r"^([a-z][a-z-]*):(?!=)", text, flags=re.MULTILINE)) - internal
    assert {"reproduce", "env", "report", "test"} <= targets
    result = make(ROOT, "CONDA=")
    explained = dict(re.findall(r"^  ([a-z]+) +(\S.*)$", result.stdout, flags=re.MULTILINE))
    assert set(explained) == targets
    assert make(ROOT, "help", "CONDA=").stdout == result.stdout


def test_reproduce_keeps_its_order_with_parallel_make(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    script(tmp_path / "py", 'case "$*" in *"run all"*) sleep 0.3 ;; esac\necho "$*" >> log\n')
    make(tmp_path, "-j4", "reproduce", "PROFILE=smoke", "PYTHON=./py")
    calls = [line for line in (tmp_path / "log").read_text().splitlines() if line[:2] == "-m"]
    trained = [f"-m lib {command} --profile smoke" for command in ("run all", "notebooks")]
    assert calls == [*trained, "-m lib report"]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with Makefile, environment.yml and, under bin/, a python3 that only pretends.

    Its `-m venv` creates a python whose `-m pip install` fails as long as bin/offline exists and
    notes each call in the file `log`.
    """
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "environment.yml", tmp_path)
    script(
        tmp_path / "bin/python3",
        """
if [ "$2" = venv ]; then
    echo venv >> log; mkdir -p "$3/bin"; cp bin/venv-python "$3/bin/python"
fi
""",
    )
    script(
        tmp_path / "bin/venv-python",
        """
for last; do :; done
if [ "$3 $last" = "install ." ]; then echo editable >> log
elif [ "$3" = install ]; then
    echo install >> log
    if [ -e bin/offline ]; then echo 'no network' >&2; exit 1; fi
    cp "$last" installed.txt
fi
""",
    )
    return tmp_path


def log(clone: Path) -> list[str]:
    """What was called: a new environment, pip for the packages, pip for this one."""
    return (clone / "log").read_text().split()


def add_one_more(clone: Path) -> None:
    with (clone / "environment.yml").open("a") as file:
        file.write("      - one-more==1.0\n")


def test_env_installs_once_and_again_only_after_a_change(clone: Path) -> None:
    for _ in range(3):
        make(clone, "env", "CONDA=")
        assert log(clone) == ["venv", "install", "editable"]
    assert (clone / "installed.txt").read_text().split() == dependencies()[1]
    (clone / "environment.yml").touch()  # as a git checkout does: same content, newer time
    make(clone, "env", "CONDA=")
    assert log(clone) == ["venv", "install", "editable"]
    add_one_more(clone)
    make(clone, "env", "CONDA=")
    assert log(clone) == ["venv", *2 * ["install", "editable"]]
    assert (clone / "installed.txt").read_text().split()[-1] == "one-more==1.0"
    script(clone / ".venv/bin/python", "exit 1\n")  # a broken environment is built anew
    make(clone, "env", "CONDA=")
    assert log(clone)[-3:] == ["venv", "install", "editable"]


def test_a_failed_installation_is_never_taken_for_a_complete_one(clone: Path) -> None:
    (clone / "bin/offline").touch()
    for _ in range(2):
        said = make(clone, "env", "CONDA=", ok=False).stderr
        assert "no network" in said and "is not complete" in said
    (clone / "bin/offline").unlink()
    make(clone, "env", "CONDA=")
    assert log(clone) == ["venv", *3 * ["install"], "editable"]
    # A change of environment.yml that cannot be installed makes the old environment invalid too.
    (clone / "bin/offline").touch()
    add_one_more(clone)
    make(clone, "env", "CONDA=", ok=False)
    shutil.copy(ROOT / "environment.yml", clone)
    make(clone, "env", "CONDA=", ok=False)


def test_an_old_python_is_named_with_what_to_do(clone: Path) -> None:
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        body = '[ "$1" = --version ] && echo Python 3.9.18 && exit 0\nexit 1\n'
        script(clone / "bin" / name, body)
    said = make(clone, "test", "CONDA=", ok=False).stderr
    assert "Python 3.11 or newer is needed, but python3 is Python 3.9.18" in said
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize(
    ("tool", "command"),
    [("micromamba", "create"), ("mamba", "env create"), ("conda", "env create")],
)
def test_conda_creates_the_environment_from_the_file(clone: Path, tool: str, command: str) -> None:
    script(
        clone / "bin" / tool,
        """
echo "$*" >> log
for word; do if [ "$previous" = --prefix ]; then prefix=$word; fi; previous=$word; done
mkdir -p "$prefix/bin"; cp bin/venv-python "$prefix/bin/python"
[ ! -e bin/offline ]
""",
    )
    (clone / "bin/offline").touch()
    arguments = ("env", f"CONDA={clone}/bin/{tool}")
    make(clone, *arguments, ok=False)
    (clone / "bin/offline").unlink()
    for _ in range(2):
        make(clone, *arguments)
    call = f"{command} --prefix {clone}/.venv-conda --file environment.yml"
    assert (clone / "log").read_text().splitlines() == [call, call, "editable"]


def test_python_given_by_hand_creates_no_environment(clone: Path) -> None:
    said = make(clone, "test", "ARGS=-k data", "PYTHON=bin/venv-python").stdout
    assert "bin/venv-python -m pytest -n auto --dist loadfile -k data" in said
    assert not (clone / "log").exists() and not list(clone.glob(".venv*"))
    said = make(clone, "test", "PYTHON=/nowhere/python", ok=False).stderr
    assert "PYTHON=/nowhere/python does not run" in said


# Notebooks


def test_saving_a_notebook_that_was_run_in_make_lab_leaves_it_as_committed(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    hook = re.search(r"pre_save_hook=(\S+)", (ROOT / "Makefile").read_text())
    assert hook and NOTEBOOKS
    manager = FileContentsManager(root_dir=str(tmp_path), pre_save_hook=hook.group(1))
    for committed in NOTEBOOKS:
        path = f"notebooks/{committed.name}"
        model = manager.get(path)
        model["content"]["metadata"]["language_info"] = {"name": "python", "version": "3.0"}
        for cell in model["content"]["cells"]:
            if cell["cell_type"] == "code":
                cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "5"}]
                cell["execution_count"] = 1
        manager.save(model, path)
        assert (tmp_path / path).read_text() == committed.read_text(), "make format rewrites it"
