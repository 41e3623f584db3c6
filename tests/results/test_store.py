"""The CSVs of runs: what goes in comes out, by many writers, under kills, from damaged files."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lib import paths
from lib.results.store import (
    MEASURE_COLUMNS,
    ResultsError,
    append_run,
    merge,
    read_curves,
    read_layers,
    read_measures,
    read_runs,
    run_paths,
    runs_path,
)
from tests.support.made_up_runs import (
    EPOCHS,
    add,
    assert_whole,
    make_curves,
    make_id,
    make_layers,
    make_row,
)


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    return tmp_path / "smoke" / "main_results.csv"


# Texts that a CSV could trip over; floats that need all their digits, or none.
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"device": 'a "quoted", comma', "overrides": " spaces ", "torch": "2.9−é"},
        {"train_loss": 5e-324, "train_seconds": 1e300, "lr": 1 / 3, "weights_total": 2**63 - 1},
        {"prune_rate": None, "dirty": None, "update_every_steps": None, "explored": None},
        {"status": "diverged", "test_error_pct": None, "val_error_pct": math.nan},
        {"keep_dense": "NA", "commit": "null", "precision": "nan"},
    ],
)
def test_rows_come_back_as_they_went_in(csv: Path, changes: dict[str, Any]) -> None:
    row = make_row(3, **changes)
    values = [(make_id(3), "m", "fc1", "q", k, -1 / 3) for k in range(2)]
    measures = [dict(zip(MEASURE_COLUMNS, one, strict=True)) for one in values]
    assert append_run(csv, row, make_curves(3), make_layers(3), measures)
    found = read_runs(csv).iloc[0].to_dict()
    for name, wanted in row.items():
        assert found[name] == wanted or (pd.isna(found[name]) and pd.isna(wanted)), name
    assert read_layers(csv).to_dict("records") == make_layers(3)
    assert read_measures(csv).to_dict("records") == measures
    assert len(read_curves(csv)) == EPOCHS
    again = csv.with_name("again.csv")
    assert append_run(again, found, make_curves(3), make_layers(3), measures)  # what is read fits
    assert again.read_bytes() == csv.read_bytes()
    assert not append_run(csv, row, make_curves(3), make_layers(3))  # once
    assert {runs_path(path) for path in csv.parent.glob("main*.csv")} == {csv}
    assert run_paths(csv.parent) == [again, csv]


def test_curves_keep_epochs_1_to_10_every_tenth_and_the_last_with_six_digits(csv: Path) -> None:
    append_run(csv, make_row(1), make_curves(1, epochs=37))
    curves = read_curves(csv)
    assert curves["epoch"].tolist() == [*range(1, 11), 20, 30, 37]
    assert set(curves["train_loss"]) == {0.25} and "0.333333," not in csv.read_text()
    append_run(csv.with_name("x.csv"), make_row(0), make_curves(0))
    assert set(read_curves(csv.with_name("x.csv"))["lr"]) == {0.333333}


# What is wrong, as a change of the row (or of its curves), and the word that the message must have.
@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"test_error_pct": 101.0}, "101"),
        ({"test_error_pct": None}, "test_error_pct"),
        ({"status": "diverged"}, "test_error_pct"),
        ({"status": "fine"}, "fine"),
        ({"train_loss": math.inf}, "inf"),
        ({"density_final": 1.5}, "1.5"),
        ({"steps": -1}, "-1"),
        ({"steps": 1.5}, "convert"),
        ({"steps": 10**25}, "(?i)overflow"),
        ({"seed": 2}, "lenet300-100"),
        ({"run_id": "lenet300-100_sparse_momentum_d0.05_s1-xyz"}, "xyz"),
        ({"model": None}, "model"),
        ({"device": "a\0b"}, "_s1-"),
        ({"device": "a\nb"}, "_s1-"),
        ({"device": "\ud800"}, "_s1-"),
        ({"dirty": "perhaps"}, "perhaps"),
        ({"finished_utc": "30.11.2026"}, "30.11.2026"),
    ],
)
def test_a_bad_value_is_refused_and_nothing_written(
    csv: Path, changes: dict[str, Any], value: str
) -> None:
    add(csv, 0)
    before = {path.name: path.read_bytes() for path in csv.parent.iterdir()}
    with pytest.raises(ResultsError, match=value):
        append_run(csv, make_row(1) | changes, make_curves(1) if "run_id" not in changes else [])
    assert {path.name: path.read_bytes() for path in csv.parent.iterdir()} == before


# A damage to the file of two runs as (old, new), and what the message must name beside the file.
@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("\nlenet300-100", "\nlenet5", ":2: run_id"),
        (",ok,", ",well,", "well"),
        (",ok,", ",diverged,", "test_error_pct"),
        (",mnist,", ",,", ":2: dataset"),
        ("run_id,", "id,", "id, run_id"),
        (",0.05,", ",x0.05,", "x0.05"),
        (",0.05,", ",inf,", "inf"),
        (",mnist,", ",mnist,mnist,", "line 2|dtype|convert|int"),
        (",mnist,", ',"mnist,', "EOF|string|literal"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name(csv: Path, old: str, new: str, named: str) -> None:
    add(csv, 0)
    add(csv, 1)
    text = csv.read_text()
    assert old in text
    csv.write_text(text.replace(old, new, 1))
    with pytest.raises(ResultsError, match=named) as caught:
        read_runs(csv)
    assert str(csv) in str(caught.value)


def test_a_file_is_read_and_appended_to_with_the_line_ends_of_windows(csv: Path) -> None:
    add(csv, 0)
    runs = read_runs(csv)
    for path in csv.parent.glob("*.csv"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    pd.testing.assert_frame_equal(read_runs(csv), runs)
    assert not add(csv, 0) and add(csv, 1)
    assert assert_whole(csv) == [0, 1]


def test_an_absent_file_has_no_runs_and_one_of_other_columns_takes_none(csv: Path) -> None:
    for read in (read_runs, read_curves, read_layers, read_measures):
        assert read(csv).empty and read(csv.parent).empty
    add(csv, 0)
    text = csv.read_text().replace("explored", "seen")
    csv.write_text(text)
    with pytest.raises(ResultsError, match="explored, seen"):
        add(csv, 1)
    assert csv.read_text() == text


def test_a_folder_is_its_files_each_run_once_and_what_is_changed_is_read_again(csv: Path) -> None:
    other = csv.with_name("ablations.csv")
    for path, i in ((csv, 0), (csv, 1), (other, 1), (other, 2)):
        add(path, i)
    (csv.parent / "verdicts.csv").write_text("id,verdict\n")
    runs = read_runs(csv.parent)
    assert sorted(runs["seed"]) == [0, 1, 2]
    assert read_curves(csv.parent).groupby("run_id").size().tolist() == [EPOCHS] * 3
    runs["seed"] = 7
    add(csv, 3)
    assert sorted(read_runs(csv.parent)["seed"]) == [0, 1, 2, 3]


@pytest.mark.parametrize("end", [".curves.csv", ".layers.csv"])
def test_a_source_without_what_its_runs_need_is_refused(csv: Path, end: str) -> None:
    add(csv, 0)
    csv.with_suffix(end).unlink()
    with pytest.raises(ResultsError, match=f"{make_id(0)}.*{end}"):
        merge([csv], csv.parent.parent / "new.csv")


# ------------------------------------------------------------------------------ disks and writers


def test_a_disk_that_refuses_loses_no_row(csv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(csv, 0)
    real, calls = os.fsync, 0

    def full(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(csv))
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"main_results\.csv"):
        add(csv, 1)
    assert read_runs(csv)["seed"].tolist() == [0]
    assert add(csv, 1) and assert_whole(csv) == [0, 1]


def test_a_file_system_without_locks_is_named_with_the_way_out(
    csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(OSError, match=r"--results .*main_results\.csv\.lock"):
        add(csv, 0)


def test_files_are_shared_like_their_folder_and_follow_no_link(csv: Path, tmp_path: Path) -> None:
    csv.parent.mkdir()
    csv.parent.chmod(0o775)
    add(csv, 0)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in csv.parent.iterdir()}
    assert modes == {0o664}
    lock = csv.with_name(f".{csv.name}.lock")
    lock.chmod(0o444)
    assert add(csv, 1)  # a lock that can only be read holds as well
    victim = tmp_path / "victim"
    lock.unlink()
    lock.symlink_to(victim)
    with pytest.raises(OSError, match="lock"):
        add(csv, 2)
    assert not victim.exists()


WRITER = """
import os, pathlib, sys
sys.path.insert(0, {root!r})
from tests.support.made_up_runs import add
print("ready", flush=True); sys.stdin.readline()
for i in {seeds}:
    add(pathlib.Path({csv!r}), i)
"""


def writer(csv: Path, seeds: Any) -> subprocess.Popen[str]:
    code = WRITER.format(root=str(paths.REPO), seeds=seeds, csv=str(csv))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_three_writers_lose_and_double_nothing_while_somebody_reads(csv: Path) -> None:
    every = [writer(csv, range(k, 8 + k)) for k in (0, 2, 4)]
    for process in every:
        assert process.stdin is not None
        print(file=process.stdin, flush=True)
    while any(process.poll() is None for process in every):
        assert_whole(csv, exact=False)
    assert [process.wait() for process in every] == [0] * 3
    assert sorted(assert_whole(csv)) == list(range(12))


KILLED_AT_EACH_CALL = """
import os, pathlib, signal, sys
sys.path.insert(0, {root!r})
from lib import paths
from tests.support.made_up_runs import add, assert_whole

def append_and_die(path, i, at, part):
    # SIGKILL in place of system call number `at`, a part of what it writes written
    calls = 0
    def dying(function):
        def call(*args, **kw):
            nonlocal calls
            calls += 1
            if calls == at:
                if function is append:
                    with open(args[0], "ab") as file:
                        file.write(args[1][: int(part * len(args[1]))])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kw)
        return call
    append = paths.append
    paths.append = dying(append)
    for name in ("open", "fsync", "replace"):
        setattr(os, name, dying(getattr(os, name)))
    add(path, i)
    os._exit(0)

folder, kills = pathlib.Path(sys.argv[1]), 0
add(folder / "old.csv", 0)
for at in range(1, 100):
    survived = True
    for n, part in enumerate((0, 0.3, 0, 0.3, 1)):
        i = 5 * at + n
        path = folder / "old.csv" if n > 1 else folder / str(i) / "new.csv"
        pid = os.fork()
        if pid == 0:
            append_and_die(path, i, at, part)
        status = os.waitpid(pid, 0)[1]
        seeds = assert_whole(path, exact=False)
        if os.WIFSIGNALED(status):
            survived = False
            kills += 1
        else:
            assert status == 0, status
        assert add(path, i) == (i not in seeds), i  # the run is done again, or was complete
        assert i in assert_whole(path)
    if survived:
        break
print(kills)
"""


def test_a_kill_at_any_call_leaves_whole_rows_and_the_next_writer_tidies(tmp_path: Path) -> None:
    code = KILLED_AT_EACH_CALL.format(root=str(paths.REPO))
    words = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5 * (1 + 3 * 2)  # lock, and three files of an append and its fsync


# ----------------------------------------------------------------------------------------- merge


def test_shards_are_merged_and_a_run_is_stored_once(tmp_path: Path) -> None:
    target, a, b = (tmp_path / name / "x.csv" for name in ("all", "a", "b"))
    add(target, 0)
    add(target.with_name("other.csv"), 4)
    for path, seeds in ((a, (0, 1, 2)), (b, (2, 3, 4))):
        for i in seeds:
            add(path, i, train_seconds=9.0, threads=2)
    assert merge([a, b.with_suffix(".curves.csv"), a], target) == 3
    assert assert_whole(target) == [0, 1, 2, 3]
    assert read_runs(target)["threads"].tolist() == [0, 2, 2, 2]
    assert merge([a, b], target) == 0


@pytest.mark.parametrize("change", [{"train_loss": 7.5}, {"method_version": 77}])
def test_two_different_rows_of_a_run_are_refused_with_what_they_need(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    target, a = tmp_path / "all.csv", tmp_path / "a" / "all.csv"
    add(target, 1)
    add(a, 0)
    add(a, 1, threads=64, **change)
    before = target.read_bytes()
    with pytest.raises(ResultsError, match=f"{make_id(1)}.*threads 1 and 64"):
        merge([a], target)
    with pytest.raises(ResultsError, match="nothing"):
        merge([a, tmp_path / "nothing.csv"], target)
    assert target.read_bytes() == before


# ----------------------------------------------------------------------------------------- paths


def test_paths_follow_the_environment_at_the_time_of_the_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in ("DATA_ROOT", "CHECKPOINT_ROOT"):
        monkeypatch.delenv(variable, raising=False)
    assert paths.data_root() == paths.REPO / "data"
    assert paths.checkpoints_dir() == paths.REPO / ".cache" / "checkpoints"
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    monkeypatch.setenv("CHECKPOINT_ROOT", "../elsewhere")
    monkeypatch.chdir(tmp_path)
    assert paths.data_root() == tmp_path
    assert paths.checkpoints_dir() == paths.REPO.parent / "elsewhere"
    assert paths.results_dir("quick", tmp_path) == tmp_path / "quick"
