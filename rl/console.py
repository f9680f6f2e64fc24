"""What commands show: our own lines without the noise of the libraries below, and how far a long loop has come."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import datasets
from huggingface_hub.utils import logging as hub_logging
from rich.console import Console
from rich.progress import Progress
from transformers.utils import logging as transformers_logging

LINES = 10  # that a whole loop prints where nobody watches a bar
SECONDS = 30.0  # after which it prints one in any case, as soon as something is done


def quiet_libraries() -> None:
    """Version notes and bars of the libraries below would bury our own lines; errors still show."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    datasets.disable_progress_bars()


@contextmanager
def progress(
    console: Console, title: str, total: int, done: int = 0, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes how many items were finished since; a bar on a terminal, else about ten lines, and
    one at least every `SECONDS`.

    Args:
        done: Items that an earlier run has finished.
    """
    if console.is_terminal:
        with Progress(console=console) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda count: bar.advance(task, count)
        return

    said = clock()

    def advance(count: int) -> None:
        nonlocal done, said
        before, done = done, done + count
        if done * LINES // total > before * LINES // total or clock() - said >= SECONDS:
            said = clock()
            console.print(f"{title}: {done:,} of {total:,}", markup=False)

    yield advance
