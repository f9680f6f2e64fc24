"""Progress, by a clock that is moved by hand: lines where nobody watches a bar, a bar on a terminal."""

import io
import threading
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from siesta.rl import console
from siesta.rl.callbacks import StepProgress
from siesta.rl.console import LINES, SECONDS, Bar, Lines, Tracker, progress, tracked

ARGS: Any = TrainingArguments


class Hand:
    """A clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, LINES), (SECONDS, 100)])
def test_a_fast_loop_has_ten_lines_and_a_slow_one_a_line_after_each_silence(seconds: float, lines: int) -> None:
    clock, screen = Hand(), io.StringIO()
    with progress(Console(file=screen, width=80), "work", 100, clock=clock) as advance:
        for _ in range(100):
            clock.now += seconds
            advance(1)
    written = screen.getvalue().splitlines()
    assert len(written) == lines
    assert written[-1] == f"work: 100 of 100 ({100 * seconds:.0f} s)"


def test_a_job_that_finishes_nothing_is_heard_of_all_the_same() -> None:
    clock, said = Hand(), []
    lines = Lines(said.append, "model", clock)
    for clock.now in (1.0, SECONDS - 1, SECONDS, SECONDS + 1, 2 * SECONDS):
        lines.tick()
    assert said == ["model: (30 s)", "model: (60 s)"]
    lines.begin("evaluate", total=40, done=10)
    clock.now += SECONDS - 1
    lines.tick()
    assert len(said) == 2, "the silence begins anew"
    clock.now += 1
    lines.tick()
    assert said[2:] == ["evaluate: 10 of 40 (30 s)"]


def test_what_is_said_elsewhere_ends_a_silence() -> None:
    clock, said = Hand(), []
    lines = Lines(said.append, "rl", clock)
    clock.now = SECONDS - 1
    lines.heard()
    clock.now = 2 * SECONDS - 2
    lines.tick()
    assert said == []
    clock.now = 2 * SECONDS - 1
    lines.tick()
    assert said == ["rl: (59 s)"]


def test_somebody_looks_at_the_clock_while_the_job_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job waits for the line that tells of its waiting."""
    monkeypatch.setattr(console, "TICK", 0.001)
    clock, told = Hand(), threading.Event()

    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            told.set()
            return super().write(text)

    screen = Screen()
    with tracked(Console(file=screen, width=80), "sleep", clock):
        clock.now = SECONDS
        assert told.wait(60)
    assert screen.getvalue().startswith("sleep: (30 s)")
    assert "progress" not in {thread.name for thread in threading.enumerate()}, "it leaves with the job"


@pytest.mark.parametrize("seconds", [0.0, 7.0, SECONDS])
def test_a_training_is_told_of_only_where_its_logs_are_silent(seconds: float) -> None:
    """Ten steps with a log after each fifth: no line in a fast training, one after each silent step of a slow one."""
    clock, said = Hand(), []
    tracker = Lines(said.append, "rl", clock)
    own, state, control = StepProgress("rl", tracker), TrainerState(max_steps=10), TrainerControl()
    own.on_train_begin(ARGS, state, control)
    for step in range(1, 11):
        clock.now += seconds
        if step % 5 == 0:
            own.on_log(ARGS, state, control, logs={})
        own.on_step_end(ARGS, state, control)
    expected = {0.0: 0, 7.0: 0, SECONDS: 8}[seconds]
    assert len(said) == expected
    if said:
        assert said[-1] == "rl: 9 of 10 (270 s)"


def test_a_terminal_gets_a_bar_that_goes_away() -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=80, force_interactive=True)
    with tracked(terminal, "evaluate") as tracker:
        assert isinstance(tracker, Bar)
        tracker.heard()
        assert screen.getvalue() == "", "a stage that is skipped shows none"
        tracker.begin("responses", 4, 1)
        tracker.advance(2)
        tracker.begin("numbers")
        tracker.begin("timed responses", 2)
        tracker.advance(2)
    shown = screen.getvalue()
    assert "timed responses" in shown
    assert "2/2" in shown


def test_a_tracker_for_nobody_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    own = Tracker()
    own.begin("work", 3)
    own.advance()
    own.heard()
    own.close()
    assert capsys.readouterr() == ("", "")
