"""Inputs that must be refused: in one sentence, with an exit code, and nothing written.

By surface: command line, notebook parameters, CSV, data and `Masking` (masking_inputs.py). A bad
checkpoint is set aside in one sentence instead, and the run has the bits of an undisturbed one.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lib.__main__ import main
from lib.results.store import append_run
from tests.soak import checkpoint_inputs, data_inputs, masking_inputs
from tests.soak.parts import Ended, Row, Share, in_child
from tests.support.made_up_runs import add, make_curves, make_row


class Bad(NamedTuple):
    """One bad input: what is done with it in a child, in a folder of its own."""

    surface: str
    name: str
    work: Callable[[Path], object]


# ---------------------------------------------------------------------------------- command line

FIELDS = """
label_smoothing=-1 label_smoothing=nan label_smoothing=1 lr_decay=nan lr_decay=-1 lr_decay=0
test_samples=99999999 test_samples=-1 batch_size=1000000 batch_size=0 batch_size=1.5 batch_size=-5
method_version=7 epochs=１５ epochs=0 epochs=-1 epochs=nan epochs= epochs=1e3 lr=0 lr=nan lr=inf
lr=-0.1 momentum=1 momentum=-0.1 momentum=nan density=0 density=1.5 density=nan density=-0.05
prune_rate=-0.1 prune_rate=1.1 prune_rate=nan weight_decay=-1 weight_decay=inf weight_decay=nan
val_fraction=0 val_fraction=1 val_fraction=0.00000001 val_fraction=nan seed=-1 seed=1.5
seed=12345678901234567890123456 train_samples=-1 train_samples=60001 dropout=2 dropout=nan
precision=fp8 init=magic init_scale=magic kernels=fast schedule=magic prune=magic growth=magic
redistribution=magic model=resnet50 model=magic dataset=magic method=magic keep_dense=magic
options=l1 options=l1=nan update_every_steps=-1 dense_window_steps=-1 warmup_epochs=-1
augment=maybe nesterov=2 colour=red epochs
""".split()  # noqa: SIM905

OPTIONS: tuple[tuple[str, ...], ...] = (
    ("--jobs", "0"),
    ("--jobs", "-1"),
    ("--jobs", "many"),
    ("--threads", "0"),
    ("--threads", "-2"),
    ("--device", "tpu"),
    ("--device", "cuda:77"),
    ("--device", "meta"),
    ("--device", ""),
    ("--shard", "0/2"),
    ("--shard", "3/2"),
    ("--shard", "1"),
    ("--shard", "a/b"),
    ("--shard", "1/0"),
    ("--only", "colour=red"),
    ("--only", "density=7"),
    ("--only", "method"),
    ("--profile", "huge"),
    ("--colour", "red"),
    ("--executor", "local", "--job", "colour=red"),
    ("--executor", "local", "--shards", "0"),
)

RUN = (
    *("run", "main_results", "--profile", "smoke", "--device", "cpu", "--jobs", "1"),
    *("--only", "method=set", "--only", "density=0.05", "--set", "train_samples=1000"),
)


def _command_lines() -> Iterator[Bad]:
    def command(*words: str) -> Callable[[Path], object]:
        return lambda folder: main([word.replace("FOLDER", str(folder)) for word in words])

    for field in FIELDS:
        words = (*RUN, "--set", "epochs=1", "--set", field, "--results", "FOLDER")
        yield Bad("command line", f"--set {field}", command(*words))
    for option in OPTIONS:
        words = (*RUN, "--set", "epochs=1", "--results", "FOLDER", *option)
        yield Bad("command line", " ".join(option), command(*words))
    file, missing = "FOLDER/a file", "FOLDER/missing"
    for words in (
        (),
        ("fly",),
        ("run",),
        ("run", "magic"),
        (*RUN, "--results", file),
        (*RUN, "--results", f"{file}/below"),
        ("merge", "FOLDER/all.csv"),
        ("merge", "FOLDER/all.csv", f"{missing}.csv"),
        ("merge", "FOLDER/all.csv", "FOLDER/kept"),
        ("merge", "FOLDER/all.csv", file),
        *(
            (name, "--profile", "smoke", "--results", where)
            for name in ("status", "verdict", "figures")
            for where in (file, missing)
        ),
    ):
        yield Bad("command line", " ".join(words), command(*words))


# ----------------------------------------------------------------------------- notebook parameters


def _notebook_parameters() -> Iterator[Bad]:
    for notebook, parameter in (
        ("magic", "epochs=1"),
        ("00_one_update", "colour=red"),
        ("00_one_update", "epochs=many"),
        ("00_one_update", "epochs=1.5"),
        ("00_one_update", "epochs"),
        ("00_one_update", "seed=[]"),
        ("00_one_update", "density='a half'"),
        ("00_one_update", "profile=quick"),
        ("00_one_update", "results=elsewhere"),
        ("00_one_update", "density=nan"),
        ("01_main_results", "only=method=set"),
        ("01_main_results", "only=3"),
        ("01_main_results", "epochs=1"),
    ):
        words = ["notebooks", "--profile", "smoke", "--only", notebook, "--set", parameter]
        yield Bad(
            "notebook parameters",
            f"{notebook} {parameter}",
            lambda folder, words=words: main([*words, "--results", str(folder)]),
        )


# ------------------------------------------------------------------------------------------- CSVs


def _edits() -> Iterator[tuple[str, Callable[[str], str]]]:
    def field(name: str, value: str) -> Callable[[str], str]:
        def edit(text: str) -> str:
            lines = text.split("\n")
            fields = lines[2].split(",")
            fields[lines[0].split(",").index(name)] = value
            return "\n".join([*lines[:2], ",".join(fields), *lines[3:]])

        return edit

    for name, value in (
        ("test_error_pct", "101"),
        ("test_error_pct", "-1"),
        ("test_error_pct", "nan"),
        ("val_error_pct", "1e9"),
        ("model", "lenet5"),
        ("method", "set"),
        ("density", "0.1"),
        ("seed", "7"),
        ("seed", "12345678901234567890123456"),
        ("status", "done"),
        ("run_id", "nonsense"),
        ("dirty", "maybe"),
        ("epochs", "0"),
        ("device", '"open'),
        ("device", "a\0b"),
        ("device", "a\rb"),
        ("device", "\udcff"),
    ):
        yield f"{name}={value!r}", field(name, value)
    yield "cut off", lambda text: text[:-9]
    yield "a row twice", lambda text: text + text.split("\n")[1] + "\n"
    yield "another header", lambda text: text.replace("density", "sparsity", 1)
    yield "empty", lambda text: ""
    yield "a short row", lambda text: text + "a,b\n"
    yield "\\r\\n", lambda text: text.replace("\n", "\r\n")


def _csvs() -> Iterator[Bad]:
    def prepared(folder: Path) -> Path:
        csv = folder / "smoke" / "main_results.csv"
        for i in (1, 2):
            add(csv, i, device="plain", keep_dense="")
        return csv

    for name, edit in _edits():

        def read(folder: Path, edit: Callable[[str], str] = edit) -> object:
            csv = prepared(folder)
            plain = csv.read_text()
            # Every text in the made-up rows holds a comma: quoted, so that edits hit whole fields.
            text = "\n".join(
                line.replace(', ""x""', "").replace('"', "") for line in plain.split("\n")
            )
            csv.write_bytes(edit(text).encode("utf-8", "surrogateescape"))
            return _watched(folder, lambda: main(["status", *_SMOKE, "--results", str(folder)]))

        yield Bad("CSV", f"read {name}", read)
    for name, changes in (
        ("an error of 101", {"test_error_pct": 101.0}),
        ("another seed", {"seed": 2}),
        ("a seed of 26 digits", {"seed": 10**25}),
        ("a NUL", {"device": "a\0b"}),
        ("no model", {"model": None}),
        ("an infinite loss", {"train_loss": float("inf")}),
    ):

        def append(folder: Path, changes: dict[str, object] = changes) -> object:
            csv = prepared(folder)
            row, curves = make_row(1) | changes, make_curves(1)
            return _watched(folder, lambda: append_run(csv.with_name("y.csv"), row, curves))

        yield Bad("CSV", f"append {name}", append)

    def double_curve(folder: Path) -> object:
        csv = prepared(folder)
        path = csv.with_suffix(".curves.csv")
        path.write_text(path.read_text() + path.read_text().split("\n")[1] + "\n")
        return _watched(folder, lambda: add(csv, 3))

    yield Bad("CSV", "append beside a double curve row", double_curve)


_SMOKE = ("--profile", "smoke")


def _watched(folder: Path, work: Callable[[], object]) -> object:
    """The child prepared its own folder: compare with that, not with the empty one."""
    before = _files(folder)
    try:
        return _told(work)
    finally:
        if _files(folder) != before:
            print("something was written")


# -------------------------------------------------------------------------------------- judgement


def inputs() -> list[Bad]:
    """All of them, in an order in which every stretch has all surfaces."""
    return [
        *_command_lines(),
        *_notebook_parameters(),
        *_csvs(),
        *(Bad("data", name, work) for name, work in data_inputs.inputs()),
        *(Bad("checkpoint", name, work) for name, work in checkpoint_inputs.inputs()),
        *(Bad("Masking", name, work) for name, work in masking_inputs.inputs()),
    ]


def judged(bad: Bad) -> str:
    """What is wrong with how this input was received; "" if nothing."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "kept").mkdir()
        (folder / "a file").write_text("kept")
        before = _files(folder)

        def work() -> object:
            os.environ["CHECKPOINT_ROOT"] = str(folder / "checkpoints")
            return _told(lambda: bad.work(folder))

        ended = in_child(work, seconds=90)
        written = set(_files(folder)) - set(before)
        changed = {k for k, v in before.items() if _files(folder).get(k) != v}
    if bad.surface == "checkpoint":  # set aside and trained anew, which is judged in the child
        return "" if ended.code == 0 and _sentences(ended) == 1 else _excerpt(ended)
    if ended.code is None:
        return "it went on and had to be stopped"
    if ended.code == 0:
        return f"accepted: {_excerpt(ended)}"
    if _sentences(ended) != 1:
        return f"not one sentence: {_excerpt(ended)}"
    if (written or changed) and bad.surface != "CSV":
        return f"written: {', '.join(sorted(written | changed))}"
    return ""


def _told(work: Callable[[], object]) -> object:
    """As the command line does it: an error that is meant for people is its sentence and code 1."""
    try:
        return work()
    except (ValueError, TypeError, AttributeError, RuntimeError, OSError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if not (last.line or "").startswith("raise"):  # an accident, not a refusal
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


def _sentences(ended: Ended) -> int:
    lines = [line for line in ended.told.splitlines() if line.strip()]
    if lines and lines[0].startswith("usage:"):  # argparse explains itself first
        lines = [line for line in lines if ": error: " in line]
    return 99 if "Traceback" in ended.told else len(lines)


def _excerpt(ended: Ended) -> str:
    lines = [line.strip() for line in ended.told.splitlines() if line.strip()]
    return f"code {ended.code}, {len(lines)} lines, the last: {lines[-1][:200] if lines else ''}"


def load_what_children_need() -> None:
    """Each forked child would import it anew, for seconds."""
    import nbformat  # noqa: F401
    import torchvision  # noqa: F401

    masking_inputs.made()


def refused(share: Share, say: Callable[[str], None]) -> list[Row]:
    """One row for each surface."""
    every = inputs()
    load_what_children_need()
    checkpoint_inputs.prepare()
    surfaces = dict.fromkeys(bad.surface for bad in every)
    rows = []
    for surface in surfaces:
        mine = [bad for bad in every if bad.surface == surface]
        count = min(len(mine), share.of(len(mine)))
        chosen = [mine[k * len(mine) // count] for k in range(count)]
        wrong, tried = [], 0
        for bad in chosen:
            if share.over:
                break
            tried += 1
            with contextlib.suppress(BrokenPipeError):
                if problem := judged(bad):
                    wrong.append(f"{bad.name}: {problem}")
                    say(f"{surface}, {bad.name}: {problem}")
        wanted = (
            "set aside in one sentence, trained anew to the same bits"
            if surface == "checkpoint"
            else "one sentence, exit code not 0, nothing written"
        )
        good = tried - len(wrong)
        found = f"{good} of {len(chosen)}" + (f"; {wrong[0]}" if wrong else "")
        rows.append(Row(f"bad input: {surface}", wanted, found, tried, good == len(chosen)))
    return rows
