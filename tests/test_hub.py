"""Uploads: all that can be known to be wrong is said before any work; the token shows nowhere. No network."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError

from siesta.data.errors import UserError
from siesta.rl import export, hub
from siesta.rl.hub import NO_ANSWER, Target, check_folder

TOKEN = "hf_" + "x" * 34


def refusal(status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError("Client error", response=response)


class Hub:
    """A stand-in for HfApi, of the user `me` with the organisation `team`."""

    def __init__(self, *, public: bool = True, fails: dict[str, Exception] | None = None) -> None:
        self.calls: list[tuple] = []
        self.public, self.fails = public, fails or {}

    def _called(self, name: str, *what: Any) -> None:
        self.calls.append((name, *what))
        if name in self.fails:
            raise self.fails[name]

    def whoami(self) -> dict:
        self._called("whoami")
        return {"name": "me", "orgs": [{"name": "team"}]}

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self._called("create", name, private)

    def model_info(self, name: str) -> SimpleNamespace:
        self._called("info", name)
        return SimpleNamespace(private=not self.public)

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> SimpleNamespace:
        self._called("upload", repo_id, folder_path)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture(autouse=True)
def logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: TOKEN)
    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)


def checked(api: Hub, name: str, *, private: bool = False) -> Target:
    anything: Any = api
    return Target.checked(anything, name, private=private)


@pytest.mark.parametrize(("name", "full"), [("me/naps", "me/naps"), ("naps", "me/naps"), ("team/naps", "team/naps")])
def test_a_folder_is_uploaded_under_its_full_name(tmp_path: Path, name: str, full: str) -> None:
    api = Hub()
    assert checked(api, name).upload(tmp_path) == f"https://hub/{full}/commit/1"
    assert api.calls == [("whoami",), ("create", full, False), ("upload", full, tmp_path)]


@pytest.mark.parametrize("name", ["", "a/b/c", "me/na ps", "-x", "me/.."])
def test_a_bad_name_is_refused_before_anything_is_asked(name: str) -> None:
    api = Hub()
    with pytest.raises(UserError, match="not the name of a hub repository"):
        checked(api, name)
    assert api.calls == []


def test_no_token_no_connection_and_another_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="the token is of me, team, not of you"):
        checked(Hub(), "you/naps")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(UserError, match=r"no token of the hub; log in with `hf auth login`, or set HF_TOKEN"):
        checked(Hub(), "me/naps")
    monkeypatch.setattr(hub, "is_offline_mode", lambda: True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        checked(Hub(), "me/naps")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (lambda: refusal(401), "the token is not valid"),
        (lambda: refusal(403), "the token may not write there"),
        (lambda: refusal(500), "Client error"),
        (lambda: ConnectionError("no route"), "the hub cannot be reached"),
        (lambda: NO_ANSWER[0]("no route"), "the hub cannot be reached"),
    ],
)
@pytest.mark.parametrize("call", ["whoami", "create", "upload"])
def test_what_the_hub_says_is_one_line(tmp_path: Path, call: str, error: Callable[[], Exception], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        checked(Hub(fails={call: error()}), "me/naps").upload(tmp_path)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_private_means_private(tmp_path: Path) -> None:
    """A repository that is there stays as visible as it was, whatever is asked."""
    api = Hub(public=True)
    with pytest.raises(UserError, match="it is there and public"):
        checked(api, "me/naps", private=True).upload(tmp_path)
    assert [call[0] for call in api.calls] == ["whoami", "create", "info"], "nothing was uploaded"
    checked(Hub(public=False), "me/naps", private=True).upload(tmp_path)


def test_a_folder_that_holds_the_token_stays(tmp_path: Path) -> None:
    api = Hub()
    (tmp_path / "README.md").write_text(f"log in with {TOKEN}")
    with pytest.raises(UserError, match=r"README.md holds the token") as caught:
        checked(api, "me/naps").upload(tmp_path)
    assert TOKEN not in str(caught.value)
    assert api.calls == [("whoami",)]


def test_only_an_export_s_own_folder_is_uploaded(tmp_path: Path) -> None:
    check_folder(tmp_path / "new")
    check_folder(tmp_path)
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other things"):
        check_folder(tmp_path)
    (tmp_path / "modes.json").write_text("{}")
    check_folder(tmp_path)


@pytest.mark.parametrize("owner", ["me", "you"])
def test_the_command_looks_first_and_uploads_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], owner: str
) -> None:
    api, done = Hub(), []
    monkeypatch.setattr(export, "HfApi", lambda: api)
    monkeypatch.setattr(export, "find_model", lambda path: (path.parent, path))
    monkeypatch.setattr(export, "export_checkpoint", lambda *args, **more: done.append((list(api.calls), more)))
    arguments = [str(tmp_path / "rl"), str(tmp_path / "out"), "--license", "mit", "--push-to-hub", f"{owner}/naps"]
    code = export.main(arguments)
    out, err = capsys.readouterr()
    if owner == "you":
        assert (code, done) == (2, [])
        assert err.startswith("siesta: error: --push-to-hub you/naps: the token is of me, team")
        return
    assert code == 0
    assert done == [([("whoami",)], {"run": tmp_path, "dtype": None, "licence": "mit"})]
    assert api.calls[-1] == ("upload", "me/naps", tmp_path / "out")
    assert out.splitlines()[-1] == "uploaded to https://hub/me/naps/commit/1"
    with pytest.raises(SystemExit):
        export.main([str(tmp_path), "out", "--private"])
