"""The line of progress: what it says is left, and when it is printed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lib.config import Run
from lib.runs import progress
from lib.runs.progress import Board

RUNS = [Run(seed=seed) for seed in range(40)]


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def board(seconds: float, *, known: bool) -> Board:
    estimate = SimpleNamespace(seconds=lambda run: seconds, known=lambda run: known)
    return Board("all (quick)", RUNS, estimate, jobs=2)


@pytest.mark.parametrize("wrong", [0.25, 1.0, 4.0])
def test_the_time_left_is_honest(wrong: float, clock: Clock) -> None:
    """40 runs of 10 s, two side by side, after 6 s of starting: an estimate that is `wrong` times
    too long costs a factor of it at the start, and little once a tenth of the stage has passed.
    """
    stage, total = board(10 * wrong, known=True), 6 + 10 * len(RUNS) / 2
    left = stage.seconds_left()
    assert left == pytest.approx(6 + wrong * (total - 6))
    ids = [run.run_id for run in RUNS]
    for tick in range(1, round(total)):
        clock.now = float(tick)
        turn, second = divmod(tick - 6, 10)
        if tick < 6:
            continue
        for run_id in ids[2 * turn : 2 * turn + 2]:
            stage.note(run_id, (second + 1) / 11, 5.0)
            if second == 9:
                stage.end(run_id)
        left = stage.seconds_left()
        assert left is not None
        if tick > 0.2 * total:
            assert left == pytest.approx(total - tick, rel=0.5, abs=6)


def test_a_line_has_a_bar_and_admits_what_it_does_not_know(clock: Clock) -> None:
    stage = board(1.0, known=False)
    unknown = "all (quick): [--------------------] 0 %, 0 of 40 runs, time left not known yet"
    assert stage.line() == unknown
    for run in RUNS[:20]:
        stage.note(run.run_id, 0.5, 7.25)
        clock.now += 1.0
        stage.end(run.run_id)
    assert stage.line().startswith("all (quick): [##########----------] 50 %, 20 of 40 runs, about")
    for run in RUNS[20:]:
        stage.end(run.run_id)
    assert stage.line().endswith("100 %, 40 of 40 runs, done")


def test_a_log_gets_a_line_at_once_one_a_minute_and_the_last(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    say = progress.print_line()
    for second in range(150):
        clock.now = float(second)
        say(f"{second} s")
    say("end\n")
    assert capsys.readouterr().out.splitlines() == ["0 s", "60 s", "120 s", "end"]
