"""Trackers are decided from what is there, before they are initialised: with a key online, else offline files."""

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_reporting_integration_callbacks

from siesta.data.errors import RecipeError
from siesta.rl import tracking
from siesta.rl.recipe import TrackingSection
from siesta.rl.tracking import EVENTS, STEADY, answers, has_wandb_key, start_trackers, steady

KEY = "0" * 40
NAMES = (
    "WANDB_API_KEY",
    "WANDB_MODE",
    "WANDB_DIR",
    "WANDB_PROJECT",
    "WANDB_BASE_URL",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "ALL_PROXY",
    "TRACKIO_DIR",
    "TENSORBOARD_LOGGING_DIR",
    "NETRC",
)


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path) -> Iterator[None]:
    """No tracker variable and an empty home before; the environment as it was afterwards."""
    before = dict(os.environ)
    for name in NAMES:
        os.environ.pop(name, None)
    os.environ["HOME"] = str(tmp_path)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def all_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is installed on this machine is not the question here; `missing` takes it back for one tracker."""
    without(monkeypatch, "")


def without(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None if name == missing else object())


@pytest.fixture(autouse=True)
def wandb_answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The servers that were asked for; all of them answer. Which callback transformers takes is put back."""
    asked: list[str] = []
    monkeypatch.setattr(tracking, "answers", lambda server: asked.append(server) is None)
    for name in STEADY:
        monkeypatch.setitem(INTEGRATION_TO_CALLBACK, name, INTEGRATION_TO_CALLBACK[name])
    return asked


def wandb_section(**fields: str) -> TrackingSection:
    return TrackingSection.model_validate({"report_to": ["wandb"], **fields})


def netrc_file(folder: Path, host: str, name: str = ".netrc") -> Path:
    file = folder / name
    file.write_text(f"machine {host}\n  login user\n  password {KEY}\n")
    file.chmod(0o600)
    return file


# ---- wandb ---------------------------------------------------------------------------------------------------------


def test_without_a_key_wandb_writes_offline_files(tmp_path: Path) -> None:
    assert start_trackers(wandb_section(), tmp_path / "run") == ["wandb"]
    assert os.environ["WANDB_MODE"] == "offline"
    assert os.environ["WANDB_DIR"] == str(tmp_path / "run")
    assert os.environ["WANDB_PROJECT"] == "siesta"


def test_a_key_in_the_environment_means_online(tmp_path: Path) -> None:
    os.environ["WANDB_API_KEY"] = KEY
    start_trackers(wandb_section(project="naps"), tmp_path)
    assert os.environ["WANDB_MODE"] == "online"
    assert os.environ["WANDB_PROJECT"] == "naps"


def test_an_empty_key_is_no_key(tmp_path: Path) -> None:
    os.environ["WANDB_API_KEY"] = ""
    start_trackers(wandb_section(), tmp_path)
    assert os.environ["WANDB_MODE"] == "offline"


@pytest.mark.parametrize("by_variable", [True, False])
def test_a_key_in_the_netrc_file_means_online(tmp_path: Path, by_variable: bool) -> None:
    if by_variable:
        os.environ["NETRC"] = str(netrc_file(tmp_path, "api.wandb.ai", "elsewhere"))
    else:
        netrc_file(tmp_path, "api.wandb.ai")
    start_trackers(wandb_section(), tmp_path)
    assert os.environ["WANDB_MODE"] == "online"


def test_a_netrc_entry_of_another_host_is_no_key(tmp_path: Path) -> None:
    netrc_file(tmp_path, "example.org")
    assert not has_wandb_key()


def test_a_broken_netrc_file_does_not_end_the_run(tmp_path: Path) -> None:
    """Most of its users never think of the file, and wandb itself passes over it."""
    (tmp_path / ".netrc").write_text("machina api.wandb.ai\n")
    assert not has_wandb_key()


@pytest.mark.parametrize("mode", ["offline", "disabled", "online"])
@pytest.mark.parametrize("key", [KEY, ""])
def test_the_user_has_the_last_word(tmp_path: Path, mode: str, key: str) -> None:
    os.environ |= {"WANDB_MODE": mode, "WANDB_API_KEY": key, "WANDB_PROJECT": "mine", "WANDB_DIR": "there"}
    start_trackers(wandb_section(), tmp_path)
    assert [os.environ[name] for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR")] == [mode, "mine", "there"]


def test_nothing_is_set_for_a_tracker_that_is_not_named(tmp_path: Path) -> None:
    assert start_trackers(TrackingSection(), tmp_path) == []
    assert not set(NAMES) & set(os.environ)


# ---- does the server answer? ---------------------------------------------------------------------------------------


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Where a connection was tried; only to a host called `up` does it succeed."""
    tried: list[tuple[str, int]] = []

    def create_connection(place: tuple[str, int], timeout: float) -> nullcontext:
        tried.append(place)
        if place[0] != "up":
            raise socket.gaierror(-2, "Name or service not known")
        return nullcontext()

    monkeypatch.setattr(socket, "create_connection", create_connection)
    answers.cache_clear()
    return tried


@pytest.mark.parametrize(
    ("server", "variables", "place", "up"),
    [
        ("https://up", {}, ("up", 443), True),
        ("https://down", {}, ("down", 443), False),
        ("http://up:8080/path", {}, ("up", 8080), True),
        ("https://down", {"https_proxy": "http://up:3128"}, ("up", 3128), True),
        ("https://down", {"https_proxy": "up:3128"}, ("up", 3128), True),
        ("https://up", {"https_proxy": "http://down:3128"}, ("down", 3128), False),
        ("https://up", {"https_proxy": "http://down:3128", "no_proxy": "up"}, ("up", 443), True),
        ("https://up", {"http_proxy": "http://down:3128"}, ("up", 443), True),
    ],
)
def test_the_server_or_the_proxy_before_it_is_asked(
    connected: list, server: str, variables: dict, place: tuple[str, int], up: bool
) -> None:
    os.environ |= variables
    assert answers(server) == up
    assert answers(server) == up
    assert connected == [place], "once"


def test_without_an_answer_wandb_writes_offline_files(
    connected: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "answers", answers)
    os.environ["WANDB_API_KEY"] = KEY
    for _ in range(2):  # each stage asks
        os.environ.pop("WANDB_MODE", None)
        start_trackers(wandb_section(), tmp_path)
        assert os.environ["WANDB_MODE"] == "offline"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "wandb: api.wandb.ai cannot be reached ([Errno -2] Name or service not known); it writes offline files into "
        "the run"
    )


def test_the_server_is_asked_only_if_that_decides(tmp_path: Path, wandb_answers: list[str]) -> None:
    start_trackers(wandb_section(), tmp_path)
    assert wandb_answers == [], "there is no key"
    os.environ |= {"WANDB_API_KEY": KEY, "WANDB_MODE": "online"}
    start_trackers(wandb_section(), tmp_path)
    assert wandb_answers == [], "the user has decided"
    del os.environ["WANDB_MODE"]
    os.environ["WANDB_BASE_URL"] = "https://wandb.example.org"
    start_trackers(wandb_section(), tmp_path)
    assert wandb_answers == ["https://wandb.example.org"]


def test_a_key_of_a_server_of_one_s_own(tmp_path: Path) -> None:
    netrc_file(tmp_path, "wandb.example.org")
    assert not has_wandb_key()
    os.environ["WANDB_BASE_URL"] = "https://wandb.example.org"
    assert has_wandb_key()


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_trainers_get_the_callback_that_does_not_end_the_run(tmp_path: Path, name: str) -> None:
    plain = INTEGRATION_TO_CALLBACK[name]
    section = TrackingSection.model_validate({"report_to": [name]})
    assert get_reporting_integration_callbacks(start_trackers(section, tmp_path)) == [STEADY[name]] != [plain]
    assert issubclass(STEADY[name], plain)


def failing_at(event: str) -> type[TrainerCallback]:
    """A tracker's callback whose `event` fails, and which keeps the events that it has seen."""

    def method(name: str):
        def call(self, args, state, control, **kwargs) -> None:
            self.seen.append(name)
            if name == event:
                raise BrokenPipeError("the service\nis gone")

        return call

    return type("Tracker", (TrainerCallback,), {"seen": [], **{name: method(name) for name in EVENTS}})


@pytest.mark.parametrize("event", EVENTS)
def test_a_tracker_that_fails_is_given_up_with_one_line(event: str, caplog: pytest.LogCaptureFixture) -> None:
    args, state, control = TrainingArguments, TrainerState(), TrainerControl()
    own: Any = steady("tensorboard", failing_at(event))()
    for name in EVENTS * 2:
        getattr(own, name)(args, state, control, model=None, logs={})
    assert own.seen == list(EVENTS[: EVENTS.index(event) + 1])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "tensorboard is given up: BrokenPipeError: the service is gone; the run goes on, metrics.jsonl is complete"
    )
    with pytest.raises(BrokenPipeError):  # negative control
        getattr(failing_at(event)(), event)(args, state, control)


# ---- when it is decided --------------------------------------------------------------------------------------------


def test_deciding_does_not_import_a_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackers = ("wandb", "trackio", "tensorboard")
    for name in trackers:
        monkeypatch.delitem(sys.modules, name, raising=False)
    start_trackers(TrackingSection(report_to=["wandb", "trackio", "tensorboard"]), tmp_path)
    assert not set(trackers) & set(sys.modules)


def test_the_decision_reaches_wandb_even_if_it_was_imported_before(tmp_path: Path) -> None:
    """TRL imports wandb at its own import; what wandb will do is read when it is initialised."""
    pytest.importorskip("wandb")
    code = (
        "import sys, wandb\n"
        "from pathlib import Path\n"
        "from siesta.rl.recipe import TrackingSection\n"
        "from siesta.rl.tracking import start_trackers\n"
        "start_trackers(TrackingSection(report_to=['wandb'], project='naps'), Path(sys.argv[1]))\n"
        "settings = wandb.setup().settings\n"
        "print(settings.mode, settings.project, settings.root_dir)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["offline", "naps", str(tmp_path)]


# ---- other trackers ------------------------------------------------------------------------------------------------


def test_other_trackers_write_into_the_run_directory(tmp_path: Path) -> None:
    assert start_trackers(TrackingSection(report_to=["tensorboard", "trackio"]), tmp_path) == [
        "tensorboard",
        "trackio",
    ]
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "tensorboard")
    assert os.environ["TRACKIO_DIR"] == str(tmp_path / "trackio")
    assert "WANDB_MODE" not in os.environ


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    without(monkeypatch, name)
    section = TrackingSection.model_validate({"report_to": [name]})
    with pytest.raises(RecipeError) as caught:
        start_trackers(section, tmp_path)
    assert str(caught.value) == f"tracking.report_to: {name} is not installed; pip install 'siesta-rl[{name}]'"
    assert not set(NAMES) & set(os.environ)
