"""What the docs hold for a machine: fenced blocks of a page, and the commands that its shell blocks start."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

FENCE = re.compile(
    r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL
)
# A stand-in for a program: it notes its name, its arguments and its standard input, and does nothing. All in one
# write, since a script may start programs side by side.
STUB = """\
#!{bash}
IFS= read -r -d '' input
printf -v words '%s\\037' "{name}" "$@"
printf '%s' "$words"$'\\036'"$input"$'\\035' >> "$RECORD"
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that it shows if any, its text, and the `text` block right behind it."""

    language: str
    title: str | None
    text: str
    output: str | None


@dataclass(frozen=True)
class Call:
    """A command as a shell would start it: program and arguments, and what comes in from a pipe or a here-document."""

    words: tuple[str, ...]
    stdin: str

    @property
    def line(self) -> str:
        return " ".join(self.words)


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    found = list(FENCE.finditer(page))
    for match, after in zip_longest(found, found[1:]):
        follows = after is not None and after["language"] == "text" and not page[match.end() : after.start()].strip()
        yield Block(match["language"], match["title"], match["text"], after["text"] if after and follows else None)


def calls(script: str, folder: Path, programs: list[str]) -> list[Call]:
    """The commands that a script starts, found by running it in `folder` with a stand-in for each program.

    Beside those there are `cat` and what bash has itself; anything else is an error that names the command.
    """
    tools, record = folder / ".tools", folder / ".record"
    shutil.rmtree(tools, ignore_errors=True)
    tools.mkdir()
    record.write_text("")
    bash, cat = shutil.which("bash"), shutil.which("cat")
    assert bash
    assert cat
    (tools / "cat").symlink_to(cat)
    for name in programs:
        stub = (folder if "/" in name else tools) / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(STUB.format(bash=bash, name=name))
        stub.chmod(0o755)
    environment = {"PATH": str(tools), "RECORD": str(record), "MODEL": "owner/model", "HOME": os.environ["HOME"]}
    done = subprocess.run(
        [bash, "-eu", "-c", f"{script}\nwait"],
        cwd=folder,
        env=environment | {"PWD": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{done.stderr.strip()}; a new program goes into PROGRAMS of the docs' tests"
    found = []
    for entry in record.read_text().split("\035")[:-1]:
        words, _, stdin = entry.partition("\036")
        found.append(Call(tuple(words.split("\037")[:-1]), stdin))
    return found
