"""How commands end: one line and the exit code that is documented; `--debug` adds the traceback, no more."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from siesta.data.errors import DataError, Ending
from siesta.rl import cli, exits
from siesta.rl.exits import command, keep_tracebacks
from siesta.rl.guards import GuardStop
from siesta.rl.heartbeat import RankLost
from siesta.rl.signals import SignalStop

TRACEBACK = "Traceback (most recent call last)"


def ending(error: BaseException):
    """A command that ends so."""

    @command
    def main(arguments: Sequence[str]) -> int:
        raise error

    return main


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (DataError("rows.jsonl, row 3: no query"), "siesta: error: rows.jsonl, row 3: no query", 2),
        (GuardStop("step 7"), "siesta: stopped: step 7", 3),
        (RankLost("rank 5: stalled"), "siesta: error: rank 5: stalled", 4),
        (SignalStop(15, "stopped"), "siesta: SIGTERM: stopped", 143),
        (SignalStop(2, "stopped"), "siesta: SIGINT: stopped", 130),
        (KeyboardInterrupt(), "siesta: interrupted", 130),
    ],
)
def test_every_ending_is_a_line_and_its_code(
    error: BaseException, line: str, code: int, debug: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ending(error)(["--debug"] * debug) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == line
    assert err.startswith(TRACEBACK) == debug
    assert debug or len(err.splitlines()) == 1


def test_a_rank_that_leaves_the_telling_to_another_one_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(RankLost(""))([]) == 4
    assert capsys.readouterr() == ("", "")


def failing(folder: Path | None):
    """A command with a fault of our own in it."""

    @command
    def main(arguments: Sequence[str]) -> int:
        if folder is not None:
            keep_tracebacks(folder)
        return [][0]

    return main


def test_an_unexpected_error_is_one_line_and_its_traceback_is_kept_in_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(tmp_path)([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    (file,) = tmp_path.iterdir()
    assert line.startswith("siesta: unexpected error: IndexError: list index out of range (test_exits.py:")
    assert line.endswith(f"its traceback is in {file}, --debug shows it")
    assert TRACEBACK in file.read_text()
    assert "return [][0]" in file.read_text()


def test_without_a_run_it_is_kept_beside_other_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exits.tempfile, "gettempdir", lambda: str(tmp_path))
    assert failing(None)([]) == 1
    assert failing(tmp_path / "not there yet")([]) == 1
    assert str(tmp_path / "error-") in capsys.readouterr().err


def test_a_traceback_that_cannot_be_kept_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args, **kwargs) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert failing(tmp_path)([]) == 1
    err = capsys.readouterr().err
    assert err.startswith(TRACEBACK)
    assert "No space left on device" in err.splitlines()[-1]


def test_debug_shows_the_traceback_and_keeps_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(tmp_path)(["--debug"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(TRACEBACK)
    assert err.splitlines()[-1].startswith("siesta: unexpected error: IndexError")
    assert list(tmp_path.iterdir()) == []


def test_memory_has_a_way_out_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    assert ending(OutOfMemoryError("CUDA out of memory"))(["--debug"]) == 1
    assert "rl.token_budget" in capsys.readouterr().err.splitlines()[-1]


def test_a_command_that_calls_another_hands_debug_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []

    @command
    def inner(arguments: Sequence[str]) -> int:
        seen.append(list(arguments))
        raise DataError("no")

    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(main=inner))
    for arguments in (["--debug", "train", "a.yaml", "--dry-run"], ["train", "a.yaml", "--dry-run", "--debug"]):
        assert cli.main(arguments) == 2
        assert capsys.readouterr().err.count(TRACEBACK) == 1
    assert cli.main(["train", "a.yaml", "--dry-run"]) == 2
    assert capsys.readouterr().err == "siesta: error: no\n"
    assert seen == [["a.yaml", "--dry-run"]] * 3


def test_what_is_no_error_passes() -> None:
    assert command(lambda arguments: len(arguments))(["--debug", "a", "b"]) == 2
    with pytest.raises(SystemExit):
        ending(SystemExit(5))([])
    assert issubclass(DataError, Exception)
    assert not issubclass(SignalStop, Exception), "nothing on the way takes a signal for an error"
    assert issubclass(SignalStop, Ending)


def test_the_module_that_launchers_start_takes_debug(tmp_path: Path) -> None:
    start = [sys.executable, "-m", "siesta.rl.train", "nowhere", "--debug"]
    done = subprocess.run(start, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert TRACEBACK in done.stderr
    assert done.stderr.splitlines()[-1].startswith("siesta: error: nowhere: no such recipe")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_debug_works_for_every_command(name: str) -> None:
    """What a command itself does not know would be refused by its parser, exit code 2 by SystemExit."""
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--debug", "--help"])
    assert stop.value.code == 0
