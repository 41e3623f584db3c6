"""Compiling the kernels and loading them: broken compilers, caches that others can write, and the
kernels under sanitizers.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lib.cpu import library

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler")


@pytest.fixture
def unloaded() -> Iterator[None]:
    """As in a process that has not asked for the kernels yet."""
    library._load.cache_clear()
    library._warn.cache_clear()
    yield
    library._load.cache_clear()
    library._warn.cache_clear()


@pytest.mark.parametrize(
    ("case", "script", "reason"),
    [
        ("failing", "echo 'g++: error: broken' >&2; exit 1", r"failed: g\+\+: error: broken"),
        ("silent", "exit 1", "failed: exit code 1, no message"),
        ("no program", "", "can't be started"),
        ("nonsense", 'for f; do :; done; echo "no library" > "$f"', "file too short"),
        ("none", "", r"no C\+\+ compiler was found"),
        ("no cache", "exit 1", r"can't be written \(Not a directory\); set SPARSE_CACHE"),
    ],
)
def test_a_broken_compiler_or_cache_is_told_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unloaded: None,
    case: str,
    script: str,
    reason: str,
) -> None:
    shell = "#!/bin/sh\n[ $1 = --version ] && exit 0\n" if script else "#!/no/such/shell\n"
    broken = tmp_path / "g++"
    broken.write_text(shell + script)
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    if case == "none":
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
        monkeypatch.delenv("CXX")
    monkeypatch.setenv(
        "SPARSE_CACHE", str(broken / "below" if case == "no cache" else tmp_path / "cache")
    )
    with pytest.warns(RuntimeWarning, match=reason) as told:
        assert not library.available() and not library.available()
    assert len(told) == 1 and "\n" not in str(told[0].message)
    with pytest.raises(library.KernelsUnavailable, match=reason):
        library.require()


@needs_compiler
def test_compiled_once_by_whoever_is_first_and_again_when_the_source_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several at an empty cache: one compiles, all have the same library, in a folder of their
    user's own whatever the cache's rights; one that others can write is refused.
    """
    source = tmp_path / "sparse.cpp"
    source.write_text("int nothing;")
    monkeypatch.setattr(library, "SOURCES", (source,))
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    monkeypatch.setenv("SPARSE_CACHE", str(cache))

    def build(count: int) -> tuple[set[Path], int]:
        with ThreadPoolExecutor(count) as pool:
            found = {
                future.result() for future in [pool.submit(library.build) for _ in range(count)]
            }
        return found, capsys.readouterr().err.count("compiling")

    found, compiled = build(3)
    assert len(found) == 1 and compiled == 1
    (built,) = found
    assert list(built.parent.glob("*.so")) == [built]
    assert built.parent.parent == cache and built.parent.stat().st_mode & 0o777 == 0o700
    assert build(1) == ({built}, 0)
    source.write_text("int something;")
    assert build(1)[1] == 1
    built.parent.chmod(0o777)
    with pytest.raises(library.KernelsUnavailable, match=re.escape(str(built.parent))):
        library.build()


@needs_compiler
def test_sanitizers(tmp_path: Path) -> None:
    """Kernels against plain loops on exactly sized buffers: memory, undefined behaviour."""
    binary = tmp_path / "test"
    command = [str(library.compiler()), "-std=c++17", "-fsanitize=address,undefined"]
    command += ["-march=native", "-O0", "-fno-sanitize-recover=all", "-fopenmp", "-Wno-psabi"]
    command += ["-I", str(ROOT / "lib" / "cpu"), str(ROOT / "tests" / "native" / "selftest.cpp")]
    built = subprocess.run(
        [*command, "-o", str(binary)], check=False, capture_output=True, text=True
    )
    if built.returncode and "cannot find" in built.stderr:
        pytest.skip(f"the compiler has no sanitizer runtime: {built.stderr.splitlines()[-1]}")
    assert built.returncode == 0, built.stderr
    # The OpenMP runtime keeps its threads' memory until exit, which is no leak of ours.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [str(binary)], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "ok"
