"""What can be known of the Dockerfile without Docker: what it copies is there, its Python is that of the lock file."""

import re
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Lines as Docker reads them: without comments, continued ones joined.
LINES = [
    line.split()
    for line in re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE))
    .strip()
    .splitlines()
    if line.strip()
]


def test_instructions_are_those_of_docker() -> None:
    known = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "VOLUME", "ENTRYPOINT", "CMD"}
    assert {line[0] for line in LINES} <= known
    assert LINES[0][0] == "FROM"


def test_what_is_copied_exists_and_is_sent_to_the_builder() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [source for line in LINES if line[0] == "COPY" for source in line[1:-1]]
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source.removeprefix("./"), pattern) for pattern in kept), (
            f"{source}: .dockerignore drops it"
        )
    assert sorted(copied) == sorted(kept)


def test_everything_that_a_wheel_is_made_of_is_copied() -> None:
    copied = {source for line in LINES if line[0] == "COPY" for source in line[1:-1]}
    assert {"pyproject.toml", "README.md", "LICENSE", "rl", "rewards", "data", "recipes"} <= copied


def test_python_is_that_of_the_lock_file() -> None:
    assert "Python 3.11" in (ROOT / "requirements.lock").read_text().partition("\n")[0]
    assert LINES[0][1].startswith("python:3.11-")
    installs = [" ".join(line) for line in LINES if line[:3] == ["RUN", "pip", "install"]]
    assert "--require-hashes -r requirements.lock" in installs[0]
    assert "--no-deps --no-build-isolation ." in installs[1]
