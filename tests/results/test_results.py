"""The CSVs of the runs: atomic, safe with several writers, strict in what they accept."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import paths
from lib.config import Run
from lib.results.columns import NULLABLE, RUN_ID
from lib.results.merge import merge
from lib.results.published import EXTRA, PublishedError, published, published_names
from lib.results.store import (
    COLUMNS,
    CURVE_COLUMNS,
    LAYER_COLUMNS,
    ResultsError,
    WriteError,
    append_run,
    curves_path,
    layers_path,
    read_curves,
    read_layers,
    read_runs,
)
from tests.support.made_up_runs import (
    EPOCHS,
    LAYERS,
    add,
    assert_whole,
    make_curves,
    make_layers,
    make_row,
)


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    return tmp_path / "quick" / "main_results.csv"


# ------------------------------------------------------------------------------------ round trip


def test_rows_come_back_as_they_went_in(csv: Path) -> None:
    row = make_row(3, overrides='{"lr": 0.1}', dirty=None, update_every_steps=None)
    row |= {"test_error_pct": np.float64(0.1 + 0.2), "threads": np.int64(2), "train_loss": None}
    assert append_run(csv, row, make_curves(3), make_layers(3))
    assert add(csv, 4, val_error_pct=float("nan"), dirty=np.bool_(True))
    runs = read_runs(csv)
    assert list(runs.columns) == list(COLUMNS)
    assert runs["test_error_pct"][0] == 0.1 + 0.2
    assert runs["device"][0] == 'device, "x"'
    assert runs["overrides"].tolist() == ['{"lr": 0.1}', ""]
    assert pd.isna(runs["dirty"][0]) and runs["dirty"][1]
    assert pd.isna(runs["update_every_steps"][0]) and runs["update_every_steps"][1] == 0
    assert np.isnan(runs["train_loss"][0]) and np.isnan(runs["val_error_pct"][1])
    assert runs["seed"].dtype == "int64" and runs["density"].dtype == "float64"
    text = csv.read_text(encoding="utf-8")
    assert "0.30000000000000004" in text and "true" in text and "\r" not in text
    assert list(read_curves(csv).columns) == list(CURVE_COLUMNS)
    assert list(read_layers(csv).columns) == list(LAYER_COLUMNS)
    assert read_layers(csv)["momentum_share"].tolist() == [1 / 3] * 2 * LAYERS


def test_what_is_read_can_be_appended_elsewhere(csv: Path, tmp_path: Path) -> None:
    add(csv, 1, dirty=None, train_samples=None, prune_rate=None)
    copy = tmp_path / "copy.csv"
    for row in read_runs(csv).to_dict("records"):
        append_run(
            copy, row, read_curves(csv).to_dict("records"), read_layers(csv).to_dict("records")
        )
    for file in (lambda p: p, curves_path, layers_path):
        assert file(copy).read_bytes() == file(csv).read_bytes()


@settings(max_examples=30, deadline=None)
@given(
    loss=st.floats(allow_nan=False, allow_infinity=False),
    total=st.integers(0, 2**63 - 1),
    text=st.text(st.characters(exclude_characters="\n\r\0", exclude_categories=("Cs",))),
)
def test_any_value_survives(
    tmp_path_factory: pytest.TempPathFactory, loss: float, total: int, text: str
) -> None:
    path = tmp_path_factory.mktemp("any") / "x.csv"
    append_run(path, make_row(1, train_loss=loss, weights_total=total, device=text))
    runs = read_runs(path)
    assert runs["train_loss"][0] == loss and np.signbit(runs["train_loss"][0]) == np.signbit(loss)
    assert runs["weights_total"][0] == total
    assert runs["device"][0] == text


def test_an_absent_file_is_an_empty_experiment(csv: Path) -> None:
    for frame, columns in (
        (read_runs(csv), COLUMNS),
        (read_curves(csv), CURVE_COLUMNS),
        (read_layers(csv, runs=read_runs(csv)), LAYER_COLUMNS),
    ):
        assert list(frame.columns) == list(columns) and frame.empty
    assert read_runs(csv)["test_error_pct"].dtype == "float64"


def test_the_three_files_are_named_by_any_of_them(csv: Path) -> None:
    add(csv, 1)
    assert len(read_runs(curves_path(csv))) == 1
    assert len(read_curves(layers_path(csv))) == len(read_curves(curves_path(csv))) == EPOCHS
    assert {p.name for p in csv.parent.iterdir()} == {
        "main_results.csv",
        "main_results.curves.csv",
        "main_results.layers.csv",
        ".main_results.csv.lock",
    }


def test_a_run_is_added_once(csv: Path) -> None:
    assert add(csv, 1)
    before = {p: p.read_bytes() for p in csv.parent.iterdir()}
    assert not add(csv, 1, train_seconds=99.0)
    assert {p: p.read_bytes() for p in csv.parent.iterdir()} == before


def test_a_diverged_run_is_a_row_without_errors(csv: Path) -> None:
    nothing = dict.fromkeys(("test_error_pct", "val_error_pct", "train_loss"))
    assert append_run(csv, make_row(1, status="diverged", **nothing))
    assert read_runs(csv)["status"].tolist() == ["diverged"]


def test_the_id_of_a_run_has_the_form_that_reading_expects() -> None:
    for run in (Run(), Run(method="dense"), Run(density=1e-5, seed=12, dataset="cifar10")):
        assert RUN_ID.fullmatch(run.run_id)


# --------------------------------------------------------------------------------- refused input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"density": float("inf")}, "density is inf"),
        ({"density": float("nan")}, "density is nan"),
        ({"density": "0.05"}, "density is '0.05' (str), expected a finite float"),
        ({"seed": 1.0}, "seed is 1.0 (float), expected a int"),
        ({"seed": True}, "seed is True (bool)"),
        ({"seed": None}, "seed is None"),
        ({"dirty": 1}, "dirty is 1 (int), expected a bool or None"),
        ({"method": None}, "method is None"),
        ({"method": ""}, "method is ''"),
        ({"device": "a\nb"}, "on one line"),
        ({"status": "done"}, "status is 'done', expected ok or diverged"),
        ({"status": "diverged"}, "expected no value in a diverged run"),
        ({"test_error_pct": None}, "test_error_pct is '', expected a number"),
        ({"run_id": "lenet-0123"}, "run_id is 'lenet-0123'"),
        ({"model": "lenet5"}, "expected lenet5_sparse_momentum_d0.05_s1-..."),
        ({"method": "set"}, "expected lenet300-100_set_d0.05_s1-..."),
        ({"density": 0.1}, "expected lenet300-100_sparse_momentum_d0.1_s1-..."),
        ({"seed": 2}, "expected lenet300-100_sparse_momentum_d0.05_s2-..."),
        ({"seed": 2**63}, "seed is '9223372036854775808', expected a whole number from 0 to"),
        ({"seed": 10**25}, "seed is '10000000000000000000000000', expected a whole number"),
        ({"weights_total": -1}, "weights_total is '-1', expected a whole number from 0"),
        ({"test_error_pct": 100.5}, "test_error_pct is '100.5', expected 0 to 100"),
        ({"val_error_pct": -0.1}, "val_error_pct is '-0.1', expected 0 to 100"),
        ({"device": "a\0b"}, "on one line"),
        ({"device": "a\rb"}, "on one line"),
        ({"device": "\ud800"}, "device is '\\ud800'"),
        ({"device": "x" * 200_000}, "field larger than field limit"),
        ({"colour": 1}, "unknown ['colour']"),
    ],
)
def test_a_bad_value_is_refused_and_nothing_written(
    csv: Path, changes: dict[str, Any], message: str
) -> None:
    row = make_row(1) | changes
    with pytest.raises(ResultsError, match=re.escape(message)):
        append_run(csv, row)
    assert not csv.exists()


def test_rows_that_do_not_belong_together_are_refused(csv: Path) -> None:
    row, curves, layers = make_row(1), make_curves(1), make_layers(1)
    short = {name: value for name, value in row.items() if name != "seed"}
    with pytest.raises(ResultsError, match=re.escape("missing ['seed']")):
        append_run(csv, short)
    with pytest.raises(ResultsError, match="belongs to run"):
        append_run(csv, row, make_curves(2), layers)
    with pytest.raises(ResultsError, match=r"epoch 1 is on line 2 already"):
        append_run(csv, row, [curves[0], curves[0]], layers)
    with pytest.raises(ResultsError, match=r"layer fc0\.weight is on line 2 already"):
        append_run(csv, row, curves, [layers[0], layers[0]])
    with pytest.raises(ResultsError, match=re.escape("missing ['lr']")):
        append_run(csv, row, [{k: v for k, v in curves[0].items() if k != "lr"}])
    assert not csv.exists() and not curves_path(csv).exists()


def _field(name: str, value: str, line: int = 3) -> Callable[[str], str]:
    """An edit of one field, in a file whose fields hold no commas."""

    def edit(text: str) -> str:
        lines = text.split("\n")
        header = lines[0].split(",")
        fields = lines[line - 1].split(",")
        fields[header.index(name)] = value
        return "\n".join([*lines[: line - 1], ",".join(fields), *lines[line:]])

    return edit


@pytest.mark.parametrize(
    ("file", "edit", "place", "message"),
    [
        ("runs", lambda t: t.replace("density,", "sparsity,", 1), ":1:", "unknown: sparsity"),
        ("runs", lambda t: "", ":1:", "header is ''"),
        ("runs", lambda t: t.replace("\n", "\r\n"), ":1:", "a carriage return"),
        ("runs", lambda t: t[:-1], ":4:", "last line is not ended"),
        ("runs", lambda t: t[:-40], ":4:", "last line is not ended"),
        ("runs", lambda t: t + "lenet,1,2\n", ":5:", "3 fields, expected 47"),
        ("runs", lambda t: t + "\n", ":5:", "0 fields"),
        ("runs", lambda t: t + t.split("\n")[1] + "\n", ":5:", "is on line 2 already"),
        ("runs", _field("density", "5 %"), ":3:", "density is '5 %', expected a finite number"),
        ("runs", _field("density", "nan"), ":3:", "density is 'nan'"),
        ("runs", _field("density", "1e999"), ":3:", "density is '1e999'"),
        ("runs", _field("density", "1_0"), ":3:", "density is '1_0'"),
        ("runs", _field("density", ""), ":3:", "density is ''"),
        ("runs", _field("seed", "2.0"), ":3:", "seed is '2.0', expected a whole number"),
        ("runs", _field("dirty", "True"), ":3:", "dirty is 'True', expected true or false"),
        ("runs", _field("status", "running"), ":3:", "status is 'running'"),
        ("runs", _field("status", "diverged"), ":3:", "no value in a diverged run"),
        ("runs", _field("test_error_pct", ""), ":3:", "test_error_pct is ''"),
        ("runs", _field("run_id", "lenet_s2-00000000g2"), ":3:", "run_id is"),
        ("runs", _field("run_id", "lenet_s2-002"), ":3:", "10 digits of 0-9a-f"),
        ("runs", _field("model", ""), ":3:", "model is '', expected a value"),
        ("runs", _field("model", '"a\nb"'), ":3:", "a quote is opened and not closed"),
        ("runs", _field("device", '"plain'), ":3:", "a quote is opened and not closed"),
        ("runs", _field("device", '"plain', 4), ":4:", "a quote is opened and not closed"),
        ("runs", _field("device", '"pl"ain'), ":3:", "expected after"),
        ("runs", _field("device", "a\rc"), ":3:", "a carriage return"),
        ("runs", _field("device", "a\0c"), ":3:", "a NUL byte"),
        (
            "runs",
            _field("seed", "12345678901234567890123456"),
            ":3:",
            "from 0 to 9223372036854775807",
        ),
        ("runs", _field("seed", "9223372036854775808"), ":3:", "from 0 to 9223372036854775807"),
        ("runs", _field("seed", "-2"), ":3:", "seed is '-2', expected a whole number"),
        ("runs", _field("seed", "5"), ":3:", "expected lenet300-100_sparse_momentum_d0.05_s5-..."),
        ("runs", _field("model", "lenet5"), ":3:", "expected lenet5_sparse_momentum_d0.05_s2-..."),
        ("runs", _field("test_error_pct", "101"), ":3:", "'101', expected 0 to 100"),
        ("runs", _field("val_error_pct", "-1"), ":3:", "'-1', expected 0 to 100"),
        ("runs", _field("momentum", "1.5"), ":3:", "momentum must be in [0, 1), got 1.5"),
        ("runs", _field("epochs", "0"), ":3:", "epochs must be in [1, 2**63), got 0"),
        ("runs", _field("device", "\udcff"), ":3:", "not UTF-8 (byte 0xff)"),
        ("curves", lambda t: t[:-3], ":16:", "last line is not ended"),
        ("curves", _field("epoch", "1", 4), ":4:", "epoch 1 is on line 2 already"),
        ("curves", _field("lr", "fast", 4), ":4:", "lr is 'fast'"),
        ("curves", _field("run_id", "x", 4), ":4:", "run_id is 'x'"),
        ("curves", lambda t: t + t.split("\n")[1] + "\n", ":17:", "epoch 1 is on line 2 already"),
        ("curves", _field("val_error_pct", "100.1", 4), ":4:", "expected 0 to 100"),
        ("layers", _field("layer", "fc0.weight"), ":3:", "layer fc0.weight is on line 2 already"),
        ("layers", lambda t: t.replace("active", "alive"), ":1:", "missing: active"),
    ],
)
def test_a_foreign_or_damaged_file_is_refused_with_file_and_line(
    csv: Path, file: str, edit: Callable[[str], str], place: str, message: str
) -> None:
    for i in (1, 2, 3):
        kept = {*vars(Run()), "run_id", "status"} - {"keep_dense"}
        plain = {n: "plain" for n, kind in COLUMNS.items() if kind is str and n not in kept}
        append_run(
            csv,
            make_row(i) | plain,
            make_curves(i),
            make_layers(i),
        )
    path = {"runs": csv, "curves": curves_path(csv), "layers": layers_path(csv)}[file]
    read = {"runs": read_runs, "curves": read_curves, "layers": read_layers}[file]
    assert len(read(csv))
    damaged = edit(path.read_text(encoding="utf-8")).encode("utf-8", "surrogateescape")
    path.write_bytes(damaged)
    with pytest.raises(ResultsError, match=re.escape(message)) as caught:
        read(csv)
    assert str(caught.value).startswith(f"{path}{place}")
    before = {p: p.read_bytes() for p in csv.parent.iterdir()}
    with pytest.raises(ResultsError):  # and nothing is ever added to such a file
        add(csv, 9)
    assert {p: p.read_bytes() for p in csv.parent.iterdir()} == before


def test_a_disk_that_refuses_loses_no_row_and_is_named(
    csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(csv, 1)
    before = {p: p.read_bytes() for p in csv.parent.iterdir()}

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(WriteError) as caught:
            add(csv, 2)
    assert str(caught.value).startswith(f"{layers_path(csv)}: can't be written (No space left on")
    assert "the rows that it had are safe" in str(caught.value)
    assert {p: p.read_bytes() for p in csv.parent.iterdir()} == before  # and no .tmp
    assert add(csv, 2) and assert_whole(csv) == [1, 2]
    (csv.parent / "file").touch()
    with pytest.raises(WriteError, match=r"x\.csv: can't be written \(\S+file is no folder"):
        add(csv.parent / "file" / "x.csv", 1)
    (csv.parent / "folder.csv").mkdir()
    with pytest.raises(ResultsError, match=r"folder\.csv: can't be read \(Is a directory\)"):
        read_runs(csv.parent / "folder.csv")


# ------------------------------------------------------------------------------- several writers

WRITER = """
import sys, pathlib
sys.path.insert(0, {root!r})
from tests.support.made_up_runs import add
path = pathlib.Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for i in range(int(sys.argv[2]), int(sys.argv[3])):
    add(path, i)
"""


def start_writer(path: Path, first: int, last: int) -> subprocess.Popen[str]:
    code = WRITER.format(root=str(paths.REPO))
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path), str(first), str(last)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def go(writer: subprocess.Popen[str]) -> None:
    assert writer.stdin is not None
    writer.stdin.write("go\n")
    writer.stdin.flush()


def test_four_writers_lose_and_double_nothing(csv: Path) -> None:
    # each writer has 25 rows of its own and the first 10 of its neighbour
    writers = [start_writer(csv, 25 * k, min(25 * k + 35, 100)) for k in range(4)]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        go(writer)
    while any(writer.poll() is None for writer in writers):
        assert_whole(csv)  # a reader never sees half a row
        time.sleep(0.05)
    assert [writer.wait() for writer in writers] == [0, 0, 0, 0]
    for writer in writers:
        writer.communicate()
    assert sorted(assert_whole(csv)) == list(range(100))
    assert len(read_curves(csv)) == 100 * EPOCHS and len(read_layers(csv)) == 100 * LAYERS


def test_a_writer_that_is_killed_leaves_whole_rows(csv: Path) -> None:
    writers = [start_writer(csv, 0, 100_000) for _ in range(4)]
    done = 0
    for k, writer in enumerate(writers):
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        go(writer)
        deadline = time.monotonic() + 10
        while len(read_runs(csv)) == done:
            assert time.monotonic() < deadline, "the writer adds nothing"
            time.sleep(0.001)
        time.sleep(0.007 * k)
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        writer.communicate()
        seeds = assert_whole(csv)
        assert seeds == list(range(len(seeds)))  # in order, none lost, none twice
        assert len(seeds) > done
        done = len(seeds)
    assert add(csv, done) and len(assert_whole(csv)) == done + 1


KILLED_AT_EACH_CALL = """
import os, pathlib, signal, sys
sys.path.insert(0, {root!r})
import lib.results.store
from tests.support.made_up_runs import add, assert_whole

def append_and_die(path, i, at, after):
    # SIGKILL at the given system call of an append; exit 0 if there are not so many
    calls = 0
    def dying(function):
        def call(*args, **kw):
            nonlocal calls
            calls += 1
            if calls == at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kw)
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call
    for name in ("open", "fsync", "replace"):
        setattr(os, name, dying(getattr(os, name)))
    add(path, i)
    os._exit(0)

path, kills = pathlib.Path(sys.argv[1]), 0
add(path, 0)
for at in range(1, 100):
    survived = True
    for after in (False, True):
        i = 2 * at + after
        pid = os.fork()
        if pid == 0:
            append_and_die(path, i, at, after)
        status = os.waitpid(pid, 0)[1]
        seeds = assert_whole(path, at_most=i + 2)
        if os.WIFSIGNALED(status):
            survived = False
            kills += 1
        else:
            assert status == 0, status
        assert add(path, i) == (i not in seeds), i  # the run is done again, or was complete
        assert i in assert_whole(path, at_most=i + 1)
    if survived:
        break
print(kills)
"""


def test_a_kill_at_any_system_call_leaves_whole_rows(csv: Path) -> None:
    code = KILLED_AT_EACH_CALL.format(root=str(paths.REPO))
    done = subprocess.run(
        [sys.executable, "-c", code, str(csv)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # lock, write out and rename of three files, folder twice, each killed before and after
    assert int(done.stdout) >= 2 * (1 + 3 * 2 + 2 * 2)


def test_rows_that_a_killed_append_left_are_replaced(csv: Path) -> None:
    add(csv, 1)
    csv.unlink()  # as if killed before the run's own row
    assert read_curves(csv, runs=read_runs(csv)).empty and len(read_curves(csv)) == EPOCHS
    assert append_run(csv, make_row(1), make_curves(1, epochs=2), make_layers(1, layers=1))
    assert len(read_curves(csv)) == 2 and len(read_layers(csv)) == 1


# ----------------------------------------------------------------------------------------- merge


def test_shards_are_merged_and_doubles_kept_once(tmp_path: Path) -> None:
    target, a, b = (tmp_path / name / "x.csv" for name in ("all", "a", "b"))
    add(target, 0)
    for i in (0, 1, 2):
        add(a, i)
    for i in (2, 3):
        add(b, i, train_seconds=1e3, finished_utc="later", commit="another")
    assert merge([a, b, a], target) == 3
    assert assert_whole(target) == [0, 1, 2, 3]
    assert read_runs(target)["train_seconds"].tolist() == [0.0, 1 / 7, 2 / 7, 1e3]
    before = target.read_bytes()
    assert merge([a, b, target], target) == 0 and target.read_bytes() == before


def test_two_different_rows_of_one_run_are_refused_with_both_places(tmp_path: Path) -> None:
    target, a, b = (tmp_path / name / "x.csv" for name in ("all", "a", "b"))
    add(a, 1)
    add(a, 2)
    add(b, 2, test_error_pct=50.0)
    with pytest.raises(ResultsError) as caught:
        merge([a, b], target)
    assert f"{a}:3 and {b}:2: two different rows" in str(caught.value)
    assert "test_error_pct is 0.2857142857142857 and 50.0" in str(caught.value)
    assert not target.exists()
    with pytest.raises(ResultsError, match="no such file"):
        merge([tmp_path / "none.csv"], target)


def test_missing_values_are_no_difference(tmp_path: Path) -> None:
    target, a = tmp_path / "all" / "x.csv", tmp_path / "a" / "x.csv"
    for path in (target, a):
        add(path, 1, prune_rate=None, train_samples=None)
    assert merge([a], target) == 0


# ----------------------------------------------------------------------------------------- paths


def test_paths_follow_the_environment_at_the_time_of_the_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in ("DATA_ROOT", "CHECKPOINT_ROOT"):
        monkeypatch.delenv(variable, raising=False)
    assert paths.data_root() == paths.REPO / "data"
    assert paths.checkpoints_dir() == paths.REPO / ".cache" / "checkpoints"
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    assert paths.data_root() == tmp_path
    monkeypatch.setenv("CHECKPOINT_ROOT", "../elsewhere")
    monkeypatch.chdir(tmp_path)
    assert paths.checkpoints_dir() == paths.REPO.parent / "elsewhere"
    assert paths.results_dir("quick") == paths.REPO / "results" / "quick"
    assert paths.results_csv("quick", "x", root=tmp_path) == tmp_path / "quick" / "x.csv"
    with pytest.raises(ValueError, match=r"profile '\.\./quick' is no plain name"):
        paths.results_dir("../quick")


def test_reading_and_statistics_need_no_torch() -> None:
    code = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'torchvision'):\n"
        "            raise ImportError('torch is not for this')\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "import lib.paths, lib.results.merge, lib.stats, lib.results.published\n"
        "print(len(lib.results.published.published('cifar10_table')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(paths.REPO)},
    )
    assert (done.returncode, done.stdout.strip()) == (0, "24"), done.stderr


# ------------------------------------------------------------------------------------- published


@pytest.mark.parametrize("name", published_names())
def test_every_published_table_reads(name: str) -> None:
    table = published(name)
    assert len(table)
    assert (table["source"] != "").all()
    for column in table.columns.intersection(list(EXTRA)):  # a column that says nothing is a slip
        assert (table[column].notna() & (table[column].astype(str) != "")).any(), column


def test_the_published_tables_hold_what_the_paper_says() -> None:
    table = published("cifar10_table").set_index(["model", "method"])["test_error_pct"]
    assert table["vgg16-d", "sparse_momentum"] == 6.69
    assert table["wrn-22-8", "dense"] == 4.26
    mnist = published("mnist_sparse_summary")
    row = mnist[(mnist["method"] == "sparse_momentum") & (mnist["density"] == 0.05)].iloc[0]
    assert (row["value"], row["test_error_pct"]) == (98.53, 1.47)
    assert mnist[mnist["suspect"]][["method", "density"]].values.tolist() == [["dsr", 0.01]]


def test_the_raw_runs_give_the_published_means() -> None:
    table = published("dsr_authors_raw_runs_wrn28-2_and_mnist")
    for row in table.itertuples():
        runs = np.array([float(x) for x in str(row.runs).split()])
        assert len(runs) == row.n
        assert runs.mean() == pytest.approx(row.value, abs=2e-3)
        assert runs.std(ddof=1) / np.sqrt(len(runs)) == pytest.approx(row.standard_error, abs=2e-4)


def test_pooled_class_specialisation_follows_from_its_layers() -> None:
    # pooled means over all kept channels, from the same arrays (official feature data)
    pooled = {
        ("alexnet-s", "dense"): 0.1973,
        ("alexnet-s", "sparse_momentum"): 0.1800,
        ("vgg16-d", "dense"): 0.1980,
        ("vgg16-d", "sparse_momentum"): 0.1870,
        ("wrn-28-2", "dense"): 0.1638,
        ("wrn-28-2", "sparse_momentum"): 0.1666,
    }
    table = published("class_specialization_official_feature_data")
    for key, group in table.groupby(["model", "method"]):
        mean = (group["value"] * group["n"]).sum() / group["n"].sum()
        assert mean == pytest.approx(pooled.pop(key), abs=6e-5)
    assert not pooled


@pytest.mark.parametrize(
    ("old", "new", "place", "message"),
    [
        ("method,label", "label,method", ":1:", "header is"),
        ("6.69,0.049", "6.69,0.049,", ":13:", "17 fields, expected 16"),
        ("dense,dense,alexnet-s", "thick,dense,alexnet-s", ":2:", "method is 'thick'"),
        ("12.95,0.056", "about 13,0.056", ":2:", "value is 'about 13'"),
        (",12.95,false", ",12.59,false", ":2:", "but the value gives 12.95"),
        (",1.0,test", ",100,test", ":2:", "expected a fraction"),
        (",12.95,false", ",12.95,true", ":2:", "no note that says why"),
        ('"paper, table 1",exact', ",exact", ":2:", "source or quantity is empty"),
        (",exact,", ",certain,", ":2:", "confidence is 'certain'"),
    ],
)
def test_a_damaged_published_table_is_refused(
    tmp_path: Path, old: str, new: str, place: str, message: str
) -> None:
    text = (paths.published_dir() / "cifar10_table.csv").read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "t.csv").write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(PublishedError, match=re.escape(message)) as caught:
        published("t", tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 't.csv'}{place}")
    with pytest.raises(PublishedError, match=r"no such table; known are t\."):
        published("u", tmp_path)


def test_columns_that_may_be_empty_are_columns() -> None:
    assert not NULLABLE - set(COLUMNS) - set(LAYER_COLUMNS)
