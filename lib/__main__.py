"""The command line, python -m lib COMMAND: see --help, and --help of each command."""

from __future__ import annotations

import argparse
import codecs
import errno
import os
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lib import experiments, paths
from lib.config import parse_field, unknown

if TYPE_CHECKING:
    from lib.results.reading import Source

# What to do about an error of the system; its own message says no more than what it is.
ADVICE = {
    errno.EISDIR: "this is a folder: name a file",
    errno.ENOTDIR: "a part of this path is a file: name a folder",
    errno.ENOSPC: "make room on that disk; what is stored is safe, and the same command goes on",
    errno.EACCES: "change its permissions, or name another folder with --results",
    errno.EROFS: "that disk is read-only: name another folder with --results",
    errno.ENOENT: "there is no such file or folder: check the path",
}


ASCII = str.maketrans({"−": "-", "–": "-", "±": "+-", "×": "x", "≥": ">=", "≤": "<="})
COMMANDS = (
    "run",
    "merge",
    "status",
    "notebooks",
    "figures",
    "report",
    "verdict",
    "compare",
    "bench",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it worked, 1 with a sentence on standard error, 130 after Ctrl-C."""
    _print_in_any_locale()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        print(f"error: {unknown('command', words[0], COMMANDS)}", file=sys.stderr)
        return 1
    options = _parser().parse_args(words)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with the clean-up of Ctrl-C
    try:
        if options.__dict__.get("profile") and options.profile not in experiments.PROFILES:
            raise ValueError(unknown("profile", options.profile, experiments.PROFILES))
        options.command(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        if options.traceback:
            raise
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 1
    return 0


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in ADVICE:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; {ADVICE[error.errno]}"
    return str(error)


def _print_in_any_locale() -> None:
    """Where the locale has no such character, print one that looks like it, or a question mark."""

    def plain(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeEncodeError)
        text = error.object[error.start : error.end].translate(ASCII)
        return unicodedata.normalize("NFKD", text).encode("ascii", "replace").decode(), error.end

    codecs.register_error("plain", plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="plain")


def run(options: argparse.Namespace) -> None:
    """Train what is missing of some experiments, or of all: the first seed first."""
    from lib.runs.runner import run_experiments

    if options.executor:
        for name in _names(options.experiment):
            _submit(name, options)
        return
    run_experiments(
        _names(options.experiment),
        options.profile,
        only=options.only,
        overrides=_overrides(options.set),
        shard=_shard(options.shard),
        results_root=options.results,
        jobs=options.jobs,
        threads=options.threads,
        device=options.device,
    )


def merge(options: argparse.Namespace) -> None:
    """Collect the rows of run CSVs (of shards, say) in one; identical rows are kept once."""
    from lib.results.store import merge as merge_csvs

    added = merge_csvs(options.sources, options.target)
    print(f"{options.target}: {added} runs added from {len(options.sources)} files")


def status(options: argparse.Namespace) -> None:
    """What is done, what is missing, and how long the rest will take on this machine."""
    from lib.runs.machine import check_device
    from lib.runs.status import status_table

    check_device(options.device)
    if options.results is not None:
        _source(options)
    names = _names(options.experiment)
    print(status_table(options.profile, options.results, options.device, names))


def notebooks(options: argparse.Namespace) -> None:
    """Execute the notebooks; executed copies go to results/<profile>/notebooks/."""
    from lib.runs.notebooks import execute_all

    execute_all(
        options.profile,
        only=options.only,
        parameters=_raw_overrides(options.set),
        results_root=options.results,
    )


def figures(options: argparse.Namespace) -> None:
    """Redraw every figure from the rows, each experiment at the largest scale that has some."""
    from lib.binding import bind

    folder, _ = bind(options.profile, options.results)
    print(f"{folder}: {len(list(folder.glob('*/*.png')))} figures, as PNG and PDF")


def report(options: argparse.Namespace) -> None:
    """Bind the notebooks to figures/report.pdf and .html, with figures, verdicts and README's
    findings; trains nothing.
    """
    from lib.binding import bind, write

    folder, text = bind(options.profile, options.results)
    for path in write(text, folder):
        print(path)


def verdict(options: argparse.Namespace) -> None:
    """Judge every claim by the rows, each experiment at the largest scale that has some."""
    from lib.binding import bind
    from lib.results.claims import scorecard

    bind(options.profile, options.results, draw=False)
    print(scorecard(options.profile, options.results, whole=options.all).to_string(index=False))
    if not options.all:
        print("--all: also the claims without rows")


def compare(options: argparse.Namespace) -> None:
    """Set the rows under --results beside the committed ones, cell by cell."""
    from lib.results.compare import compare as cells

    found = cells(options.profile, options.results)
    print(found.to_string(index=False, float_format="%.2f"))
    print(", ".join(f"{n} cells: {said}" for said, n in found.said.value_counts().items()))


def bench(options: argparse.Namespace) -> None:
    """Measure the training speed: against a conventional script, and against the machine."""
    from lib.bench.speed import bench as measure

    measure(options.repeats, options.results, options.only, options.network)


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help explains)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m lib", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(function: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        name = function.__name__
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.set_defaults(command=function)
        command.add_argument(
            "--profile",
            default="quick",
            metavar="NAME",
            help=f"scale of the runs: {', '.join(experiments.PROFILES)} (default: quick)",
        )
        command.add_argument("--results", metavar="DIR", help="write to and read from DIR instead")
        command.add_argument("--traceback", action="store_true", help="show where an error arose")
        return command

    command = add(run)
    command.add_argument("experiment", nargs="+", help=f"all, {', '.join(experiments.EXPERIMENTS)}")
    command.add_argument(
        "--only", action="append", default=[], metavar="FIELD=VALUE", help="keep runs that have it"
    )
    command.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="override in every run"
    )
    command.add_argument(
        "--shard", default="1/1", metavar="I/N", help="every N-th run from the I-th"
    )
    command.add_argument("--jobs", type=int, help="runs side by side (default: as measured best)")
    command.add_argument("--threads", type=int, help="threads of each run")
    command.add_argument("--device", help='"cpu" or "cuda" (default: cuda where there is one)')

    command.add_argument(
        "--executor", choices=["local", "slurm"], help="submit shards as jobs (submitit)"
    )
    command.add_argument("--shards", type=int, default=2, help="number of jobs for --executor")
    command.add_argument(
        "--job",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="parameter of the jobs, for instance timeout_min=240 or slurm_partition=gpu",
    )

    command = commands.add_parser("merge", help=merge.__doc__, description=merge.__doc__)
    command.set_defaults(command=merge, traceback=False)
    command.add_argument("target", help="CSV that the rows go to")
    command.add_argument("sources", nargs="+", help="run CSVs; curves and layers come along")

    command = add(status)
    command.add_argument("experiment", nargs="*", help="those to tell of (default: all)")
    command.add_argument("--device", default="cpu", help='"cpu" or "cuda"')

    command = add(notebooks)
    command.add_argument("--only", action="append", default=[], metavar="NAME", help="one notebook")
    command.add_argument(
        "--set", action="append", default=[], metavar="PARAMETER=VALUE", help="papermill parameter"
    )
    for function in (figures, report, verdict):
        command = add(function)
        command.set_defaults(profile="")
    command.add_argument("--all", action="store_true", help="also the claims without rows")
    add(compare)
    command = add(bench)
    command.add_argument("--repeats", type=int, default=5, help="measurements of everything")
    command.add_argument("--only", action="append", default=[], metavar="TOPIC", help="one topic")
    command.add_argument(
        "--network", action="append", default=[], metavar="NAME", help="of the sparse topics"
    )
    return parser


def _names(names: Sequence[str]) -> list[str]:
    """The experiments named, each once; all of them for "all" and for none."""
    for name in names:
        if name != "all":
            experiments.experiment(name)
    every = "all" in names or not names
    return list(experiments.EXPERIMENTS) if every else list(dict.fromkeys(names))


def _source(options: argparse.Namespace) -> Source:
    """The rows of the profile, here or under --results; ValueError where there are none."""
    from lib.results.reading import Source
    from lib.results.store import run_paths

    given = options.results
    folder = paths.results_dir(options.profile, given)
    if given is not None and not Path(given).is_dir():
        what = "is a file, not a folder" if Path(given).exists() else "doesn't exist"
        raise ValueError(f"--results {given!r} {what}: name the folder that holds the profiles")
    if given == "" or not run_paths(folder):
        raise ValueError(
            f"{folder} holds no results: python -m lib run all --profile {options.profile} trains "
            "what is missing"
        )
    return Source(options.profile, given)


def _submit(name: str, options: argparse.Namespace) -> None:
    from lib.runs.cluster import submit

    jobs = submit(
        name,
        options.profile,
        options.executor,
        options.shards,
        only=options.only,
        overrides=_overrides(options.set),
        results_root=options.results,
        device=options.device,
        **{k: int(v) if v.isdigit() else v for k, v in _raw_overrides(options.job).items()},
    )
    print(f"{name} ({options.profile}): submitted {', '.join(job.job_id for job in jobs)}")
    if options.executor == "local":  # local jobs end with this process
        for job in jobs:
            print(job.result())


def _overrides(texts: Sequence[str]) -> dict[str, object]:
    return {name: parse_field(name, value) for name, value in _raw_overrides(texts).items()}


def _raw_overrides(texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator:
            raise ValueError(f"--set {text!r}: write name=value, for instance epochs=15")
        pairs[name] = value
    return pairs


def _shard(text: str) -> tuple[int, int]:
    try:
        index, count = map(int, text.split("/"))
    except ValueError:
        raise ValueError(f"--shard {text!r}: write i/n, for instance 1/4") from None
    return index, count


if __name__ == "__main__":
    sys.exit(main())
