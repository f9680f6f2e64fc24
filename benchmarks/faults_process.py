"""The real command in a process of its own, to be killed, stopped or given what it must refuse.

`fresh` starts a new interpreter: `python -m siesta.rl.train ...`. Otherwise the process is forked from this one, which
has imported what the command imports and done nothing else, and runs the same module as `__main__`: imports take most
of the seconds of a start, and nearly all of hundreds of starts.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

COMMAND = "siesta.rl.train"
LATER = ("deepspeed", "matplotlib.backends.backend_agg")  # what it imports when it has begun
LIMIT = 900.0  # seconds after which a process counts as hanging
GLANCE = 0.005  # seconds between two looks at a process


class Ended(NamedTuple):
    """Exit code (minus the number of a signal that killed it) and what was printed."""

    code: int
    out: str
    err: str

    @property
    def told(self) -> list[str]:
        """Lines on stderr."""
        return self.err.splitlines()


def preload() -> None:
    """Import what the command imports; its own module stays out, so that it can become `__main__`."""
    for name in (COMMAND, *LATER):
        import_module(name)
    del sys.modules[COMMAND]


def _become(arguments: Sequence[str], folder: Path, prefix: Path, inject: Callable[[], object] | None) -> None:
    """The forked process from here on: its own folder and files, then the command."""
    os.chdir(folder)
    for number, suffix in enumerate(("out", "err"), start=1):
        handle = os.open(f"{prefix}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  for good
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.argv = [COMMAND, *arguments]
    if inject is not None:
        inject()
    runpy.run_module(COMMAND, run_name="__main__", alter_sys=True)


class Process:
    """A run of the command that has been started.

    Args:
        arguments: Of the command.
        folder: The working directory.
        prefix: What it prints goes to `prefix.out` and `prefix.err`.
        fresh: In a new interpreter.
        inject: Called in the process before the command; breaks something. Not for a fresh one.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        prefix: Path,
        *,
        fresh: bool = False,
        inject: Callable[[], object] | None = None,
    ):
        self.prefix = prefix.absolute()
        self.started = time.monotonic()
        if fresh:
            with open(f"{prefix}.out", "w") as out, open(f"{prefix}.err", "w") as err:
                command = [sys.executable, "-m", COMMAND, *arguments]
                self._process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
            return
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # or the copy would print what is still in the buffers
        for suffix in ("out", "err"):
            Path(f"{prefix}.{suffix}").write_text("")
        fork = multiprocessing.get_context("fork")
        self._process = fork.Process(target=_become, args=(list(arguments), folder, self.prefix, inject))
        self._process.start()

    @property
    def pid(self) -> int:
        """Of the process itself."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def age(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def printed(self) -> str:
        """What stands on stdout so far."""
        return Path(f"{self.prefix}.out").read_text(encoding="utf-8", errors="replace")

    def code(self) -> int | None:
        """The exit code, or None while it runs."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        return self._process.exitcode

    def until(self, what: Callable[[], bool]) -> bool:
        """Wait for `what`; False if the process ended before.

        Raises:
            TimeoutError: It hangs.
        """
        while not what():
            if self.code() is not None:
                return False
            if self.age > LIMIT:
                self.signal(9)
                raise TimeoutError(f"{self.prefix}: still running after {LIMIT:.0f} seconds")
            time.sleep(GLANCE)
        return True

    def signal(self, number: int) -> None:
        """Send a signal to the process alone."""
        if self.code() is None:
            os.kill(self.pid, number)

    def end(self) -> Ended:
        """Wait for its end."""
        self.until(lambda: False)
        code = self.code()
        assert code is not None
        err = Path(f"{self.prefix}.err").read_text(encoding="utf-8", errors="replace")
        return Ended(code, self.printed, err)
