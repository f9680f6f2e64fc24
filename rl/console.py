"""What commands show: our own lines without the noise of the libraries below, and how far a long job has come.

On a terminal a job has a bar. Elsewhere it has plain lines: one at every tenth of it, and one whenever nothing was
said for `SECONDS`, whether or not anything was finished since: a log that has ended looks unlike a long wait.
"""

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import datasets
from huggingface_hub.utils import logging as hub_logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers.utils import logging as transformers_logging

LINES = 10  # that a whole loop prints where nobody watches a bar
SECONDS = 30.0  # of silence, after which a line is printed in any case
TICK = 1.0  # seconds between two looks at the clock


def quiet_libraries() -> None:
    """Version notes and bars of the libraries below would bury our own lines; errors still show."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    datasets.disable_progress_bars()


class Tracker:
    """Where a job's progress is told. This one tells nobody: for ranks but the first, and where nobody looks."""

    def begin(self, title: str, total: int | None = None, done: int = 0, *, tenths: bool = True) -> None:
        """A loop begins; what was told before it is over.

        Args:
            total, done: Items there are, and those that an earlier run has finished; None: not known.
            tenths: Lines at every tenth; without them only after a silence.
        """

    def advance(self, count: int = 1) -> None:
        """So many more items are finished."""

    def heard(self) -> None:
        """Something else has just been said of the job."""

    def close(self) -> None:
        """The job is over."""


class Bar(Tracker):
    """On a terminal."""

    def __init__(self, console: Console):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True)
        self._task: TaskID | None = None

    def begin(self, title: str, total: int | None = None, done: int = 0, *, tenths: bool = True) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(title, total=total, completed=done)
        self._progress.start()

    def advance(self, count: int = 1) -> None:
        if self._task is not None:
            self._progress.advance(self._task, count)

    def close(self) -> None:
        self._progress.stop()


class Lines(Tracker):
    """Anywhere else.

    Args:
        say: Prints a line.
        title: Of the job before its first loop.
        clock: Seconds that only grow.
    """

    def __init__(self, say: Callable[[str], None], title: str, clock: Callable[[], float] = time.monotonic):
        self._say, self._clock = say, clock
        self._lock = threading.Lock()  # the ticks come from another thread
        self.begin(title)

    def begin(self, title: str, total: int | None = None, done: int = 0, *, tenths: bool = True) -> None:
        with self._lock:
            self._title, self._total, self._done, self._tenths = title, total, done, tenths
            self._started = self._said = self._clock()

    def advance(self, count: int = 1) -> None:
        with self._lock:
            before, self._done = self._done, self._done + count
            if self._total and self._tenths and self._done * LINES // self._total > before * LINES // self._total:
                self._tell()
        self.tick()

    def heard(self) -> None:
        with self._lock:
            self._said = self._clock()

    def tick(self) -> None:
        """Say where the job is if nothing was said for a while."""
        with self._lock:
            if self._clock() - self._said >= SECONDS:
                self._tell()

    def _tell(self) -> None:
        self._said = self._clock()
        so_far = "" if self._total is None else f" {self._done:,} of {self._total:,}"
        self._say(f"{self._title}:{so_far} ({self._said - self._started:.0f} s)")


@contextmanager
def tracked(console: Console, title: str, clock: Callable[[], float] = time.monotonic) -> Iterator[Tracker]:
    """A job whose loops are told: a bar on a terminal, else lines."""
    if console.is_terminal:
        bar = Bar(console)
        try:
            yield bar
        finally:
            bar.close()
        return
    lines = Lines(lambda line: console.print(line, markup=False), title, clock)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(TICK):
            lines.tick()

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        over.set()
        thread.join()


@contextmanager
def progress(
    console: Console, title: str, total: int, done: int = 0, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int], None]]:
    """A job of one loop: yields a function that takes how many items were finished since.

    Args:
        done: Items that an earlier run has finished.
    """
    with tracked(console, title, clock) as tracker:
        tracker.begin(title, total, done)
        yield tracker.advance
