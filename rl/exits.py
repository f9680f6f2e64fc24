"""How a command ends: what it prints, its exit code, and where a traceback goes.

| what ends it | what is printed | exit code |
|---|---|---|
| bad input, a guard, a lost rank, a signal (`siesta.data.errors.Ending`) | its line | its own |
| Ctrl-C | a line | 130 |
| an error that nobody expected | a line that names it and the file with its traceback | 1 |

With `--debug`, anywhere among the arguments, the traceback is printed before the line. Without it that of an
unexpected error is kept in a file, because after hours of work "try again with --debug" is no way out. (Nothing heavy
is imported here: help does not wait for torch.)
"""

import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from os import getpid
from pathlib import Path

from siesta.data.errors import Ending

DEBUG = "--debug"
DEBUG_HELP = f"{DEBUG} shows the traceback of an error."
MEMORY = ("OutOfMemoryError", "MemoryError")  # torch's has no class that could be named without importing torch
SHOWN = 300  # characters of an unexpected error

_debug: ContextVar[bool] = ContextVar("debug", default=False)
_folder: ContextVar[Path | None] = ContextVar("folder", default=None)


def command(work: Callable[[Sequence[str]], int]) -> Callable[..., int]:
    """Makes the main function of a command: it takes the arguments, those of the process by default, and returns the
    exit code. One command may call another one, and hands on `--debug`.
    """

    @wraps(work)
    def main(arguments: Sequence[str] | None = None) -> int:
        given = list(sys.argv[1:] if arguments is None else arguments)
        with _setting(DEBUG in given or _debug.get()):
            return _ended(lambda: work([argument for argument in given if argument != DEBUG]))

    return main


def keep_tracebacks(folder: Path) -> None:
    """From now on that of an unexpected error goes to this folder if it is there by then."""
    _folder.set(folder)


@contextmanager
def _setting(debug: bool) -> Iterator[None]:
    tokens = _debug.set(debug), _folder.set(None)
    try:
        yield
    finally:
        _debug.reset(tokens[0])
        _folder.reset(tokens[1])


def _ended(work: Callable[[], int]) -> int:
    try:
        return work()
    except (Ending, KeyboardInterrupt, Exception) as error:
        if _debug.get():
            traceback.print_exc()
        if isinstance(error, Ending):
            line, code = f"{error.opening}{error}" if str(error) else "", error.exit_code
        elif isinstance(error, Exception):
            line, code = _unexpected(error), 1
        else:
            line, code = "siesta: interrupted", 130
        if line:
            print(line, file=sys.stderr)
        return code


def _unexpected(error: Exception) -> str:
    name = type(error).__name__
    what = f"{name}: {' '.join(str(error).split())[:SHOWN]}".rstrip(": ")
    where = traceback.extract_tb(error.__traceback__)[-1]
    kept = "" if _debug.get() else f"; {_keep(error)}"
    if name in MEMORY:
        way_out = "lower rl.token_budget or evaluate.batch_size, see docs/troubleshooting.md"
    else:
        way_out = "a fault of siesta or of a library it uses, or of the machine; no work that was saved is lost"
    return f"siesta: unexpected error: {what} ({Path(where.filename).name}:{where.lineno}): {way_out}{kept}"


def _keep(error: Exception) -> str:
    """Write the traceback to a file; what to say of it."""
    run = _folder.get()
    folder = run if run is not None and run.is_dir() else Path(tempfile.gettempdir())
    file = folder / f"error-{datetime.now():%Y%m%d-%H%M%S}-{getpid()}.txt"
    try:
        file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError as failure:
        traceback.print_exception(error)
        return f"its traceback is above, {file} cannot be written ({failure.strerror})"
    return f"its traceback is in {file}, {DEBUG} shows it"
