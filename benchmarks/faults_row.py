"""A row of the table of faults, and how it is judged: as a user sees a run, by exit code and by what is printed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults_process import Ended

ERROR = "siesta: error: "


@dataclass
class Row:
    """One fault: how often it was injected, what came of it. Every entry of `failures` says why it does not hold."""

    part: str
    fault: str
    times: int = 1
    lost: str = "nothing"
    recovery: str = ""
    message: str = ""
    failures: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        return "holds" if not self.failures else "FAILS"


def tracebacks(ended: Ended) -> list[str]:
    """A user shows a traceback to somebody else; a line can be acted on."""
    return ["a traceback"] if "Traceback (most recent call last)" in ended.out + ended.err else []


def one_line(lines: Sequence[str], names: Sequence[str]) -> list[str]:
    """What is wrong with what was told: it is exactly one line, which names the thing."""
    if len(lines) != 1:
        return [f"{len(lines)} lines instead of one: {' / '.join(lines)[:300]}"]
    return [f"{name!r} is not named" for name in names if name not in lines[0]]


def refused(ended: Ended, names: Sequence[str], code: int = 2, start: str = ERROR) -> list[str]:
    """What is wrong with a refusal: one line on stderr, no traceback, the right exit code."""
    failures = tracebacks(ended) + one_line(ended.told, [start, *names])
    return failures if ended.code == code else [f"exit code {ended.code} instead of {code}", *failures]


def finished(ended: Ended) -> list[str]:
    """What is wrong with a run that should come to its end."""
    failures = tracebacks(ended)
    return failures if ended.code == 0 else [f"exit code {ended.code}: {ended.err[-300:]}", *failures]


def untouched(canary: Path) -> list[str]:
    """Whether code from outside has run."""
    return ["the canary is dead: code from outside has run"] if canary.exists() else []


def message(lines: Sequence[str], start: str = ERROR) -> str:
    """What the table shows of a line."""
    return lines[0].removeprefix(start) if lines else ""
