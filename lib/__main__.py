"""The command line, python -m lib COMMAND: see --help, and --help of each command."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lib import experiments, paths
from lib.config import parse_field, parse_pair

# What to do about an error of the system; its own message says no more than what it is.
ADVICE = {
    errno.ENOSPC: "make room on that disk; what is stored is safe, and the same command goes on",
    errno.EACCES: "change its permissions, or name another folder: --results, CHECKPOINT_ROOT",
    errno.EEXIST: "a folder is needed there: move that file, or name another with --results",
    errno.EROFS: "that disk is read-only: name another folder: --results, CHECKPOINT_ROOT",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it worked, 1 with a sentence on standard error, 2 for wrong words,
    130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a locale without our signs stops nothing
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with the clean-up of Ctrl-C
    try:
        options.command(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        if options.traceback:
            raise
        said = str(error)
        if isinstance(error, OSError) and error.filename:
            said = f"{error.filename}: {error.strerror}"
        advice = ADVICE.get(error.errno or 0, "") if isinstance(error, OSError) else ""
        print(f"error: {said}{'; ' if advice else ''}{advice}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    """Train what is missing of some experiments, or of all: the first seed first."""
    for name in ("jobs", "threads"):
        if (value := getattr(options, name)) is not None and not 1 <= value <= 10_000:
            raise ValueError(f"--{name} must be from 1 to 10000, got {value}")
    index, _, count = options.shard.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise ValueError(f"--shard {options.shard!r}: write i/n, for instance 1/4")
    from lib.runs.runner import run_experiments

    found = run_experiments(
        _names(options.experiment),
        options.profile,
        only=options.only,
        overrides=dict(map(parse_field, options.set)),
        shard=(int(index), int(count)),
        results_root=options.results and str(Path(options.results).resolve()),
        jobs=options.jobs,
        threads=options.threads,
        device=options.device,
    )
    for name, rows in found.items():
        if rows.empty:
            continue
        errors = rows["test_error_pct"].dropna()
        said = f"{name}: {len(rows)} runs, {len(rows) - len(errors)} of them diverged"
        if len(errors):
            said += f", test error {errors.min():.2f} to {errors.max():.2f} %"
        print(said)
    folder = paths.results_dir(options.profile, options.results)
    print(f"rows: {folder}; of runs that --set changed: {folder.parent / 'own' / folder.name}")


def merge(options: argparse.Namespace) -> None:
    """Collect the rows of run CSVs (of shards, say) in one; identical rows are kept once."""
    from lib.results.store import merge as merge_csvs

    added = merge_csvs(options.sources, options.target)
    print(f"{options.target}: {added} runs added from {len(options.sources)} files")


def status(options: argparse.Namespace) -> None:
    """What is done, what is missing, and how many core-hours the rest takes."""
    from lib.runs.runner import status_table

    if options.results is not None and not Path(options.results or "-").is_dir():
        raise ValueError(f"--results {options.results!r}: name the folder that holds the profiles")
    print(status_table(options.profile, options.results, _names(options.experiment)))


def notebooks(options: argparse.Namespace) -> None:
    """Execute the notebooks; executed copies go to results/<profile>/notebooks/."""
    from lib.runs.notebooks import execute_all

    parameters = dict(map(parse_pair, options.set))
    execute_all(options.profile, options.only, parameters, options.results)


def figures(options: argparse.Namespace) -> None:
    """Redraw every figure from the rows, each experiment at the largest scale that has some."""
    from lib.report import bind

    folder, _ = bind(options.profile, options.results)
    print(f"{folder}: {len(list(folder.glob('*/*.png')))} figures, as PNG and PDF")


def report(options: argparse.Namespace) -> None:
    """Bind the notebooks to figures/report.pdf and .html, with figures, verdicts and README's
    findings, and say the verdicts; trains nothing.
    """
    from lib.report import bind, write

    folder, text = bind(options.profile, options.results)
    for path in write(text, folder):
        print(path)
    _say_verdicts(options)


def verdict(options: argparse.Namespace) -> None:
    """Judge every claim by the rows, each experiment at the largest scale that has some."""
    from lib.report import bind

    bind(options.profile, options.results, draw=False)
    _say_verdicts(options, options.all)


def _say_verdicts(options: argparse.Namespace, whole: bool = False) -> None:
    from lib.results.claims import scorecard

    for claim in scorecard(options.profile, options.results, whole).to_dict("records"):
        said = claim["difference [95 %]"].replace("\N{NO-BREAK SPACE}", " ")
        print(f"{claim['verdict']:<16}{claim['claim']}{said and ': ' + said}")
    if not whole:
        print("python -m lib verdict --all: also the claims without rows")


def compare(options: argparse.Namespace) -> None:
    """Set the rows under --results beside the committed ones, cell by cell."""
    from lib.results.rows import compare as cells

    found = cells(options.profile, options.results)
    print(found.to_string(index=False, float_format="%.2f"))
    print(", ".join(f"{n} cells: {said}" for said, n in found.said.value_counts().items()))


def bench(options: argparse.Namespace) -> None:
    """Measure the training speed: against a conventional script, and sparse against dense."""
    from lib.bench import bench as measure

    shares = options.density or [0.05]
    measure(options.repeats, options.results, options.only, options.network, shares)


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help explains)\n")


def _names(names: Sequence[str]) -> list[str]:
    """The experiments named, each once; all of them for "all" and for none."""
    if "all" in names or not names:
        return list(experiments.EXPERIMENTS)
    for name in names:
        experiments.experiment(name)
    return list(dict.fromkeys(names))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m lib", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    many: dict[str, Any] = {"action": "append", "default": []}
    field = {**many, "metavar": "FIELD=VALUE"}

    def add(function: Callable[[argparse.Namespace], None]) -> Callable[..., argparse.Action]:
        name = function.__name__
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.set_defaults(command=function)
        command.add_argument("--traceback", action="store_true", help="show where an error arose")
        if function is not merge:
            bound = function in (figures, report, verdict)
            default, said = ("", "largest that has rows") if bound else ("quick", "quick")
            text = f"scale of the runs (default: {said})"
            command.add_argument(
                "--profile", choices=experiments.PROFILES, default=default, help=text
            )
            text = "write to and read from DIR instead"
            command.add_argument("--results", metavar="DIR", help=text)
        return command.add_argument

    option = add(run)
    known = f"all, {', '.join(experiments.EXPERIMENTS)}"
    option("experiment", nargs="+", help=known)
    option("--only", **field, help="keep runs that have it")
    option("--set", **field, help="override in every run")
    option("--shard", default="1/1", metavar="I/N", help="every N-th run from I")
    option("--jobs", type=int, metavar="N", help="runs side by side (default: cores)")
    option("--threads", type=int, metavar="N", help="threads of each run")
    option("--device", help='"cpu" or "cuda" (default: cuda where there is one)')
    option = add(merge)
    option("target", help="CSV that the rows go to")
    option("sources", nargs="+", help="run CSVs; curves and layers come along")
    add(status)("experiment", nargs="*", help="default: all")
    option = add(notebooks)
    option("--only", **many, metavar="NAME", help="one notebook")
    option("--set", **many, metavar="PARAMETER=VALUE", help="papermill parameter")
    add(figures)
    add(report)
    add(verdict)("--all", action="store_true", help="also the claims without rows")
    add(compare)
    option = add(bench)
    option("--repeats", type=int, default=5, help="measurements of everything")
    option("--only", **many, metavar="TOPIC", help="one topic")
    option("--network", **many, metavar="NAME", help="one network")
    option("--density", **many, type=float, help="share of weights (0.05)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
