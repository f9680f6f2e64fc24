"""siesta doctor: what is missing is told with the way to get it, and only what is needed is an error."""

import pytest

from siesta.rl import cli, doctor
from siesta.rl.doctor import ABSENT, GOOD, WRONG, Finding, packages

NEEDS = [
    "torch>=2.11,<2.14",
    "trl==1.16.0",
    "math-verify>=0.9",
    'wandb>=0.31; extra == "wandb"',
    'ruff; extra == "dev"',
]


def test_packages_by_hand() -> None:
    versions = {"torch": "2.13.0+cpu", "trl": "1.15.0", "wandb": "0.30"}
    assert list(packages(NEEDS, versions)) == [
        Finding("package", GOOD, "torch 2.13.0+cpu"),
        Finding("package", WRONG, "trl 1.15.0 is installed, ==1.16.0 is needed: pip install 'trl==1.16.0'"),
        Finding("package", WRONG, "math-verify is not installed: pip install 'math-verify>=0.9'"),
        Finding("package", WRONG, "wandb 0.30 is installed, >=0.31 is needed: pip install 'siesta-rl[wandb]'"),
    ]
    (absent,) = packages(NEEDS[3:], {})
    assert absent == Finding("package", ABSENT, "wandb is not installed: pip install 'siesta-rl[wandb]'")


def test_names_are_compared_as_package_indexes_do() -> None:
    assert [own.state for own in packages(["Some_Package>=1"], {"some-package": "1.2"})] == [GOOD]


def test_the_command_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for word in ("torch 2.", "trl 1.16.0", "attention: ", "cores", "'siesta-rl[vllm]'"):
        assert word in shown


def test_what_is_needed_and_missing_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "findings", lambda: [Finding("package", WRONG, "trl is not installed")])
    assert cli.main(["doctor"]) == 1
    assert "missing" in capsys.readouterr().out
