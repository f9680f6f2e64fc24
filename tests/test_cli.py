"""The command `siesta`: it finds its commands, hands their arguments on, and turns bad input into exit code 2."""

import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from siesta.data.errors import DataError
from siesta.rl import cli

ROOT = Path(__file__).resolve().parents[1]
# Commands that take overrides, with the options that they cannot do without or that take a word.
OVERRIDDEN = {
    "train": ["--dry-run"],
    "plan": ["--like", "run"],
    "eval": ["--recipe", "other.yaml", "--out", "folder"],
    "warmup-data": ["--out", "folder", "--limit", "2"],
    "sleep": ["--contexts", "contexts.jsonl", "--out", "folder"],
    "answer": ["--states", "folder", "--queries", "queries.jsonl", "--out", "answers.jsonl"],
}


def test_the_console_script_is_this_main() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["siesta"].partition(":")
    assert vars(import_module(module))[name] is cli.main


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_is_listed_and_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
        assert command in (shown := capsys.readouterr().out)
    assert ("section.key=value" in shown) == (command in OVERRIDDEN)


@pytest.mark.parametrize("command", OVERRIDDEN)
def test_overrides_stand_before_and_behind_options(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of overrides counts, their place among the options does not."""
    seen: list[list[str]] = []

    def load(recipe: str, overrides: list[str]) -> None:
        seen.append(list(overrides))
        raise DataError("read")

    monkeypatch.setattr(import_module(cli.COMMANDS[command][0]), "load_recipe", load)
    first, then, options = "rl.tau=0.3", "seed=1", OVERRIDDEN[command]
    for arguments in (
        ["a", first, then, *options],
        ["a", *options, first, then],
        ["a", first, *options, then],
        [*options, "a", first, then],
    ):
        assert cli.main([command, *arguments]) == 2
    assert seen == [[first, then]] * 4
    with pytest.raises(SystemExit):
        cli.main([command, "a", first, *options, "--no-such-option"])


def test_arguments_and_exit_code_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    module = SimpleNamespace(main=lambda arguments: seen.append(arguments) or 3)
    monkeypatch.setattr(cli, "import_module", lambda name: module)
    assert cli.main(["train", "--dry-run", "a.yaml", "rl.tau=1", "--help"]) == 3
    assert seen == [["--dry-run", "a.yaml", "rl.tau=1", "--help"]]


def test_bad_input_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(arguments: list[str]) -> int:
        raise DataError("rows.jsonl, row 3: no query")

    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(main=refuse))
    assert cli.main(["train"]) == 2
    assert capsys.readouterr() == ("", "siesta: error: rows.jsonl, row 3: no query\n")


def test_a_fault_of_our_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(main=lambda arguments: [][0]))
    assert cli.main(["train", "--debug"]) == 1
    assert "IndexError" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["trian"]])
def test_no_command_or_an_unknown_one(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_train_is_the_module_of_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("siesta: error: nowhere: no such recipe")
